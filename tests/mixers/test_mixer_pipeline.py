"""Networks with mixers in what the pipeline does: trained, and adapted to one image at a time."""

import pytest
import torch
from ruamel.yaml import YAML

from tests.helpers import contract, networks, trainings
from tests.mixers.test_mixing import OTHERS, build
from tools.stage_code import ROOT
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.params import read_params, read_yaml
from tttlab.mixers.mixing import mixer_layers
from tttlab.networks.checkpoints import build_objective
from tttlab.networks.source_statistics import layer_statistics
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune, pretrain
from tttlab.workflow.method_trials import NETWORK, trial_key
from tttlab.workflow.untrained import build_untrained, try_at

TOKENS = [name for name in OTHERS if name != "ttt_conv"]
MAE_SETTINGS = {
    "name": "mae",
    "mask_ratio": 0.5,
    "decoder_dim": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
SIMSIAM = {"name": "simsiam", "hidden_dim": 8, "projection_dim": 8, "prediction_dim": 4}


def settled(name: str, objective: dict, **mixer):
    """Make a network in double precision whose inner models matter."""
    network = build(name, {"objective": objective}, **mixer).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if ".rule." in key:
                value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return network


def compare(network, method: str, loop: InnerLoop) -> None:
    """Adapt to five images at once and to one after the other, by the contract's slow reference."""
    statistics = layer_statistics(network, [networks.images(32, seed=7).double()])
    images, method = contract.shifted(), contract.load(method)
    image_ids = [str(number) for number in range(len(images))]
    options = {"statistics": statistics, "image_ids": image_ids, "seed": contract.SEED}
    together = adapt(network, images, method, loop, **options)
    alone = [
        contract.one_at_a_time(network, image, method, loop, statistics, image_id)
        for image, image_id in zip(images, image_ids, strict=True)
    ]
    assert not together.fell_back.any()
    torch.testing.assert_close(together.logits, torch.stack(alone), atol=1e-8, rtol=1e-8)
    assert (together.logits - together.source_logits).abs().max() > 1e-6


@pytest.mark.parametrize("method", ["tent", "memo", "actmad"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_image_is_adapted_to_as_if_it_were_alone(name, method):
    """With all of the encoder trained: so the inner models start from each image's own weights."""
    mixer = {} if name == "linear_attention" else {"inner_steps": 2, "inner_batch": 9}
    network = settled(name, {"name": "none"}, **mixer)
    lr = 1e-4 if method == "actmad" else 1e-2  # the moments' loss is steep
    compare(network, method, InnerLoop(steps=2, lr=lr, trainable="encoder"))


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_conv"])
def test_with_a_normalisation_policy_and_norms_alone(name):
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm", normalisation="shrink", threshold=0.5)
    compare(settled(name, {"name": "none"}), "memo", loop)


@pytest.mark.parametrize("name", TOKENS)
def test_masked_images_are_adapted_to_as_if_they_were_alone(name):
    network = settled(name, MAE_SETTINGS)
    compare(network, "mae", InnerLoop(steps=2, lr=1e-2, trainable="encoder"))


def train(name: str, objective: dict, mode: str, **options):
    """Pretrain and fine-tune for two epochs on 22 images; give the network and both curves."""
    network = build(name, {"objective": objective}).train()
    loss = build_objective(objective)
    images, held_out = trainings.image_set(), trainings.image_set(9, seed=1)
    recipe = Recipe(epochs=2, batch_size=8, lr=3e-3, warmup_epochs=0)
    fitter, sets = trainings.trainer(), (images, held_out)
    curve = pretrain(fitter, network, loss, images, sets, trainings.VIEWS, recipe)
    views = {"augmentation": trainings.VIEWS, "objective_augmentation": trainings.VIEWS}
    curves = finetune(
        fitter, network, loss, images, held_out, recipe, mode=mode, **views, **options
    )
    return network, curve, curves[0]


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, MAE_SETTINGS) for name in TOKENS] + [("ttt_conv", SIMSIAM)],
)
def test_pretraining_and_fine_tuning_train_every_part_of_a_mixer(name, objective):
    before = build(name, {"objective": objective}).state_dict()
    network, curve, rows = train(name, objective, "joint", objective_weight=0.5)
    assert [row["epoch"] for row in curve] == [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(abs(row["loss"]) < 100 for row in (*curve[1:], *rows[1:]))
    parts = [key for key in before if key.startswith("encoder.blocks") and ".attn." in key]
    assert len(parts) == 2 * (4 if name == "linear_attention" else 8 if "mlp" in name else 6)
    for key in parts:
        assert (network.state_dict()[key] - before[key]).abs().max() > 1e-4, key


def read(folder, mixer: dict | None):
    """Read the project's params.yaml with a mixer in its transformer."""
    values = read_yaml(ROOT / "params.yaml")
    if mixer:
        values["models"]["mae_vit"]["mixer"] = mixer
    path = folder / "params.yaml"
    YAML(typ="safe").dump(values, path)
    return read_params(path)


def test_a_model_of_the_file_is_built_tried_and_hashed_with_its_mixer(tmp_path):
    mixed, timms = read(tmp_path, {"name": "ttt_mlp", "inner_steps": 2}), read(tmp_path, None)
    layers = mixer_layers(build_untrained(mixed, "mae_vit", 16).network.encoder)
    assert [mixer.rule.inner.inner_steps for mixer in layers.values()] == [2, 2]
    assert not mixer_layers(build_untrained(timms, "mae_vit", 16).network.encoder)
    try_at(mixed, "mae_vit", ["ssl", "actmad"], 16)
    attention = read(tmp_path, {"name": "attention"})
    keys = {trial_key(params, "ssl", "mae_vit", {}) for params in (mixed, timms, attention)}
    assert len(keys) == 3


def test_without_a_mixer_nothing_of_it_is_hashed(tmp_path):
    """So what was computed before there were any is still up to date."""
    section = read(tmp_path, None).models["mae_vit"].model_dump(mode="json", include=NETWORK)
    trainings = {"pretrain", "finetune"}
    names = {"backbone", "backbone_options", "stem", "objective", "weights"} | trainings
    assert section.keys() == names
