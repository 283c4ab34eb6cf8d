"""What is special to each method, against numbers from elsewhere."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.helpers import networks
from tttlab.adaptation.adapter import InnerLoop, adapt
from tttlab.adaptation.registry import load_method
from tttlab.config.inner_loop import Augmentation
from tttlab.config.method_settings import declared, method_names
from tttlab.config.objective_settings import objective_names
from tttlab.data.augmix import draw_views
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD, l1_discrepancy, natural_discrepancy
from tttlab.methods.memo import MEMO
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.views import ViewAverage
from tttlab.networks.network import Outputs
from tttlab.networks.taps import Moments, image_moments, record
from tttlab.objectives.rotation import TURNS, rotate
from tttlab.objectives.simclr import bank_contrast
from tttlab.seeding import torch_generator


def test_natural_discrepancy_by_hand():
    moments = Moments(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 0.5]))
    statistics = {
        "x.mean_center": torch.tensor([0.0, 1.0]),
        "x.mean_scale": torch.tensor([1.0, 1.5]),
        "x.log_variance_center": torch.tensor([0.0, 0.0]),
        "x.log_variance_scale": torch.tensor([1.0, 1.0]),
    }
    # The means lie 1 and 2 units away: z² = (1 + 4) / 2. The log-variances have z² = 0.125.
    for tolerance, expected in ((1.0, 2.5 - 1), (2.0, 2.5 - 2), (0.0, 2.5 + 0.125)):
        discrepancy = natural_discrepancy(moments, statistics, "x", tolerance=tolerance)
        assert discrepancy.item() == pytest.approx(expected)
    assert natural_discrepancy(moments, statistics, "x").item() == pytest.approx(2.5 - 1)


def test_l1_discrepancy_is_half_the_published_distance():
    moments = Moments(torch.tensor([1.0, -1.0]), torch.tensor([4.0, 2.0]).log())
    statistics = {
        "x.pooled_mean": torch.tensor([0.5, 0.5]),
        "x.pooled_variance": torch.tensor([1.0, 4.0]),
    }
    expected = 0.5 * (np.mean([0.5, 1.5]) + np.mean([3.0, 2.0]))
    assert l1_discrepancy(moments, statistics, "x").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["natural", "l1"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_actmad_is_finite_on_one_image_and_equals_a_loop_over_layers(kind, form):
    network, statistics = networks.source_statistics(kind)
    image, method = networks.images(1, seed=20).double() + 0.5, ActMAD(form=form)
    loop = InnerLoop(steps=1, lr=1e-6)
    loss = adapt(network, image, method, loop, statistics=statistics).losses[0, 0]
    layers, total = method.matched_layers(network), 0.0
    with record(network, layers) as activations, torch.no_grad():
        network(image)
    for layer in layers:
        mean, log_variance = (value.numpy() for value in image_moments(activations[layer]))
        source = {
            name.removeprefix(f"{layer}."): value.numpy()
            for name, value in statistics.items()
            if name.startswith(f"{layer}.")
        }
        if form == "natural":
            for name, values in (("mean", mean), ("log_variance", log_variance)):
                center, scale = source[f"{name}_center"], source[f"{name}_scale"]
                z = (values - center) / np.maximum(scale, 1e-6)
                total += max(0.0, sum(z**2) / len(z) - 1)
        else:
            means = np.abs(mean - source["pooled_mean"]).mean()
            variances = np.abs(np.exp(log_variance) - source["pooled_variance"]).mean()
            total += 0.5 * (means + variances)
    assert math.isfinite(loss)
    assert loss.item() == pytest.approx(total / len(layers), rel=1e-9)


def test_actmads_own_statistics_are_those_of_the_stage():
    network, statistics = networks.source_statistics("resnet")
    images = networks.images(64, seed=7).double()
    measured = ActMAD(layers="stages").source_statistics(network, [images])
    assert measured
    for key, value in measured.items():
        torch.testing.assert_close(value, statistics[key], rtol=1e-9, atol=1e-12)


def test_natural_actmad_leaves_typical_images_alone():
    """An image within the natural variation has loss zero, and keeps its prediction to the bit."""
    network, statistics = networks.source_statistics("resnet")
    images, loop = networks.images(3, seed=7).double(), InnerLoop(steps=3, lr=0.1)
    wide = {
        key: value * 100 if key.endswith("_scale") else value for key, value in statistics.items()
    }
    result = adapt(network, images, ActMAD(), loop, statistics=wide)
    assert not result.losses.any()
    assert torch.equal(result.logits, result.source_logits)


def test_view_average_is_the_mean_of_probabilities():
    network, statistics = networks.source_statistics("resnet")
    images, method = networks.images(2, seed=30).double(), ViewAverage(num_views=3)
    result = adapt(network, images, method, statistics=statistics, image_ids=["a", "b"])
    streams = [torch_generator(0, "views", name, 0) for name in "ab"]
    views = method.views(network, images, streams)
    assert torch.equal(views[:, 0], images)
    with torch.no_grad():
        probabilities = [network(image_views).logits.softmax(-1).mean(0) for image_views in views]
    torch.testing.assert_close(result.logits.exp(), torch.stack(probabilities))


def test_a_methods_settings_come_from_the_run_then_from_the_objective_then_from_the_class():
    objective = {"name": "simclr", "temperature": 0.2, "hidden_dim": 64}
    weak = Augmentation(0.9, True, 0.0)
    method = load_method("simclr", {"num_views": 4}, objective=objective, augmentation=weak)
    assert (method.num_views, method.temperature, method.augmentation) == (4, 0.2, weak)
    assert load_method("simclr", {"temperature": 1.0}, objective=objective).temperature == 1.0
    assert load_method("simclr").temperature == 0.5


def test_only_a_method_that_uses_the_head_takes_over_what_it_was_trained_with():
    """AdaContrast has a temperature too, of another contrast."""
    objective = {"name": "simclr", "temperature": 0.2}
    assert load_method("ttt_plus_plus", objective=objective).temperature == 0.2
    for name, default in (("adacontrast", 0.07), ("aws", 0.5)):
        assert load_method(name, objective=objective).temperature == default


HELPED = """
from dataclasses import dataclass
from tttlab.adaptation.method import Method


