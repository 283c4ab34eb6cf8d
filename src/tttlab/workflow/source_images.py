"""The images that represent the source domain."""

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
    source = ImageSet.load(places.OUTPUTS / "data" / "labeled_train")
    rows = balanced_subset(
        source.image_ids, source.labels, params.source_stats.images, params.seed, "source_stats"
    )
    # Folders come class by class, so the order is drawn at random.
    rows = numpy_generator(params.seed, "source_stats", "order").permutation(rows)

    def load(numbers: torch.Tensor) -> torch.Tensor:
        return as_images(torch.from_numpy(source.pixels[rows[numbers.numpy()]])).to(device)

    batch_size = params.machine.images_per_step
    return SourceImages(load, len(rows), BATCH if batch_size == "auto" else batch_size)
