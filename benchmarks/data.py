"""Times decoding, corrupting and augmenting photographs, to compare with the time of computing."""

import os
import time
from pathlib import Path

import torch

from benchmarks.amount import FULL, Amount
from benchmarks.cases import STEPS, resnet
from tttlab.config.images import ImageSpec
from tttlab.config.inner_loop import Augmentation
from tttlab.config.values import CORRUPTIONS
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.reading import gather
from tttlab.data.sources import open_source
from tttlab.objectives.simclr import SimCLR
from tttlab.runtime.parallel import in_order
from tttlab.shifts.shift import list_shifts
from tttlab.training.loaders import Views, open_loader

BATCH = 128


def photographs() -> Path:
    """The test half of CIFAR-10 as a folder of classes."""
    root = Path(os.environ.get("TTTLAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return root / "cifar10" / "test"


def profile(device: torch.device, workers: int, amount: Amount = FULL) -> list[dict]:
    """Time every stage of the data on photographs: rows of ``what``, ``images``, ``seconds``."""
    if not photographs().is_dir():
        print(
            "CIFAR-10 is absent: the data are not profiled "
            "(set TTTLAB_DATA to the folder that holds cifar10/test)"
        )
        return []
    rows = []

    def add(what: str, count: int, seconds: float) -> None:
        rows.append({"what": what, "images": count, "seconds": seconds})

    began = time.perf_counter()
    spec = ImageSpec(source="folder", root=photographs().resolve(), limit=amount.photographs)
    source = open_source(spec, "labeled", downloads=Path("unused"))
    images = gather(source, spec, "labeled", 32, seed=0, workers=workers)
    add("decode PNG files", len(images), time.perf_counter() - began)
    shifts = list_shifts(CORRUPTIONS, [3])[1:]

    def corrupt(shift) -> float:
        began = time.perf_counter()
        shift.apply(images, 0)
        return time.perf_counter() - began

    began = time.perf_counter()
    times = list(in_order(corrupt, shifts, workers))
    add("corrupt, all 15 types", len(shifts) * len(images), time.perf_counter() - began)
    for shift, seconds in zip(shifts, times, strict=True):
        add(f"corrupt, {shift.corruption}", len(images), seconds)
    add("augment, two SimCLR views", len(images), augment(images, workers))
    batch = images.take(range(min(BATCH, len(images))))
    add("train SimCLR on them, small ResNet", STEPS * len(batch), train(batch, device))
    for row in rows:
        print(
            f"data {row['what']:36}{row['images']:8} images {row['seconds']:7.2f} s "
            f"{row['images'] / row['seconds']:9.0f} per s"
        )
    return rows


def augment(images: ImageSet, workers: int) -> float:
    """Time one pass of the training's loader."""
    views = Views(2, Augmentation(flip=True, jitter=0.4))
    loader = open_loader(images, {"objective": views}, BATCH, 0, workers=workers)
    loader.sampler.set_epoch(1)
    began = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began


def train(images: ImageSet, device: torch.device) -> float:
    """Time steps of SimCLR on one batch that is already on the device."""
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
