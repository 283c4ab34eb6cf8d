"""What `adapt` and `evaluate` leave for `report`, drawn from a small seeded model of adaptation: every table of the contract.

An image is classified rightly where its margin is positive; a shift lowers the margin, a run raises or lowers it again.
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
#         effect on the margin without training, by training, its share of harm at random, milliseconds, settings
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
    """Write outputs/{data/{test,shifted},runs,predictions,tables,metrics.json}; return the settings that they belong to.

    Labels are known of all images, of none (``labeled=False``) or of the clean ones (``"clean"``). Images that come shifted
    are given in ``sets``, by the name of their shift, ``<set>/<shift>``; the models of a run that is not for all in ``only``.
    """
    pairs = [
        (model, run) for model in models for run in runs if model in (only or {}).get(run, models)
    ]
    test, sets = test or blobs(images), sets or {}
    test.save(outputs / "data" / "test")
    test = test.take(range(min(images, len(test))))
    write_sets(outputs / "data" / "shifted", sets)
    shifts = [
        *list_shifts(corruptions, severities),
        *(Shift(name, 0, own) for name, own in sets.items()),
    ]
    predictions = {}
    for model, run in pairs:
        table = predict(model, run, test, shifts, seeds, run in gated)
        if labeled is not True:
            table = table.assign(
                label=table["label"].where((table["shift"] == "clean") & (labeled == "clean"), -1)
            )
        path = outputs / "predictions" / model / f"{run}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
        predictions[model, run] = table
    tables = {**compared(predictions), **extras(predictions, seeds)}
    if labeled is not True:  # what needs no labels is still there
        del tables["alignment"], tables["correlations"]
    (outputs / "tables").mkdir()
    for name, table in tables.items():
        if name not in OPTIONAL or name in optional:
            table.to_csv(outputs / "tables" / f"{name}.csv", index=False)
    entries = {
        f"{m}/{r}": summary(table, r in gated, len(seeds)) for (m, r), table in predictions.items()
    }
    (outputs / "metrics.json").write_text(json.dumps({"runs": entries}, indent=2), encoding="utf-8")
    (outputs / "runs").mkdir()
    for run in runs:
        entry = {
            "mlflow_run_id": "0" * 32,
            "peak_memory_mb": 312.4,
            "settings": {"run": run, **RUNS[run][4], "seed": 3},
        }
        entry["losses"] = [2.0, 1.5, 1.25] if RUNS[run][1] else []
        gate = {"signal": "distance", "threshold": 1.6} if run in gated else None
        entry["tuning"] = tuning_of(run) | {"gate": gate}
        own = [model for model, other in pairs if other == run]
        (outputs / "runs" / f"{run}.json").write_text(
            json.dumps(dict.fromkeys(own, entry)), encoding="utf-8"
        )
    return SimpleNamespace(
        seed=3,
        seeds=tuple(seeds),
        models=dict.fromkeys(models),
        shifts=settings(corruptions, severities, sets),
        pairs=pairs,
        adapt=SimpleNamespace(runs=dict.fromkeys(runs), online=None),
        model_dump=lambda **_: {
            "seed": 3,
            "models": {"vit": {"note": "</pre><script>alert(1)</script>"}},
        },
    )


def settings(corruptions=CORRUPTIONS, severities=SEVERITIES, sets=(), clean="test") -> Shifts:
    """Give the section ``shifts`` of params.yaml; the sets by their names alone, without a folder where they lie."""
    names = dict.fromkeys(name.partition("/")[0] for name in sets)
    return Shifts.model_construct(
        clean=clean, corruptions=corruptions, severities=severities, images=None, sets=names
    )


def write_sets(folder: Path, sets) -> None:
    """Write what `prepare` leaves of sets that come shifted."""
    folder.mkdir(parents=True)
    entries = []
    for number, (name, images) in enumerate(sets.items()):
        images.save(folder / str(number))
        entries.append({"corruption": name, "severity": 0, "folder": str(number)})
    (folder / "shifts.json").write_text(json.dumps(entries), encoding="utf-8")


def tuning_of(run) -> dict:
    """Give what `tune` wrote for a run: ``bn`` chose among values that tie, ``actmad`` a better setting than its default."""
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
    """Draw smooth pictures, a class a hue."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(256, size=(images, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(images) % 3
    pixels = np.kron(coarse, np.ones((1, 4, 4, 1), np.uint8))
    return ImageSet(
        pixels,
        labels,
        tuple(f"{prefix}/{i}" for i in range(images)),
        ("a", "b <i>", "c"),
        source="a <source>",
    )


