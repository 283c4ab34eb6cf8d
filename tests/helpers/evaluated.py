"""Tables that `adapt` and `evaluate` write for `report`, drawn from a small model of adaptation.

An image is classified correctly if its margin is positive. A shift lowers the margin, and a run
raises or lowers it again. All draws are seeded.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy import stats

from tttlab.config.images import Shifts
from tttlab.data.image_sets import ImageSet
from tttlab.shifts.shift import Shift, list_shifts

MODELS = ("convnet", "vit")
CORRUPTIONS, SEVERITIES = ("fog", "frost", "gaussian_noise", "jpeg_compression"), (1, 5)
# Per run: effect on the margin without training, effect of training, standard deviation of random
# harm, milliseconds, settings.
RUNS = {
    "none": (0.0, 0.0, 0.0, 0.09, {"method": "none", "steps": 0}),
    "views": (0.15, 0.0, 0.1, 0.65, {"method": "views", "num_views": 8}),
    "bn": (0.25, 0.0, 0.2, 0.32, {"method": "none", "normalisation": "mixed"}),
    "shrink": (0.8, 0.0, 0.1, 0.34, {"method": "none", "normalisation": "shrink"}),
    "ssl": (0.0, -0.2, 0.4, 6.3, {"method": "SimCLR(num_views=8)", "steps": 3, "lr": 0.01}),
    "actmad": (
        0.8,
        0.2,
        0.2,
        4.6,
        {"method": "ActMAD(tolerance=4.0)", "steps": 5, "lr": 0.1, "clip": None},
    ),
}
TRAINED = ("ssl", "actmad")
OPTIONAL = ("reliability", "steps", "tuning", "alignment", "correlations", "distances")


def write_project(
    outputs: Path,
    *,
    models=MODELS,
    runs=tuple(RUNS),
    corruptions=CORRUPTIONS,
    severities=SEVERITIES,
    images=40,
    seeds=(0,),
    labeled=True,
    optional=OPTIONAL,
    gated=("ssl", "actmad"),
    test=None,
    sets=None,
    only=None,
) -> SimpleNamespace:
    """Write the outputs that `report` reads, and return the settings that they belong to.

    Written are ``data/{test,shifted}``, ``runs``, ``predictions``, ``tables`` and
    ``metrics.json``.

    Args:
        outputs: where to.
        models: names.
        runs: names, keys of `RUNS`.
        corruptions: names.
        severities: of every corruption.
        images: largest number of test images.
        seeds: of the trainings.
        labeled: True: all images have labels; ``"clean"``: only the clean ones; False: none; a
            tuple: those of the shifts that it names.
        optional: tables to write of `OPTIONAL`.
        gated: runs with a gate.
        test: test images; None: blobs.
        sets: images that come shifted, by the name of their shift, ``<set>/<shift>``.
        only: models by run, for the runs that are not for all models.
    """
    pairs = [
        (model, run) for model in models for run in runs if model in (only or {}).get(run, models)
    ]
    test, sets = test or blobs(images), sets or {}
    test.save(outputs / "data" / "test")
    test = test.take(range(min(images, len(test))))
    write_sets(outputs / "data" / "shifted", sets)
    shifts = list_shifts(corruptions, severities)
    shifts = [*shifts, *(Shift(name, 0, shifted) for name, shifted in sets.items())]
    predictions = {}
    for model, run in pairs:
        table = predict(model, run, test, shifts, seeds, run in gated)
        if labeled is not True:
            names = labeled if isinstance(labeled, tuple) else (labeled,)
            kept = table["shift"].isin(names)
            table = table.assign(label=table["label"].where(kept, -1))
        path = outputs / "predictions" / model / f"{run}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
        predictions[model, run] = table
    tables = {**compared(predictions), **extras(predictions, seeds)}
    if labeled is not True:  # the other tables need no labels
        tables = {key: tables[key] for key in tables if key not in ("alignment", "correlations")}
    (outputs / "tables").mkdir()
    for name, table in tables.items():
        if name not in OPTIONAL or name in optional:
            table.to_csv(outputs / "tables" / f"{name}.csv", index=False)
    entries = {
        f"{model}/{run}": summary(table, run in gated, len(seeds))
        for (model, run), table in predictions.items()
    }
    if labeled is True and "views" in runs:
        for model, run in set(pairs) & {(model, run) for model in models for run in TRAINED}:
            table, control = predictions[model, run], predictions[model, "views"]
            entries[f"{model}/{run}"] |= over_views(table, control)
    (outputs / "metrics.json").write_text(json.dumps({"runs": entries}, indent=2), encoding="utf-8")
    write_runs(outputs / "runs", pairs, runs, gated)
    return SimpleNamespace(
        seed=3,
        seeds=tuple(seeds),
        models=dict.fromkeys(models),
        shifts=settings(corruptions, severities, sets),
        pairs=pairs,
        adapt=SimpleNamespace(runs=dict.fromkeys(runs), online=None),
        machine=SimpleNamespace(workers=2),
        model_dump=lambda **_: {
            "seed": 3,
            "models": {"vit": {"note": "</pre><script>alert(1)</script>"}},
        },
    )


def settings(
    corruptions=CORRUPTIONS, severities=SEVERITIES, sets=(), clean="test", strength="own"
) -> Shifts:
    """Give the section ``shifts`` of params.yaml, with the names of sets but no folders."""
    names = dict.fromkeys(name.partition("/")[0] for name in sets)
    return Shifts.model_construct(
        clean=clean,
        corruptions=corruptions,
        severities=severities,
        strength=strength,
        images=None,
        sets=names,
    )


def write_runs(folder: Path, pairs, runs, gated) -> None:
    """Write what `adapt` says of every run: ``<run>.json``, the same for every model."""
    folder.mkdir()
    for run in runs:
        gate = {"signal": "distance", "threshold": 1.6} if run in gated else None
        entry = {
            "mlflow_run_id": "0" * 32,
            "peak_memory_mb": 312.4,
            "settings": {"run": run, **RUNS[run][4], "seed": 3},
            "losses": [2.0, 1.5, 1.25] if RUNS[run][1] else [],
            "tuning": tuning_of(run) | {"gate": gate},
        }
        entries = {model: entry for model, name in pairs if name == run}
        (folder / f"{run}.json").write_text(json.dumps(entries), encoding="utf-8")


def write_sets(folder: Path, sets) -> None:
    """Write what `prepare` writes of sets that come shifted."""
    folder.mkdir(parents=True)
    entries = []
    for number, (name, images) in enumerate(sets.items()):
        images.save(folder / str(number))
        entries.append({"corruption": name, "severity": 0, "folder": str(number)})
    (folder / "shifts.json").write_text(json.dumps(entries), encoding="utf-8")


def tuning_of(run) -> dict:
    """Give what `tune` wrote for a run.

    ``bn`` chose among values that tie, ``actmad`` found a better setting than its default.
    """
    if run not in SEARCHED:
        return {"tuned": False, "settings": {}, "default": {}, "candidates": [], "search": {}}
    return {"tuned": True, **SEARCHED[run]}


SEARCHED = {
    "bn": {
        "search": {"prior": [0.1, 0.4]},
        "settings": {"prior": 0.1},
        "default": {"prior": 0.1},
        "without_influence": ["prior"],
        "candidates": [
            {"settings": {"prior": prior}, "score": 0.84, "standard_error": None}
            for prior in (0.1, 0.4)
        ],
    },
    "actmad": {
        "search": {
            "lr": [0.1, 0.03],
            "clip": [None, 1.0],
            "trainable": ["norm", ["blocks.0", "norm"]],
            "steps": [1, 5],
        },
        "settings": {"lr": 0.03, "clip": None, "trainable": ["blocks.0", "norm"], "steps": 5},
        "default": {"lr": 0.1, "clip": None, "trainable": "norm", "steps": 1},
        "without_influence": ["clip"],
        "candidates": [
            {
                "settings": {
                    "lr": 0.03,
                    "clip": None,
                    "trainable": ["blocks.0", "norm"],
                    "steps": 5,
                },
                "score": 0.8725,
                "standard_error": 0.004,
            },
            {
                "settings": {"lr": 0.1, "clip": None, "trainable": "norm", "steps": 1},
                "score": 0.861,
                "standard_error": None,
            },
        ],
    },
}


def blobs(images: int, prefix="test", seed=0) -> ImageSet:
    """Draw images of 4×4 random squares, of three classes."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(256, size=(images, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(images) % 3
    pixels = np.kron(coarse, np.ones((1, 4, 4, 1), np.uint8))
    image_ids = tuple(f"{prefix}/{number}" for number in range(images))
    return ImageSet(pixels, labels, image_ids, ("a", "b <i>", "c"), source="a <source>")


