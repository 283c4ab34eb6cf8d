"""The images that represent the source domain."""

from pathlib import Path

import torch

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.splits import balanced_subset
from tttlab.networks.source_statistics import SourceImages
from tttlab.seeding import numpy_generator
from tttlab.workflow import places

BATCH = 32  # small enough for a method that processes a batch as a whole


def source_batches(params: Params, device: torch.device) -> SourceImages:
    """Open the labeled training images that represent the source domain, in batches on a device."""
    folder, size = places.OUTPUTS / "data" / "labeled_train", params.machine.images_per_step
    size = BATCH if size == "auto" else size
    return open_source_images(folder, params.source_stats.images, params.seed, size, device)


def open_source_images(
    folder: Path,
    count: int | None,
    seed: int,
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
) -> SourceImages:
    """Open source images of a set that `prepare` wrote, on a device.

    Args:
        folder: ``outputs/data/labeled_train``.
        count: how many, balanced by class; None: all.
        seed: of the choice, and of the order.
        batch_size: the most images at once.
        device: of the images.
    """
    source = ImageSet.load(folder)
    rows = balanced_subset(source.image_ids, source.labels, count, seed, "source_stats")
    # Folders come class by class, so the order is drawn at random.
    rows = numpy_generator(seed, "source_stats", "order").permutation(rows)

    def load(numbers: torch.Tensor) -> torch.Tensor:
        return as_images(torch.from_numpy(source.pixels[rows[numbers.numpy()]])).to(device)

    return SourceImages(load, len(rows), batch_size)