def predict(model, run, test, shifts, seeds, gated) -> pd.DataFrame:
    """Draw predictions: the source's depend on (model, seed, shift) alone, as they must."""
    untrained, training, harm, cost, _ = RUNS[run]
    blocks = []
    for seed in seeds:
        for number, shift in enumerate(shifts):
            corruption, severity, images = shift.corruption, shift.severity, shift.of(test)
            count, classes = len(images), len(images.classes)
            shared = np.random.default_rng([len(model), seed, number])
            own = np.random.default_rng([len(model), seed, number, list(RUNS).index(run)])
            grade = severity or (
                0 if shift.clean else 5
            )  # what has no degrees is shifted all the same
            strength = (
                grade
                * (0.15 + 0.1 * (sum(map(ord, corruption)) % 5))
                * (1.0 if model == "convnet" else 0.8)
            )
            curable = 0.3 + (sum(map(ord, corruption)) % 3) / 2
            source = shared.normal(2.2 - strength, 1, count)
            distance = shared.lognormal(0, 0.15, count) * (1 + 0.5 * strength)
            before = source + untrained * curable * strength * 0.7
            after = before + training * strength * 0.6 + own.normal(0, 1e-9 + harm, count)
            wrong = (images.labels + shared.integers(1, classes, count)) % classes
            margins = {
                "source": source,
                "untrained": before if training else after,
                "adapted": after,
            }
            columns = {
                "image_id": images.image_ids,
                "seed": seed,
                "shift": shift.name,
                "corruption": corruption,
            }
            columns |= {"severity": severity, "label": images.labels}
            columns |= {
                f"{who}_prediction": np.where(m > 0, images.labels, wrong)
                for who, m in margins.items()
            }
            columns |= {
                f"{who}_confidence": 0.3 + 0.7 * np.tanh(np.abs(margins[who]))
                for who in ("source", "adapted")
            }
            loss = 2 + 0.3 * distance if training else np.full(count, np.nan)
            columns |= {"loss_first": loss, "loss_last": 0.8 * loss, "distance": distance}
            columns |= {
                "gate_open": distance > 1.6 if gated else True,
                "fell_back": own.random(count) < 0.01 * severity * harm,
            }
            columns |= {
                "milliseconds": own.lognormal(np.log(cost), 0.2, count),
                "gate_milliseconds": 0.4 * gated,
            }
            blocks.append(pd.DataFrame(columns))
    return pd.concat(blocks, ignore_index=True)


def right(table, who) -> pd.Series:
    """Tell where a prediction is right; NaN where the label is unknown."""
    return (table[f"{who}_prediction"] == table["label"]).astype(float).where(table["label"] >= 0)


def gate(table) -> pd.DataFrame:
    """Put the gate's predictions in the place of the adapted ones."""
    return table.assign(
        adapted_prediction=table["adapted_prediction"].where(
            table["gate_open"], table["source_prediction"]
        )
    )


def gain(table, before="source") -> dict:
    """Compare two columns of predictions: mean difference with a normal interval over images."""
    each = (right(table, "adapted") - right(table, before)).groupby(table["image_id"]).mean()
    half = 1.96 * each.std() / np.sqrt(len(each)) if len(each) > 1 else np.nan
    return {"gain": each.mean(), "gain_low": each.mean() - half, "gain_high": each.mean() + half}


def flips(table) -> dict:
    """Count what changed."""
    before, after = right(table, "source"), right(table, "adapted")
    changed = table["source_prediction"] != table["adapted_prediction"]
    counts = {
        "wrong_to_right": (before < after).sum(),
        "right_to_wrong": (before > after).sum(),
        "changed": changed.sum(),
    }
    return {name: int(value) for name, value in counts.items()}


def accuracies(table) -> dict:
    """Give what every table of groups has."""
    known = {
        "n": len(table),
        "accuracy_source": right(table, "source").mean(),
        "accuracy_adapted": right(table, "adapted").mean(),
    }
    return (
        known
        | gain(table)
        | flips(table)
        | {"distance": table["distance"].mean(), "gated_gain": gain(gate(table))["gain"]}
    )


