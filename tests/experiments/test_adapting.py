"""Adapting under all shifts: labels stay out of it, a kill loses nothing, rows are in order."""

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers import networks
from tests.helpers.processes import on_ranks, start
from tttlab.adaptation import adapter
from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.signals import logits_and_distance
from tttlab.adaptation.task import Task, complete_statistics
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.experiments import blocks, jobs
from tttlab.experiments.adapting import Sweep, adapt_to_shifts, adapting, collect, mean_of_finite
from tttlab.experiments.blocks import Block, list_blocks
from tttlab.experiments.jobs import Experiment, adapt_to_blocks
from tttlab.experiments.rows import predictions, steps_rows
from tttlab.methods.actmad import ActMAD
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.tent import TENT
from tttlab.runtime.machine import Machine
from tttlab.runtime.ranks import open_fabric
from tttlab.runtime.resuming import Work
from tttlab.shifts.corruptions import corrupt_all
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.shifts.streams import Stream

SHIFTS = list_shifts(["fog", "contrast"], [2, 5])


@pytest.fixture
def images():
    pixels = (networks.images(6, seed=40).permute(0, 2, 3, 1) * 255).byte().numpy()
    labels, names = np.arange(6) % networks.CLASSES, tuple(f"img-{i}" for i in range(6))
    return ImageSet(pixels, labels, names, tuple("abcd"), source="made")


@pytest.fixture(autouse=True)
def every_block_is_a_job(monkeypatch):
    monkeypatch.setattr(blocks, "TOGETHER", 0)


LOOP = InnerLoop(steps=2, lr=1e-2, clip=1.0)
# On streams the convolutions are not trained: this network has strided 1×1 convolutions of fewer
# than 16 channels, whose weights oneDNN may differentiate out of bounds (docs/design.md, fact 18).
STREAM_LOOP = replace(LOOP, trainable="norm")


def run(
    images,
    folder,
    method=None,
    shifts=SHIFTS,
    workers=0,
    stream=None,
    gate=None,
    record=(0,),
    images_per_step="auto",
    **options,
):
    network, statistics = networks.source_statistics("resnet", torch.float32)
    loop = STREAM_LOOP if stream else LOOP
    task = Task(network, method or ActMAD(), loop, statistics, seed=3)
    experiment = Experiment(task, images, stream, gate, record)
    machine = Machine(workers=workers, images_per_step=images_per_step)
    with Work(folder) as work:
        sweep = Sweep(experiment, shifts, work, "model", options.pop("rows", predictions))
        return adapt_to_shifts(sweep, machine, **options)


def assert_predictions(rows, expected: Adaptation) -> None:
    """Compare classes, where rounding cannot change them, and confidences."""
    for name, logits in (("source", expected.source_logits), ("adapted", expected.logits)):
        likeliest, sure = logits.softmax(1).max(1), networks.sure(logits).numpy()
        np.testing.assert_allclose(rows[f"{name}_confidence"], likeliest.values, rtol=1e-4)
        np.testing.assert_array_equal(rows[f"{name}_prediction"][sure], likeliest.indices[sure])


def test_shifts_are_clean_first_then_every_pair():
    assert [shift.name for shift in SHIFTS] == [
        "clean",
        "fog-2",
        "fog-5",
        "contrast-2",
        "contrast-5",
    ]
    assert Shift().severity == 0


