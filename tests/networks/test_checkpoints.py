import json
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import trainings
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.networks.checkpoints import build_network, load, save
from tttlab.networks.network import add_probe

OPTIONS = trainings.SIMCLR["backbone_options"]
PICTURES = as_images(torch.from_numpy(trainings.image_set().pixels))


def states(network) -> dict[str, list]:
    return {name: value.tolist() for name, value in network.state_dict().items()}


def keep(folder, settings=trainings.SIMCLR, **extra):
    network, _ = trainings.build(settings)
    about = save(
        network,
        folder,
        settings=settings,
        classes=("a", "b", "c"),
        image_size=trainings.SIZE,
        extra=extra,
    )
    return network, about


@pytest.mark.parametrize("settings", trainings.OF_EACH.values(), ids=trainings.OF_EACH)
def test_a_network_comes_back_bit_for_bit(settings, tmp_path):
    network, about = keep(tmp_path, settings, parent="abc", metrics={"loss": 0.5})
    loaded, sidecar = load(tmp_path)
    assert states(loaded) == states(network)
    assert torch.equal(loaded(PICTURES).logits, network(PICTURES).logits)
    assert not loaded.training
    assert sidecar == about == json.loads((tmp_path / "network.json").read_text())
    assert sidecar["parent"] == "abc"
    assert sidecar["metrics"] == {"loss": 0.5}
    assert sidecar["classes"] == ["a", "b", "c"]
    for name, parameter in network.named_parameters():
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad, name


def test_initial_weights_follow_the_seed_and_leave_the_global_stream_alone():
    torch.manual_seed(0)
    first = states(build_network(trainings.SIMCLR, 3, 16, seed=1)[0])
    next_draw = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), next_draw)
    assert states(build_network(trainings.SIMCLR, 3, 16, seed=1)[0]) == first
    assert states(build_network(trainings.SIMCLR, 3, 16, seed=2)[0]) != first


def test_a_vit_for_mae_starts_as_mae_does():
    network, _ = trainings.build(trainings.MAE)
    vit = network.encoder
    assert vit.pos_embed.requires_grad
    assert vit.pos_embed[0, 0].abs().max() == 0  # the class token has no position
    # Position (row 1, column 2) of a 4 × 4 grid: sines and cosines of the column, then of the row.
    rates = 10000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate(
        [function(position * rates) for position in (2, 1) for function in (np.sin, np.cos)]
    )
    np.testing.assert_allclose(vit.pos_embed[0, 1 + 4 * 1 + 2].detach(), expected, atol=1e-6)
    # Xavier: uniform up to √(6 / (inputs + outputs)), with the patch embedding as a matrix.
    bound = (6 / (16 + 3 * 16)) ** 0.5
    assert 0.9 * bound < vit.patch_embed.proj.weight.abs().max() <= bound


def test_weights_that_cannot_be_fetched_are_told_without_a_traceback(monkeypatch):
    def fail(*arguments, **options):
        raise FileNotFoundError(
            "An error happened while trying to locate the file on the Hub.\nMore."
        )

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(
        UserError, match=r"^weights: expected timm's weights of 'resnet18', found neither .* file$"
    ):
        trainings.build(trainings.SIMCLR | {"weights": "timm", "stem": "original"})


def test_mae_refuses_a_convolutional_network_before_any_work():
    with pytest.raises(UserError, match="objective mae needs a plain timm vision transformer"):
        trainings.build(trainings.SIMCLR | {"objective": trainings.MAE["objective"]})


def test_an_unknown_objective_is_named_with_the_likely_one():
    with pytest.raises(UserError, match="unknown objective 'simcrl'; did you mean 'simclr'"):
        trainings.build(trainings.SIMCLR | {"objective": {"name": "simcrl"}})


