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
from tttlab.memory import Tally
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
IMAGES = networks.images(MANY, seed=41)
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
    pixels = (IMAGES.permute(0, 2, 3, 1) * 255).byte().numpy()
    return ImageSet(pixels[:count], np.arange(count) % networks.CLASSES, tuple(NAMES[:count]), tuple("abcd"), source="made")


def source(count: int, batch_size: int = MANY) -> SourceImages:
    return SourceImages(IMAGES.__getitem__, count, batch_size)


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
        signals.measure(signal, network, IMAGES[:count], MEMO(num_views=4), LOOP, statistics=statistics,
                        image_ids=NAMES[:count], seed=0, images_per_step=wish)  # fmt: skip

    return run


def aligned(network, count, wish, _folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    gradient_alignment(network, IMAGES[:count], torch.zeros(count, dtype=torch.long), MEMO(num_views=4), LOOP,
                       statistics=statistics, image_ids=NAMES[:count], seed=0, images_per_step=wish)  # fmt: skip


def own_statistics(method):
    return lambda network, count, wish, _folder: method.source_statistics(network, source(count, wish))


PASSES = {
    "layer statistics": lambda network, count, wish, _: layer_statistics(network, source(count, wish)),
    "projection bank": lambda network, count, wish, _: projection_bank(network, source(count, wish), count),
    "statistics of ttt_plus_plus": own_statistics(TTTPlusPlus()),
    "confidence": measured("confidence"),
    "distance": measured("distance"),
    "loss": measured("loss"),
    "tuning": judged,
    "adapting": swept,
    "alignment": aligned,
    "encoding": lambda network, count, wish, _: encode(network, image_set(count), wish),
}
# These look at batches of a size that their results depend on, whatever the machine's setting says.
BATCHED = {"statistics of eata": own_statistics(EATA()), "statistics of actmad_batch": own_statistics(BatchActMAD())}


def peak(run, *arguments) -> int:
    with Tally() as tally:
        run(*arguments)
    return tally.peak


@pytest.mark.parametrize("name", PASSES)
def test_eight_times_the_images_take_little_more_than_a_group(name, network, tmp_path):
    """What is kept of every image, such as its pixels and logits, is a small part of what a group takes."""
    few, many = (peak(PASSES[name], network, count, GROUP, tmp_path) for count in (GROUP, MANY))
    assert many < 1.5 * few


@pytest.mark.parametrize("name", [*PASSES, *BATCHED])
def test_a_group_takes_no_more_than_there_is(name, network, tmp_path, monkeypatch):
    """It is found out while the first group is worked on."""
    run, wish = (PASSES | BATCHED)[name], MANY if "statistics" in name or "bank" in name else "auto"
    everything = peak(run, network, MANY, MANY, tmp_path / "whole")
    limit = everything / 4
    monkeypatch.setattr(group_size, "CPU_LIMIT", limit)
    found = peak(run, network, MANY, wish, tmp_path / "part")
    print(name, everything, limit, found, found - limit)
    assert found < limit + KEPT


KEPT = 4 * IMAGES.nbytes  # of all images, beside the work on a group: as bytes, as numbers in two precisions, their logits
