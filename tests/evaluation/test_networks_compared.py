"""Networks as they are beside what is recommended for the others, on the same shifted images."""

import numpy as np
import pandas as pd
import pytest

from tests.evaluation.test_controls import predictions
from tttlab.errors import UserError
from tttlab.evaluation import networks
from tttlab.evaluation.results import CONTROL

PAIRS = [(model, run) for model in ("weak", "strong") for run in (CONTROL, "shrink", "memo")]


def tuning(lead, steps=0):
    settings = {"steps": steps} if steps else {}
    return {"tuned": True, "lead": lead, "lead_error": 0.01, "settings": settings}


def records(leads):
    """What `adapt` tells, by run and model, from leads in tuning by model and run."""
    told = {run: {} for run in (CONTROL, "shrink", "memo")}
    for model, run in PAIRS:
        lead = leads.get((model, run))
        told[run][model] = {
            "settings": {"protocol": "episodic"},
            "tuning": {} if lead is None else tuning(lead, 2 * (run == "memo")),
        }
    return told


@pytest.fixture
def folder(tmp_path):
    """Two networks: of the shifted images the weak one knows 40 %, adapted 60; the other 80."""
    draw = np.random.default_rng(0).random((3, 4, 60))
    right = {
        ("weak", CONTROL): draw < 0.4,
        ("weak", "shrink"): draw < 0.6,
        ("weak", "memo"): draw < 0.5,
        ("strong", CONTROL): draw < 0.8,
        ("strong", "shrink"): draw < 0.7,
        ("strong", "memo"): draw < 0.9,
    }
    for (model, run), adapted in right.items():
        (tmp_path / model).mkdir(exist_ok=True)
        table = predictions(adapted, right[model, CONTROL])
        table.to_parquet(tmp_path / model / f"{run}.parquet")
    return tmp_path, right


def table_of(told, folder, pairs=PAIRS):
    return pd.DataFrame(networks.rows(told, pairs, folder))


def test_the_other_network_as_it_is_stands_beside_the_recommended_run(folder):
    path, right = folder
    told = records({("weak", "shrink"): 0.1, ("weak", "memo"): 0.05, ("strong", "memo"): 0.2})
    table = table_of(told, path).set_index("model")
    assert table["run"].to_dict() == {"weak": "shrink", "strong": "memo"}
    assert table["other"].to_dict() == {"weak": "strong", "strong": "weak"}
    shifted = {key: value[1:] for key, value in right.items()}  # (shifts, seeds, images)
    for model, run, other in (("weak", "shrink", "strong"), ("strong", "memo", "weak")):
        row, own = table.loc[model], shifted[model, run]
        assert row["accuracy"] == pytest.approx(own.mean())
        assert row["accuracy_other"] == pytest.approx(shifted[other, CONTROL].mean())
        assert row["lead"] == pytest.approx(row["accuracy_other"] - row["accuracy"])
        assert row["lead_low"] < row["lead"] < row["lead_high"]
    assert table.loc["weak", "lead_low"] > 0 > table.loc["strong", "lead_high"]


def test_where_nothing_is_recommended_the_networks_are_compared_as_they_are(folder):
    path, right = folder
    table = table_of(records({("weak", "shrink"): -0.1}), path).set_index("model")
    assert set(table["run"]) == {CONTROL}
    assert table.loc["weak", "accuracy"] == pytest.approx(right["weak", CONTROL][1:].mean())
    weak, strong = table.loc["weak"], table.loc["strong"]
    assert weak["lead"] == pytest.approx(-strong["lead"])
    assert (weak["lead_low"], weak["lead_high"]) == pytest.approx(
        (-strong["lead_high"], -strong["lead_low"])
    )


def test_a_stream_is_no_recommendation_for_single_images(folder):
    told = records({("weak", "shrink"): 0.1, ("weak", "memo"): 0.05})
    told["shrink"]["weak"]["settings"]["protocol"] = "online"
    assert table_of(told, folder[0]).set_index("model").loc["weak", "run"] == "memo"


def test_one_network_or_no_labels_give_no_rows(folder):
    path, _ = folder
    assert not len(table_of(records({}), path, [pair for pair in PAIRS if pair[0] == "weak"]))
    for file in path.glob("*/*.parquet"):
        pd.read_parquet(file).assign(label=-1).to_parquet(file)
    assert not len(table_of(records({}), path))


def test_networks_of_other_images_are_refused(folder):
    path, _ = folder
    file = path / "strong" / f"{CONTROL}.parquet"
    pd.read_parquet(file).query("image_id != '0'").to_parquet(file)
    with pytest.raises(UserError, match="expected two tables of the same images"):
        table_of(records({}), path)
