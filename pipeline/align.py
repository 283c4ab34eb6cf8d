"""Compare the gradients of a run's loss and the supervised loss, with labels, after the fact."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command
from tttlab.workflow.keys import aligning_key
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import Pair, list_pairs


def run(params: Params, names: Sequence[str]) -> None:
    """Write outputs/aligned/<run>/<model>.parquet: a row per (image, shift), for part of them."""
    ledger = Ledger("align")
    pairs = [pair for pair in list_pairs(params, names) if wanted(params, pair)]
    if missing := ledger.missing({pair: aligning_key(params, pair, ledger) for pair in pairs}):
        from tttlab.workflow.alignments import align_pairs  # seconds of imports

        align_pairs(params, missing, ledger)
    if not names:
        ledger.keep_only([str(pair) for pair in pairs])


def wanted(params: Params, pair: Pair) -> bool:
    """Tell whether a run trains on single images; on a stream no step belongs to one image."""
    settings = params.run_settings(*pair)
    return bool(params.alignment.images) and settings.trains and settings.protocol == "episodic"


if __name__ == "__main__":
    command.main(run, __doc__, "runs")