def test_a_probe_is_rebuilt_with_the_network(tmp_path):
    network, _ = trainings.build(trainings.MAE)
    add_probe(network, depth=2, heads=4, seed=0)
    settings = trainings.MAE | {"probe": {"depth": 2, "heads": 4}}
    save(network, tmp_path, settings=settings, classes="abc", image_size=16)
    loaded, _ = load(tmp_path)
    assert states(loaded) == states(network)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images).logits, network(images).logits, rtol=0, atol=0)
    message = r"probe\.heads: expected a divisor of the backbone's width 16, found 3"
    with pytest.raises(UserError, match=message):
        add_probe(network, depth=1, heads=3, seed=0)
    resnet, _ = trainings.build(trainings.SIMCLR)
    message = r"probe: expected a plain vision transformer .* found ResNet"
    with pytest.raises(UserError, match=message):
        add_probe(resnet, depth=1, heads=1, seed=0)


def test_our_checkpoint_as_initial_weights_gives_encoder_and_what_else_fits(tmp_path):
    network, _ = keep(tmp_path)
    settings = trainings.SIMCLR | {"weights": str(tmp_path)}
    assert states(build_network(settings, 3, 16, seed=9)[0]) == states(network)
    objective = trainings.SIMCLR["objective"] | {"hidden_dim": 6}
    wider, _ = build_network(settings | {"objective": objective}, 5, 16, seed=9)
    assert states(wider.encoder) == states(network.encoder)
    assert wider.classifier.out_features == 5


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_weights_from_a_file_fill_the_encoder(suffix, tmp_path):
    torch.manual_seed(4)
    size = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = timm.create_model("resnet18", num_classes=7, stem_type="deep", stem_width=4, **size)
    state, path = model.state_dict(), tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    network, _ = build_network(trainings.SIMCLR | {"weights": str(path)}, 3, 16, seed=0)
    assert states(network.encoder) == {
        name: value.tolist() for name, value in state.items() if not name.startswith("fc.")
    }


def test_weights_that_do_not_fit_are_told_with_file_entry_and_shapes(tmp_path):
    keep(tmp_path)
    settings = trainings.SIMCLR | {"weights": str(tmp_path)}
    wider = settings | {"backbone_options": OPTIONS | {"channels": [6, 8, 8, 8]}}
    message = (
        f"{tmp_path / 'weights.safetensors'}: the weights do not fit this "
        "network: expected layer1.0.conv1.weight (6, 8, 3, 3), found (8, 8, 3, 3); check"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        build_network(wider, 3, 16, seed=0)
    deeper = settings | {"backbone_options": OPTIONS | {"layers": [2, 1, 1, 1]}}
    message = r"expected layer1.1.conv1.weight \(8, 8, 3, 3\), found no such entry"
    with pytest.raises(UserError, match=message):
        build_network(deeper, 3, 16, seed=0)
    state = {
        name.removeprefix("encoder."): value
        for name, value in load_file(tmp_path / "weights.safetensors").items()
        if name.startswith("encoder.")
    }
    save_file(state | {"layer9.weight": torch.zeros(2, 5)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"expected no entry layer9.weight, found one \(2, 5\)"):
        build_network(settings | {"weights": str(tmp_path / "more.safetensors")}, 3, 16, seed=0)


@pytest.mark.parametrize("name", ["cut.safetensors", "noise.pth", "list.pth"])
def test_a_file_that_holds_no_weights_is_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"not at all")
    if name == "list.pth":
        torch.save([1, 2], path)
    with pytest.raises(UserError, match=re.escape(f"{path}: expected weights")) as caught:
        build_network(trainings.SIMCLR | {"weights": str(path)}, 3, 16, seed=0)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_missing_or_put_together_wrongly_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a checkpoint"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "checkpoint"
    keep(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="expected weights"):
        load(folder)
    network, _ = build_network(trainings.SIMCLR, 3, 16, seed=8)
    save_file(network.state_dict(), folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"expected the weights that network\.json describes"):
        load(folder)
