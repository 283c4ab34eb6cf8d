"""The strongest control: chosen by tuning among cheaper runs, compared on the same images."""

import numpy as np
import pandas as pd
import pytest

from tttlab.evaluation.controls import UNKNOWN, Candidate, add, candidate, over_control, strongest
from tttlab.evaluation.metrics import summarise


def of(trains=False, protocol="episodic", milliseconds=10.0, lead=None) -> Candidate:
    return Candidate(trains, protocol, milliseconds, lead)


TRAINED = of(trains=True, milliseconds=30.0, lead=0.05)
NONE = of(milliseconds=1.0)


@pytest.mark.parametrize("tuned", [True, False])
def test_a_candidate_is_read_with_its_median_time_and_the_lead_that_tuning_found(tuned):
    entry = {"training_gain": 0.1, "milliseconds_p50": 2.0, "milliseconds_mean": 9.0}
    record = {"tuning": {"tuned": tuned, "lead": 0.3}, "settings": {"protocol": "online"}}
    expected = of(True, "online", 2.0, 0.3 if tuned else None)
    assert candidate(entry, record) == expected


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"a": of(lead=0.02), "b": of(lead=0.04)}, "b"),
        ({"a": of(lead=0.02), "b": of(lead=0.04, milliseconds=31.0)}, "a"),  # too dear
        ({"a": of(lead=0.02), "b": of(lead=0.04, milliseconds=30.0)}, "b"),  # as dear
        ({"a": of(lead=0.02), "b": of(lead=0.04, trains=True)}, "a"),
        ({"a": of(lead=0.02), "b": of(lead=0.04, protocol="online")}, "a"),
        ({"a": of(lead=0.02), "b": of()}, "a"),  # b was not tuned
        ({"a": of(lead=-0.02), "b": of(lead=0.0)}, "none"),  # nothing above the network as it is
        ({"a": of()}, None),  # nobody knows which is strongest
        ({}, "none"),
    ],
)
def test_the_strongest_control_is_the_cheaper_run_that_tuning_scored_highest(others, expected):
    assert strongest("run", {"none": NONE, "run": TRAINED, **others}) == expected


def predictions(right: np.ndarray, source: np.ndarray) -> pd.DataFrame:
    """Make a run's table; ``right`` and ``source`` (shifts, seeds, images), the first clean."""
    rows = []
    for (shift, seed, image), is_right in np.ndenumerate(right):
        label = image % 3
        wrong = (label + 1) % 3
        rows.append(
            {
                "image_id": str(image),
                "seed": seed,
                "shift": ("clean", "fog-5", "snow-5")[shift],
                "corruption": ("none", "fog", "snow")[shift],
                "severity": 5 * (shift > 0),
                "label": label,
                "source_prediction": label if source[shift, seed, image] else wrong,
                "untrained_prediction": label if source[shift, seed, image] else wrong,
                "adapted_prediction": label if is_right else wrong,
                "source_confidence": 0.5,
                "adapted_confidence": 0.5,
                "loss_first": 1.0,
                "loss_last": 0.5,
                "distance": 0.0,
                "gate_open": True,
                "fell_back": False,
                "milliseconds": 5.0,
                "gate_milliseconds": 0.0,
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture
def tables():
    """Make a run and its control, right on about 0.7 and 0.5 of 40 images, of one source."""
    generator = np.random.default_rng(0)
    source, run, control = (share > generator.random((3, 2, 40)) for share in (0.4, 0.7, 0.5))
    return predictions(run, source), predictions(control, source), run, control


def test_the_difference_is_that_of_a_report_in_which_the_control_is_the_source(tables):
    run, control, run_right, control_right = tables
    found = over_control(run, control.sample(frac=1, random_state=0), "views")
    difference = run_right[1:].astype(float).mean() - control_right[1:].mean()
    assert found["over_control"] == pytest.approx(difference)
    entry = summarise(run.assign(source_prediction=control["adapted_prediction"]))
    for end in ("low", "high"):
        assert found[f"over_control_{end}"] == pytest.approx(entry[f"gain_{end}"])
    assert found["control"] == "views"


def test_without_labels_the_difference_is_unknown(tables):
    run, control, *_ = tables
    found = over_control(run.assign(label=-1), control.assign(label=-1), "views")
    assert found == UNKNOWN | {"control": "views"}


def test_only_runs_that_train_are_compared_and_with_the_source_where_no_control_leads(
    tables, tmp_path
):
    run, control, *_ = tables
    read = {("m", "train"): run, ("m", "views"): control, ("m", "none"): control}
    quick = {"milliseconds": 1.0, "loss_first": np.nan}
    read["m", "views"] = control.assign(**quick)
    read["m", "none"] = control.assign(adapted_prediction=control["source_prediction"], **quick)
    (tmp_path / "m").mkdir()
    for (model, name), table in read.items():
        table.to_parquet(tmp_path / model / f"{name}.parquet")
    for lead, expected in ((0.1, "views"), (-0.1, "none")):
        entries = {f"m/{name}": summarise(table) for (_, name), table in read.items()}
        tuning = {"tuned": True, "lead": lead}
        records = {name: {"m": {"tuning": tuning}} for name in ("train", "views")}
        records["none"] = {"m": {"tuning": {"tuned": False}}}
        add(entries, records, read, tmp_path)
        assert {key: entries["m/views"][key] for key in UNKNOWN} == UNKNOWN
        assert {key: entries["m/none"][key] for key in UNKNOWN} == UNKNOWN
        trained = entries["m/train"]
        assert trained["control"] == expected
        compared = over_control(run, read["m", expected], expected)
        assert trained["over_control"] == pytest.approx(compared["over_control"])
        assert trained["over_control_low"] == pytest.approx(compared["over_control_low"])
