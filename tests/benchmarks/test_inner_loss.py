"""Inner loss against accuracy: image by image, closed forms, and the command on a small network."""

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from benchmarks.inner_loss import STEPS, draw, inner_steps, measure_shift, summarise
from tests.benchmarks.test_benchmarks import assert_png, run_module
from tests.helpers import trainings
from tests.mixers.test_mixing import build
from tools.stage_code import ROOT
from tttlab.data.pixels import as_images
from tttlab.mixers.mixing import inner_losses
from tttlab.networks.checkpoints import build_network, save
from tttlab.shifts.shift import Shift

NONE = {"objective": {"name": "none"}}


def network(name: str = "ttt_linear"):
    """Make a network whose inner steps change its answers."""
    made = build(name, NONE, inner_steps=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return made.eval()


def test_other_steps_change_answers_and_are_put_back():
    made = network()
    images = as_images(torch.from_numpy(trainings.image_set(4).pixels))
    with torch.no_grad():
        before = made(images).logits
        answers = {}
        for steps in STEPS:
            with inner_steps(made, steps):
                answers[steps] = made(images).logits
        assert torch.equal(answers[2], before)
        assert torch.equal(made(images).logits, before)
    for steps in (0, 1, 4):
        assert (answers[steps] - before).abs().max() > 1e-3


def test_a_shifts_rows_are_those_of_every_image_on_its_own():
    made, images = network(), trainings.image_set(30)
    shift = Shift("fog", 5)
    rows = list(measure_shift(made, shift, images, seed=3))
    assert [row["steps"] for row in rows] == list(STEPS)
    pixels = shift.apply(images, 3)
    losses, correct = [], {steps: [] for steps in STEPS}
    for image, label in zip(as_images(torch.from_numpy(pixels)), images.labels, strict=True):
        with torch.no_grad():
            found = inner_losses(made.encoder, lambda image=image: made(image[None]), max(STEPS))
            losses.append([part.mean(-1)[:, 0].tolist() for part in found.values()])
            for steps in STEPS:
                with inner_steps(made, steps):
                    correct[steps].append(made(image[None]).logits.argmax().item() == label)
    losses = np.array(losses)  # (N, layers, steps)
    for row in rows:
        steps = row["steps"]
        assert row["accuracy"] == pytest.approx(np.mean(correct[steps]))
        assert row["loss"] == pytest.approx(losses[..., steps].mean(), rel=1e-5)
        for layer in range(losses.shape[1]):
            assert row[f"loss_{layer}"] == pytest.approx(losses[:, layer, steps].mean(), rel=1e-5)
        per_image, right = losses[..., steps].mean(1), np.array(correct[steps])
        pairs = per_image[~right][:, None] > per_image[right][None]
        assert row["auc"] == pytest.approx(pairs.mean(), abs=0.02)  # ties of rounding
    assert 0 < rows[0]["accuracy"] < 1


def test_a_networks_summary_is_that_of_its_rows():
    table = [
        {"model": "m", "seed": 0, "shift": shift, "steps": steps, "trained_steps": 1}
        | {"accuracy": accuracy, "loss": loss, "loss_0": loss, "loss_1": other, "auc": auc}
        for shift, steps, accuracy, loss, other, auc in [
            ("clean", 0, 0.8, 3.0, 3.0, 0.1),
            ("clean", 1, 0.9, 2.0, 4.0, 0.6),
            ("fog-5", 0, 0.5, 9.0, 9.0, 0.1),
            ("fog-5", 1, 0.7, 4.0, 3.0, 0.7),
            ("snow-5", 0, 0.3, 9.0, 9.0, 0.1),
            ("snow-5", 1, 0.6, 3.0, 3.0, 0.8),
        ]
    ]
    (row,) = summarise(pd.DataFrame(table)).to_dict("records")
    expected = {"clean_0": 80, "clean_1": 90, "shifted_0": 40, "shifted_1": 65}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["lowered"] == 1  # of the first layer alone
    assert row["across"] == pytest.approx(-0.5)  # ranks of loss 1, 3, 2 and of accuracy 3, 2, 1
    assert row["auc"] == pytest.approx(0.7)
    assert len(draw(pd.DataFrame(table)).axes) == 3


@pytest.mark.slow
def test_the_command_measures_the_networks_of_an_execution(tmp_path):
    yaml = YAML()
    settings = yaml.load(ROOT / "settings" / "ttt_layers.yaml")
    settings["seeds"] = [0]
    settings["models"] = {name: settings["models"][name] for name in ("attention", "ttt_mlp")}
    settings["shifts"]["corruptions"] = ["fog"]
    yaml.dump(settings, tmp_path / "params.yaml")
    outputs, section = tmp_path / "outputs", settings["models"]["ttt_mlp"]
    model, _ = build_network(section, trainings.CLASSES, trainings.SIZE, seed=0)
    about = {"settings": section, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    save(model, outputs / "finetuned" / "ttt_mlp" / "0", **about)
    trainings.image_set(12).save(outputs / "data" / "test")
    (outputs / "data" / "shifted").mkdir()
    (outputs / "data" / "shifted" / "shifts.json").write_text("[]", encoding="utf-8")
    done = run_module("benchmarks.inner_loss", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(outputs / "inner_loss.csv")
    assert list(rows["shift"]) == ["clean"] * len(STEPS) + ["fog-5"] * len(STEPS)
    assert set(rows["model"]) == {"ttt_mlp"}
    assert "lowered" in done.stdout
    assert_png(outputs / "inner_loss.png")