def test_rows_are_those_of_the_adapter_on_the_corrupted_images(images, tmp_path):
    table, losses = run(images, tmp_path / "work")
    assert len(table) == 30
    assert list(table.columns) == [
        "image_id",
        "shift",
        "corruption",
        "severity",
        "label",
        "source_prediction",
        "untrained_prediction",
        "adapted_prediction",
        "source_confidence",
        "adapted_confidence",
        "loss_first",
        "loss_last",
        "distance",
        "gate_open",
        "fell_back",
        "milliseconds",
        "gate_milliseconds",
    ]
    network, statistics = networks.source_statistics("resnet", torch.float32)
    pixels = corrupt_all(images.pixels, images.image_ids, "fog", 5, 3)
    expected = adapt(
        network,
        as_images(torch.from_numpy(pixels)),
        ActMAD(),
        LOOP,
        statistics=statistics,
        image_ids=images.image_ids,
        seed=3,
    )
    part = table[table["shift"] == "fog-5"]
    assert part["image_id"].tolist() == list(images.image_ids)
    assert_predictions(part, expected)
    assert (part["adapted_prediction"] != part["source_prediction"]).any()
    np.testing.assert_allclose(part["loss_first"], expected.losses[:, 0], rtol=1e-4)
    assert losses.shape == (3,)


class Failing(SimCLRTraining):
    """A method that fails for a white image."""

    def loss(self, net, views, statistics, state):
        loss, state = super().loss(net, views, statistics, state)
        return loss * torch.where(views.mean() > 0.99, torch.nan, 1.0), state


def test_rows_tell_which_images_fell_back_and_seeds_are_the_experiments(images, tmp_path):
    """Corruption and views are both random."""
    white = images.pixels.copy()
    white[2] = 255
    images, shifts = replace(images, pixels=white), list_shifts(["shot_noise"], [5])
    method = Failing(num_views=2, augmentation=Augmentation(0.5, flip=True, jitter=0.0))
    table, _ = run(images, tmp_path / "work", method, shifts)
    network, statistics = networks.source_statistics("resnet", torch.float32)
    noisy = corrupt_all(white, images.image_ids, "shot_noise", 5, 3)
    for name, pixels in (("clean", white), ("shot_noise-5", noisy)):
        expected = adapt(
            network,
            as_images(torch.from_numpy(pixels)),
            method,
            LOOP,
            statistics=statistics,
            image_ids=images.image_ids,
            seed=3,
        )
        part = table[table["shift"] == name]
        assert_predictions(part, expected)
        np.testing.assert_allclose(part["loss_first"], expected.losses[:, 0], rtol=1e-4)
        np.testing.assert_allclose(part["loss_last"], expected.losses[:, -1], rtol=1e-4)
        np.testing.assert_array_equal(part["fell_back"], expected.fell_back)
    assert np.flatnonzero(table["fell_back"][:6]).tolist() == [2]


SIGNALS = {"confidence": "source_confidence", "distance": "distance", "loss": "loss_first"}


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_gate_judges_every_image_and_all_are_adapted_to_all_the_same(images, tmp_path, signal):
    options = {"method": SimCLRTraining(num_views=2), "images_per_step": 6}
    ungated, _ = run(images, tmp_path / "ungated", **options)
    assert ungated["gate_open"].all()
    assert (ungated["gate_milliseconds"] == 0).all()
    values = ungated[SIGNALS[signal]]
    gate = Gate(signal, float(values.median()))  # between two of the thirty values
    gated, _ = run(images, tmp_path / "gated", gate=gate, **options)
    beyond = values < gate.threshold if signal == "confidence" else values > gate.threshold
    np.testing.assert_array_equal(gated["gate_open"], beyond)
    assert gated["gate_open"].sum() == 15
    assert (gated["gate_milliseconds"] > 0).all()
    np.testing.assert_array_equal(gated["adapted_prediction"], ungated["adapted_prediction"])
    np.testing.assert_allclose(gated["distance"], ungated["distance"], rtol=1e-5)


