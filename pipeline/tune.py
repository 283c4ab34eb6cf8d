"""Choose one run's settings on labeled source images under corruptions that are never tested on."""

import json
from pathlib import Path
from typing import Any

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, name: str) -> None:
    """Write outputs/tuned/<run>.json: for every model the settings that `adapt` takes, the gate, and the runners-up."""
    chosen = {model: params.run_settings(name, model) for model in params.models_of(name)}
    found = {
        model: {
            "tuned": False,
            "settings": own.values(),
            "default": own.values(),
            "candidates": [],
            "gate": None,
        }
        for model, own in chosen.items()
    }
    searched = [model for model, own in chosen.items() if params.tune.enabled and own.search]
    target = places.OUTPUTS / "tuned" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    if searched:
        from tttlab.workflow.tunings import open_tuning, tune_model  # seconds of imports

        with open_tuning(params, name, searched) as work:
            found |= {model: tune_model(params, name, model, work) for model in searched}
            write(target, found)
    else:
        write(target, found)


def write(target: Path, found: dict[str, Any]) -> None:
    """Write the choices; a file that is there is whole."""
    target.with_suffix(".partial").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    target.with_suffix(".partial").replace(target)


if __name__ == "__main__":
    command.main(run, __doc__, "run")
