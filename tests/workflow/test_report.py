"""The stages `evaluate` and `report`, and the text of the report."""

import json
import math
import os
import re
import shutil
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest

from pipeline import evaluate
from pipeline import report as report_stage
from tests.helpers import evaluated
from tttlab.adaptation.task import Task
from tttlab.config.experiments import Online
from tttlab.config.runs import resolve_run
from tttlab.errors import UserError
from tttlab.evaluation.results import Results, read_table
from tttlab.reporting import about, report
from tttlab.reporting.words import (
    amount,
    interval,
    percent,
    points,
    probability,
    setting,
    significant,
)
from tttlab.tracking.executions import Execution
from tttlab.tracking.records import TAG_LIMIT
from tttlab.tracking.runs import pipeline_run
from tttlab.tracking.store import open_store
from tttlab.workflow import places
from tttlab.workflow.loading import Ready
from tttlab.workflow.network_runs import NetworkRun
from tttlab.workflow.pieces import Piece

MODELS, RUNS = ("vit",), tuple(evaluated.RUNS)


def number(text: str) -> float:
    return float(re.sub(r"[*,]", "", text.replace("−", "-")))


def run_stages(root, **options) -> str:
    """Make a project as before `evaluate`, run `evaluate` and `report`, and return their output."""
    outputs, lines = root / "outputs", []
    params = evaluated.write_project(outputs, **options)
    for path in (outputs / "predictions").rglob("*.parquet"):
        folder = outputs / "adapted" / path.stem / path.parent.name
        folder.mkdir(parents=True)
        about = json.loads((outputs / "runs" / f"{path.stem}.json").read_text())[path.parent.name]
        for seed, table in pd.read_parquet(path).groupby("seed"):
            table.to_parquet(folder / f"{seed}.parquet", index=False)
            (folder / f"{seed}.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.rmtree(outputs / "predictions")
    shutil.rmtree(outputs / "runs")
    distances = read_table(outputs / "tables" / "distances.csv")
    for (model, seed), table in distances.groupby(["model", "seed"]):
        (outputs / "distances" / model).mkdir(parents=True, exist_ok=True)
        table.to_csv(outputs / "distances" / model / f"{seed}.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "OUTPUTS", outputs)
        patch.setattr(places, "ROOT", root)
        patch.setattr(
            "tttlab.workflow.execution.execution", lambda _: Execution("repro", os.getpid())
        )
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        evaluate.run(params)
        report_stage.run(params)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A project after `evaluate` and `report`, with their output in the file ``printed``."""
    root = tmp_path_factory.mktemp("project")
    printed = run_stages(root, models=MODELS, images=32, corruptions=("fog", "frost"))
    (root / "printed").write_text(printed, encoding="utf-8")
    return root / "outputs"


@pytest.fixture(scope="module")
def results(outputs):
    return Results.read(outputs, list(product(MODELS, RUNS)))


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    root = tmp_path_factory.mktemp("unlabeled")
    evaluated.write_project(root, models=MODELS, labeled=False, images=24, corruptions=("fog",))
    return Results.read(root, list(product(MODELS, RUNS)))


class TestStage:
    def test_prints_the_comparison_and_where_to_look(self, outputs):
        printed = (outputs.parent / "printed").read_text(encoding="utf-8")
        metrics = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))
        entry = metrics["runs"]["vit/actmad"]
        pattern = r"^(vit +actmad .*)\n +(with gate .*)$"
        ((line, gated),) = re.findall(pattern, printed, re.MULTILINE)
        before, after = 100 * entry["accuracy_source"], 100 * entry["accuracy_adapted"]
        assert f"{before:.1f} → {after:.1f}" in line
        assert f"+{100 * entry['gain']:.1f}  [+" in line
        assert f" {points(entry['training_gain'])} " in line
        assert "clean 0.0" in line
        assert f"→ {100 * entry['gated']['accuracy_adapted']:.1f}" in gated
        assert str(outputs / "report.html") in printed
        there = f"cd {outputs.parent.resolve()} && {places.program()}"  # there is no Makefile
        assert printed.endswith(f"MLflow   {there} ui")

    def test_comparison_lies_on_the_parent_run(self, outputs):
        root = outputs.parent
        run_id = pipeline_run(root, Execution("repro", os.getpid()))
        run = open_store(root)[0].get_run(run_id)
        entries = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))["runs"]
        for key, entry in entries.items():
            assert run.data.metrics[f"gain/{key}"] == pytest.approx(entry["gain"], abs=5.1e-5)
        assert "| vit | actmad |" in run.data.tags["mlflow.note.content"]
        artifacts = (root / "mlruns" / run.info.run_id).rglob("*")
        names = {path.name for path in artifacts if path.is_file()}
        expected = "report.html comparison.json gain_vit.png examples.png cost.png"
        assert set(expected.split()) <= names

    def test_the_page_shows_flips_of_the_runs_that_train(self, outputs):
        text = (outputs / "report.html").read_text(encoding="utf-8")
        assert re.findall(r"</svg>(\w+ · \w+)</h3>", text) == [
            f"{model} · {run}" for model in MODELS for run in ("ssl", "actmad")
        ]

    def test_flips_are_those_of_the_first_training_seed_that_params_yaml_lists(self, tmp_path):
        """The first seed here is not the smallest."""
        options = {"runs": ("none", "actmad"), "images": 24, "corruptions": ("fog",)}
        run_stages(tmp_path, models=MODELS, seeds=(3, 0), **options)
        predictions = tmp_path / "outputs" / "predictions" / "vit" / "actmad.parquet"
        table = pd.read_parquet(predictions).query("shift != 'clean'")
        before = table["source_prediction"] == table["label"]
        after = table["adapted_prediction"] == table["label"]
        flips = [
            (turned & (table["seed"] == seed)).sum()
            for seed in (3, 0)
            for turned in (~before & after, before & ~after)
        ]
        text = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
        headings = r"<h4>(?:wrong → right|right → wrong): (?:\d+ of (\d+)|none)</h4>"
        counts = [int(count or 0) for count in re.findall(headings, text)]
        assert counts == flips[:2] != flips[2:]


class TestNames:
    """Names that look like a number, a truth value or a missing value stay names all the way."""

    MODELS, RUNS = ("50", "null"), ("none", "1e5", "true", "nan")

    @pytest.fixture(scope="class")
    @classmethod
    def named(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("names")
        with pytest.MonkeyPatch.context() as patch:
            for run in cls.RUNS[1:]:
                patch.setitem(evaluated.RUNS, run, evaluated.RUNS["actmad"])
            sets = {
                f"photos/{name}": evaluated.blobs(9, name, seed=number)
                for number, name in enumerate(("nan", "None"))
            }
            options = {
                "models": cls.MODELS,
                "runs": cls.RUNS,
                "images": 9,
                "corruptions": ("fog",),
                "severities": (5,),
            }
            printed = run_stages(root, **options, sets=sets, gated=("1e5",))
        return root / "outputs", printed

    def test_every_table_has_its_rows(self, named):
        outputs, _ = named
        results = Results.read(outputs, list(product(self.MODELS, self.RUNS)))
        for name, runs in (
            ("by_shift", self.RUNS),
            ("by_corruption", self.RUNS),
            ("by_severity", self.RUNS),
            ("reliability", self.RUNS),
            ("distances", ()),
        ):
            table = results.rows(name)
            assert set(table["model"]) == set(self.MODELS), name
            assert set(table.get("run", ())) == set(runs), name
        photos = {"photos/nan", "photos/None"}
        assert set(results.rows("by_shift")["shift"]) == {"clean", "fog-5"} | photos
        assert set(results.rows("distances")["corruption"]) == {"none", "fog"} | photos
        assert results.changed("50", "true") > 0

    def test_terminal_page_and_mlflow_show_them(self, named):
        outputs, printed = named
        page = (outputs / "report.html").read_text(encoding="utf-8")
        run_id = pipeline_run(outputs.parent, Execution("repro", os.getpid()))
        run = open_store(outputs.parent)[0].get_run(run_id)
        for model, name in product(self.MODELS, self.RUNS):
            assert re.search(rf"^{model} +{name} ", printed, re.MULTILINE)
            assert f'data-row="{model}/{name}"' in page
            assert f"gain/{model}/{name}" in run.data.metrics


class TestRead:
    def test_a_missing_stage_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"metrics\.json.*run `make repro`"):
            Results.read(tmp_path, list(product(MODELS, RUNS)))

    @pytest.mark.parametrize("name", ["by_shift", "by_corruption", "by_severity"])
    def test_a_missing_table_is_named(self, tmp_path, name):
        evaluated.write_project(tmp_path, models=("vit",), runs=("none",), images=4)
        (tmp_path / "tables" / f"{name}.csv").unlink()
        with pytest.raises(UserError, match=rf"{name}\.csv.*run `make repro`"):
            Results.read(tmp_path, list(product(("vit",), ("none",))))

    def test_a_run_without_its_numbers_is_named(self, outputs):
        with pytest.raises(UserError, match=r"runs/new\.json.*run `make repro`"):
            Results.read(outputs, list(product(MODELS, (*RUNS, "new"))))
        with pytest.raises(UserError, match=r"metrics\.json: expected an entry resnet/none"):
            Results.read(outputs, list(product(("resnet",), RUNS)))

    def test_rows_are_those_of_the_models_and_runs_asked_for(self, outputs):
        part = Results.read(outputs, list(product(("vit",), ("none", "ssl"))))
        assert set(part.rows("by_shift")["run"]) == {"none", "ssl"}
        assert set(part.rows("distances")["model"]) == {"vit"}
        assert set(part.rows("by_shift", run="ssl", shift="fog-5")["shift"]) == {"fog-5"}
        assert not len(part.rows("nothing of this name"))

    def test_names_that_look_like_missing_values_are_names(self, tmp_path):
        evaluated.write_project(tmp_path, models=("vit",), runs=("none",), images=4)

        def substitute(path, old: str, new: str) -> None:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(old, new), encoding="utf-8")

        for path in (tmp_path / "tables").glob("*.csv"):
            substitute(path, "vit,none,", "null,none,")
        substitute(tmp_path / "metrics.json", "vit/none", "null/none")
        substitute(tmp_path / "runs" / "none.json", '"vit"', '"null"')
        results = Results.read(tmp_path, [("null", "none")])
        assert len(results.rows("by_shift", model="null")) > 0

    def test_changes_are_those_of_the_predictions(self, outputs, results):
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        table = table.query("shift != 'clean'")
        expected = (table["source_prediction"] != table["adapted_prediction"]).mean()
        assert results.changed("vit", "actmad") == pytest.approx(expected)
        assert results.changed("vit", "none") == 0


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (percent, 0.613, "61.3"),
        (percent, None, "–"),
        (percent, math.nan, "–"),
        (points, 0.047, "+4.7"),
        (points, -0.002, "−0.2"),
        (points, -0.0001, "0.0"),
        (points, 0.0, "0.0"),
        (amount, 0.0512, "0.05"),
        (amount, 4.567, "4.57"),
        (amount, 18.34, "18.3"),
        (amount, 12400.4, "12,400"),
        (amount, None, "–"),
        (significant, 0.004123, "0.00412"),
        (significant, -0.5, "−0.5"),
        (significant, 41234.0, "41,234"),
        (significant, math.nan, "–"),
        (probability, 0.314, "0.31"),
        (probability, 0.0042, "0.004"),
        (probability, 0.0951, "0.10"),
        (probability, 1e-9, "< 0.001"),
        (probability, None, "–"),
        (setting, 3.0e-5, "3e-05"),
        (setting, 1.0, "1"),
        (setting, 0.123456789, "0.123456789"),
        (setting, 1, "1"),
        (setting, True, "true"),
        (setting, None, "null"),
        (setting, ["blocks.0", "norm"], "[blocks.0, norm]"),
    ],
)
def test_numbers_as_text(function, value, text):
    assert function(value) == text


def test_interval_as_text():
    assert interval(0.039, 0.055) == "[+3.9, +5.5]"
    assert interval(-0.01, 0.0) == "[−1.0, 0.0]"
    assert interval(None, None) == "–"


def sentence(extra=(), streamed=(), adapted=(), **gains) -> str:
    """Write the sentence for runs given as (low, gain, high, clean change)."""
    entries = {
        ("m", run): {
            "accuracy_source": 0.5,
            "accuracy_adapted": 0.5 + gain,
            "gain": gain,
            "gain_low": low,
            "gain_high": high,
            "clean_source": 0.9,
            "clean_adapted": 0.9 + clean,
        }
        for run, (low, gain, high, clean) in gains.items()
    }
    for run, entry in dict(extra).items():
        entries["m", run] |= entry
    adapted = {
        ("m", run): {"settings": {"protocol": "online" if run in streamed else "episodic"}}
        | dict(adapted).get(run, {})
        for run in gains
    }
    return report.sentence(Results(("m",), tuple(gains), entries, adapted=adapted), "m")


class TestSentence:
    def test_the_best_comes_first_with_its_numbers(self):
        text = sentence(a=(0.01, 0.02, 0.03, 0), b=(0.02, 0.05, 0.08, 0))
        assert text.startswith(
            "b helped most, 50.0 % → 55.0 % (+5.0 points, 95 % interval +2.0 to +8.0); "
            "a helped too."
        )
        assert text.endswith("No run lost more than one point on clean images.")

    def test_streams_are_not_compared_with_single_images(self):
        hurt = (-0.03, -0.02, -0.01, 0)
        text = sentence(
            a=(0.01, 0.02, 0.03, 0), b=(0.02, 0.05, 0.08, 0), c=hurt, streamed=("b", "c")
        )
        alone, along = text.removeprefix("Image by image: ").split(" On streams: ")
        assert alone.startswith("a helped most, 50.0 % → 52.0 %")
        assert along.startswith("b helped most, 50.0 % → 55.0 %")
        assert "c hurt" in along
        assert sentence(b=(0.02, 0.05, 0.08, 0), streamed=("b",)).startswith("b helped most")

    def test_nothing_helped_some_hurt_some_are_undecided(self):
        text = sentence(
            a=(-0.03, -0.02, -0.01, 0),
            b=(-0.01, 0.01, 0.03, 0),
            c=(-0.02, 0.0, 0.02, 0),
            d=(0, 0, 0, 0),
        )
        assert text == (
            "No run helped: no interval lies above zero. a hurt: the interval lies below zero. "
            "b and c: undecided, the interval includes zero. d made no difference to the accuracy. "
            "No run lost more than one point on clean images."
        )

    def test_too_few_images_for_an_interval_are_told_and_not_called_a_failure(self):
        assert sentence(a=(None, 0.02, None, 0)) == (
            "a: unknown, too few images for an interval. "
            "No run lost more than one point on clean images."
        )

    def test_a_loss_on_clean_images_is_told(self):
        text = sentence(
            a=(0.01, 0.02, 0.03, -0.03), b=(0.01, 0.02, 0.03, -0.06), c=(0.01, 0.02, 0.03, -0.005)
        )
        assert text.endswith("On clean images b lost 6.0 points and a lost 3.0 points.")

    def test_the_control_is_left_out(self):
        assert "none" not in sentence(none=(0, 0, 0, 0), a=(0.01, 0.02, 0.03, 0))

    def test_training_is_told_apart_from_the_rest_of_the_gain(self):
        trained = {"training_gain": 0.01, "training_gain_low": 0.005, "training_gain_high": 0.02}
        unclear = {"training_gain": -0.002, "training_gain_low": -0.01, "training_gain_high": 0.01}
        text = sentence(
            {"a": trained, "b": unclear},
            a=(0.01, 0.02, 0.03, 0),
            b=(0.02, 0.05, 0.08, 0),
            c=(0.01, 0.02, 0.03, 0),
        )
        assert "Points by training alone: a +1.0, b −0.2 (undecided)." in text

    def test_training_with_too_few_images_is_not_called_undecided(self):
        unknown = {"training_gain": 0.01, "training_gain_low": None, "training_gain_high": None}
        text = sentence({"a": unknown}, a=(None, 0.02, None, 0))
        assert "Points by training alone: a +1.0 (too few images to tell)." in text

    def test_a_setting_that_had_no_influence_is_told(self):
        def tuned(*without_influence: str) -> dict:
            return {"tuning": {"tuned": True, "without_influence": list(without_influence)}}

        gains = {"a": (0.01, 0.02, 0.03, 0), "b": (0.02, 0.05, 0.08, 0)}
        text = sentence(adapted={"a": tuned("prior")}, **gains)
        assert text.endswith("Tuning: prior of a had no influence, all values tie.")
        text = sentence(adapted={"a": tuned("prior"), "b": tuned("lr", "clip")}, **gains)
        assert text.endswith(
            "Tuning: prior of a and lr, clip of b had no influence, all values tie."
        )
        assert "Tuning" not in sentence(adapted={"a": tuned()}, a=(0.1, 0.2, 0.3, 0))

    def test_the_gate_is_told_with_its_price(self):
        gated = {
            "gain": 0.02,
            "gain_low": 0.01,
            "gain_high": 0.03,
            "accuracy_adapted": 0.52,
            "clean_adapted": 0.895,
            "open": 0.5,
            "clean_open": 0.1,
            "milliseconds": 3.0,
        }
        text = sentence({"a": {"gated": gated}}, a=(0.01, 0.03, 0.05, -0.03))
        assert text.endswith("With the gate: a +2.0 (clean −0.5).")


class TestSettingsInUse:
    """MLflow and the report show the settings of a run that act on it, and no others."""

    ALWAYS = frozenset({"run", "method", "protocol", "normalisation", "average", "seed"})
    TRAINING = frozenset({"steps", "optimizer", "lr", "momentum", "trainable", "clip", "sharpness"})

    @pytest.mark.parametrize(
        ("entry", "shown"),
        [
            ({"method": "none"}, set()),
            ({"method": "t3a", "protocol": "online"}, set()),
            ({"method": "none", "normalisation": "mixed", "prior": 0.2}, {"prior"}),
            ({"method": "views", "normalisation": "shrink", "lr": 0.1}, {"threshold"}),
            ({"method": "actmad", "steps": 3}, TRAINING),
            (
                {"method": "actmad", "optimizer": "adam", "normalisation": "shrink"},
                TRAINING - {"momentum"} | {"threshold"},
            ),
            ({"method": "actmad", "trainable": "none"}, {"steps", "trainable"}),
            ({"method": "actmad", "steps": 0}, {"steps", "trainable"}),
        ],
    )
    def test_no_learning_rate_where_nothing_is_learnt(self, entry, shown):
        settings = resolve_run({"own": entry}, {"vit": "none"}, "own", "vit")
        ready = Ready(settings, Task(None, "Method()"))
        piece = Piece("own", "vit", 0)
        run = NetworkRun(SimpleNamespace(seed=3), piece, None, [], None, None, {}, ready)
        assert run.settings.keys() == self.ALWAYS | shown
        for name in shown & entry.keys():
            assert run.settings[name] == entry[name]


class TestMarkdown:
    def test_runs_link_to_their_pages(self, results):
        text = report.markdown(results, {("vit", "actmad"): "#/experiments/1/runs/7"})
        assert "| vit | [actmad](#/experiments/1/runs/7) |" in text
        assert "| vit | views |" in text

    def test_training_and_gate_have_their_numbers(self, results):
        entry = results.summary["vit", "actmad"]
        lines = [line for line in report.markdown(results, {}).splitlines() if "| vit |" in line]
        cells = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines}
        training_gain, accuracy = entry["training_gain"], entry["gated"]["accuracy_adapted"]
        assert number(cells["actmad"][6]) == pytest.approx(100 * training_gain, abs=0.0501)
        assert number(cells["actmad with gate"][3]) == pytest.approx(100 * accuracy, abs=0.0501)
        assert cells["shrink"][6] == ""

    def test_searched_settings_are_listed_with_the_chosen_values_bold(self, results):
        text = report.markdown(results, {})
        assert "\n- vit · bn: prior **0.1**, 0.4 (no influence: all values tie)\n" in text
        assert (
            "\n- vit · actmad: lr 0.1, **0.03**; clip **null**, 1 (no influence: all values tie); "
            "trainable norm, **[blocks.0, norm]**; steps 1, **5**\n"
        ) in text
        assert "vit · ssl: " not in text

    def test_a_long_table_is_cut_between_rows(self, results):
        runs = [f"run_{number}" for number in range(80)]
        summary = {("vit", run): results.summary["vit", "actmad"] for run in runs}
        adapted = {key: {} for key in summary}
        results = Results(("vit",), tuple(runs), summary, results.tables, adapted)
        pages = dict.fromkeys(summary, f"#/experiments/1/runs/{'0' * 32}")
        text = report.markdown(results, pages)
        assert len(text) <= TAG_LIMIT
        assert "comparison.json" in text
        assert all(line.endswith(" |") for line in text.splitlines() if line.startswith("| vit"))

    def test_a_long_list_of_what_was_searched_is_cut_between_lines(self, results):
        runs = [f"run_{number}" for number in range(30)]
        summary = {("vit", run): results.summary["vit", "bn"] for run in runs}
        adapted = dict.fromkeys(summary, results.adapted["vit", "actmad"])
        text = report.markdown(Results(("vit",), tuple(runs), summary, results.tables, adapted), {})
        assert len(text) <= TAG_LIMIT
        lines = [line for line in text.splitlines() if line.startswith("- ")]
        assert 1 < len(lines) < 30
        assert all(line.endswith("steps 1, **5**") for line in lines[:-1])
        assert text.endswith(
            "- and more in `report.html`\n\n"
            "Figures and the page `report.html` are among the artifacts."
        )


class TestSomeLabels:
    """Of a set that comes shifted, one domain has labels and one has none."""

    def test_every_number_is_of_the_labeled_ones_and_the_others_are_named(self, tmp_path):
        sets = {"photos/a": evaluated.blobs(20, "a", 1), "photos/b": evaluated.blobs(30, "b", 2)}
        options = {"models": MODELS, "runs": ("none", "actmad"), "images": 12, "corruptions": ()}
        labeled = ("clean", "photos/a")
        printed = run_stages(tmp_path, sets=sets, labeled=labeled, **options)
        line = "no labels, so that only changed predictions are counted: photos/b\n"
        assert line in printed
        sentence = (
            "There are no labels for photos/b: 30 of the 50 shifted images count in no accuracy "
            "and no gain."
        )
        assert f"\n{sentence}\n" in printed
        page = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
        assert page.count(sentence) == 2  # in the verdict and in the note
        assert "over the shifts with labels (photos/a), n = 20 images." in page
        assert "over all" not in page

    def test_where_all_have_labels_nothing_is_said(self, outputs):
        assert "no labels" not in (outputs.parent / "printed").read_text(encoding="utf-8")


class TestWithoutLabels:
    def test_tables_show_changes_in_place_of_accuracy(self, unlabeled):
        share = percent(unlabeled.changed("vit", "actmad"))
        plain, markdown = report.plain_table(unlabeled), report.markdown(unlabeled, {})
        assert re.search(rf"^vit +actmad +{share} ", plain, re.MULTILINE)
        assert f"| vit | actmad | {share} |" in markdown
        assert not re.search(r"\bnan\b|\bNone\b|–|gate", plain + markdown)

    def test_the_price_on_clean_images_is_shown_where_these_have_labels(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), labeled="clean", images=24, corruptions=("fog",)
        )
        results = Results.read(tmp_path, list(product(("vit",), RUNS)))
        entry = results.summary["vit", "actmad"]
        price = points(entry["clean_adapted"] - entry["clean_source"])
        share = percent(results.changed("vit", "actmad"))
        row = rf"^vit +actmad +{share} +clean {re.escape(price)} "
        assert re.search(row, report.plain_table(results), re.MULTILINE)
        assert f"| vit | actmad | {share} | {price} |" in report.markdown(results, {})
        assert entry["gain"] is None

    def test_the_sentence_says_so(self, unlabeled):
        assert "no labels, so accuracy is unknown" in report.sentence(unlabeled, "vit")


STREAM = Online(batch_size=64, order="by_class", shifts="mixed")


class TestAbout:
    ALONE = "each adapted to on its own, from the source weights, without labels."

    def about(self, results, models=("a", "b"), runs=RUNS, seeds=1, streamed=(), **shifts):
        """Write the text about 32 images under each of five shifts."""
        entry = results.summary["vit", "none"] | {"seeds": seeds}
        summary = dict.fromkeys(product(models, runs), entry)
        online = {"settings": {"protocol": "online"}}
        adapted = dict.fromkeys(product(models, streamed), online)
        results = Results(models, runs, summary, results.tables, adapted)
        return about.note(results, "digits", evaluated.settings(**shifts), STREAM)

    @pytest.fixture
    def results(self, results):
        """All rows as rows of model a."""
        tables = {"by_shift": results.rows("by_shift").assign(model="a")}
        return Results(results.models, results.runs, results.summary, tables)

    def test_says_what_was_tested_on_what(self, results):
        text = self.about(results, corruptions=("fog", "snow"), severities=(1, 5))
        assert text == (
            "2 models, trained once each; 6 runs each; 32 test images from digits, "
            f"under 2 synthetic corruptions at severities 1 and 5 and clean, {self.ALONE}"
        )

    def test_says_whose_strengths_the_corruptions_have(self, results):
        fog = {"corruptions": ("fog",), "severities": (1, 5)}
        text = self.about(results, strength="cifar10_c", **fog)
        said = (
            "1 synthetic corruption at severities 1 and 5 (strengths of CIFAR-10-C, written anew)"
        )
        assert f"under {said} and clean, " in text

    def test_says_how_many_training_seeds(self, results):
        by_shift = results.tables["by_shift"]
        tables = {"by_shift": by_shift.assign(n=3 * by_shift["n"])}
        results = Results(("a",), ("none",), results.summary, tables)
        fog = {"corruptions": ("fog",), "severities": (5,)}
        text = self.about(results, ("a",), ("none",), seeds=3, **fog)
        assert text.startswith("1 model, trained with 3 seeds; 1 run; 32 test images from digits, ")
        assert "1 synthetic corruption at severity 5 and clean, each adapted to on its own" in text

    def test_says_which_runs_are_on_streams(self, results):
        stream = (
            "the shifts of a severity mixed in one stream "
            "(batches of 64, one class after another), without labels."
        )
        runs = ("none", "bn", "tent")
        text = self.about(results, ("a",), runs, streamed=("tent",), corruptions=("fog",))
        assert text.endswith(
            f"and clean, each adapted to on its own, from the source weights; tent: {stream}"
        )
        text = self.about(results, ("a",), runs, streamed=("bn", "tent"), corruptions=("fog",))
        assert text.endswith(f"and clean, {stream}")

    def test_says_how_many_runs_there_are_for_each_model(self, results):
        entry = results.summary["vit", "none"]
        pairs = [("a", "none"), ("a", "tent"), ("b", "none")]
        summary = dict.fromkeys(pairs, entry)
        results = Results(("a", "b"), ("none", "tent"), summary, results.tables)
        settings = evaluated.settings(corruptions=("fog",))
        assert "; 1 to 2 runs each; " in about.note(results, "digits", settings, STREAM)

    def test_says_which_sets_came_shifted(self, results):
        sets = ("cifar10_c/fog", "cifar10_c/snow", "photos/night")
        text = self.about(results, corruptions=("fog",), severities=(5,), sets=sets)
        shifts = "1 synthetic corruption at severity 5, clean and those of cifar10_c and photos"
        assert f"digits, under {shifts}, each adapted" in text
        text = self.about(results, corruptions=(), sets=("photos/night",))
        assert f"32 test images from digits, clean and those of photos, {self.ALONE}" in text

    def test_counts_the_test_images_and_not_those_of_a_larger_set(self, results):
        by_shift = results.tables["by_shift"]
        larger = by_shift[by_shift["shift"] == "fog-5"].assign(
            shift="photos/night", corruption="photos/night", severity=0, n=500
        )
        tables = {"by_shift": pd.concat([by_shift, larger])}
        results = Results(("vit",), RUNS, results.summary, tables)
        text = self.about(results, corruptions=("fog",), sets=("photos/night",))
        assert "32 test images from digits" in text

    def test_says_where_the_test_images_are_themselves_shifted(self, results):
        text = self.about(results, corruptions=(), clean="validation")
        images = "32 test images from digits, shifted as they are (clean: labeled images set aside)"
        assert f"{images}, {self.ALONE}" in text


def test_the_number_of_images_is_that_of_each_shift_and_not_of_all_together(results):
    by_shift = results.rows("by_shift")
    by_shift = by_shift.assign(n=by_shift["n"].where(by_shift["shift"] != "fog-5", 20))
    assert results.images == (32, 32)
    assert Results(MODELS, RUNS, results.summary, {"by_shift": by_shift}).images == (20, 32)