def test_a_sweep_along_the_steps_has_a_row_per_image_and_step(images, tmp_path):
    whole, losses = run(images, tmp_path / "whole", images_per_step=6)
    recorded = (0, 1, 2)
    options = {"record": recorded, "rows": steps_rows(recorded), "images_per_step": 6}
    steps, _ = run(images, tmp_path / "steps", **options)
    assert len(steps) == 3 * len(whole)
    last = steps[steps["step"] == 2]
    np.testing.assert_array_equal(last["prediction"], whole["adapted_prediction"])
    first = steps[steps["step"] == 0]
    np.testing.assert_array_equal(first["prediction"], whole["untrained_prediction"])
    assert (whole["adapted_prediction"] != whole["untrained_prediction"]).any()
    mean_losses = steps[steps["shift"] != "clean"].groupby("step")["loss"].mean()
    np.testing.assert_allclose(mean_losses, losses, rtol=1e-4)


@pytest.mark.parametrize("order", ["shuffled", "by_class"])
def test_every_shift_is_a_stream_of_its_own_told_in_the_order_of_the_images(
    images, tmp_path, order
):
    stream = Stream(2, order)
    table, losses = run(images, tmp_path / order, TENT(), stream=stream)
    network, statistics = networks.source_statistics("resnet", torch.float32)
    for name in ("fog-5", "contrast-5"):
        part = table[table["shift"] == name].set_index("image_id")
        assert part.index.tolist() == list(images.image_ids)
        pixels = corrupt_all(images.pixels, images.image_ids, name.partition("-")[0], 5, 3)
        arrived = stream.arrange(images.labels, 3, f"{name}-0")
        image_ids = [images.image_ids[index] for index in arrived]
        expected = adapt_stream(
            network,
            as_images(torch.from_numpy(pixels[arrived])),
            TENT(),
            STREAM_LOOP,
            batch_size=2,
            seed=3,
            statistics=statistics,
            image_ids=image_ids,
        )
        rows = part.loc[image_ids]
        assert_predictions(rows, expected)
        np.testing.assert_allclose(rows["loss_first"], expected.losses[:, 0], rtol=1e-4)
        assert rows["loss_last"].isna().all()  # no loss is computed after the last step
    assert losses.shape == (2,)


@pytest.mark.parametrize("shifts", ["continual", "mixed"])
def test_a_stream_through_several_shifts_is_one_stream(images, tmp_path, shifts):
    """It gives the same losses and predictions as one call of `adapt_stream` on all its images."""
    stream, severe = Stream(3, shifts=shifts), SHIFTS[::2]
    table, _ = run(images, tmp_path, TENT(), severe, stream=stream)
    network, statistics = networks.source_statistics("resnet", torch.float32)
    (route,) = (route for route in stream.routes(severe) if not route[0].shifts[0].clean)
    pixels, keys = [], []
    for visit in route:
        batches = stream.batches(visit, [images.labels] * len(visit.shifts), 3)
        for number, index in np.concatenate(batches):
            shift = visit.shifts[number]
            pixels.append(shift.apply(images.take([index]), 3)[0])
            keys.append((shift.name, images.image_ids[index]))
    expected = adapt_stream(
        network,
        as_images(torch.from_numpy(np.stack(pixels))),
        TENT(),
        STREAM_LOOP,
        batch_size=3,
        seed=3,
        statistics=statistics,
        image_ids=[name for _, name in keys],
    )
    rows = table.set_index(["shift", "image_id"]).loc[keys]
    assert_predictions(rows, expected)
    np.testing.assert_allclose(rows["loss_first"], expected.losses[:, 0], rtol=1e-4)
    alone, _ = run(images, tmp_path / "alone", TENT(), severe, stream=Stream(3))
    np.testing.assert_array_equal(alone["image_id"], table["image_id"])  # in the same order
    assert (alone["shift"] == table["shift"]).all()
    differs = alone["loss_first"] != table["loss_first"]
    assert not differs[table["shift"] == "clean"].any()
    assert differs[table["shift"] == "contrast-5"].any()


def test_an_order_by_classes_that_are_unknown_is_refused_before_any_work(images, tmp_path):
    unknown = replace(images, labels=np.full(6, -1))
    shifts, stream = [Shift(), Shift("photos/turned", 0, unknown)], Stream(2, "by_class")
    with pytest.raises(UserError, match="by_class needs the labels of all images"):
        run(images, tmp_path, TENT(), shifts, stream=stream)
    assert not list(tmp_path.glob("model*"))


