"""The number of images at once: it grows while that saves time and fits, and shrinks otherwise."""

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD
from tttlab.runtime import group_size
from tttlab.runtime.group_size import FIRST, Groups, GroupSize, in_groups

CPU = torch.device("cpu")


class Clock:
    """Stands in for the module's clock and for its free memory.

    The work takes ``seconds_per_image(size)`` and makes tensors of ``bytes_per_image``; ``busy`` is
    the share of it that is done.
    """

    def __init__(
        self, monkeypatch, seconds_per_image, bytes_per_image=0, free=10**12, busy=lambda _size: 1.0
    ):
        self.now, self.busy = 0.0, busy
        self.seconds_per_image, self.bytes_per_image = seconds_per_image, bytes_per_image
        monkeypatch.setattr(group_size.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(group_size, "free_bytes", lambda _device: free)

    def run(self, chooser, groups, left=10**6):
        sizes = []
        for _ in range(groups):
            with chooser.open(left, CPU) as group:
                sizes.append(group.size)
                group.work *= self.busy(group.size)
                torch.empty(group.size * self.bytes_per_image, dtype=torch.uint8)
                self.now += group.work * self.seconds_per_image(group.size)
        return sizes


def test_it_doubles_while_an_image_becomes_cheaper_and_settles_on_the_cheapest(monkeypatch):
    cost = {8: 1.0, 16: 0.6, 32: 0.5, 64: 0.49, 128: 0.1}
    sizes = Clock(monkeypatch, cost.__getitem__).run(GroupSize("auto"), 12)
    assert sizes == [8, 8, 16, 16, 32, 32] + [64] * 6  # 64 saves too little to try 128


def test_it_goes_back_when_more_is_slower(monkeypatch):
    sizes = Clock(monkeypatch, {8: 1.0, 16: 1.5}.__getitem__).run(GroupSize("auto"), 6)
    assert sizes == [8, 8, 16, 16, 8, 8]


def test_a_disturbed_measurement_is_made_up_for_by_the_second(monkeypatch):
    times = iter([9.0, 1.0, 0.5, 9.0, 0.49, 0.49, 1.0])
    sizes = Clock(monkeypatch, lambda _size: next(times)).run(GroupSize("auto"), 7)
    assert sizes == [8, 8, 16, 16, 32, 32, 32]


def test_images_that_were_left_alone_do_not_make_their_groups_look_cheap(monkeypatch):
    cost = {8: 1.0, 16: 0.6, 32: 0.5, 64: 0.5}
    clock = Clock(monkeypatch, cost.__getitem__, busy=lambda size: 0.1 if size == 8 else 1.0)
    assert clock.run(GroupSize("auto"), 9) == [8, 8, 16, 16, 32, 32, 64, 64, 32]


def test_it_does_not_grow_beyond_memory(monkeypatch):
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=100, free=5000)
    assert max(clock.run(GroupSize("auto"), 20)) == 32  # 64 images would need 6,400 bytes


def test_processes_that_work_side_by_side_share_what_is_free(monkeypatch):
    """Two processes that took 70 % each would be killed."""
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=100, free=5000)
    sizes = clock.run(GroupSize("auto", processes=2), 20)
    assert max(sizes) == 16  # 32 would need 3,200 of 1,750 bytes
    assert clock.run(GroupSize("auto", timed=False), 3) == [8, 35, 35]
    assert clock.run(GroupSize("auto", timed=False, processes=5), 3) == [8, 4, 4]  # of 700 bytes


def test_on_a_cpu_a_group_stays_small_whatever_is_free(monkeypatch):
    monkeypatch.setattr(group_size, "CPU_LIMIT", 2000)
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=100)
    assert max(clock.run(GroupSize("auto"), 20)) == 16
    assert clock.run(GroupSize("auto", timed=False), 3) == [8, 20, 20]


def test_the_first_group_is_stopped_before_it_takes_too_much(monkeypatch):
    """The system would kill the process; no error is raised on a CPU."""
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=1000, free=5000)
    for timed in (True, False):
        assert clock.run(GroupSize("auto", timed=timed), 6) == [8, 4, 2, 2, 2, 2]  # of 3,500 bytes
    assert clock.run(GroupSize("auto"), 1, left=1) == [1]
    clock.bytes_per_image = 6000
    message = r"one image does not fit into the memory of cpu; .*, or lower machine\.workers"
    with pytest.raises(UserError, match=message):
        clock.run(GroupSize("auto", processes=2), 4)