def predict(model, run, test, shifts, seeds, gated) -> pd.DataFrame:
    """Draw predictions; the source's depend only on model, seed and shift, as they must."""
    blocks = [
        predict_shift(model, run, shift, number, shift.of(test), seed, gated)
        for seed in seeds
        for number, shift in enumerate(shifts)
    ]
    return pd.concat(blocks, ignore_index=True)


def predict_shift(model, run, shift, number, images, seed, gated) -> pd.DataFrame:
    """Draw the predictions for the images of one shift, the ``number``-th, and one seed."""
    untrained, training, harm, cost, _ = RUNS[run]
    count, classes = len(images), len(images.classes)
    shared = np.random.default_rng([len(model), seed, number])
    run_only = np.random.default_rng([len(model), seed, number, list(RUNS).index(run)])
    letters = sum(map(ord, shift.corruption))
    # A set that comes shifted has severity 0, and counts as 5.
    severity = shift.severity or (0 if shift.clean else 5)
    strength = severity * (0.15 + 0.1 * (letters % 5)) * (1.0 if model == "convnet" else 0.8)
    curable = 0.3 + (letters % 3) / 2
    source = shared.normal(2.2 - strength, 1, count)
    distance = shared.lognormal(0, 0.15, count) * (1 + 0.5 * strength)
    before = source + untrained * curable * strength * 0.7
    after = before + training * strength * 0.6 + run_only.normal(0, 1e-9 + harm, count)
    wrong = (images.labels + shared.integers(1, classes, count)) % classes
    margins = {"source": source, "untrained": before if training else after, "adapted": after}
    columns = {
        "image_id": images.image_ids,
        "seed": seed,
        "shift": shift.name,
        "corruption": shift.corruption,
        "severity": shift.severity,
        "label": images.labels,
    }
    for who, margin in margins.items():
        columns[f"{who}_prediction"] = np.where(margin > 0, images.labels, wrong)
    for who in ("source", "adapted"):
        columns[f"{who}_confidence"] = 0.3 + 0.7 * np.tanh(np.abs(margins[who]))
    loss = 2 + 0.3 * distance if training else np.full(count, np.nan)
    columns |= {
        "loss_first": loss,
        "loss_last": 0.8 * loss,
        "distance": distance,
        "gate_open": distance > 1.6 if gated else True,
        "fell_back": run_only.random(count) < 0.01 * shift.severity * harm,
        "milliseconds": run_only.lognormal(np.log(cost), 0.2, count),
        "gate_milliseconds": 0.4 * gated,
    }
    return pd.DataFrame(columns)


