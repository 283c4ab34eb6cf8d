"""The results that `report` shows: `outputs/metrics.json`, the tables, and how runs were made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.config.values import UNCORRUPTED
from tttlab.errors import UserError

CONTROL = "none"  # the run that leaves the network as it is
REQUIRED = ("by_shift", "by_corruption", "by_severity")
OPTIONAL = (
    "reliability",
    "steps",
    "tuning",
    "alignment",
    "correlations",
    "distances",
    "networks",
)
# Columns of names, always read as text: models, runs and shifts may be called 50, 1e5 or true.
NAMES = (
    "model",
    "run",
    "other",
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
    """The files of `evaluate` and `adapt`, for the models and runs of params.yaml.

    Attributes:
        models: Names in order.
        runs: Names in order.
        summary: ``outputs/metrics.json`` by (model, run).
        tables: ``outputs/tables/<name>.csv`` by name; an optional one that is missing is empty.
        adapted: ``outputs/runs/<run>.json`` by (model, run): losses, cost, settings, tuning and
            MLflow's run.
    """

    models: tuple[str, ...]
    runs: tuple[str, ...]
    summary: Mapping[tuple[str, str], Mapping[str, Any]]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    adapted: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, outputs: Path, pairs: Sequence[tuple[str, str]]) -> "Results":
        """Read the results from the folder of outputs.

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
                    f"{outputs / 'metrics.json'}: expected an entry {model}/{run}, "
                    "found none; run `make repro`"
                )
            if model not in sidecars[run]:
                raise UserError(
                    f"{outputs / 'runs' / run}.json: expected an entry {model}, "
                    "found none; run `make repro`"
                )
            summary[model, run] = metrics[f"{model}/{run}"]
            adapted[model, run] = sidecars[run][model]
        names = (*REQUIRED, *OPTIONAL)
        tables = {name: _read_table(outputs / "tables" / f"{name}.csv") for name in names}
        return cls(models, runs, summary, tables, adapted)

    @property
    def labeled(self) -> bool:
        """Whether any accuracy is known."""
        return any(is_known(entry["accuracy_source"]) for entry in self.summary.values())

    @property
    def clean(self) -> bool:
        """Whether the accuracy on clean images is known."""
        return any(is_known(entry["clean_source"]) for entry in self.summary.values())

    @property
    def images(self) -> tuple[int, int]:
        """The least and largest number of images per shift; of clean ones without any shift."""
        table = self.rows("by_shift")
        shifted = table["shift"] != "clean"
        counts = table.loc[shifted if shifted.any() else ~shifted, "n"] // self.seeds
        return int(counts.min()), int(counts.max())

    @property
    def seeds(self) -> int:
        """The number of training seeds of every model."""
        return max(entry.get("seeds") or 1 for entry in self.summary.values())

    def runs_of(self, model: str) -> tuple[str, ...]:
        """The runs of one model, in order."""
        return tuple(run for run in self.runs if (model, run) in self.summary)

    @property
    def acting(self) -> tuple[str, ...]:
        """All runs but the control."""
        return tuple(run for run in self.runs if run != CONTROL)

    def acting_on(self, model: str) -> tuple[str, ...]:
        """The runs of one model but the control, in order."""
        return tuple(run for run in self.runs_of(model) if run != CONTROL)

    @property
    def streamed(self) -> tuple[str, ...]:
        """The runs that adapt to streams, in order; the others adapt to every image on its own."""
        settings = {run: entry.get("settings") or {} for (_, run), entry in self.adapted.items()}
        return tuple(r for r in self.acting if settings.get(r, {}).get("protocol") == "online")

    def trains(self, model: str, run: str) -> bool:
        """Tell whether a run trains on this model with a known effect on the accuracy."""
        return is_known(self.summary[model, run].get("training_gain"))

    def records(self, model: str) -> dict[str, Mapping[str, Any]]:
        """Give what `adapt` tells of every run on one model, in order."""
        return {run: self.adapted.get((model, run), {}) for run in self.runs_of(model)}

    def tuning(self, model: str, run: str) -> Mapping[str, Any]:
        """Return what `tune` wrote for a run on a model; empty if it is not known."""
        return self.adapted.get((model, run), {}).get("tuning") or {}

    def rows(self, name: str, **where: Any) -> pd.DataFrame:
        """Select a table's rows by values of columns, among this report's models and runs.

        Args:
            name: Such as ``by_shift``; a missing table gives no rows.
            where: A value or a list of values by column, such as ``run="ssl"``.
        """
        table = self.tables.get(name, pd.DataFrame())
        if table.empty:
            return table
        wanted = {"model": list(self.models)}
        if "run" in table:
            wanted["run"] = list(self.runs)
        for column, value in (wanted | where).items():
            table = table[table[column].isin(value if isinstance(value, list) else [value])]
        return table

    def changed(self, model: str, run: str) -> float | None:
        """Compute the share of shifted images whose predicted class changed; it needs no labels."""
        rows = self.rows("by_corruption", model=model, run=run)
        return rows["changed"].sum() / rows["n"].sum() if len(rows) else None


def is_known(value: float | None) -> bool:
    """Tell whether a value is neither None nor NaN."""
    return value is not None and not pd.isna(value)


def difference(after: float | None, before: float | None) -> float | None:
    """Subtract if both are known, else return None."""
    return after - before if is_known(after) and is_known(before) else None


def shift_name(shift: str) -> str:
    """Write a shift or a corruption for people: ``jpeg_compression-5`` as ``jpeg compression 5``.

    A shift with images of its own is named by folders. Its name stays as it is, because two of them
    may differ in these characters only.
    """
    if shift == UNCORRUPTED:
        return "test images"
    return shift if "/" in shift else shift.replace("_", " ").replace("-", " ")


def name_shifts(table: pd.DataFrame, *, labeled: bool) -> list[str]:
    """Name the shifts with labels, or those without, for people; the clean images are no shift.

    Args:
        table: Rows of ``by_shift``. An accuracy is known where there are labels.
        labeled: Which shifts. A corruption stands for its severities where it is the same for all.
    """
    rows = table[table["shift"] != "clean"].drop_duplicates("shift")
    names = []
    for corruption, of_corruption in rows.groupby("corruption", sort=False):
        wanted = of_corruption["accuracy_source"].notna() == labeled
        names += [corruption] if wanted.all() else list(of_corruption.loc[wanted, "shift"])
    return [shift_name(name) for name in names]


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that a stage wrote: names as text, and NaN for empty cells only."""
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: expected what the stage `{stage}` writes, found no file; run `make repro`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _read_table(path: Path) -> pd.DataFrame:
    if path.is_file():
        return read_table(path)
    if path.stem in REQUIRED:
        raise UserError(
            f"{path}: expected a table that the stage `evaluate` writes, "
            "found no file; run `make repro`"
        )
    return pd.DataFrame()
