"""The images that stand for the source domain."""

import torch

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.splits import balanced_subset
from tttlab.networks.source_statistics import SourceImages
from tttlab.seeding import numpy_generator
from tttlab.workflow import places

BATCH = 32  # few enough for a method that looks at a batch as a whole


def source_batches(params: Params, device: torch.device) -> SourceImages:
    """Take the labeled training images that stand for the source domain, in random order, in batches on a device."""
    source = ImageSet.load(places.OUTPUTS / "data" / "labeled_train")
    chosen = balanced_subset(
        source.image_ids, source.labels, params.source_stats.images, params.seed, "source_stats"
    )
    chosen = numpy_generator(params.seed, "source_stats", "order").permutation(
        chosen
    )  # folders come class by class
    wish = params.machine.images_per_step
    return SourceImages(
        lambda numbers: as_images(torch.from_numpy(source.pixels[chosen[numbers.numpy()]])).to(
            device
        ),
        len(chosen),
        BATCH if wish == "auto" else wish,
    )
