"""All work holds at most a group of images at once, and a group fits into memory."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers import networks
from tttlab.adaptation import signals
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.experiments.adapting import Sweep, adapt_to_shifts
from tttlab.experiments.alignment import gradient_alignment
from tttlab.experiments.jobs import Experiment
from tttlab.experiments.trials import Grid
from tttlab.experiments.tuning import Judge, Rounds
from tttlab.methods.actmad import ActMAD
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.methods.eata import EATA
from tttlab.methods.memo import MEMO
from tttlab.methods.tent import TENT
from tttlab.methods.ttt_plus_plus import TTTPlusPlus
from tttlab.networks.source_statistics import (
    SourceImages,
    Spread,
    layer_statistics,
    projection_bank,
)
from tttlab.networks.taps import record
from tttlab.runtime import group_size, memory
from tttlab.runtime.group_size import GroupSize
from tttlab.runtime.machine import Machine
from tttlab.runtime.memory import OverLimit, Tally
from tttlab.runtime.resuming import Work
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.shifts.streams import Stream
from tttlab.training.probing import encode
from tttlab.workflow import network_runs, places
from tttlab.workflow.pieces import Piece
from tttlab.workflow.source_images import source_batches

CPU, GROUP, MANY = torch.device("cpu"), 8, 32
IMAGES = networks.images(MANY, seed=41)
NAMES = [f"img-{number}" for number in range(MANY)]
LOOP = InnerLoop(steps=1, lr=1e-3, normalisation="shrink", trainable="norm")
METHOD = MEMO(num_views=2)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def network():
    return networks.source_statistics("resnet", torch.float32)[0]


def image_set(count: int) -> ImageSet:
    pixels = (IMAGES.permute(0, 2, 3, 1) * 255).byte().numpy()
    labels = np.arange(count) % networks.CLASSES
    return ImageSet(pixels[:count], labels, tuple(NAMES[:count]), tuple("abcd"), source="made")


def source(count: int, batch_size: int = MANY) -> SourceImages:
    return SourceImages(IMAGES.__getitem__, count, batch_size)


def judged(network, count, wish, folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    task, grid = Task(network, METHOD, LOOP, statistics), Grid([{}], (1,), 0)
    rounds, machine = Rounds(image_set(count), (None,), [3], 0), Machine(images_per_step=wish)
    with Work(folder / f"{count}") as work:
        Judge(rounds, grid, lambda _: task, work, "run", machine)(0, [0])


def swept(network, count, wish, folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    experiment = Experiment(Task(network, METHOD, LOOP, statistics), image_set(count))
    machine, shifts = Machine(images_per_step=wish), list_shifts(["fog"], [3])
    with Work(folder / f"{count}") as work:
        adapt_to_shifts(Sweep(experiment, shifts, work, "model"), machine)


def measured(signal):
    def run(network, count, wish, _folder):
        _, statistics = networks.source_statistics("resnet", torch.float32)
        task = Task(network, METHOD, LOOP, statistics)
        signals.measure_signal(signal, task, IMAGES[:count], NAMES[:count], wish)

    return run


def aligned(network, count, wish, _folder):
    _, statistics = networks.source_statistics("resnet", torch.float32)
    labels = torch.zeros(count, dtype=torch.long)
    task = Task(network, METHOD, LOOP, statistics)
    gradient_alignment(task, IMAGES[:count], labels, NAMES[:count], wish)


def statistics_of(method):
    def run(network, count, wish, _folder):
        method.source_statistics(network, source(count, wish))

    return run


def layers(network, count, wish, _folder):
    layer_statistics(network, source(count, wish))


def bank(network, count, wish, _folder):
    projection_bank(network, source(count, wish), count)


def encoded(network, count, wish, _folder):
    encode(network, image_set(count), wish)


PASSES = {
    "layer statistics": layers,
    "projection bank": bank,
    "statistics of ttt_plus_plus": statistics_of(TTTPlusPlus()),
    "confidence": measured("confidence"),
    "distance": measured("distance"),
    "loss": measured("loss"),
    "tuning": judged,
    "adapting": swept,
    "alignment": aligned,
    "encoding": encoded,
}
# Their results depend on the batch size, which is therefore not the machine's setting.
BATCHED = {
    "statistics of eata": statistics_of(EATA()),
    "statistics of actmad_batch": statistics_of(BatchActMAD()),
}
# Of all images, beside the work on a group: as bytes, as numbers in two precisions, their logits.
KEPT = 4 * IMAGES.nbytes


def peak(run, *arguments) -> int:
    with Tally() as tally:
        run(*arguments)
    return tally.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_four_times_the_images_take_little_more_than_a_group(name, network, tmp_path):
    """What is kept of every image, such as pixels and logits, is small beside a group's memory."""
    few, many = (peak(PASSES[name], network, count, GROUP, tmp_path) for count in (GROUP, MANY))
    assert many < 1.5 * few


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PASSES, *BATCHED])
def test_a_group_takes_no_more_than_there_is(name, network, tmp_path, monkeypatch):
    """What an image takes is measured while the first group runs."""
    run = (PASSES | BATCHED)[name]
    wish = MANY if "statistics" in name or "bank" in name else "auto"
    limit = peak(run, network, MANY, MANY, tmp_path / "whole") / 4
    monkeypatch.setattr(group_size, "CPU_LIMIT", limit)
    assert peak(run, network, MANY, wish, tmp_path / "part") < limit + KEPT


