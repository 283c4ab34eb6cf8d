"""The card of a registered model says what the tables say, and where its best run did harm."""

from itertools import product

import pytest

from tests.helpers import evaluated
from tttlab.evaluation.results import Results
from tttlab.reporting.card import write_card

RUNS = ("none", "shrink", "ssl")


def card(results, **changes):
    about = {
        "trained_on": "503 labeled images.",
        "tested_on": "40 test images.",
        "about": {"classes": [f"class{number}" for number in range(14)]},
        "best": "ssl",
        "refused": {"tent": "tent, which adapts along a stream"},
        "links": {"ssl": "#/runs/7"},
    }
    return write_card(results, "vit", **about | changes)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    evaluated.write_project(root, models=("vit",), runs=RUNS)
    return Results.read(root, list(product(("vit",), RUNS)))


def test_the_table_is_that_of_metrics(results):
    text = card(results)
    assert "**Classes** (14): class0, class1," in text
    assert "class11, …" in text
    assert "class12" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "run |" not in line]
    assert [row.split(" | ")[0].lstrip("| ") for row in rows] == [
        "none",
        "shrink",
        "**[ssl](#/runs/7)** (default)",
    ]
    for row, run in zip(rows, RUNS, strict=True):
        entry = results.summary["vit", run]
        without, adapted = (
            f"{100 * entry[f'accuracy_{side}']:.1f}" for side in ("source", "adapted")
        )
        assert row.split(" | ")[1:3] == [without, adapted]


def test_the_shifts_that_the_best_run_is_known_to_lose_on_are_named(results):
    table = results.tables["by_corruption"]
    hurt = table[(table["run"] == "ssl") & (table["gain_high"] < 0)]["corruption"]
    assert len(hurt) > 0  # its effect without training is 0, and training takes 0.2 away
    text = card(results)
    (line,) = (line for line in text.splitlines() if "there ssl lost accuracy" in line)
    assert all(name.replace("_", " ") in line for name in hurt)
    kept = set(table["corruption"]) - set(hurt)
    assert not any(name.replace("_", " ") in line for name in kept)
    assert "- Instead of the plain network: ssl is not known to help; ask for none." in text
    assert "- For tent, which adapts along a stream." in text
    good = card(results, best="shrink", refused={})
    assert "not known to help" not in good
    assert "lost accuracy" not in good


def test_without_labels_nothing_is_claimed(tmp_path):
    evaluated.write_project(tmp_path, models=("vit",), runs=RUNS, labeled=False)
    results = Results.read(tmp_path, list(product(("vit",), RUNS)))
    assert results.tables["by_corruption"]["gain"].isna().all()
    text = card(results, best="shrink")
    assert "- Instead of the plain network: shrink is not known to help" in text
    assert "nan" not in text


def test_where_nothing_is_recommended_none_is_not_advised_against(results):
    text = card(results, best="none")
    assert "**[none]" not in text
    assert "| **none** (default) |" in text
    assert text.startswith(
        "An image classifier that answers as it is. Asked for a run by its name, it adapts to "
        "every image, without its label, and answers with and without.\n\n"
    )
    assert card(results).startswith("An image classifier that adapts to every image it is asked")
    warnings = text.partition("**When not to use it**\n\n")[2].partition("\n\n")[0].splitlines()
    assert warnings == [
        "- On images of other classes: it always answers one of its own, adapted or not.",
        "- Under shifts that it was not tested on, before a few labeled images of them have shown "
        "that it helps there, too.",
        "- For tent, which adapts along a stream.",
    ]
    latest = f"{results.summary['vit', 'ssl']['milliseconds_p95']:.3g}"
    assert f"- Where an answer must come in less than {latest} ms on a machine" in card(results)


def test_a_model_with_only_the_control_promises_no_adapting(tmp_path):
    evaluated.write_project(tmp_path, models=("vit",), runs=("none",), images=12)
    text = card(Results.read(tmp_path, [("vit", "none")]), best="none")
    assert text.startswith("An image classifier; no run of it adapts to single images.\n\n")