def right(table, who) -> pd.Series:
    """Give 1 where a prediction is right, 0 where it is wrong, NaN where the label is unknown."""
    return (table[f"{who}_prediction"] == table["label"]).astype(float).where(table["label"] >= 0)


def gate(table) -> pd.DataFrame:
    """Put the source's predictions in place of the adapted ones where the gate is closed."""
    gated = table["adapted_prediction"].where(table["gate_open"], table["source_prediction"])
    return table.assign(adapted_prediction=gated)


def gain(table, before="source") -> dict:
    """Give the mean gain of the adapted predictions, with a normal interval over images."""
    gains = right(table, "adapted") - right(table, before)
    gains = gains.groupby(table["image_id"]).mean().dropna()
    mean = gains.mean()
    half_width = 1.96 * gains.std() / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
    return {"gain": mean, "gain_low": mean - half_width, "gain_high": mean + half_width}


def flips(table) -> dict:
    """Count the predictions that changed, and how where there are labels."""
    before, after = right(table, "source"), right(table, "adapted")
    changed = table["source_prediction"] != table["adapted_prediction"]
    known = before.notna().any()
    return {
        "wrong_to_right": int((before < after).sum()) if known else None,
        "right_to_wrong": int((before > after).sum()) if known else None,
        "changed": int(changed.sum()),
    }