def ece(table, who) -> float:
    """Give the expected calibration error over 15 bins."""
    bins = (15 * table[f"{who}_confidence"]).astype(int).clip(upper=14)
    gaps = (right(table, who) - table[f"{who}_confidence"]).groupby(bins).sum().abs()
    return gaps.sum() / len(table) if (table["label"] >= 0).any() else np.nan


def summary(table, gated, seeds) -> dict:
    """Sum one run up as in metrics.json."""
    clean, shifted = table[table["shift"] == "clean"], table[table["shift"] != "clean"]
    whole = accuracies(shifted)
    entry = {
        name: whole[name]
        for name in ("accuracy_source", "accuracy_adapted", "gain", "gain_low", "gain_high")
    }
    trained = (
        gain(shifted, "untrained")
        if shifted["loss_first"].notna().any()
        else dict.fromkeys(("gain", "gain_low", "gain_high"))
    )
    entry |= {f"training_{name}": value for name, value in trained.items()}
    entry |= {
        "clean_source": right(clean, "source").mean(),
        "clean_adapted": right(clean, "adapted").mean(),
    }
    entry |= {f"ece_{who}": ece(shifted, who) for who in ("source", "adapted")} | flips(shifted)
    blocks = [accuracies(part) for _, part in table.groupby("shift", sort=False)]
    clear = [
        block["gain"] for block, (_, p) in zip(blocks, mcnemar(blocks), strict=True) if p < 0.05
    ]
    entry |= {"shifts_helped": sum(g > 0 for g in clear), "shifts_hurt": sum(g < 0 for g in clear)}
    entry |= {"images": table["image_id"].nunique(), "seeds": seeds}
    entry |= {
        "gain_seed_sd": 0.004 if seeds > 1 else None,
        "fell_back": int(shifted["fell_back"].sum()),
    }
    entry |= {f"milliseconds_p{p}": shifted["milliseconds"].quantile(p / 100) for p in (50, 95)}
    entry["milliseconds_mean"] = shifted["milliseconds"].mean()
    entry["gated"] = None
    if gated:
        kept = gate(shifted)
        entry["gated"] = {
            "accuracy_adapted": right(kept, "adapted").mean(),
            **gain(kept),
            "clean_adapted": right(gate(clean), "adapted").mean(),
            "open": shifted["gate_open"].mean(),
            "clean_open": clean["gate_open"].mean(),
            "milliseconds": (
                shifted["gate_milliseconds"] + shifted["gate_open"] * shifted["milliseconds"]
            ).mean(),
            **{name: flips(kept)[name] for name in ("wrong_to_right", "right_to_wrong")},
        }
    return plain(entry)


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
        blocks = []
        for (shift, corruption, severity), part in table.groupby(
            ["shift", "corruption", "severity"], sort=False
        ):
            name = {"shift": shift, "corruption": corruption, "severity": severity}
            blocks.append(
                {
                    **key,
                    **name,
                    **accuracies(part),
                    "ece_source": ece(part, "source"),
                    "ece_adapted": ece(part, "adapted"),
                }
            )
        for block, p in zip(blocks, mcnemar(blocks), strict=True):
            block["mcnemar_p"], block["mcnemar_holm"] = p
        tables["by_shift"] += blocks
        tables["by_corruption"] += [
            {**key, "corruption": name, **accuracies(part)}
            for name, part in shifted.groupby("corruption", sort=False)
        ]
        graded = table[(table["severity"] > 0) | (table["shift"] == "clean")]
        tables["by_severity"] += [
            {**key, "severity": name, **accuracies(part)}
            for name, part in graded.groupby("severity")
        ]
        for who in ("source", "adapted"):
            bins = (15 * shifted[f"{who}_confidence"]).astype(int).clip(upper=14)
            for number in range(15):
                part = shifted[bins == number]
                values = {
                    "confidence": part[f"{who}_confidence"].mean(),
                    "accuracy": right(part, who).mean(),
                    "n": len(part),
                }
                tables["reliability"].append({**key, "with": who, "bin": number, **values})
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def mcnemar(blocks) -> list[tuple[float, float]]:
    """Give exact McNemar p-values, alone and after Holm's correction."""
    if not any(block["gain"] == block["gain"] for block in blocks):
        return [(np.nan, np.nan)] * len(blocks)
    pairs = [(block["wrong_to_right"], block["right_to_wrong"]) for block in blocks]
    p = np.array(
        [stats.binomtest(one, one + other).pvalue if one + other else 1.0 for one, other in pairs]
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
        tables["steps"] += steps(key, accuracies(table[table["shift"] != "clean"]), RUNS[run][3])
        tables["tuning"] += tuning(key, accuracies(table[table["shift"] != "clean"]))
        shifts = [(shift, part) for shift, part in table.groupby("shift", sort=False)]
        for shift, part in shifts:
            cosine = 0.05 + 0.8 * gain(part)["gain"] + generator.normal(0, 0.03)
            row = {
                "shift": shift,
                "n": len(part),
                "cosine": cosine,
                "cosine_low": cosine - 0.04,
                "cosine_high": cosine + 0.04,
            }
            row |= {"gain": gain(part)["gain"], "loss_change": -0.4, "confidence_change": 0.05}
            tables["alignment"].append({**key, **row, "distance": part["distance"].mean()})
        for level in ("image", "shift"):
            for signal, free in SIGNALS.items():
                row = {
                    "level": level,
                    "signal": signal,
                    "label_free": free,
                    "spearman": generator.uniform(-0.2, 0.7),
                }
                tables["correlations"].append(
                    {
                        **key,
                        **row,
                        "p": generator.beta(0.4, 3),
                        "n": 400 if level == "image" else len(shifts),
                    }
                )
    for model in {model: None for model, _ in predictions}:
        table = predictions[model, next(run for m, run in predictions if m == model)]
        for seed in seeds:
            tables["distances"] += distances(model, seed, table[table["seed"] == seed])
    return {name: pd.DataFrame(rows) for name, rows in tables.items() if rows}


SIGNALS = {
    "cosine": False,
    "loss_first": True,
    "loss_change": False,
    "source_confidence": True,
    "confidence_change": False,
    "distance": True,
}


def steps(key, whole, cost) -> list[dict]:
    """Draw curves of the tuned setting, the default and three candidates."""
    rows = []
    for place, setting in enumerate(
        ("tuned", "default", "candidate-0", "candidate-1", "candidate-2")
    ):
        count, used = (10, 6) if place == 0 else (8, 5)
        for step in range(count + 1):
            share = (1 - np.exp(-step / (2 + place))) * (1 - 0.012 * step * place)
            values = {
                "accuracy": whole["accuracy_source"] + whole["gain"] * share,
                "clean_accuracy": 0.97 - 0.002 * step * (1 + place),
            }
            values |= {
                "loss": 2 + np.exp(-step / 4) - 0.1 * place,
                "milliseconds": 0.1 + cost / 5 * step * (1 + 0.1 * place),
            }
            rows.append(
                {**key, "setting": setting, "step": step, **values, "n": 100, "used": step == used}
            )
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
    """Draw every metric of every pair, larger where the shift is stronger."""
    generator = np.random.default_rng([len(model), seed])
    floors = {
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
    targets = [("unlabeled", "labeled", "none", 0, 0.1, 0.97)]
    for (shift, corruption, severity), part in table.groupby(
        ["shift", "corruption", "severity"], sort=False
    ):
        for reference in ("unlabeled", "labeled"):
            far = part["distance"].mean() - 1
            targets.append(
                (reference, shift, corruption, severity, far, right(part, "source").mean())
            )
    rows = []
    for reference, target, corruption, severity, far, accuracy in targets:
        for metric, floor in floors.items():
            value = (
                floor * (1 + 3 * far)
                if floor < 0.5 or metric == "fid"
                else min(1, floor + 0.3 * far)
            )
            if metric.startswith("estimated"):
                accuracy = 0.8 if np.isnan(accuracy) else accuracy
                value = np.clip(accuracy + generator.normal(0.02, 0.03), 0, 1)
            row = {
                "model": model,
                "seed": seed,
                "reference": reference,
                "target": target,
                "corruption": corruption,
            }
            row |= {
                "severity": severity,
                "metric": metric,
                "value": value,
                "floor": floor,
                "floor_high": 1.3 * floor,
            }
            p = (
                np.nan
                if metric in ("fid", "confidence_drop") or metric.startswith("estimated")
                else 0.005
                if far > 0.15
                else 0.31
            )
            rows.append({**row, "p": p, "n_reference": 126, "n_target": 100})
    return rows