def test_a_batch_that_will_be_too_small_is_refused_before_any_work(images, tmp_path):
    """On a gradual stream a lower severity comes twice: with one and two of its three images."""
    shifts, three = [Shift(), Shift("fog", 1), Shift("fog", 5)], images.take(range(3))
    message = r"BatchActMAD.* needs batches of 2 images or more, found one of 1"
    with pytest.raises(UserError, match=message):
        run(three, tmp_path, BatchActMAD(), shifts, stream=Stream(4, shifts="gradual"))
    assert not list(tmp_path.glob("model*"))


def test_a_streams_blocks_are_whole_shifts_whatever_their_length():
    blocks = list_blocks([Shift(), Shift("fog", 5)], plain(600), Stream())
    assert [(block.name, block.images) for block in blocks] == [
        ("clean-0", range(600)),
        ("fog-5-0", range(600)),
    ]


def test_labels_change_no_prediction(images, tmp_path):
    table, _ = run(images, tmp_path / "a", images_per_step=6)
    random = np.random.default_rng(0).integers(networks.CLASSES, size=6)
    relabelled = ImageSet(images.pixels, random, images.image_ids, images.classes, source="made")
    relabelled_table, _ = run(relabelled, tmp_path / "b", images_per_step=6)
    differing = ["label", "milliseconds", "gate_milliseconds"]
    pd.testing.assert_frame_equal(
        table.drop(columns=differing), relabelled_table.drop(columns=differing)
    )
    assert (table["label"] != relabelled_table["label"]).any()


def test_a_killed_sweep_goes_on_where_it_was_with_the_same_numbers(images, tmp_path, monkeypatch):
    options = {"method": SimCLRTraining(num_views=2), "images_per_step": 6}
    whole, losses = run(images, tmp_path / "whole", **options)
    calls = []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return adapt(*arguments, **settings)

    monkeypatch.setattr(jobs, "adapt", dying)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "killed", **options)
    done, folder = [], tmp_path / "killed"
    resumed, resumed_losses = run(images, folder, on_images=done.append, **options)
    assert len(calls) == 3 + 3  # two shifts were kept; three are computed
    assert done == [12, 6, 6, 6]
    same = [name for name in whole.columns if name != "milliseconds"]
    pd.testing.assert_frame_equal(whole[same], resumed[same])
    np.testing.assert_array_equal(losses, resumed_losses)
    assert not (tmp_path / "killed").exists()


def test_workers_change_nothing(images, tmp_path):
    options = {"method": SimCLRTraining(num_views=2), "images_per_step": 6}
    alone, losses = run(images, tmp_path / "alone", **options)
    together, losses_together = run(images, tmp_path / "together", workers=2, **options)
    same = [name for name in alone.columns if name != "milliseconds"]
    pd.testing.assert_frame_equal(alone[same], together[same], rtol=1e-5)
    np.testing.assert_allclose(losses, losses_together, rtol=1e-5)


@pytest.mark.timeout(120)
def test_a_worker_that_the_system_kills_is_told_by_its_shift_and_loses_only_that(
    images, tmp_path, monkeypatch
):
    options = {"workers": 2, "images_per_step": 6}
    alone, losses = run(images, tmp_path / "alone", **options)
    compute = adapt_to_blocks

    def killed(experiment, shown, *arguments):
        if shown[0].shift.name == "contrast-5":  # the last of five
            while len(list((tmp_path / "killed").glob("*.pt"))) < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(experiment, shown, *arguments)

    monkeypatch.setattr(jobs, "adapt_to_blocks", killed)
    message = (
        r"SIGKILL, at work on model, contrast-5, images 0 to 5: memory probably ran out; lower"
    )
    with pytest.raises(UserError, match=message):
        run(images, tmp_path / "killed", **options)
    monkeypatch.setattr(jobs, "adapt_to_blocks", compute)
    done, folder = [], tmp_path / "killed"
    resumed, resumed_losses = run(images, folder, on_images=done.append, **options)
    assert done == [24, 6]
    same = [name for name in alone.columns if name != "milliseconds"]
    pd.testing.assert_frame_equal(alone[same], resumed[same], rtol=1e-5)
    np.testing.assert_allclose(losses, resumed_losses, rtol=1e-5)