def accuracies(table) -> dict:
    """Give the columns that all tables of groups have."""
    return {
        "n": len(table),
        "accuracy_source": right(table, "source").mean(),
        "accuracy_adapted": right(table, "adapted").mean(),
        **gain(table),
        **flips(table),
        "distance": table["distance"].mean(),
        "gated_gain": gain(gate(table))["gain"],
    }


def ece(table, who) -> float:
    """Give the expected calibration error over 15 bins."""
    bins = (15 * table[f"{who}_confidence"]).astype(int).clip(upper=14)
    gaps = (right(table, who) - table[f"{who}_confidence"]).groupby(bins).sum().abs()
    return gaps.sum() / len(table) if (table["label"] >= 0).any() else np.nan


def summary(table, gated, seeds) -> dict:
    """Sum one run up as in metrics.json."""
    clean, shifted = table[table["shift"] == "clean"], table[table["shift"] != "clean"]
    gains = dict.fromkeys(("gain", "gain_low", "gain_high"))
    trained = gain(shifted, "untrained") if shifted["loss_first"].notna().any() else gains
    blocks = [accuracies(part) for _, part in table.groupby("shift", sort=False)]
    p_values = [holm for _, holm in mcnemar(blocks)]
    clear = [block["gain"] for block, p in zip(blocks, p_values, strict=True) if p < 0.05]
    milliseconds = shifted["milliseconds"]
    entry = {
        "accuracy_source": right(shifted, "source").mean(),
        "accuracy_adapted": right(shifted, "adapted").mean(),
        **gain(shifted),
        **{f"training_{name}": value for name, value in trained.items()},
        "clean_source": right(clean, "source").mean(),
        "clean_adapted": right(clean, "adapted").mean(),
        "ece_source": ece(shifted, "source"),
        "ece_adapted": ece(shifted, "adapted"),
        **flips(shifted),
        "shifts_helped": sum(value > 0 for value in clear),
        "shifts_hurt": sum(value < 0 for value in clear),
        "images": table["image_id"].nunique(),
        "seeds": seeds,
        "gain_seed_sd": 0.004 if seeds > 1 else None,
        "fell_back": int(shifted["fell_back"].sum()),
        "milliseconds_p50": milliseconds.quantile(0.5),
        "milliseconds_p95": milliseconds.quantile(0.95),
        "milliseconds_mean": milliseconds.mean(),
        "gated": gated_summary(clean, shifted) if gated else None,
    }
    return plain(entry)


def over_views(table, control) -> dict:
    """Compare a run with its control ``views``, whose rows are in the same order."""
    shifted = table["shift"] != "clean"
    before = control.loc[shifted, "adapted_prediction"].to_numpy()
    values = gain(table[shifted].assign(source_prediction=before))
    over = {name.replace("gain", "over_control"): value for name, value in values.items()}
    return {"control": "views", **plain(over)}


def gated_summary(clean, shifted) -> dict:
    """Sum up what a run gives with its gate."""
    kept = gate(shifted)
    cost = shifted["gate_milliseconds"] + shifted["gate_open"] * shifted["milliseconds"]
    return {
        "accuracy_adapted": right(kept, "adapted").mean(),
        **gain(kept),
        "clean_adapted": right(gate(clean), "adapted").mean(),
        "open": shifted["gate_open"].mean(),
        "clean_open": clean["gate_open"].mean(),
        "milliseconds": cost.mean(),
        **{name: flips(kept)[name] for name in ("wrong_to_right", "right_to_wrong")},
    }


def plain(entry):
    """Turn NumPy's numbers into JSON's, NaN into None."""
    if isinstance(entry, dict):
        return {name: plain(value) for name, value in entry.items()}
    if isinstance(entry, int | np.integer | None):
        return entry if entry is None else int(entry)
    return None if np.isnan(entry) else float(entry)


