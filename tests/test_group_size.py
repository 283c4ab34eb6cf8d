"""The number of images at once: it grows while that pays and fits, and shrinks when memory runs out."""

import networks
import pytest
import torch

from tttlab import group_size
from tttlab.adapter import adapt
from tttlab.errors import UserError
from tttlab.group_size import FIRST, GroupSize
from tttlab.inner_loop import InnerLoop
from tttlab.methods.actmad import ActMAD

CPU = torch.device("cpu")


class Clock:
    """Stands in for the module's clock, and for its view of memory."""

    def __init__(self, monkeypatch, seconds_per_image, bytes_per_image=0, free=10**12, busy=lambda _size: 1.0):
        self.now, self.held, self.busy = 0.0, 0, busy
        self.seconds_per_image, self.bytes_per_image = seconds_per_image, bytes_per_image
        monkeypatch.setattr(group_size.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(group_size, "_peak", lambda _device: self.held)
        monkeypatch.setattr(group_size, "_free", lambda _device: free)

    def run(self, group, groups, left=10**6):
        sizes = []
        for _ in range(groups):
            with group.open(left, CPU) as one:
                sizes.append(one.size)
                one.work *= self.busy(one.size)
                self.now += one.work * self.seconds_per_image(one.size)
                self.held = max(self.held, one.size * self.bytes_per_image)
        return sizes


def test_it_doubles_while_an_image_becomes_cheaper_and_settles_on_the_cheapest(monkeypatch):
    cost = {8: 1.0, 16: 0.6, 32: 0.5, 64: 0.49, 128: 0.1}
    sizes = Clock(monkeypatch, cost.__getitem__).run(GroupSize("auto"), 12)
    assert sizes == [8, 8, 16, 16, 32, 32, 64, 64, 64, 64, 64, 64]  # 64 saves too little to look any further


def test_it_goes_back_when_more_is_slower(monkeypatch):
    sizes = Clock(monkeypatch, {8: 1.0, 16: 1.5}.__getitem__).run(GroupSize("auto"), 6)
    assert sizes == [8, 8, 16, 16, 8, 8]


def test_a_disturbed_measurement_is_made_up_for_by_the_second(monkeypatch):
    times = iter([9.0, 1.0, 0.5, 9.0, 0.49, 0.49, 1.0])
    sizes = Clock(monkeypatch, lambda _size: next(times)).run(GroupSize("auto"), 7)
    assert sizes == [8, 8, 16, 16, 32, 32, 32]


def test_images_that_were_left_alone_do_not_make_their_groups_look_cheap(monkeypatch):
    cost = {8: 1.0, 16: 0.6, 32: 0.5, 64: 0.5}
    sizes = Clock(monkeypatch, cost.__getitem__, busy=lambda size: 0.1 if size == 8 else 1.0).run(GroupSize("auto"), 9)
    assert sizes == [8, 8, 16, 16, 32, 32, 64, 64, 32]


def test_it_does_not_grow_beyond_memory(monkeypatch):
    clock = Clock(monkeypatch, lambda size: 1 / size, bytes_per_image=100, free=5000)
    assert max(clock.run(GroupSize("auto"), 20)) == 32  # 64 images would need 6,400 bytes


def test_the_rest_of_the_images_tells_nothing(monkeypatch):
    group = GroupSize("auto")
    assert Clock(monkeypatch, lambda _size: 1.0).run(group, 5, left=3) == [3] * 5
    assert group.size == FIRST


def test_a_wish_is_followed(monkeypatch):
    assert Clock(monkeypatch, lambda size: 1 / size).run(GroupSize(5), 4) == [5] * 4


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


@pytest.mark.parametrize("error", [Greedy.error, RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
@pytest.mark.parametrize("wish", ["auto", 7])
def test_out_of_memory_halves_the_group_and_changes_no_result(wish, error):
    network, statistics = networks.source_statistics("resnet")
    images, loop, done = networks.images(11, seed=50).double(), InnerLoop(steps=2, lr=1e-2, clip=1.0), []
    greedy = type("Greedy", (Greedy,), {"error": error})()
    found = adapt(network, images, greedy, loop, statistics=statistics, images_per_step=wish, on_images=done.append)
    plain = adapt(network, images, ActMAD(), loop, statistics=statistics)
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.losses, plain.losses, atol=1e-10, rtol=1e-10)
    assert sum(done) == 11
    assert max(done) <= 2


def test_one_image_that_does_not_fit_is_a_users_error():
    network, statistics = networks.source_statistics("resnet")
    never = type("Never", (Greedy,), {"most": 0})()
    with pytest.raises(UserError, match="one image does not fit into the memory of cpu; lower num_views"):
        adapt(network, networks.images(4).double(), never, InnerLoop(), statistics=statistics)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    group = GroupSize("auto")
    with pytest.raises(RuntimeError, match="shapes"), group.open(10, CPU):
        raise RuntimeError("shapes do not fit")
    assert group.size == FIRST
