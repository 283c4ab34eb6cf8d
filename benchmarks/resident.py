"""Largest resident set of every pass over images: ``python -m benchmarks.resident``.

Each pass runs in a process of its own, as a stage does, on a ResNet-50 at 224 px with random
weights and the settings of settings/folders.yaml. The peak of a few groups of images is that of
many.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from tttlab.adaptation.method import Method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.experiments.adapting import Sweep, adapt_to_shifts
from tttlab.experiments.alignment import gradient_alignment
from tttlab.experiments.jobs import Experiment
from tttlab.experiments.trials import Grid
from tttlab.experiments.tuning import Judge, Rounds
from tttlab.methods.actmad import ActMAD
from tttlab.methods.eata import EATA
from tttlab.methods.memo import MEMO
from tttlab.methods.tent import TENT
from tttlab.networks.building import build_encoder
from tttlab.networks.network import Network
from tttlab.networks.source_statistics import SourceImages, Statistics, layer_statistics
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.resuming import Work
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream
from tttlab.training.probing import encode


def network(backbone: str, size: int) -> Network:
    """Make a network with random weights."""
    return Network(build_encoder(backbone, size, stem="original"), 10).eval()


def image_set(count: int, size: int) -> ImageSet:
    """Make random images of ten classes."""
    pixels = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, np.arange(count) % 10, names, tuple("abcdefghij"))


def source(images: ImageSet) -> SourceImages:
    """Take images as the source domain's."""

    def load(positions: torch.Tensor) -> torch.Tensor:
        return as_images(torch.from_numpy(images.pixels[positions.numpy()]))

    return SourceImages(load, len(images), 256)


def statistics(model: nn.Module, images: ImageSet) -> Statistics:
    """Measure statistics on two images: only the memory counts, not the values."""
    return layer_statistics(model, source(images.take([0, 1])))


def adapted(
    method: Method, loop: InnerLoop, stream: Stream | None = None
) -> Callable[[Network, ImageSet], None]:
    """Adapt as the stage ``adapt`` does, distances included."""

    def run(model: Network, images: ImageSet) -> None:
        task = Task(model, method, loop, statistics(model, images))
        experiment, shifts = Experiment(task, images, stream), [Shift("gaussian_noise", 3)]
        with TemporaryDirectory() as folder, Work(Path(folder)) as work:
            adapt_to_shifts(Sweep(experiment, shifts, work, "model"))

    return run


def tuned(model: Network, images: ImageSet) -> None:
    """Judge one candidate on the clean images and under four held-out corruptions."""
    loop = InnerLoop(steps=2, clip=1.0, trainable="encoder", normalisation="shrink")
    task = Task(model, ActMAD(tolerance=0), loop, statistics(model, images))
    rounds, grid = Rounds(images, (None,), (3,), 0), Grid([{}], (1, 2), 0)
    with TemporaryDirectory() as folder, Work(Path(folder)) as work:
        Judge(rounds, grid, lambda _: task, work, "run")(0, [0])


def aligned(model: Network, images: ImageSet) -> None:
    """Compare the gradients of all the encoder's parameters."""
    loop = InnerLoop(normalisation="shrink")
    task = Task(model, ActMAD(tolerance=0), loop, statistics(model, images))
    pixels, labels = as_images(torch.from_numpy(images.pixels)), torch.from_numpy(images.labels)
    gradient_alignment(task, pixels, labels, images.image_ids)


def measured(model: Network, images: ImageSet) -> None:
    """Measure the standard source statistics."""
    layer_statistics(model, source(images))


def measured_by_eata(model: Network, images: ImageSet) -> None:
    """Measure EATA's own source statistics."""
    EATA().source_statistics(model, source(images))


ACTMAD_LOOP = InnerLoop(steps=2, clip=1.0, trainable="norm", normalisation="shrink")
# Name → number of images, and the pass over them.
PASSES: dict[str, tuple[int, Callable[[Network, ImageSet], object]]] = {
    "nothing": (1, lambda _model, _images: None),
    "source_stats": (256, measured),
    "source_stats, EATA's": (64, measured_by_eata),
    "tune actmad, encoder": (8, tuned),
    "adapt actmad, norm": (24, adapted(ActMAD(), ACTMAD_LOOP)),
    "adapt memo, norm": (12, adapted(MEMO(num_views=8), InnerLoop(trainable="norm"))),
    "adapt memo, encoder": (6, adapted(MEMO(num_views=8), InnerLoop(trainable="encoder"))),
    "adapt tent, stream": (64, adapted(TENT(), InnerLoop(trainable="norm"), Stream(64))),
    "align actmad, encoder": (20, aligned),
    "distance": (256, encode),
}


def run(name: str) -> None:
    """Run one pass in this process and print its largest resident set."""
    keep_freed_memory()  # as every stage does
    count, work = PASSES[name]
    began = time.perf_counter()
    work(network("resnet50", 224), image_set(count, 224))
    unit = 1 if sys.platform == "darwin" else 1024
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    seconds = time.perf_counter() - began
    print(f"{name:24}{count:4} images {gibibytes:6.2f} GiB {seconds:7.0f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run(sys.argv[1])
    else:
        for name in PASSES:
            subprocess.run([sys.executable, "-m", "benchmarks.resident", name], check=True)