def compared(predictions) -> dict[str, pd.DataFrame]:
    """Make the tables that every project has, and reliability."""
    tables = {name: [] for name in ("by_shift", "by_corruption", "by_severity", "reliability")}
    for (model, run), table in predictions.items():
        key = {"model": model, "run": run}
        shifted = table[table["shift"] != "clean"]
        tables["by_shift"] += by_shift(key, table)
        tables["by_corruption"] += [
            {**key, "corruption": name, **accuracies(part)}
            for name, part in shifted.groupby("corruption", sort=False)
        ]
        graded = table[(table["severity"] > 0) | (table["shift"] == "clean")]
        tables["by_severity"] += [
            {**key, "severity": name, **accuracies(part)}
            for name, part in graded.groupby("severity")
        ]
        tables["reliability"] += reliability(key, shifted)
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def by_shift(key, table) -> list[dict]:
    """Make the rows of one run's shifts."""
    rows = []
    columns = ["shift", "corruption", "severity"]
    for names, part in table.groupby(columns, sort=False):
        row = {**key, **dict(zip(columns, names, strict=True)), **accuracies(part)}
        row |= {f"ece_{who}": ece(part, who) for who in ("source", "adapted")}
        rows.append(row)
    for row, (p, holm) in zip(rows, mcnemar(rows), strict=True):
        row["mcnemar_p"], row["mcnemar_holm"] = p, holm
    return rows


def reliability(key, shifted) -> list[dict]:
    """Make the rows of one run's reliability diagram, of 15 bins."""
    rows = []
    for who in ("source", "adapted"):
        bins = (15 * shifted[f"{who}_confidence"]).astype(int).clip(upper=14)
        for number in range(15):
            part = shifted[bins == number]
            values = {
                "confidence": part[f"{who}_confidence"].mean(),
                "accuracy": right(part, who).mean(),
                "n": len(part),
            }
            rows.append({**key, "with": who, "bin": number, **values})
    return rows


def mcnemar(blocks) -> list[tuple[float, float]]:
    """Give exact McNemar p-values, alone and after Holm's correction; NaN without labels."""
    known = np.array([block["wrong_to_right"] is not None for block in blocks])
    values = np.full((len(blocks), 2), np.nan)
    if known.any():
        values[known] = tested([block for block in blocks if block["wrong_to_right"] is not None])
    return [(p, holm) for p, holm in values]


