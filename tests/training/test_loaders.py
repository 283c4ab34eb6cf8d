import numpy as np
import pytest
import torch
from albumentations import ColorJitter, Compose, RandomResizedCrop

from tests.helpers import trainings
from tttlab.data.pixels import as_images
from tttlab.data.views import Augmentation
from tttlab.errors import UserError
from tttlab.training.loaders import (
    EpochBatches,
    Item,
    SeededView,
    Views,
    build_transform,
    open_loader,
    reporting_lost_workers,
)

TWO = {"objective": Views(2, trainings.VIEWS), "classify": Views(1, trainings.VIEWS)}


def batches(epoch: int, workers: int = 0, seed: int = 5) -> list[dict]:
    loader = open_loader(trainings.image_set(), TWO, batch_size=8, seed=seed, workers=workers)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same(left: list[dict], right: list[dict]) -> None:
    for one, other in zip(left, right, strict=True):
        assert all(
            torch.equal(one[name], other[name]) for name in ("objective", "classify", "labels")
        )


def test_batches_do_not_depend_on_the_number_of_workers_and_every_epoch_has_its_own():
    images = trainings.image_set()
    one, many = (
        open_loader(images, TWO, batch_size=8, seed=5, workers=workers) for workers in (0, 2)
    )
    for epoch in (1, 2, 1):  # the workers persist: they must follow the epoch, forwards and back
        one.sampler.set_epoch(epoch)
        many.sampler.set_epoch(epoch)
        assert_same(list(one), list(many))
    assert not torch.equal(batches(1)[0]["objective"], batches(2)[0]["objective"])
    assert not torch.equal(batches(1)[0]["objective"], batches(1, seed=6)[0]["objective"])


def test_a_view_depends_on_its_own_key_alone():
    images = trainings.image_set()
    wanted = SeededView(build_transform(trainings.VIEWS, trainings.SIZE), 5, "objective", 1)
    seen = 0
    for batch, indices in zip(batches(4), order(4), strict=True):
        for place, index in enumerate(indices):
            view = wanted(Item(images.pixels[index], images.image_ids[index], 4))
            np.testing.assert_array_equal(batch["objective"][place, 1].numpy(), view)
            assert batch["labels"][place] == images.labels[index]
            assert not torch.equal(batch["objective"][place, 0], batch["objective"][place, 1])
            seen += 1
    assert seen == len(images)


def order(epoch: int) -> list[list[int]]:
    sampler = EpochBatches(22, 8, 5)
    sampler.set_epoch(epoch)
    return [[index for _, index in batch] for batch in sampler]


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(22, 8, [8, 7, 7]), (9, 8, [5, 4]), (5, 8, [5]), (16, 8, [8, 8])]
)
def test_every_image_once_per_epoch_in_batches_of_almost_one_size(count, size, sizes):
    sampler = EpochBatches(count, size, seed=0)
    found = list(sampler)
    assert [len(batch) for batch in found] == sizes
    assert len(sampler) == len(sizes)
    assert sorted(index for batch in found for _, index in batch) == list(range(count))


def test_ranks_share_an_epoch_out_in_equal_numbers_of_batches():
    ranks = [list(EpochBatches(23, 4, seed=0, rank=rank, ranks=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {index for batches in ranks for batch in batches for _, index in batch} == set(range(23))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_parts_make_up_the_batches_of_one_process(ranks):
    whole, parts = (
        EpochBatches(23, 8, seed=0),
        [EpochBatches(23, 8, 0, rank, ranks) for rank in range(ranks)],
    )
    for sampler in (whole, *parts):
        sampler.set_epoch(3)
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert batch == [pair for piece in pieces for pair in piece]
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert [share.whole for share in parts[0].shares] == [len(batch) for batch in whole]


def test_a_batch_has_an_image_for_every_rank():
    with pytest.raises(
        UserError, match="at least one image for each of 4 processes, found batches of 3"
    ):
        EpochBatches(9, 3, seed=0, rank=0, ranks=4)


def test_crop_and_jitter_are_drawn_independently():
    """With the library's own set_random_seed a large crop is a bright one: every step would start at the same seed."""
    view = SeededView(
        Compose(
            [
                RandomResizedCrop((8, 8), scale=(0.2, 1), ratio=(1, 1)),
                ColorJitter((0.6, 1.4), (1, 1), (1, 1), (0, 0), p=1),
            ]
        ),
        0,
        "objective",
        0,
    )
    ramp = np.zeros((64, 64, 3), np.uint8) + np.arange(50, 178, 2, dtype=np.uint8)[:, None]
    drawn = [view(Item(ramp, str(number), 1)).astype(float)[..., 0] for number in range(300)]
    areas = [
        image.std() / image.mean() for image in drawn
    ]  # of a ramp: grows with the crop, and no factor changes it
    assert abs(np.corrcoef(areas, [image.mean() for image in drawn])[0, 1]) < 0.45
    assert np.std(areas) > 0.02


def test_no_augmentation_leaves_square_images_as_they_are():
    pixels = trainings.image_set().pixels[0]
    transform = build_transform(Augmentation(min_scale=1, flip=False, jitter=0), trainings.SIZE)
    found = SeededView(transform, 0, "objective", 0)(Item(pixels, "a", 1))
    assert found.shape == pixels.shape
    np.testing.assert_array_equal(found, pixels)


def test_pixels_become_images():
    pixels = torch.tensor([[[[0, 51, 255], [10, 20, 30]]]], dtype=torch.uint8)  # 1 × 1 × 2 × 3
    expected = torch.tensor([[[[0.0, 10 / 255]], [[0.2, 20 / 255]], [[1.0, 30 / 255]]]])
    torch.testing.assert_close(as_images(pixels), expected)
    assert as_images(pixels[None, None]).shape == (1, 1, 1, 3, 1, 2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"pid 7\) is killed by signal: Killed\.",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_lost_worker_is_told_whatever_its_loss_interrupts(error, told):
    with (
        pytest.raises(
            UserError, match=rf"^a process that augments images was lost \(.*{told}\): memory"
        ),
        reporting_lost_workers(),
    ):
        raise error


def test_other_errors_of_a_training_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), reporting_lost_workers():
        raise RuntimeError("size mismatch")
