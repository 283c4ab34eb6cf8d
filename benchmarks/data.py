"""Decoding, corrupting and augmenting real photographs: whether the data can ever hold up the computing."""

import os
import time
from pathlib import Path

import torch

from benchmarks.amount import FULL, Amount
from benchmarks.cases import STEPS, resnet
from tttlab.config.images import ImageSpec
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.reading import gather
from tttlab.data.sources import open_source
from tttlab.data.views import Augmentation
from tttlab.objectives.simclr import SimCLR
from tttlab.runtime.parallel import in_order
from tttlab.shifts.corruptions import CORRUPTIONS
from tttlab.shifts.shift import list_shifts
from tttlab.training.loaders import Views, open_loader

BATCH = 128


def photographs() -> Path:
    """The test half of CIFAR-10 as a folder of classes."""
    root = Path(os.environ.get("TTTLAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return root / "cifar10" / "test"


def profile(device: torch.device, workers: int, amount: Amount = FULL) -> list[dict]:
    """Time every stage of the data on photographs; → rows of ``what``, ``images``, ``seconds``."""
    if not photographs().is_dir():
        print(
            "CIFAR-10 is absent: the data are not profiled (set TTTLAB_DATA to the folder that holds cifar10/test)"
        )
        return []
    began = time.perf_counter()
    spec = ImageSpec(source="folder", root=photographs().resolve(), limit=amount.photographs)
    source = open_source(spec, "labeled", downloads=Path("unused"))
    images = gather(source, spec, "labeled", 32, seed=0, workers=workers)
    rows = [
        {"what": "decode PNG files", "images": len(images), "seconds": time.perf_counter() - began}
    ]
    shifts = list_shifts(CORRUPTIONS, [3])[1:]

    def corrupt(shift) -> float:
        began = time.perf_counter()
        shift.apply(images, 0)
        return time.perf_counter() - began

    began = time.perf_counter()
    alone = list(in_order(corrupt, shifts, workers))
    rows.append(
        {
            "what": "corrupt, all 15 types",
            "images": len(shifts) * len(images),
            "seconds": time.perf_counter() - began,
        }
    )
    rows += [
        {"what": f"corrupt, {shift.corruption}", "images": len(images), "seconds": seconds}
        for shift, seconds in zip(shifts, alone, strict=True)
    ]
    rows.append(
        {
            "what": "augment, two SimCLR views",
            "images": len(images),
            "seconds": augment(images, workers),
        }
    )
    batch = images.take(range(min(BATCH, len(images))))
    rows.append(
        {
            "what": "train SimCLR on them, small ResNet",
            "images": STEPS * len(batch),
            "seconds": train(batch, device),
        }
    )
    for row in rows:
        print(
            f"data {row['what']:36}{row['images']:8} images {row['seconds']:7.2f} s {row['images'] / row['seconds']:9.0f} per s"
        )
    return rows


def augment(images: ImageSet, workers: int) -> float:
    """Time one pass of the training's loader."""
    loader = open_loader(
        images,
        {"objective": Views(2, Augmentation(flip=True, jitter=0.4))},
        BATCH,
        0,
        workers=workers,
    )
    loader.sampler.set_epoch(1)
    began = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began


def train(images: ImageSet, device: torch.device) -> float:
    """Time steps of SimCLR on a batch that is there already."""
    network, objective = resnet(32).to(device).train(), SimCLR()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    pixels = torch.from_numpy(images.pixels).to(device)
    views = as_images(pixels).unsqueeze(1).expand(-1, 2, -1, -1, -1)

    def step() -> float:
        optimizer.zero_grad()
        loss = objective.loss(network, views, torch.Generator())
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - began