def share(fabric, images, folder, die_at=None, workers=0):
    """One rank's part of a sweep in blocks of four images; it dies before block ``die_at``."""
    calls = []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return adapt(*arguments, **settings)

    network, statistics = networks.source_statistics("resnet", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 4)
        patch.setattr(blocks, "TOGETHER", 4)
        patch.setattr(jobs, "adapt", dying)
        task = Task(network, SimCLRTraining(num_views=2), LOOP, statistics, seed=3)
        machine = Machine(
            workers=workers,
            images_per_step=4,
            rank=fabric.global_rank,
            ranks=fabric.world_size,
            barrier=fabric.barrier,
        )
        work = Work(folder, owner=False)
        result = adapt_to_shifts(Sweep(Experiment(task, images), SHIFTS, work, "model"), machine)
    return result, len(calls)


def assert_same(actual: tuple, expected: tuple) -> None:
    same = [name for name in actual[0].columns if name != "milliseconds"]
    pd.testing.assert_frame_equal(actual[0][same], expected[0][same], check_exact=True)
    np.testing.assert_array_equal(actual[1], expected[1])


def test_blocks_adapted_together_give_what_each_gives_alone(images, tmp_path, monkeypatch):
    alone, losses = run(images, tmp_path / "alone", SimCLRTraining(num_views=2))
    monkeypatch.setattr(blocks, "TOGETHER", 12)
    jobs_together = blocks.list_jobs(list_blocks(SHIFTS, images), None)
    assert [len(job.blocks) for job in jobs_together] == [2, 2, 1]
    together, losses_together = run(images, tmp_path / "together", SimCLRTraining(num_views=2))
    same = [name for name in alone.columns if name != "milliseconds"]
    pd.testing.assert_frame_equal(alone[same], together[same], rtol=1e-5)
    np.testing.assert_allclose(losses, losses_together, rtol=1e-5)


def test_several_sweeps_give_what_each_gives_alone(images, tmp_path):
    network, statistics = networks.source_statistics("resnet", torch.float32)
    tasks = [Task(network, method, LOOP, statistics, seed=3) for method in (ActMAD(), TENT())]
    alone = [
        run(images, tmp_path / f"alone-{number}", task.method, images_per_step=6)
        for number, task in enumerate(tasks)
    ]
    for workers in (0, 2):
        counts = [[], []]
        with ExitStack() as stack:
            works = [stack.enter_context(Work(tmp_path / f"{workers}-{n}")) for n in range(2)]
            sweeps = [
                Sweep(Experiment(task, images), SHIFTS, work, "model")
                for task, work in zip(tasks, works, strict=True)
            ]
            with adapting(sweeps, Machine(workers=workers, images_per_step=6)) as finish:
                together = [finish(count.append) for count in counts]
        for actual, expected, count in zip(together, alone, counts, strict=True):
            assert_same(actual, expected)
            assert sum(count) == 6 * len(SHIFTS)