@pytest.mark.parametrize(
    ("kind", "method", "loop"),
    [
        ("resnet", MEMO(num_views=4), InnerLoop(steps=2, optimizer="adam")),
        ("resnet", ActMAD(), LOOP),
        ("vit", MEMO(num_views=4), InnerLoop(steps=2, trainable="norm")),
    ],
    ids=["all parameters, Adam", "norms, moments", "vit"],
)
def test_the_tally_is_what_pytorchs_allocator_gives_away(kind, method, loop):
    """The profiler measures it. The tally is never much less, for it must stop too large groups."""
    network, statistics = networks.source_statistics(kind, torch.float32)

    def run():
        adapt(network, IMAGES[:4], method, loop, statistics=statistics, images_per_step=4)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(
        (
            event
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ),
        key=lambda event: event.start_ns(),
    )
    allocated = max(itertools.accumulate(event.nbytes() for event in events))
    assert 0.95 * allocated < peak(run) < 1.5 * allocated


def test_the_tally_counts_what_is_alive_and_what_an_operation_copies():
    kilobyte, before = 256, torch.ones(256)
    with Tally() as tally:
        assert len(before.view(16, 16).expand(4, 16, 16).transpose(0, 1)) == 16
        assert tally.peak == 0  # views of a tensor from before
        result = before + 1
        assert tally.peak == 4 * kilobyte * 3  # the result, and copies of input and result
        del result
        zeros = torch.zeros(3 * kilobyte)  # no input that could be copied
        assert tally.peak == 4 * kilobyte * 3
        torch.cat([zeros, zeros[:kilobyte]])
        assert tally.peak == 4 * kilobyte * (3 + 4 + 4 + 4)
    after = torch.zeros(1000 * kilobyte)
    assert tally.peak == 4 * kilobyte * 15
    assert len(after)


def test_work_that_goes_beyond_the_limit_is_stopped_wherever_it_is():
    network, _ = networks.source_statistics("resnet", torch.float32)
    with (
        pytest.raises(OverLimit, match=r"\d+ bytes of tensors, where 100000 are allowed"),
        Tally(100_000),
    ):
        network(IMAGES).logits.sum().backward()
    weight = torch.ones(10, requires_grad=True)
    with Tally(4 * 10 * 6) as tally:
        loss = weight.square().sum()
        tally.limit = 0
        with pytest.raises(OverLimit):
            loss.backward()  # stopped inside autograd's engine


