"""A small network trained outside of this project, as a user brings it, and its images."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tests.helpers.once import once

SIZE = 16
OPTIONS = {"layers": [1, 1, 1, 1], "channels": [16, 32, 32, 64], "stem_type": "deep"}
MEAN, STD = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
NAMES = ("nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "zero")


def build(num_classes: int = 10) -> nn.Module:
    """Build a ResNet of timm's with its own classifier."""
    return timm.create_model(
        "resnet18", num_classes=num_classes, stem_width=8, zero_init_last=False, **OPTIONS
    )


def digits(part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Give digits ``(N, 16, 16, 3)`` uint8 and their labels; 0 is nine, as in `NAMES`."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images[part].reshape(-1, 8, 8) * 15.9).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return np.stack([pixels] * 3, -1), 9 - labels[part]


@once
def trained() -> dict[str, torch.Tensor]:
    """Train the network for a few seconds; return its state dict."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = digits(slice(0, 900))
    images = standardised(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    labels, network = torch.from_numpy(labels), build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network.state_dict()


def standardised(images: torch.Tensor) -> torch.Tensor:
    """Standardise images in [0, 1] as in training."""
    mean, std = (torch.tensor(values, dtype=images.dtype) for values in (MEAN, STD))
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def write_checkpoint(path: Path, **metadata: str) -> Path:
    """Write the trained weights as ``.safetensors``."""
    save_file(trained(), path, metadata=metadata or None)
    return path


def write_folders(root: Path, part: slice, change=lambda pixels: pixels) -> Path:
    """Write digits into class folders of the names in `NAMES`."""
    for number, (pixels, label) in enumerate(zip(*digits(part), strict=True)):
        folder = root / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(change(pixels)).save(folder / f"{part.start + number}.png")
    return root


def darker(pixels: np.ndarray) -> np.ndarray:
    """Shift an image: dark, without contrast, and noisy."""
    noise = np.random.default_rng(int(pixels.sum())).normal(0, 15, pixels.shape)
    return np.clip(pixels * 0.5 + 50 + noise, 0, 255).astype(np.uint8)


class Own(nn.Module):
    """A network that is none of timm's, and standardises its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(standardised(images))


def own_network() -> nn.Module:
    """Return the trained network as a module of the user's own."""
    network = Own()
    network.layers.load_state_dict(trained())
    return network