class _Base(Method):
    pass


@dataclass(frozen=True)
class Helped(Method):
    rate: float = 0.5

    def loss(self, net, views, statistics, state):
        return 0.0, state
"""


def test_private_helpers_may_stand_beside_a_method(tmp_path, monkeypatch):
    (tmp_path / "helping").mkdir()
    (tmp_path / "helping" / "helped.py").write_text(HELPED)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_method("helping.helped").rate == 0.5
    assert list(declared("helped", tmp_path / "helping").settings.model_fields) == ["rate"]


def test_what_a_method_declares_must_be_plain(tmp_path):
    """Its file is read before it is run."""
    (tmp_path / "named.py").write_text(HELPED + "    protocols = BOTH\n")
    message = r"named\.py, line 16: expected protocols as a plain value, found BOTH"
    with pytest.raises(UserError, match=message):
        declared("named", tmp_path)


def test_every_method_file_loads_by_its_name():
    folder = Path(__file__).resolve().parents[2] / "src" / "tttlab" / "methods"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "ssl"}
    assert names >= {"none", "views", "simclr", "mae", "actmad", "memo"}
    for name in names:
        method = load_method(name)
        assert type(method).__module__ == f"tttlab.methods.{name}"
        settings = {key: getattr(method, key) for key in declared(name).settings.model_fields}
        assert method == load_method(name, settings)


def test_refused_values_are_user_errors():
    with pytest.raises(UserError, match=r"method actmad: .*stepz"):
        load_method("actmad", {"stepz": 1})


STILL = Augmentation(min_scale=1.0, flip=False, jitter=0.0)
DRAW_VIEWS = [name for name in method_names() if hasattr(load_method(name), "augmentation")]


@pytest.mark.parametrize("name", DRAW_VIEWS)
def test_views_are_as_strong_as_the_runs_augmentation(name):
    """Those of strength zero are the image."""
    network, _ = networks.source_statistics("resnet")
    settings = {"num_views": 2} if hasattr(load_method(name), "num_views") else {}
    images = networks.images(2, seed=31).double()

    def views(augmentation):
        method = load_method(name, settings, augmentation=augmentation)
        found = method.views(network, images, [torch_generator(0, key) for key in "ab"])
        if name == "dressed":  # it also draws noise
            return [found["looks"]]
        if name == "rotation":
            return [rotate(found["images"], -found["labels"] % TURNS)]
        return [part for part in tree_leaves(found) if part.ndim == 5]

    for part in views(STILL):
        torch.testing.assert_close(part, images[:, None].expand_as(part), atol=1e-5, rtol=0)
    random = Augmentation(min_scale=0.5, flip=True, jitter=0.5)
    assert any((part - images[:, None]).abs().amax() > 0.05 for part in views(random))


def test_memos_kinds_of_views_are_crops_and_augmix():
    images = networks.images(2, seed=31)

    def views(kind):
        method = MEMO(num_views=4, kind=kind, augmentation=STILL)
        return method.views(None, images, [torch_generator(0, key) for key in "ab"])

    streams = [torch_generator(0, key) for key in "ab"]
    torch.testing.assert_close(views("crops"), images[:, None].expand(-1, 4, -1, -1, -1))
    assert torch.equal(views("augmix"), draw_views("augmix", images, streams, 4, STILL))
    assert (views("augmix") - images[:, None]).abs().amax() > 0.05


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_contrasts_at_its_temperature(temperature):
    network, statistics = networks.source_statistics("resnet")
    method = SimCLRTraining(num_views=3, temperature=temperature)
    views = networks.images(3, seed=31).double()
    loss, _ = method.loss(network, views, statistics, ())
    expected = bank_contrast(network(views).projections, statistics["bank"], temperature)
    torch.testing.assert_close(loss, expected)


def test_memo_is_the_entropy_of_the_mean_prediction():
    network, statistics = networks.source_statistics("resnet")
    images, method = networks.images(2, seed=31).double(), MEMO(num_views=5)
    loop = InnerLoop(steps=1, lr=0.0)
    result = adapt(network, images, method, loop, statistics=statistics, image_ids=["a", "b"])
    views = method.views(network, images, [torch_generator(0, "views", name, 0) for name in "ab"])
    with torch.no_grad():
        for image_views, loss in zip(views, result.losses[:, 0], strict=True):
            logits = network(image_views).logits.numpy()
            odds = np.exp(logits - logits.max(1, keepdims=True))
            mean = (odds / odds.sum(1, keepdims=True)).mean(0)
            assert loss.item() == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 10])
def test_memo_lies_between_certainty_and_a_die(classes):
    """Views sure of one class give 0; views sure of different classes, or unsure, give log K."""
    method, sure = MEMO(num_views=classes), 1e3 * torch.eye(classes, dtype=torch.float64)
    for logits, entropy in (
        (sure, math.log(classes)),
        (sure[:1].expand(classes, -1), 0.0),
        (0 * sure, math.log(classes)),
    ):

        def net(_views, logits=logits):
            return Outputs(logits, None)

        loss, _ = method.loss(net, torch.zeros(classes, 3, 4, 4), {}, ())
        assert loss.item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "head"),
    [(name, name) for name in objective_names()] + [("memo", None), ("actmad", None)],
)
def test_a_method_says_whose_head_it_needs_without_being_imported(method, head):
    assert declared(method).head == head == load_method(method).head


def test_the_list_of_methods_tells_what_each_file_says():
    from tttlab.methods.__main__ import rows

    table = {row["method"]: row for row in rows()}
    assert list(table) == [*method_names(), "MT3 (finetune.mode: meta)"]
    assert table["tent"] == {
        "method": "tent",
        "what it does": "TENT: be sure of the test images, by the normalisation layers' affine "
        "parameters",
        "paper": "ICLR 2021, arXiv 2006.10726",
        "trains": "yes",
        "protocols": "episodic, online",
        "backbones": "any",
    }
    assert table["MT3 (finetune.mode: meta)"] == {
        "method": "MT3 (finetune.mode: meta)",
        "what it does": "Meta-learned fine-tuning: training through a self-supervised step on each "
        "single image",
        "paper": "AISTATS 2022, arXiv 2103.16201",
        "trains": "yes",
        "protocols": "episodic, online",
        "backbones": "any, with the head of clust3, learned, mae, rotation or simsiam",
    }
    assert table["mae"]["backbones"].startswith("ViT")
    assert {name for name, row in table.items() if row["paper"] == "–"} == {"none", "views"}
