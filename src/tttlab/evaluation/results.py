"""What the stages before `report` found: `outputs/metrics.json`, the tables, and how each run was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.errors import UserError

CONTROL = "none"  # the run that leaves the network as it is
REQUIRED = ("by_shift", "by_corruption", "by_severity")
OPTIONAL = ("reliability", "steps", "tuning", "alignment", "correlations", "distances")
# Columns of tables that hold names: of models, runs and shifts, which may be called 50, 1e5 or true, and of what we list.
NAMES = (
    "model",
    "run",
    "shift",
    "corruption",
    "reference",
    "target",
    "metric",
    "with",
    "setting",
    "settings",
    "choice",
    "level",
    "signal",
)


@dataclass(frozen=True)
class Results:
    """What `evaluate` and `adapt` left, for the models and runs of params.yaml.

    Attributes:
        models: Names in order.
        runs: Names in order.
        summary: ``outputs/metrics.json`` by (model, run).
        tables: ``outputs/tables/<name>.csv`` by name; an optional one that is missing is empty.
        adapted: ``outputs/runs/<run>.json`` by (model, run): losses, cost, settings, tuning, MLflow's run.
    """

    models: tuple[str, ...]
    runs: tuple[str, ...]
    summary: Mapping[tuple[str, str], Mapping[str, Any]]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    adapted: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, outputs: Path, pairs: Sequence[tuple[str, str]]) -> "Results":
        """Read them from the folder of outputs.

        Args:
            outputs: The folder.
            pairs: Every (model, run).

        Raises:
            UserError: A file is missing, or lacks one of the models and runs.
        """
        models, runs = (tuple(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
        metrics = _read_json(outputs / "metrics.json", "evaluate").get("runs", {})
        sidecars = {run: _read_json(outputs / "runs" / f"{run}.json", "evaluate") for run in runs}
        summary, adapted = {}, {}
        for model, run in pairs:
            if f"{model}/{run}" not in metrics:
                raise UserError(
                    f"{outputs / 'metrics.json'}: expected an entry {model}/{run}, found none; run `evaluate`"
                )
            if model not in sidecars[run]:
                raise UserError(
                    f"{outputs / 'runs' / run}.json: expected an entry {model}, found none; run `evaluate`"
                )
            summary[model, run] = metrics[f"{model}/{run}"]
            adapted[model, run] = sidecars[run][model]
        tables = {
            name: _read_table(outputs / "tables" / f"{name}.csv") for name in (*REQUIRED, *OPTIONAL)
        }
        return cls(models, runs, summary, tables, adapted)

    @property
    def labeled(self) -> bool:
        """Whether any accuracy is known."""
        return any(known(entry["accuracy_source"]) for entry in self.summary.values())

    @property
    def clean(self) -> bool:
        """Whether the accuracy on clean images is known."""
        return any(known(entry["clean_source"]) for entry in self.summary.values())

    @property
    def images(self) -> tuple[int, int]:
        """How many images there are under a shift, at least and at most; of the clean ones where there is nothing else."""
        table = self.rows("by_shift")
        shifted = table["shift"] != "clean"
        counts = table.loc[shifted if shifted.any() else ~shifted, "n"] // self.seeds
        return int(counts.min()), int(counts.max())

    @property
    def seeds(self) -> int:
        """With how many training seeds every model was trained."""
        return max(entry.get("seeds") or 1 for entry in self.summary.values())

    def runs_of(self, model: str) -> tuple[str, ...]:
        """The runs of one model, in order."""
        return tuple(run for run in self.runs if (model, run) in self.summary)

    @property
    def acting(self) -> tuple[str, ...]:
        """The runs that do something: all but the control."""
        return tuple(run for run in self.runs if run != CONTROL)

    def acting_on(self, model: str) -> tuple[str, ...]:
        """The runs that do something to one model, in order."""
        return tuple(run for run in self.runs_of(model) if run != CONTROL)

    @property
    def streamed(self) -> tuple[str, ...]:
        """The runs that do something on streams, in order; the others adapt to every image on its own."""
        told = {run: entry.get("settings") or {} for (_, run), entry in self.adapted.items()}
        return tuple(run for run in self.acting if told.get(run, {}).get("protocol") == "online")

    def trains(self, model: str, run: str) -> bool:
        """Tell whether a run takes training steps on this model, and what they do to the accuracy is known."""
        return known(self.summary[model, run].get("training_gain"))

    def tuning(self, model: str, run: str) -> Mapping[str, Any]:
        """Give what `tune` wrote for a run on a model; empty where it is not known."""
        return self.adapted.get((model, run), {}).get("tuning") or {}

    def rows(self, name: str, **where: Any) -> pd.DataFrame:
        """Give a table's rows of this report's models and runs at which columns have the values asked for.

        Args:
            name: Such as ``by_shift``; a table that is missing gives no rows.
            where: Values by column, such as ``run="ssl"``.
        """
        table = self.tables.get(name, pd.DataFrame())
        if not table.empty:
            where = {
                "model": list(self.models),
                **({"run": list(self.runs)} if "run" in table else {}),
                **where,
            }
        for column, value in where.items() if len(table) else ():
            table = table[table[column].isin(value if isinstance(value, list) else [value])]
        return table

    def changed(self, model: str, run: str) -> float | None:
        """Give the share of shifted images whose predicted class changed; this needs no labels."""
        rows = self.rows("by_corruption", model=model, run=run)
        return rows["changed"].sum() / rows["n"].sum() if len(rows) else None


def known(value: float | None) -> bool:
    """Tell a number from None and NaN."""
    return value is not None and not pd.isna(value)


def difference(after: float | None, before: float | None) -> float | None:
    """Subtract, where both are known."""
    return after - before if known(after) and known(before) else None


def shift_name(shift: str) -> str:
    """Write a shift or a corruption for people: ``jpeg_compression-5`` becomes ``jpeg compression 5``.

    What came with images of its own is named by folders and stays as it is: two of them may differ in just these signs.
    """
    return shift if "/" in shift else shift.replace("_", " ").replace("-", " ")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that a stage wrote, every name as the text that it is; only what is empty is unknown."""
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: expected what the stage `{stage}` writes, found no file; run `{stage}`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _read_table(path: Path) -> pd.DataFrame:
    if path.is_file():
        return read_table(path)
    if path.stem in REQUIRED:
        raise UserError(
            f"{path}: expected a table that the stage `evaluate` writes, found no file; run `evaluate`"
        )
    return pd.DataFrame()
