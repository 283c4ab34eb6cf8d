"""Choose runs' settings on labeled source images under corruptions that are never tested on."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command
from tttlab.workflow.keys import tuning_key
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import list_pairs
from tttlab.workflow.tuned import is_scored, untuned, write_choice


def run(params: Params, names: Sequence[str]) -> None:
    """Write outputs/tuned/<run>/<model>.json: the settings, the gate and the runners-up."""
    pairs, ledger = list_pairs(params, names), Ledger("tune")
    scored = [pair for pair in pairs if params.tune.enabled and is_scored(params, pair)]
    for pair in pairs:
        if pair not in scored:
            ledger.enter(str(pair), "", [write_choice(pair, untuned(params, pair))])
    if missing := ledger.missing({pair: tuning_key(params, pair, ledger) for pair in scored}):
        from tttlab.workflow.tunings import tune_pairs  # seconds of imports

        tune_pairs(params, missing, ledger)
    if not names:
        ledger.keep_only([str(pair) for pair in pairs])


if __name__ == "__main__":
    command.main(run, __doc__, "runs")