def write(folder: Path, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


@pytest.mark.parametrize("mount", ["", "unified"])
def test_a_containers_limits_are_those_of_its_groups_and_of_the_groups_around_them(tmp_path, mount):
    """As SLURM sets them: the job has a limit, its step has none."""
    groups, root = tmp_path / "cgroup", tmp_path / "sys" / mount
    groups.write_text("0::/slurm/job_1/step_0\n")
    write(root / "slurm/job_1/step_0", max="max", current=10_000, stat="anon 1\ninactive_file 300")
    write(
        root / "slurm/job_1",
        max=100_000,
        current=40_000,
        stat="anon 36000\ninactive_file 3000\nfile 4000",
    )
    write(root / "slurm", max=10**9, current=10**8, stat="inactive_file 0")
    assert sorted(memory.granted(tmp_path / "sys", groups)) == [63_000, 9 * 10**8]
    write(root / "slurm/job_1", current=200_000)
    assert min(memory.granted(tmp_path / "sys", groups)) == 0


def test_a_container_that_sees_its_group_as_the_root_is_limited_too(tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/\n")
    write(tmp_path / "sys", max=5000, current=1000, stat="inactive_file 100")
    assert list(memory.granted(tmp_path / "sys", groups)) == [4100]
    # Version 1; the paths are those on the host.
    groups.write_text("11:cpuset:/\n5:memory,hugetlb:/docker/abc\n1:name=systemd:/docker/abc\n")
    write(
        tmp_path / "sys/memory",
        limit_in_bytes=7000,
        usage_in_bytes=1000,
        stat="inactive_file 9\ntotal_inactive_file 50",
    )
    assert list(memory.granted(tmp_path / "sys", groups)) == [6050]


def test_without_control_groups_the_machine_is_the_limit(tmp_path, monkeypatch):
    assert list(memory.granted(tmp_path, tmp_path / "none")) == []
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for limits, expected in ([], 1000), ([2000, 400], 400):
        monkeypatch.setattr(memory, "granted", lambda limits=limits: iter(limits))
        assert memory.free_bytes(CPU) == expected


def test_linux_says_what_is_available_and_elsewhere_psutil_does(tmp_path, monkeypatch):
    report = tmp_path / "meminfo"
    report.write_text("MemTotal:  9000 kB\nMemFree:   10 kB\nMemAvailable:    3000 kB\n")
    assert memory.available_bytes(report) == 3000 * 1024
    if sys.platform == "linux":
        share = memory.available_bytes() / psutil.virtual_memory().available
        assert share == pytest.approx(1, abs=0.2)  # other processes go on meanwhile
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert memory.available_bytes(tmp_path / "none") == 1000


def test_moments_that_come_bit_by_bit_are_those_of_all():
    values = 100 + torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    whole = Spread()
    for part in values.split([1, 20, 4, 25]):
        whole.add(Spread.of(part))
    expected = values.double()
    torch.testing.assert_close(whole.mean, expected.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.variance(), expected.var(0), rtol=1e-9, atol=0)
    population = expected.var(0, correction=0)
    torch.testing.assert_close(whole.variance(correction=0), population, rtol=1e-9, atol=0)
    assert Spread.of(values[:1]).variance().isnan().all()


def test_statistics_are_those_of_all_images_whatever_the_groups():
    """Against the moments of all activations at once, in double precision."""
    network, _ = networks.source_statistics("resnet")
    images, layer = IMAGES.double(), "encoder.layer1.0.bn1"
    computed = [
        layer_statistics(network, batches, [layer]) for batches in (images.split(7), [images])
    ]
    with record(network, [layer]) as activations, torch.no_grad():
        network(images)
    activation = activations[layer]
    means, variances = activation.mean((2, 3)), activation.var((2, 3), correction=0)
    logs = (variances + 1e-5).log()
    expected = {
        "mean_center": means.mean(0),
        "mean_scale": means.std(0),
        "log_variance_center": logs.mean(0),
        "log_variance_scale": logs.std(0),
        "pooled_mean": activation.mean((0, 2, 3)),
        "pooled_variance": activation.var((0, 2, 3), correction=0) + 1e-5,
        "total_variance": activation.var((2, 3), correction=0).mean(0)
        + activation.mean((2, 3)).var(0)
        + 1e-5,
    }
    for statistics in computed:
        assert statistics.keys() == {f"{layer}.{name}" for name in expected}
        for name, value in expected.items():
            torch.testing.assert_close(statistics[f"{layer}.{name}"], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [EATA(), BatchActMAD(), TTTPlusPlus(queue_size=16)], ids=str)
def test_a_methods_own_statistics_do_not_depend_on_the_groups(method, monkeypatch):
    network, _ = networks.source_statistics("resnet")
    images = IMAGES.double()
    whole = method.source_statistics(network, [images])
    monkeypatch.setattr(group_size, "FIRST", 5)
    monkeypatch.setattr(GroupSize, "_fit", lambda self, _device: setattr(self, "size", 5))
    monkeypatch.setattr(GroupSize, "_learn", lambda self, *_: None)
    parts = method.source_statistics(network, SourceImages(images.__getitem__, MANY, 9))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-12)


def test_source_images_are_looked_at_when_their_turn_comes_and_as_often_as_asked():
    sizes = []

    def look(indices):
        sizes.append(len(indices))
        return IMAGES[indices]

    batches = SourceImages(look, 20, 8)
    assert len(batches) == 3
    assert sizes == []
    for _ in range(2):
        assert torch.equal(torch.cat(list(batches)), IMAGES[:20])
    assert sizes == [8, 8, 4] * 2
    network, _ = networks.source_statistics("resnet", torch.float32)
    sizes.clear()
    projection_bank(network, batches, 5)
    assert sizes == [8]


class Watched:
    """Pixels that record how many are accessed at once, and refuse to be sent to a process."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.looks = pixels, pixels.shape, []

    def __getitem__(self, key):
        pixels = self.pixels[key]
        self.looks.append(len(pixels))
        return pixels

    def __reduce__(self):
        raise AssertionError("sent")


@pytest.mark.parametrize("shifts", ["separate", "continual", "mixed"])
def test_a_stream_is_looked_at_batch_by_batch(network, shifts, tmp_path):
    images = image_set(20)
    pixels = Watched(images.pixels)
    _, statistics = networks.source_statistics("resnet", torch.float32)
    task = Task(network, TENT(), InnerLoop(lr=1e-3, trainable="norm"), statistics)
    experiment = Experiment(task, replace(images, pixels=pixels), Stream(5, shifts=shifts))
    with Work(tmp_path) as work:
        shown = list_shifts(["fog", "contrast"], [3])
        table, _ = adapt_to_shifts(Sweep(experiment, shown, work, "model"))
    assert len(table) == 60
    assert max(pixels.looks) == 5
    assert sum(pixels.looks) == 60  # each image once, though it is adapted to and judged


def test_workers_are_not_sent_the_images(network, tmp_path):
    images = image_set(6)
    night = Shift("photos/night", 0, replace(images, pixels=Watched(images.pixels)))
    shifts = [night, *list_shifts(["fog"], [3])]
    _, statistics = networks.source_statistics("resnet", torch.float32)
    experiment = Experiment(Task(network, TENT(), LOOP, statistics), images)
    with Work(tmp_path) as work:
        table, _ = adapt_to_shifts(Sweep(experiment, shifts, work, "model"), Machine(workers=2))
    assert len(table) == 18


def test_the_images_of_a_shift_are_made_when_they_are_looked_at():
    images = image_set(20)
    pixels, shift = Watched(images.pixels), Shift("gaussian_noise", 3)
    seen = shift.seen(replace(images, pixels=pixels), 7)
    assert pixels.looks == []
    whole = shift.apply(images, 7)
    np.testing.assert_array_equal(seen.pixels[3:6], whole[3:6])
    np.testing.assert_array_equal(seen.pixels[4], whole[4])
    np.testing.assert_array_equal(seen.take([9, 2]).pixels, whole[[9, 2]])
    assert pixels.looks == [3, 1, 2]
    np.testing.assert_array_equal(np.asarray(seen.pixels), whole)
    assert (len(seen), seen.pixels.shape, seen.image_ids) == (
        20,
        images.pixels.shape,
        images.image_ids,
    )


def test_choosing_images_copies_none(tmp_path):
    images = image_set(20)
    images.save(tmp_path)
    kept = ImageSet.load(tmp_path)
    pixels = Watched(kept.pixels)
    subset = replace(kept, pixels=pixels).view([7, 3, 11]).view([2, 0])
    assert pixels.looks == []
    assert subset.image_ids == ("img-11", "img-7")
    np.testing.assert_array_equal(subset.pixels[:], images.pixels[[11, 7]])
    assert subset.digest() == images.take([11, 7]).digest()
    assert pixels.looks == [2, 1, 1]


def test_source_images_of_the_pipeline_stay_on_disk_until_a_batch_is_looked_at(
    tmp_path, monkeypatch
):
    images = image_set(MANY)
    images.save(tmp_path / "data/labeled_train")
    monkeypatch.setattr(places, "OUTPUTS", tmp_path)
    load, pixels = ImageSet.load, Watched(images.pixels)
    monkeypatch.setattr(ImageSet, "load", lambda folder: replace(load(folder), pixels=pixels))

    def opened(count, images_per_step):
        settings = {
            "source_stats": SimpleNamespace(images=count),
            "machine": SimpleNamespace(images_per_step=images_per_step),
        }
        return source_batches(SimpleNamespace(seed=0, **settings), CPU)

    def as_bytes(images):
        return {tuple((255 * image).round().int().flatten().tolist()) for image in images}

    batches = opened(20, 6)
    assert (batches.count, len(batches), pixels.looks) == (20, 4, [])
    few = torch.cat(list(batches))
    assert pixels.looks == [6, 6, 6, 2]
    everything = as_bytes(torch.cat(list(opened(None, "auto"))))
    assert len(everything) == MANY
    assert as_bytes(few) < everything
    same = torch.cat(list(opened(20, "auto")))  # the machine's setting changes nothing
    assert torch.equal(few, same)


def test_the_test_images_are_opened_once_for_all_networks(monkeypatch):
    opened, images = [], image_set(2)

    def open_test(_params):
        opened.append(1)
        return images, [Shift()]

    loaded = []
    monkeypatch.setattr(network_runs, "open_test", open_test)
    monkeypatch.setattr(network_runs, "load_tuned", lambda *_: {"settings": {}})
    monkeypatch.setattr(network_runs, "load_network", lambda _, *network: loaded.append(network))
    monkeypatch.setattr(network_runs, "build_run", lambda *_: None)
    pieces = [
        Piece(name, model, seed)
        for name in ("tent", "eata")
        for model in ("resnet", "vit")
        for seed in (0, 1, 2)
    ]
    runs = network_runs.open_runs(None, pieces, SimpleNamespace(device=CPU))
    assert [run.piece for run in runs] == pieces
    assert len(loaded) == 6  # every network once, whatever the number of runs
    assert len(opened) == 1
    assert all(run.images is images for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapting", "tuning", "alignment"])
def test_no_group_is_larger_than_the_machines_setting_says(name, network, tmp_path, monkeypatch):
    sizes, views = [], MEMO.views

    def counted(self, model, images, generators):
        sizes.append(len(images))
        return views(self, model, images, generators)

    monkeypatch.setattr(MEMO, "views", counted)
    PASSES[name](network, 11, 3, tmp_path)
    assert max(sizes) == 3
    assert sum(sizes) % 11 == 0


@pytest.mark.parametrize("stage", ["source_stats", "tune", "adapt", "align", "distance"])
def test_every_stage_that_looks_at_images_hands_the_machines_setting_on(stage):
    """By its name in the code that the stage runs."""
    scripts = {
        "source_stats": "src/tttlab/workflow/source_images.py",
        "adapt": "src/tttlab/workflow/processes.py",
        "tune": "src/tttlab/workflow/tunings.py",
        "align": "src/tttlab/workflow/alignments.py",
        "distance": "src/tttlab/workflow/distances.py",
    }
    script = ROOT / scripts.get(stage, f"pipeline/{stage}.py")
    assert "machine.images_per_step" in script.read_text()
