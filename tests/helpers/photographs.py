"""Photographs of CIFAR-10's test set, where they are there."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR = Path(os.environ.get("TTTLAB_DATA", _SHARED)) / "cifar10" / "test"


def of_every_class(count: int) -> np.ndarray:
    """Read the first images of every class, uint8 (10 * count, 32, 32, 3), or skip the test."""
    if not CIFAR.is_dir():
        pytest.skip(
            f"no CIFAR-10 photographs at {CIFAR}: "
            "set TTTLAB_DATA to the folder that holds cifar10/test"
        )
    folders = sorted(folder for folder in CIFAR.iterdir() if folder.is_dir())
    files = [file for folder in folders for file in sorted(folder.glob("*.png"))[:count]]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
