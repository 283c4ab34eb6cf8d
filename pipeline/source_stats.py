"""Measure the source domain through a fine-tuned network: activation moments, and projections as negatives."""

import pipeline
from tttlab.params import Params


def run(params: Params, model: str) -> None:
    """Write outputs/source_stats/<model>, tied to the checkpoint by its hash."""
    import torch

    from tttlab import checkpoints, source_statistics
    from tttlab.data import ImageSet, balanced_subset
    from tttlab.devices import choose_device
    from tttlab.loaders import as_images

    settings, device = params.source_stats, choose_device(params.machine.device)
    network, about = checkpoints.load(pipeline.OUTPUTS / "finetuned" / model, device)
    source = ImageSet.load(pipeline.OUTPUTS / "data" / "labeled_train")
    chosen = balanced_subset(source.image_ids, source.labels, settings.images, params.seed, "source_stats")
    images = as_images(torch.from_numpy(source.pixels[chosen]))
    batches = [batch.to(device) for batch in images.split(256)]
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(network.head, "project"):
        statistics |= source_statistics.projection_bank(network, batches, settings.bank_size)
    source_statistics.save(statistics, pipeline.OUTPUTS / "source_stats" / model, checkpoint=about["sha256"],
                           images=len(chosen))  # fmt: skip
    print(f"{model}: {len(statistics)} statistics of {len(chosen)} source images")


if __name__ == "__main__":
    pipeline.main(run, __doc__, item="model")
