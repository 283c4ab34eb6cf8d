"""A run's settings on a model: the file that `tune` writes and the later stages read."""

import json
from pathlib import Path
from typing import Any

from tttlab.config.params import Params
from tttlab.workflow import places
from tttlab.workflow.ledger import written_whole
from tttlab.workflow.pieces import Pair


def is_scored(params: Params, pair: Pair) -> bool:
    """Tell whether tuning scores a run: it searches, or it acts without training.

    A control without a search is scored as it is, for the strongest control is the one that scored
    highest (`tttlab.evaluation.controls`).
    """
    settings = params.run_settings(*pair)
    return bool(settings.search) or settings.is_control


def untuned(params: Params, pair: Pair) -> dict[str, Any]:
    """Give the choice of a run without a search: the values of params.yaml."""
    values = params.run_settings(*pair).values()
    return {
        "tuned": False,
        "settings": values,
        "default": values,
        "candidates": [],
        "gate": None,
    }


def choice_file(run: str, model: str) -> Path:
    """Give the path of the choice for a run and a model."""
    return places.OUTPUTS / "tuned" / run / f"{model}.json"


def write_choice(pair: Pair, choice: dict[str, Any]) -> Path:
    """Write a choice, unless its file has this content already."""
    file, text = choice_file(*pair), json.dumps(choice, indent=2) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return file
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