def tested(blocks) -> list[tuple[float, float]]:
    """Give the p-values of blocks with labels."""
    pairs = [(block["wrong_to_right"], block["right_to_wrong"]) for block in blocks]
    p = np.array(
        [
            stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
            for gained, lost in pairs
        ]
    )
    order = np.argsort(p)
    holm = np.empty_like(p)
    holm[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return list(zip(p, holm, strict=True))


def extras(predictions, seeds) -> dict[str, pd.DataFrame]:
    """Make the tables of the optional stages."""
    trained = {
        key: table for key, table in predictions.items() if table["loss_first"].notna().any()
    }
    tables = {"steps": [], "tuning": [], "alignment": [], "correlations": [], "distances": []}
    for number, ((model, run), table) in enumerate(trained.items()):
        key, generator = {"model": model, "run": run}, np.random.default_rng(number)
        whole = accuracies(table[table["shift"] != "clean"])
        tables["steps"] += steps(key, whole, RUNS[run][3])
        tables["tuning"] += tuning(key, whole)
        tables["alignment"] += alignment(key, table, generator)
        tables["correlations"] += correlations(key, table["corruption"].nunique(), generator)
    first_tables = {}
    for (model, _), table in predictions.items():
        first_tables.setdefault(model, table)
    for model, table in first_tables.items():
        for seed in seeds:
            tables["distances"] += distances(model, seed, table[table["seed"] == seed])
    return {name: pd.DataFrame(rows) for name, rows in tables.items() if rows}


def alignment(key, table, generator) -> list[dict]:
    """Draw a cosine of gradients for every shift, larger where the gain is larger."""
    rows = []
    for shift, part in table.groupby("shift", sort=False):
        gained = gain(part)["gain"]
        cosine = 0.05 + 0.8 * gained + generator.normal(0, 0.03)
        row = {
            "shift": shift,
            "n": len(part),
            "cosine": cosine,
            "cosine_low": cosine - 0.04,
            "cosine_high": cosine + 0.04,
            "gain": gained,
            "loss_change": -0.4,
            "confidence_change": 0.05,
            "distance": part["distance"].mean(),
        }
        rows.append({**key, **row})
    return rows


# Whether a signal needs no labels.
SIGNALS = {
    "cosine": False,
    "loss_first": True,
    "loss_change": False,
    "source_confidence": True,
    "confidence_change": False,
    "distance": True,
}


def correlations(key, corruptions, generator) -> list[dict]:
    """Draw a correlation of every signal with the gain, over images and over corruptions."""
    rows = []
    for level, count in (("image", 400), ("corruption", corruptions)):
        for signal, label_free in SIGNALS.items():
            row = {
                "level": level,
                "signal": signal,
                "label_free": label_free,
                "spearman": generator.uniform(-0.2, 0.7),
                "p": generator.beta(0.4, 3),
                "n": count,
            }
            rows.append({**key, **row})
    return rows


def steps(key, whole, cost) -> list[dict]:
    """Draw curves of the tuned setting, the default and three candidates."""
    rows = []
    settings = ("tuned", "default", "candidate-0", "candidate-1", "candidate-2")
    for rank, setting in enumerate(settings):
        count, used = (10, 6) if rank == 0 else (8, 5)
        for step in range(count + 1):
            share = (1 - np.exp(-step / (2 + rank))) * (1 - 0.012 * step * rank)
            row = {
                "setting": setting,
                "step": step,
                "accuracy": whole["accuracy_source"] + whole["gain"] * share,
                "clean_accuracy": 0.97 - 0.002 * step * (1 + rank),
                "loss": 2 + np.exp(-step / 4) - 0.1 * rank,
                "milliseconds": 0.1 + cost / 5 * step * (1 + 0.1 * rank),
                "n": 100,
                "used": step == used,
            }
            rows.append({**key, **row})
    return rows


def tuning(key, whole) -> list[dict]:
    """List the four choices of a tuned run."""
    settings = {
        "none": (None, 0, 0),
        "default": ("lr 0.1, steps 5, trainable norm", 5, 0.6),
        "tuned": ("lr 0.03, steps 6, trainable norm, momentum 0.9", 6, 1.0),
        "oracle": ("lr 0.03, steps 8, trainable norm", 8, 1.2),
    }
    return [
        {
            **key,
            "choice": choice,
            "settings": text,
            "step": step,
            "accuracy": whole["accuracy_source"] + share * whole["gain"],
            "gain": share * whole["gain"],
            "clean_change": -0.01 * share,
            "n": 100,
        }
        for choice, (text, step, share) in settings.items()
    ]


def distances(model, seed, table) -> list[dict]:
    """Draw every metric of every pair of sets, larger where the shift is stronger."""
    generator = np.random.default_rng([len(model), seed])
    targets = [("unlabeled", "labeled", "none", 0, 0.1, 0.97)]
    for names, part in table.groupby(["shift", "corruption", "severity"], sort=False):
        far, accuracy = part["distance"].mean() - 1, right(part, "source").mean()
        targets += [(reference, *names, far, accuracy) for reference in ("unlabeled", "labeled")]
    rows = []
    for reference, target, corruption, severity, far, accuracy in targets:
        for metric, floor in FLOORS.items():
            estimated = metric.startswith("estimated")
            if estimated:
                expected = 0.8 if np.isnan(accuracy) else accuracy
                value = np.clip(expected + generator.normal(0.02, 0.03), 0, 1)
            elif floor < 0.5 or metric == "fid":
                value = floor * (1 + 3 * far)
            else:
                value = min(1, floor + 0.3 * far)
            p = 0.005 if far > 0.15 else 0.31
            if estimated or metric in ("fid", "confidence_drop"):
                p = np.nan
            row = {
                "model": model,
                "seed": seed,
                "reference": reference,
                "target": target,
                "corruption": corruption,
                "severity": severity,
                "metric": metric,
                "value": value,
                "floor": floor,
                "floor_high": 1.3 * floor,
                "p": p,
                "n_reference": 126,
                "n_target": 100,
            }
            rows.append(row)
    return rows


FLOORS = {
    "kl_features": 0.4,
    "kl_labels": 0.01,
    "wasserstein_sliced": 0.05,
    "wasserstein_gaussian": 0.3,
    "fid": 1.5,
    "mmd": 0.001,
    "classifier_accuracy": 0.5,
    "confidence_drop": 0.0,
    "estimated_accuracy": 0.97,
    "estimated_accuracy_atc": 0.97,
}
