"""Measure the source domain in a fine-tuned network: activation moments, projections."""

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, model: str, seed: int) -> None:
    """Write outputs/source_stats/<model>/<seed>, with the checkpoint's hash."""
    from tttlab.networks import checkpoints, source_statistics
    from tttlab.runtime.devices import choose_device
    from tttlab.workflow.source_images import source_batches

    device = choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(places.OUTPUTS / "finetuned" / model / str(seed), device)
    batches = source_batches(params, device)
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(getattr(network, "head", None), "project"):
        statistics |= source_statistics.projection_bank(
            network, batches, params.source_stats.bank_size
        )
    folder = places.OUTPUTS / "source_stats" / model / str(seed)
    source_statistics.save(statistics, folder, checkpoint=about["sha256"], images=batches.count)
    print(f"{model}: {len(statistics)} statistics of {batches.count} source images")


if __name__ == "__main__":
    command.main(run, __doc__, "model", "seed")