def test_distances_that_are_known_of_one_network_are_not_taken_for_anothers(images, tmp_path):
    found = [networks.source_statistics(kind, torch.float32) for kind in ("resnet", "groupnorm")]
    shown, distances = as_images(torch.from_numpy(images.pixels)), []
    with ExitStack() as stack:
        sweeps = [
            Sweep(
                Experiment(Task(network, TENT(), STREAM_LOOP, statistics), images),
                SHIFTS[:1],
                stack.enter_context(Work(tmp_path / str(number))),
                "model",
            )
            for number, (network, statistics) in enumerate(found)
        ]
        with adapting(sweeps, Machine()) as finish:
            for network, statistics in found:
                _, expected = logits_and_distance(network, shown, statistics)
                distances.append(finish(lambda _count: None).table["distance"])
                np.testing.assert_allclose(distances[-1], expected, rtol=1e-4)
    assert (abs(distances[0] - distances[1]) > 1e-2).all()


def test_whether_network_and_method_fit_is_checked_once_for_each_sweep(
    images, tmp_path, monkeypatch
):
    checked = []
    monkeypatch.setattr(
        adapter, "check", lambda _network, _images, *rest, **_: checked.append(rest[0])
    )
    for method in (ActMAD(), TENT()):
        run(images, tmp_path / repr(method), method)
    assert checked == [ActMAD(), TENT()]


@pytest.mark.slow
def test_ranks_and_a_kill_change_no_bit(images, tmp_path):
    """Ten blocks: on one rank, on two, and on two of which one is killed, resumed by three."""
    torch.set_num_threads(1)
    for name in ("alone", "two", "killed"):
        (tmp_path / name).mkdir()
    alone, blocks = share(open_fabric("cpu", "32"), images, tmp_path / "alone")
    assert blocks == 10
    results = on_ranks(share, tmp_path / "a", images, tmp_path / "two", None, 2)
    (first_result, first_calls), (second_result, second_calls) = results
    assert second_result is None
    assert (first_calls, second_calls) == (0, 0)  # all calls are in the ranks' workers
    assert_same(first_result, alone)

    def killed(fabric, *arguments):
        return share(fabric, *arguments, die_at=3 if fabric.global_rank else None)

    assert start(killed, tmp_path / "b", images, tmp_path / "killed") == [1, -signal.SIGKILL]
    assert len(list((tmp_path / "killed").glob("*.pt"))) == 5 + 2
    resumed = on_ranks(share, tmp_path / "c", images, tmp_path / "killed", ranks=3)
    assert sum(calls for _, calls in resumed) == 3
    assert_same(resumed[0][0], alone)


def test_a_block_that_no_rank_left_is_missed(images, tmp_path):
    experiment = Experiment(None, images)  # nothing is computed
    message = r"expected the results of model-clean-0 in .*, found none.*that all machines share"
    with pytest.raises(UserError, match=message):
        collect(Sweep(experiment, SHIFTS, Work(tmp_path), "model"))


def plain(count, prefix="img"):
    """Images whose pixels do not matter."""
    names = tuple(f"{prefix}-{number}" for number in range(count))
    return ImageSet(np.zeros((count, 1, 1, 3), np.uint8), np.zeros(count, np.int64), names, ("a",))


def test_blocks_hold_every_image_of_every_shift_once():
    blocks = list_blocks(SHIFTS[:2], plain(600))
    assert [(block.name, len(block.images)) for block in blocks] == [
        ("clean-0", 256),
        ("clean-1", 256),
        ("clean-2", 88),
        ("fog-2-0", 256),
        ("fog-2-1", 256),
        ("fog-2-2", 88),
    ]
    assert [index for block in blocks[:3] for index in block.images] == list(range(600))


def test_blocks_of_a_shift_with_its_own_images_hold_these_and_their_names_are_fit_for_files():
    shifts = [
        Shift(),
        Shift("photos/by night", 0, plain(257)),
        Shift("c/fog", 3, plain(2)),
        Shift("c/été", 0, plain(1)),
    ]
    blocks = list_blocks(shifts, plain(3))
    assert [(block.name, len(block.images)) for block in blocks] == [
        ("clean-0", 3),
        ("photos%2Fby night-0", 256),
        ("photos%2Fby night-1", 1),
        ("c%2Ffog-3-0", 2),
        ("c%2F%C3%A9t%C3%A9-0", 1),
    ]