def test_images_that_were_left_alone_do_not_make_others_look_small(monkeypatch):
    """Seven of eight images stop after the first of four steps: the others take more than 800/8."""
    memory = {"bytes_per_image": 100, "free": 1500}
    clock = Clock(monkeypatch, lambda size: 1 / size, **memory, busy=lambda size: 0.34)
    assert clock.run(GroupSize("auto"), 3) == [8, 3, 3]  # of 1,050 bytes, 294 for each


def test_without_a_clock_it_is_the_largest_that_fits_every_time(monkeypatch):
    times = iter(np.random.default_rng(0).random(40))
    clock = Clock(monkeypatch, lambda _size: next(times))
    assert clock.run(GroupSize("auto", largest=256, timed=False), 4) == [8, 256, 256, 256]
    assert clock.run(GroupSize("auto", largest=5, timed=False), 3) == [5, 5, 5]
    assert clock.run(GroupSize("auto", largest=256, timed=False), 3, left=100) == [8, 100, 100]


def test_the_rest_of_the_images_tells_nothing_of_speed(monkeypatch):
    group = GroupSize("auto")
    assert Clock(monkeypatch, lambda _size: 1.0).run(group, 5, left=3) == [3] * 5
    assert group.size == FIRST


def test_a_wish_is_followed(monkeypatch):
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=10**4, free=1)
    assert clock.run(GroupSize(5), 4) == [5] * 4


def test_every_kind_of_work_has_a_size_of_its_own_from_one_wish():
    groups = Groups(3, processes=2)
    tent = groups.of("adapt", "tent")
    assert tent is groups.of("adapt", "tent")
    assert tent is not groups.of("adapt", "memo")
    assert groups.of("distance", largest=2).size == 3  # a fixed wish counts more than ``largest``
    assert Groups().of("distance", largest=2, timed=False).size == 2


def test_all_images_are_worked_on_once_and_in_order_though_memory_runs_out_on_the_way():
    done = []

    def work(part):
        if part.start >= 5 and part.stop - part.start > 2:
            raise MemoryError
        done.append(part)
        return list(range(part.start, part.stop))

    results = list(in_groups(work, 12, CPU, GroupSize(5)))
    assert results == [[0, 1, 2, 3, 4], [5, 6], [7, 8], [9, 10], [11]]
    assert len(done) == len(results)


class Greedy(ActMAD):
    """Runs out of memory with more than ``most`` images."""

    most = 2

    def source_statistics(self, network, batches):
        return {}

    def check(self, network):
        """Accept anything."""

    def views(self, network, images, generators):
        if len(images) > self.most:
            raise self.error
        return super().views(network, images, generators)

    error = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "error",
    [Greedy.error, RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
)
@pytest.mark.parametrize("wish", ["auto", 7])
def test_out_of_memory_halves_the_group_and_changes_no_result(wish, error):
    network, statistics = networks.source_statistics("resnet")
    images = networks.images(11, seed=50).double()
    loop, sizes = InnerLoop(steps=2, lr=1e-2, clip=1.0), []
    greedy = type("Greedy", (Greedy,), {"error": error})()
    halved = adapt(
        network,
        images,
        greedy,
        loop,
        statistics=statistics,
        images_per_step=wish,
        on_images=sizes.append,
    )
    plain = adapt(network, images, ActMAD(), loop, statistics=statistics)
    torch.testing.assert_close(halved.logits, plain.logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(halved.losses, plain.losses, atol=1e-10, rtol=1e-10)
    assert sum(sizes) == 11
    assert max(sizes) <= 2


def test_one_image_that_does_not_fit_is_a_users_error():
    network, statistics = networks.source_statistics("resnet")
    never = type("Never", (Greedy,), {"most": 0})()
    message = "one image does not fit into the memory of cpu; lower num_views"
    with pytest.raises(UserError, match=message):
        adapt(network, networks.images(4).double(), never, InnerLoop(), statistics=statistics)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    group = GroupSize("auto")
    with pytest.raises(RuntimeError, match="shapes"), group.open(10, CPU):
        raise RuntimeError("shapes do not fit")
    assert group.size == FIRST
