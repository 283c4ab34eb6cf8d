from dataclasses import replace

import numpy as np
import pytest
import torch
from albumentations import ColorJitter, Compose, RandomResizedCrop

from tests.helpers import trainings
from tttlab.config.inner_loop import Augmentation
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.training.loaders import (
    AugmentedImages,
    Changes,
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
    for left_batch, right_batch in zip(left, right, strict=True):
        for name in ("objective", "classify", "labels"):
            assert torch.equal(left_batch[name], right_batch[name]), name


def test_batches_do_not_depend_on_the_number_of_workers_and_every_epoch_has_its_own():
    images = trainings.image_set()
    alone = open_loader(images, TWO, batch_size=8, seed=5, workers=0)
    with_workers = open_loader(images, TWO, batch_size=8, seed=5, workers=2)
    for epoch in (1, 2, 1):  # persistent workers must follow the epoch, forwards and backwards
        alone.sampler.set_epoch(epoch)
        with_workers.sampler.set_epoch(epoch)
        assert_same(list(alone), list(with_workers))
    assert not torch.equal(batches(1)[0]["objective"], batches(2)[0]["objective"])
    assert not torch.equal(batches(1)[0]["objective"], batches(1, seed=6)[0]["objective"])


def test_a_view_depends_on_its_own_key_alone():
    images = trainings.image_set()
    second_view = SeededView(build_transform(trainings.VIEWS, trainings.SIZE), 5, "objective", 1)
    count = 0
    for batch, indices in zip(batches(4), order(4), strict=True):
        for row, index in enumerate(indices):
            view = second_view(Item(images.pixels[index], images.image_ids[index], 4))
            np.testing.assert_array_equal(batch["objective"][row, 1].numpy(), view)
            assert batch["labels"][row] == images.labels[index]
            assert not torch.equal(batch["objective"][row, 0], batch["objective"][row, 1])
            count += 1
    assert count == len(images)


def order(epoch: int) -> list[list[int]]:
    sampler = EpochBatches(22, 8, 5)
    sampler.set_epoch(epoch)
    return [[index for _, index in batch] for batch in sampler]


def test_the_order_depends_on_epoch_and_seed():
    def order(epoch: int, seed: int) -> list[int]:
        sampler = EpochBatches(22, 8, seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    orders = [order(*key) for key in ((1, 5), (1, 5), (2, 5), (1, 6))]
    assert orders[0] == orders[1]
    assert orders[0] not in orders[2:]


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(22, 8, [8, 7, 7]), (9, 8, [5, 4]), (5, 8, [5]), (16, 8, [8, 8])]
)
def test_every_image_once_per_epoch_in_batches_of_almost_one_size(count, size, sizes):
    sampler = EpochBatches(count, size, seed=0)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == sizes
    assert len(sampler) == len(sizes)
    assert sorted(index for batch in batches for _, index in batch) == list(range(count))


