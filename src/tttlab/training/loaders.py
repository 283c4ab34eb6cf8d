"""Augmented batches for training.

Every view has its own random stream, so that the number of workers never changes a result.
"""

import random
import signal
import threading
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

from tttlab.config.inner_loop import Augmentation
from tttlab.data.augmix import augmix
from tttlab.data.image_sets import ImageSet
from tttlab.data.perturbations import perturb
from tttlab.errors import UserError
from tttlab.runtime.ranks import Share
from tttlab.seeding import numpy_generator, stream_seed


class Views(NamedTuple):
    """How many views of an image are drawn, and how strong they are."""

    count: int
    augmentation: Augmentation


class Changes(NamedTuple):
    """Shares of the images that are changed, others in every epoch, before any view is drawn.

    Attributes:
        perturb: by `tttlab.data.perturbations`.
        augmix: by `tttlab.data.augmix`.
    """

    perturb: float = 0.0
    augmix: float = 0.0


UNCHANGED = Changes()


class Item(NamedTuple):
    """One image in one epoch: ``pixels (H, W, 3)`` uint8."""

    pixels: np.ndarray
    image_id: str
    epoch: int


def build_transform(augmentation: Augmentation, image_size: int) -> A.Compose:
    """Compose SimCLR's crop, mirroring and colour jitter.

    SimCLR's blur and grey are left out: small images lose too much by them.

    Args:
        augmentation: the strength.
        image_size: side of the result, pixels.
    """
    size, scale = (image_size, image_size), (augmentation.min_scale, 1)
    steps = [A.RandomResizedCrop(size, scale=scale, ratio=(3 / 4, 4 / 3))]
    if augmentation.flip:
        steps.append(A.HorizontalFlip())
    strength = augmentation.jitter
    if strength:
        factors = (1 - 0.8 * strength, 1 + 0.8 * strength)
        hues = (-0.2 * strength, 0.2 * strength)
        steps.append(A.ColorJitter(factors, factors, factors, hues, p=0.8))
    return A.Compose(steps)


class SeededView:
    """Draws one random view of an image from the stream (seed, name, epoch, image, number)."""

    def __init__(self, transform: A.Compose, seed: int, name: str, number: int) -> None:
        self.transform, self.seed, self.name, self.number = transform, seed, name, number

    def __call__(self, item: Item) -> np.ndarray:
        """Draw the view ``(S, S, 3)`` uint8."""
        key = stream_seed(self.seed, "augment", self.name, item.epoch, item.image_id, self.number)
        # Not set_random_seed: it gives every transform the same seed, and then crop area and
        # brightness correlate at 0.99.
        self.transform.set_random_state(np.random.default_rng(key), random.Random(key))
        return self.transform(image=item.pixels)["image"]


class AugmentedImages(Dataset):
    """Whole batches of views and labels; a batch's index is its list of (epoch, image) pairs.

    All views of an image show the same `Changes`.
    """

    def __init__(
        self, images: ImageSet, views: Mapping[str, Views], seed: int, changes: Changes = UNCHANGED
    ) -> None:
        self.images, self.seed, self.changes = images, seed, changes
        self.transforms = {}
        for name, (count, augmentation) in views.items():
            transform = build_transform(augmentation, images.pixels.shape[1])
            seeded = [SeededView(transform, seed, name, number) for number in range(count)]
            self.transforms[name] = MultiViewTransform(seeded)

    def __getitem__(self, batch: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Draw a batch: per name ``(N, V, S, S, 3)`` uint8, and ``labels (N,)``."""
        images = self.images
        items = [
            Item(self.pixels(index, epoch), images.image_ids[index], epoch)
            for epoch, index in batch
        ]
        tensors = {}
        for name, draw in self.transforms.items():
            views = np.stack([view for item in items for view in draw(item)])
            tensors[name] = torch.from_numpy(views).unflatten(0, (len(items), -1))
        tensors["labels"] = torch.from_numpy(images.labels[[index for _, index in batch]])
        return tensors

    def pixels(self, index: int, epoch: int) -> np.ndarray:
        """Give an image as an epoch shows it, changed or not: ``(H, W, 3)`` uint8."""
        pixels = self.images.pixels[index]
        if not any(self.changes):
            return pixels
        generator = numpy_generator(self.seed, "perturb", epoch, self.images.image_ids[index])
        draw = generator.random()
        if draw < self.changes.perturb:
            return perturb(pixels, generator)
        return augmix(pixels, generator) if draw < sum(self.changes) else pixels


class EpochBatches(Sampler):
    """Every image once per epoch, in an order drawn from (seed, epoch).

    Batch sizes differ by at most one. So no image is dropped, and the last batch is not a single
    image, which BatchNorm cannot take. The whole batches are the same for any number of ranks. Each
    rank gets its `Share` of every batch; no image is repeated to make the shares equal.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        batches = -(-count // batch_size)
        if count // batches < ranks:
            raise UserError(
                f"batch_size: expected at least one image for each of {ranks} processes, "
                f"found batches of {count // batches}; raise it or start fewer processes"
            )
        sizes = [len(batch) for batch in np.array_split(np.empty(count), batches)]
        self.shares = [Share(size, rank, ranks) for size in sizes]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = numpy_generator(self.seed, "order", self.epoch).permutation(self.count)
        for batch, share in zip(np.array_split(order, len(self.shares)), self.shares, strict=True):
            yield [(self.epoch, int(index)) for index in batch[share.own]]


class Loader(DataLoader):
    """A data loader that re-raises a worker's `UserError` without torch's traceback in its text."""

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
    changes: Changes = UNCHANGED,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader:
    """Open the stream of augmented batches; call ``loader.sampler.set_epoch`` before each pass.

    Args:
        images: what to augment.
        views: the views of each image, by name.
        batch_size: largest number of images per batch, on all ranks together.
        seed: the experiment's seed.
        changes: shares of the images that are changed in an epoch.
        workers: processes that augment; 0 augments in this one.
        rank: number of this process among those that train together.
        ranks: number of processes that train together.

    Raises:
        UserError: there are more ranks than images in a batch.
    """
    return Loader(
        AugmentedImages(images, views, seed, changes),
        batch_size=None,  # the sampler hands out whole batches
        sampler=EpochBatches(len(images), batch_size, seed, rank, ranks),
        num_workers=workers,
        worker_init_fn=_single_threaded,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise every pass draws from the global stream
        pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def reporting_lost_workers() -> Iterator[None]:
    """Raise a one-line error when the system kills a worker of a loader.

    torch raises a RuntimeError wherever the main thread is at that moment. But while it receives a
    batch, the connection to the worker may break before torch knows the cause.

    Raises:
        UserError: a worker was killed.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        if threading.current_thread() is threading.main_thread():
            # Else torch raises the same again for the next worker that ends, even while this error
            # is being printed.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"a process that augments images was lost ({reason}): memory probably ran out; "
            "lower machine.workers; whole epochs are kept, and the same command goes on"
        ) from error


def _single_threaded(_worker: int) -> None:
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
