"""Measure the source domain in every fine-tuned network: activation moments, projections."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tttlab.config.params import Params
from tttlab.workflow import command, places
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import Network, list_networks
from tttlab.workflow.training_keys import statistics_key


def run(params: Params, models: Sequence[str]) -> None:
    """Write outputs/source_stats/<model>/<seed>, with the checkpoint's hash."""
    networks, ledger = list_networks(params, models), Ledger("source_stats")
    keys = {network: statistics_key(params, network, ledger) for network in networks}
    for network, key in ledger.missing(keys).items():
        ledger.enter(str(network), key, measure(params, network, ledger.folder / str(network)))
    if not models:
        ledger.keep_only([str(network) for network in networks])


def measure(params: Params, item: Network, folder: Path) -> list[Path]:
    """Measure one network; return the files that are written."""
    from tttlab.networks import checkpoints, source_statistics
    from tttlab.runtime.devices import choose_device
    from tttlab.workflow.source_images import source_batches

    device = choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(places.OUTPUTS / "finetuned" / str(item), device)
    batches = source_batches(params, device)
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(getattr(network, "head", None), "project"):
        statistics |= source_statistics.projection_bank(
            network, batches, params.source_stats.bank_size
        )
    # DVC may have linked the files of earlier ones to its cache.
    shutil.rmtree(folder, ignore_errors=True)
    source_statistics.save(statistics, folder, checkpoint=about["sha256"], images=batches.count)
    print(f"{item.model}: {len(statistics)} statistics of {batches.count} source images")
    return sorted(folder.iterdir())


if __name__ == "__main__":
    command.main(run, __doc__, "models")
