"""Augmented batches for training: every view from its own random stream, so that workers never change a result."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import albumentations as A
import cv2
import numpy as np
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tttlab.data.image_sets import ImageSet
from tttlab.data.views import Augmentation
from tttlab.errors import UserError
from tttlab.runtime.ranks import Share
from tttlab.seeding import numpy_generator, stream_seed


class Views(NamedTuple):
    """How many views of an image are drawn, and how strong they are."""

    count: int
    augmentation: Augmentation


class Item(NamedTuple):
    """One image in one epoch: ``pixels (H, W, 3)`` uint8."""

    pixels: np.ndarray
    image_id: str
    epoch: int


def build_transform(augmentation: Augmentation, image_size: int) -> A.Compose:
    """Compose crop, mirroring and colour jitter as SimCLR has them, without what small images do not bear (blur, grey).

    Args:
        augmentation: the strength.
        image_size: side of the result, pixels.
    """
    spread, strength = 0.8 * augmentation.jitter, augmentation.jitter
    factors = (1 - spread, 1 + spread)
    steps = [
        A.RandomResizedCrop(
            (image_size, image_size), scale=(augmentation.min_scale, 1), ratio=(3 / 4, 4 / 3)
        ),
        *([A.HorizontalFlip()] if augmentation.flip else []),
        *(
            [A.ColorJitter(factors, factors, factors, (-0.2 * strength, 0.2 * strength), p=0.8)]
            if strength
            else []
        ),
    ]
    return A.Compose(steps)


class SeededView:
    """One random view of an image from the stream of (seed, name, epoch, image, number)."""

    def __init__(self, transform: A.Compose, seed: int, name: str, number: int) -> None:
        self.transform, self.seed, self.name, self.number = transform, seed, name, number

    def __call__(self, item: Item) -> np.ndarray:
        """Draw the view ``(S, S, 3)`` uint8."""
        key = stream_seed(self.seed, "augment", self.name, item.epoch, item.image_id, self.number)
        # Not set_random_seed: that starts every step of the composition at the same seed, so that the area of the crop
        # and the brightness rise and fall together (correlation 0.99).
        self.transform.set_random_state(np.random.default_rng(key), random.Random(key))
        return self.transform(image=item.pixels)["image"]


class AugmentedImages(Dataset):
    """Whole batches of views and labels; an entry is asked for by its (epoch, image) pairs."""

    def __init__(self, images: ImageSet, views: Mapping[str, Views], seed: int) -> None:
        self.images = images
        self.transforms = {}
        for name, (count, augmentation) in views.items():
            transform = build_transform(augmentation, images.pixels.shape[1])
            self.transforms[name] = MultiViewTransform(
                [SeededView(transform, seed, name, v) for v in range(count)]
            )

    def __getitem__(self, batch: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Draw a batch: per name ``(N, V, S, S, 3)`` uint8, and ``labels (N,)``."""
        images = self.images
        items = [
            Item(images.pixels[index], images.image_ids[index], epoch) for epoch, index in batch
        ]
        views = {
            name: torch.from_numpy(
                np.stack([view for item in items for view in draw(item)])
            ).unflatten(0, (len(items), -1))
            for name, draw in self.transforms.items()
        }
        return views | {"labels": torch.from_numpy(images.labels[[index for _, index in batch]])}


class EpochBatches(Sampler):
    """Every image once per epoch, in an order drawn from (seed, epoch), in batches whose sizes differ by at most one.

    No image is dropped, and no batch is left with the one image that BatchNorm cannot take. The whole batches are the same
    for any number of ranks; each rank gets its `Share` of every one, and no image is repeated to make these equal.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        batches = -(-count // batch_size)
        if count // batches < ranks:
            raise UserError(
                f"batch_size: expected at least one image for each of {ranks} processes, found batches of "
                f"{count // batches}; raise it or start fewer processes"
            )
        self.shares = [
            Share(len(batch), rank, ranks) for batch in np.array_split(np.empty(count), batches)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = numpy_generator(self.seed, "order", self.epoch).permutation(self.count)
        for batch, share in zip(np.array_split(order, len(self.shares)), self.shares, strict=True):
            yield [(self.epoch, int(index)) for index in batch[share.own]]


class Loader(DataLoader):
    """A data loader whose workers' mistakes are told as everyone's are: torch would put their traceback into the message."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def open_loader(
    images: ImageSet,
    views: Mapping[str, Views],
    batch_size: int,
    seed: int,
    *,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader:
    """Open the stream of augmented batches; call ``loader.sampler.set_epoch`` before each pass.

    Args:
        images: what to augment.
        views: the views of each image, by name.
        batch_size: images per batch, at most, on all ranks together.
        seed: the experiment's seed.
        workers: processes that augment; 0 augments in this one.
        rank: number of this process among those that train together.
        ranks: how many they are.

    Raises:
        UserError: there are more ranks than images in a batch.
    """
    return Loader(
        AugmentedImages(images, views, seed),
        batch_size=None,  # the sampler hands out whole batches
        sampler=EpochBatches(len(images), batch_size, seed, rank, ranks),
        num_workers=workers,
        worker_init_fn=_single_threaded,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else every pass would draw from the global stream
        pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def told_of_lost_workers() -> Iterator[None]:
    """Say in one line that the system ended a worker of a loader.

    torch raises a RuntimeError wherever the main thread then is; but if that is just taking over a batch, its connection to the
    worker may break before torch knows why.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"a process that augments images was lost ({reason}): memory probably ran out; lower machine.workers; "
            "whole epochs are kept, and the same command goes on"
        ) from error


def _single_threaded(_worker: int) -> None:
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