def test_long_names_of_folders_name_files_all_the_same_and_no_two_the_same_one(tmp_path):
    shifts = [Shift(f"photos/{'夜' * 80}{end}") for end in ("", "a", "b")]
    names = {Block(shift, 0, range(1)).name for shift in shifts}
    assert len(names) == 3
    with Work(tmp_path / "work") as work:
        for name in names:
            work.save(f"model-0-candidate-1-{name}", {})
        assert len(list(work.folder.glob("*.pt"))) == 3


def test_a_shift_with_its_own_images_is_adapted_to_as_it_is_with_its_own_names_and_labels(
    images, tmp_path
):
    pixels = (networks.images(4, seed=41).permute(0, 2, 3, 1) * 255).byte().numpy()
    names = tuple(f"photos/{i}" for i in range(4))
    photos = ImageSet(pixels, np.array([2, -1, 0, 1]), names, tuple("abcd"))
    shifts = [Shift(), Shift("photos/night", 0, photos)]
    table, losses = run(images, tmp_path / "work", shifts=shifts)
    part = table[table["shift"] == "photos/night"]
    assert part["image_id"].tolist() == list(names)
    assert part["label"].tolist() == [2, -1, 0, 1]
    assert table.loc[table["shift"] == "clean", "image_id"].tolist() == list(images.image_ids)
    network, statistics = networks.source_statistics("resnet", torch.float32)
    expected = adapt(
        network,
        as_images(torch.from_numpy(pixels)),
        ActMAD(),
        LOOP,
        statistics=statistics,
        image_ids=names,
        seed=3,
    )
    assert_predictions(part, expected)
    np.testing.assert_allclose(part["loss_last"], expected.losses[:, -1], rtol=1e-4)
    # A set without severities counts as shifted too.
    np.testing.assert_allclose(losses, expected.losses.mean(0), rtol=1e-4)


def test_clean_images_of_another_set_count_as_clean(images, tmp_path):
    validation = images.take([4, 2])
    shifts = [Shift(images=validation), Shift("test", 0, images)]
    table, losses = run(images, tmp_path / "work", shifts=shifts)
    assert table.loc[table["shift"] == "clean", "image_id"].tolist() == ["img-4", "img-2"]
    shifted = table[table["shift"] == "test"]
    assert len(shifted) == 6
    assert losses[0] == pytest.approx(shifted["loss_first"].mean(), rel=1e-5)


def test_clean_images_alone_have_no_losses_of_shifted_ones(images, tmp_path):
    table, losses = run(images, tmp_path / "work", shifts=[Shift()])
    assert (len(table), losses.tolist()) == (6, [])


def test_an_image_whose_losses_grew_without_bound_is_no_part_of_their_mean():
    losses = torch.tensor([[1.0, 0.5], [2.0, torch.inf], [3.0, torch.nan], [5.0, 1.5]])
    assert mean_of_finite(losses).tolist() == pytest.approx([3.0, 1.0])
    assert mean_of_finite(losses[1:3]).isnan().all()


def test_a_method_measures_what_the_standard_statistics_lack():
    class OwnStatistics(ActMAD):
        needs = ("layers", "typical_image")

        def source_statistics(self, network, batches):
            return {"typical_image": torch.cat(list(batches)).mean(0)}

    network, statistics = networks.source_statistics("resnet")
    batches = [networks.images(3, seed=1), networks.images(2, seed=2)]
    complete = complete_statistics(statistics, OwnStatistics(), network, lambda: batches)
    torch.testing.assert_close(complete["typical_image"], torch.cat(batches).mean(0))
    assert set(complete) == {*statistics, "typical_image"}

    def unread():
        raise AssertionError

    assert complete_statistics(statistics, ActMAD(), network, unread) == statistics
