"""Whatever looks at images holds no more of them at once than a group, and a group no more than there is memory for."""

import itertools

import networks
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tttlab import group_size, signals
from tttlab.alignment import gradient_alignment
from tttlab.data import ImageSet
from tttlab.inner_loop import InnerLoop
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.methods.eata import EATA
from tttlab.methods.memo import MEMO
from tttlab.methods.ttt_plus_plus import TTTPlusPlus
from tttlab.normalisation import Normalisation
from tttlab.probing import encode
from tttlab.resuming import Work
from tttlab.shifts import list_shifts
from tttlab.source_statistics import SourceImages, layer_statistics, projection_bank
from tttlab.sweep import adapt_to_shifts
from tttlab.tuning import Judge

CPU, GROUP, MANY = torch.device("cpu"), 8, 64
NAMES = [f"img-{number}" for number in range(MANY)]
LOOP = InnerLoop(steps=2, lr=1e-3, normalisation=Normalisation("shrink"), trainable="norm")


def profiled(function) -> int:
    """Most bytes that PyTorch's allocator had given away during a call, by its own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


@pytest.fixture
def network():
    return networks.source_statistics("resnet", torch.float32)[0]


def image_set(count: int) -> ImageSet:
    pixels = (networks.images(count, seed=41).permute(0, 2, 3, 1) * 255).byte().numpy()
    return ImageSet(pixels, np.arange(count) % networks.CLASSES, tuple(NAMES[:count]), tuple("abcd"), source="made")


def source(count: int, batch_size: int = MANY) -> SourceImages:
    return SourceImages(networks.images(count, seed=7).__getitem__, count, batch_size)


def judged(network, count, wish, folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    with Work(folder / f"{count}") as work:
        Judge(network, image_set(count), (None,), [3], [{}], (1, 2), lambda _: (MEMO(num_views=4), LOOP, statistics), 0, work,
              "run", images_per_step=wish)(0, [0])  # fmt: skip


def swept(network, count, wish, folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    with Work(folder / f"{count}") as work:
        adapt_to_shifts(network, MEMO(num_views=4), LOOP, image_set(count), list_shifts(["fog"], [3]), statistics=statistics,
                        seed=0, work=work, prefix="model", images_per_step=wish)  # fmt: skip


def measured(signal):
    def run(network, count, wish, _folder):
        _, statistics = networks.source_statistics("resnet", torch.float32)
        signals.measure(signal, network, networks.images(count), MEMO(num_views=4), LOOP, statistics=statistics,
                        image_ids=NAMES[:count], seed=0, images_per_step=wish)  # fmt: skip

    return run


def aligned(network, count, wish, _folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    gradient_alignment(network, networks.images(count), torch.zeros(count, dtype=torch.long), MEMO(num_views=4), LOOP,
                       statistics=statistics, image_ids=NAMES[:count], seed=0, images_per_step=wish)  # fmt: skip


PASSES = {
    "layer statistics": lambda network, count, wish, _: layer_statistics(network, source(count, wish)),
    "projection bank": lambda network, count, wish, _: projection_bank(network, source(count, wish), count),
    "statistics of ttt_plus_plus": lambda network, count, wish, _: TTTPlusPlus().source_statistics(
        network, source(count, wish)
    ),
    "confidence": measured("confidence"),
    "distance": measured("distance"),
    "loss": measured("loss"),
    "tuning": judged,
    "adapting": swept,
    "alignment": aligned,
    "encoding": lambda network, count, wish, _: encode(network, image_set(count), wish),
}
# Whose batches have a size of their own: these learn what fits, and the machine setting has no say.
BY_ITSELF = {
    "statistics of eata": lambda network, count: EATA().source_statistics(network, source(count)),
    "statistics of actmad_batch": lambda network, count: BatchActMAD().source_statistics(network, source(count)),
}


@pytest.mark.parametrize("name", PASSES)
def test_many_images_take_no_more_than_a_group_of_them(name, network, tmp_path):
    """Eight times the images: what is kept of each, such as its pixels and logits, is a small part of what one takes."""
    run = PASSES[name]
    few, many = (profiled(lambda count=count: run(network, count, GROUP, tmp_path)) for count in (GROUP, MANY))
    assert many < 1.4 * few


@pytest.mark.parametrize("name", [*PASSES, *BY_ITSELF])
def test_a_group_takes_no_more_than_there_is(name, network, tmp_path, monkeypatch):
    """As found out while the first group is worked on; everything at once would take several times the limit."""
    if name in PASSES:
        run = lambda: PASSES[name](network, MANY, "auto" if "statistics" not in name and "bank" not in name else MANY, tmp_path)  # noqa: E731
    else:
        run = lambda: BY_ITSELF[name](network, MANY)  # noqa: E731
    for free in (600_000, 2_000_000):
        monkeypatch.setattr(group_size, "CPU_LIMIT", free)
        print(name, free, profiled(run))
