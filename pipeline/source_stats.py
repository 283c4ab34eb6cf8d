"""Measure the source domain through a fine-tuned network: activation moments, and projections as negatives."""

from typing import TYPE_CHECKING

import pipeline
from tttlab.params import Params

if TYPE_CHECKING:
    from tttlab.source_statistics import SourceImages

BATCH = 32  # few enough for a method that looks at a batch as a whole


def run(params: Params, model: str, seed: int) -> None:
    """Write outputs/source_stats/<model>/<seed>, tied to the checkpoint by its hash."""
    from tttlab import checkpoints, source_statistics
    from tttlab.devices import choose_device

    device = choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(pipeline.OUTPUTS / "finetuned" / model / str(seed), device)
    batches = source_batches(params, device)
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(network.head, "project"):
        statistics |= source_statistics.projection_bank(network, batches, params.source_stats.bank_size)
    folder = pipeline.OUTPUTS / "source_stats" / model / str(seed)
    source_statistics.save(statistics, folder, checkpoint=about["sha256"], images=batches.count)
    print(f"{model}: {len(statistics)} statistics of {batches.count} source images")


def source_batches(params: Params, device) -> "SourceImages":
    """Take the labeled training images that stand for the source domain, in random order, in batches on a device."""
    import torch

    from tttlab.data import ImageSet, balanced_subset
    from tttlab.pixels import as_images
    from tttlab.seeding import numpy_generator
    from tttlab.source_statistics import SourceImages

    source = ImageSet.load(pipeline.OUTPUTS / "data" / "labeled_train")
    chosen = balanced_subset(source.image_ids, source.labels, params.source_stats.images, params.seed, "source_stats")
    chosen = numpy_generator(params.seed, "source_stats", "order").permutation(chosen)  # folders come class by class
    wish = params.machine.images_per_step
    return SourceImages(lambda places: as_images(torch.from_numpy(source.pixels[chosen[places.numpy()]])).to(device),
                        len(chosen), BATCH if wish == "auto" else wish)  # fmt: skip


if __name__ == "__main__":
    pipeline.main(run, __doc__, "model", "seed")