def test_ranks_share_an_epoch_out_in_equal_numbers_of_batches():
    ranks = [list(EpochBatches(23, 4, seed=0, rank=rank, ranks=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {index for batches in ranks for batch in batches for _, index in batch} == set(range(23))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_parts_make_up_the_batches_of_one_process(ranks):
    whole = EpochBatches(23, 8, seed=0)
    parts = [EpochBatches(23, 8, 0, rank, ranks) for rank in range(ranks)]
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
    """The library's set_random_seed gives every transform one seed: large crops would be bright."""
    crop = RandomResizedCrop((8, 8), scale=(0.2, 1), ratio=(1, 1))
    jitter = ColorJitter((0.6, 1.4), (1, 1), (1, 1), (0, 0), p=1)
    view = SeededView(Compose([crop, jitter]), 0, "objective", 0)
    ramp = np.zeros((64, 64, 3), np.uint8) + np.arange(50, 178, 2, dtype=np.uint8)[:, None]
    views = [view(Item(ramp, str(number), 1)).astype(float)[..., 0] for number in range(300)]
    # On a ramp this contrast grows with the crop, and no brightness factor changes it.
    contrasts = [image.std() / image.mean() for image in views]
    brightness = [image.mean() for image in views]
    assert abs(np.corrcoef(contrasts, brightness)[0, 1]) < 0.45
    assert np.std(contrasts) > 0.02


def test_no_augmentation_leaves_square_images_as_they_are():
    pixels = trainings.image_set().pixels[0]
    transform = build_transform(Augmentation(min_scale=1, flip=False, jitter=0), trainings.SIZE)
    for number in range(20):
        view = SeededView(transform, 0, "objective", number)(Item(pixels, "a", 1))
        np.testing.assert_array_equal(view, pixels)


def test_jitter_turns_hues():
    """Brightness, contrast and saturation leave the order of the three colours as it is."""
    transform = build_transform(Augmentation(min_scale=1, flip=False, jitter=1), trainings.SIZE)
    pixels = np.full((trainings.SIZE, trainings.SIZE, 3), (180, 120, 60), np.uint8)
    views = [
        SeededView(transform, 0, "objective", number)(Item(pixels, "a", 1))[0, 0].astype(int)
        for number in range(20)
    ]
    assert any(red < green or green < blue for red, green, blue in views)


def test_pixels_become_images():
    pixels = torch.tensor([[[[0, 51, 255], [10, 20, 30]]]], dtype=torch.uint8)  # 1 × 1 × 2 × 3
    expected = torch.tensor([[[[0.0, 10 / 255]], [[0.2, 20 / 255]], [[1.0, 30 / 255]]]])
    torch.testing.assert_close(as_images(pixels), expected)
    assert as_images(pixels[None, None]).shape == (1, 1, 1, 3, 1, 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"pid 7\) is killed by signal: Killed\.",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_lost_worker_is_told_whatever_its_loss_interrupts(error, reason):
    message = rf"^a process that augments images was lost \(.*{reason}\): memory"
    with pytest.raises(UserError, match=message), reporting_lost_workers():
        raise error


def test_other_errors_of_a_training_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), reporting_lost_workers():
        raise RuntimeError("size mismatch")


@pytest.mark.parametrize("name", Changes._fields)
def test_a_share_of_the_images_is_changed_anew_in_every_epoch(name):
    images = trainings.image_set(300)
    data = AugmentedImages(images, TWO, seed=5, changes=Changes(**{name: 0.4}))
    changed = {}
    for epoch in (1, 2):
        shown = [data.pixels(index, epoch) for index in range(len(images))]
        for index in range(20):  # every view of an image draws on the same pixels
            np.testing.assert_array_equal(shown[index], data.pixels(index, epoch))
        changed[epoch] = {
            index for index, pixels in enumerate(shown) if (pixels != images.pixels[index]).any()
        }
        assert 90 < len(changed[epoch]) < 150  # 120 ± 3.5 standard deviations
    assert len(changed[1] & changed[2]) < 80  # of about 48


def test_of_two_shares_no_image_has_both_changes():
    images = trainings.image_set(300)
    images.pixels.setflags(write=False)  # as files are mapped
    both, one = (
        AugmentedImages(images, TWO, seed=5, changes=Changes(0.3, augmix)) for augmix in (0.4, 0)
    )
    counts = {"perturbed": 0, "mixed": 0}
    for index in range(300):
        plain, perturbed = images.pixels[index], one.pixels(index, 1)
        found = both.pixels(index, 1)
        if (perturbed != plain).any():
            np.testing.assert_array_equal(found, perturbed)
            counts["perturbed"] += 1
        else:
            counts["mixed"] += bool((found != plain).any())
    assert 62 < counts["perturbed"] < 118  # 90 and
    assert 90 < counts["mixed"] < 150  # 120 ± 3.5 standard deviations


@pytest.mark.parametrize("name", Changes._fields)
def test_views_are_drawn_of_the_changed_image(name):
    images = trainings.image_set(8)
    data = AugmentedImages(images, TWO, seed=5, changes=Changes(**{name: 1.0}))
    shown = np.stack([data.pixels(index, 3) for index in range(8)])
    already = AugmentedImages(replace(images, pixels=shown), TWO, seed=5)
    batch, expected = ([each[[(3, index) for index in range(8)]]] for each in (data, already))
    assert_same(batch, expected)
    plain = AugmentedImages(images, TWO, seed=5)[[(3, index) for index in range(8)]]
    assert not torch.equal(plain["classify"], batch[0]["classify"])
