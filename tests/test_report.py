import json
import math
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import pipeline
from pipeline import evaluate
from pipeline import report as report_stage
from tttlab import metrics, plots, report, tracking
from tttlab.data import ImageSet
from tttlab.errors import UserError

MODELS, RUNS = ("convnet", "vit"), ("none", "views", "actmad")
CORRUPTIONS, SEVERITIES = ("fog", "gaussian_noise"), (1, 5)
IMAGES = 24


def predictions(better: float, seed: int) -> pd.DataFrame:
    """Draw a table in which adaptation makes a share ``better`` of the predictions right; below zero, wrong."""
    generator = np.random.default_rng(seed)
    shifts = [("clean", "none", 0), *((f"{c}-{s}", c, s) for c in CORRUPTIONS for s in SEVERITIES)]
    blocks = []
    for shift, corruption, severity in shifts:
        label = np.arange(IMAGES) % 3
        right = generator.random(IMAGES) < (0.9 if severity == 0 else 0.5)
        flip = generator.random(IMAGES) < abs(better) if severity else np.zeros(IMAGES, bool)
        adapted = np.where(flip, better > 0, right)
        columns = {"image_id": [f"test/{i}" for i in range(IMAGES)], "shift": shift, "corruption": corruption}
        columns |= {"severity": severity, "label": label, "source_prediction": np.where(right, label, label + 1)}
        columns |= {"adapted_prediction": np.where(adapted, label, label + 1), "source_confidence": 0.5}
        columns |= {"adapted_confidence": 0.6, "loss_first": 1.0, "loss_last": 0.5, "fell_back": flip & (severity == 5)}
        blocks.append(pd.DataFrame({**columns, "milliseconds": generator.lognormal(3, 0.3, IMAGES)}))
    return pd.concat(blocks, ignore_index=True)


def write_project(outputs, **columns) -> SimpleNamespace:
    """Write what the stages before `evaluate` leave; return the settings that it belongs to."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(IMAGES, 16, 16, 3), dtype=np.uint8)
    ids = tuple(f"test/{i}" for i in range(IMAGES))
    labels = np.arange(IMAGES) % 3
    ImageSet(pixels, labels, ids, ("a", "b", "c"), source="a <source>").save(outputs / "data" / "test")
    (outputs / "adapt").mkdir()
    for number, (run, better) in enumerate({"none": 0.0, "views": -0.3, "actmad": 0.4}.items()):
        for model in MODELS:
            path = outputs / "adapted" / run / f"{model}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            predictions(better, seed=number + 10 * len(model)).assign(**columns).to_parquet(path)
        entry = {"mlflow_run_id": "0" * 32, "peak_memory_mb": 312.4}
        entry["losses"] = [2.0, 1.5, 1.25] if number == 2 else [1.0]
        entry["settings"] = {"method": run, "steps": number, "clip": None}
        (outputs / "adapt" / f"{run}.json").write_text(json.dumps(dict.fromkeys(MODELS, entry)), encoding="utf-8")
    return SimpleNamespace(
        seed=3,
        models=dict.fromkeys(MODELS),
        shifts=SimpleNamespace(corruptions=CORRUPTIONS, severities=SEVERITIES),
        adapt=SimpleNamespace(runs=dict.fromkeys(RUNS), protocol="episodic"),
        model_dump=lambda mode: {"seed": 3, "models": {"vit": {"note": "</pre><script>alert(1)</script>"}}},
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A project after `evaluate` and `report`, with what `report` printed."""
    root = tmp_path_factory.mktemp("project")
    params = write_project(root / "outputs")
    (root / "outputs" / "adapted" / "forgotten.parquet").write_bytes(b"no table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "OUTPUTS", root / "outputs")
        patch.setattr(pipeline, "ROOT", root)
        patch.setattr("pipeline.execution.execution", lambda _: tracking.Execution("repro", os.getpid()))
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        evaluate.run(params)
        report_stage.run(params)
    (root / "printed").write_text("\n".join(lines), encoding="utf-8")
    return root / "outputs"


@pytest.fixture(scope="module")
def results(outputs):
    return report.Results.read(outputs, MODELS, RUNS)


class Page(HTMLParser):
    """What a test wants to know of the page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.figures, self.cells, self.ids, self.words = [], {}, {}, [], []
        self._figure = self._row = self._key = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        places = ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
        self.addresses += [attrs[name] for name in places if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "figure":
            self._figure = attrs["id"]
            self.figures[self._figure] = ""
        elif tag in ("svg", "img") and self._figure:
            self.figures[self._figure] += tag
        self._row = attrs.get("data-row", self._row)
        self._key = attrs.get("data-key") if tag == "td" else None

    def handle_endtag(self, tag):
        self._figure = None if tag == "figure" else self._figure
        self._row = None if tag == "table" else self._row
        self._key = None

    def handle_data(self, data):
        self.words.append(data)
        if self._row and self._key:
            self.cells[self._row, self._key] = data


@pytest.fixture(scope="module")
def page(outputs):
    return Page((outputs / "report.html").read_text(encoding="utf-8"))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


class TestEvaluate:
    def test_metrics_are_those_of_the_predictions_that_params_lists(self, outputs):
        found = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))
        assert found.keys() == {"runs"}
        assert list(found["runs"]) == [f"{model}/{run}" for model in MODELS for run in RUNS]
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        assert found["runs"]["vit/actmad"] == metrics.summarise(table, seed=3)
        assert list(found["runs"]["vit/actmad"]) == [
            "accuracy_source", "accuracy_adapted", "gain", "gain_low", "gain_high", "clean_source", "clean_adapted",
            "images", "fell_back", "milliseconds_p50", "milliseconds_p95",
        ]  # fmt: skip

    def test_tables_have_a_row_per_shift_and_run(self, outputs):
        shifts = pd.read_csv(outputs / "tables" / "by_shift.csv")
        assert len(shifts) == 6 * (1 + 4)
        row = shifts.query("model == 'vit' and run == 'views' and shift == 'fog-5'").iloc[0]
        table = pd.read_parquet(outputs / "predictions" / "vit" / "views.parquet").query("shift == 'fog-5'")
        assert row["accuracy_adapted"] == pytest.approx((table["adapted_prediction"] == table["label"]).mean(), abs=1e-5)
        summary = pd.read_csv(outputs / "tables" / "summary.csv").set_index(["model", "run"])
        lost = shifts.query("model == 'vit' and run == 'views' and shift != 'clean'")["right_to_wrong"].sum()
        assert summary.loc[("vit", "views"), "right_to_wrong"] == lost > 0

    def test_a_missing_file_is_named(self, tmp_path, monkeypatch):
        params = write_project(tmp_path / "outputs")
        (tmp_path / "outputs" / "adapted" / "views" / "vit.parquet").unlink()
        monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
        with pytest.raises(UserError, match=r"views/vit\.parquet.*run `adapt`"):
            evaluate.run(params)


class TestPage:
    def test_needs_no_network(self, outputs, page):
        text = (outputs / "report.html").read_text(encoding="utf-8")
        assert all(address.startswith(("#", "data:")) for address in page.addresses)
        assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<link|<iframe|<script[^>]+src", text)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)

    def test_shows_every_figure_once(self, outputs, page):
        names = ["gain_convnet", "gain_vit", "severity", "loss", "examples"]
        assert page.figures == {f"figure-{name}": "svg" for name in names}
        assert sorted(path.stem for path in (outputs / "figures").iterdir()) == sorted(names)
        assert len(page.ids) == len(set(page.ids))

    def test_numbers_are_those_of_metrics_json(self, outputs, page):
        entries = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))["runs"]
        assert {row for row, _ in page.cells} == set(entries)
        for row, entry in entries.items():
            for key in ("accuracy_source", "accuracy_adapted", "gain"):
                assert number(page.cells[row, key]) == pytest.approx(100 * entry[key], abs=0.0501)
            low, high = page.cells[row, "interval"].strip("[]").split(", ")
            assert number(low) == pytest.approx(100 * entry["gain_low"], abs=0.0501)
            assert number(high) == pytest.approx(100 * entry["gain_high"], abs=0.0501)
            clean = 100 * (entry["clean_adapted"] - entry["clean_source"])
            assert number(page.cells[row, "clean"]) == pytest.approx(clean, abs=0.0501)
            median, tail = page.cells[row, "milliseconds"].split(" / ")
            assert number(median) == pytest.approx(entry["milliseconds_p50"], rel=0.01)
            assert number(tail) == pytest.approx(entry["milliseconds_p95"], rel=0.01)
            assert number(page.cells[row, "fell_back"]) == entry["fell_back"]
            assert page.cells[row, "memory"] == "312"

    def test_text_from_outside_stays_text(self, outputs, page):
        assert "<script>alert" not in (outputs / "report.html").read_text(encoding="utf-8")
        words = "".join(page.words)
        assert "</pre><script>alert(1)</script>" in words
        assert "a <source>" in words

    def test_says_what_was_tested(self, page):
        words = "".join(page.words)
        assert f"{IMAGES} test images" in words
        assert "2 synthetic corruptions at 2 severities" in words
        assert "vit: actmad helped most" in re.sub(r"\s+", " ", words)

    def test_same_input_same_page(self, outputs, results):
        test = ImageSet.load(outputs / "data" / "test")
        pictures = report.shift_pictures(test, CORRUPTIONS, SEVERITIES, seed=3)
        pages = {report.render(results, report.draw(results, pictures, SEVERITIES), {}, "note") for _ in range(2)}
        assert len(pages) == 1


class TestWithoutLabels:
    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("unlabeled")
        params = write_project(root, label=-1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "OUTPUTS", root)
            evaluate.run(params)
        results = report.Results.read(root, MODELS, RUNS)
        pictures = {"fog": [np.zeros((4, 4, 3), np.uint8)] * 2}
        drawings = report.draw(results, pictures, [1])
        return results, Page(report.render(results, drawings, {}, "note"))

    def test_page_says_so_and_counts_changes(self, written):
        results, page = written
        words = "".join(page.words)
        assert "no labels, so accuracy is unknown" in words
        assert not re.search(r"\bnan\b|\bNone\b", words)
        assert set(page.figures) == {"figure-loss", "figure-examples"}
        assert page.cells["vit/actmad", "accuracy_source"] == "–"
        assert number(page.cells["vit/actmad", "changed"]) == pytest.approx(100 * results.changed("vit", "actmad"), abs=0.0501)
        assert number(page.cells["vit/none", "changed"]) == 0

    def test_changes_are_those_of_the_predictions(self, written):
        table = predictions(0.4, seed=2 + 10 * len("vit")).query("shift != 'clean'")
        expected = (table["source_prediction"] != table["adapted_prediction"]).mean()
        assert written[0].changed("vit", "actmad") == pytest.approx(expected)

    def test_tables_show_changes_in_place_of_accuracy(self, written):
        share = report.percent(written[0].changed("vit", "actmad"))
        plain, markdown = report.plain_table(written[0]), report.markdown(written[0], {})
        assert re.search(rf"^vit +actmad +{share} ", plain, re.MULTILINE)
        assert f"| vit | actmad | {share} |" in markdown
        assert not re.search(r"\bnan\b|\bNone\b|–", plain + markdown)


class TestStage:
    def test_prints_the_comparison_and_where_to_look(self, outputs):
        printed = (outputs.parent / "printed").read_text(encoding="utf-8")
        entry = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))["runs"]["vit/actmad"]
        (line,) = [line for line in printed.splitlines() if re.match(r"vit +actmad ", line)]
        assert f"{100 * entry['accuracy_source']:.1f} → {100 * entry['accuracy_adapted']:.1f}" in line
        assert f"+{100 * entry['gain']:.1f}  [+" in line
        assert "clean 0.0" in line
        assert str(outputs / "report.html") in printed
        assert "make ui" in printed

    def test_comparison_lies_on_the_parent_run(self, outputs):
        root = outputs.parent
        run = tracking._open(root)[0].get_run(tracking.pipeline_run(root, tracking.Execution("repro", os.getpid())))
        entries = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))["runs"]
        for key, entry in entries.items():
            assert run.data.metrics[f"gain/{key}"] == pytest.approx(entry["gain"], abs=5e-5)
        assert "| vit | actmad |" in run.data.tags["mlflow.note.content"]
        kept = {path.name for path in (root / "mlruns" / run.info.run_id).rglob("*") if path.is_file()}
        assert {"report.html", "comparison.json", "gain_vit.png", "examples.png"} <= kept


class TestRead:
    def test_a_missing_stage_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"metrics\.json.*run `evaluate`"):
            report.Results.read(tmp_path, MODELS, RUNS)

    def test_a_run_without_its_numbers_is_named(self, outputs):
        with pytest.raises(UserError, match=r"adapt/new\.json.*run `adapt`"):
            report.Results.read(outputs, MODELS, (*RUNS, "new"))
        with pytest.raises(UserError, match=r"metrics\.json: expected an entry resnet/none"):
            report.Results.read(outputs, ("resnet",), RUNS)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (report.percent, 0.613, "61.3"),
        (report.percent, None, "–"),
        (report.percent, math.nan, "–"),
        (report.points, 0.047, "+4.7"),
        (report.points, -0.002, "−0.2"),
        (report.points, -0.0001, "0.0"),
        (report.points, 0.0, "0.0"),
        (report.amount, 0.0512, "0.05"),
        (report.amount, 4.567, "4.57"),
        (report.amount, 18.34, "18.3"),
        (report.amount, 12400.4, "12,400"),
        (report.amount, None, "–"),
    ],
)
def test_numbers_as_text(function, value, text):
    assert function(value) == text


def test_interval_as_text():
    assert report.interval(0.039, 0.055) == "[+3.9, +5.5]"
    assert report.interval(-0.01, 0.0) == "[−1.0, 0.0]"
    assert report.interval(None, None) == "–"


def told(**gains) -> str:
    """Write the sentence for runs given as (low, gain, high, clean change)."""
    entries = {
        ("m", run): {"accuracy_source": 0.5, "accuracy_adapted": 0.5 + gain, "gain": gain, "gain_low": low,
                     "gain_high": high, "clean_source": 0.9, "clean_adapted": 0.9 + clean}
        for run, (low, gain, high, clean) in gains.items()
    }  # fmt: skip
    empty = pd.DataFrame()
    return report.sentence(report.Results(("m",), tuple(gains), entries, empty, empty, {}), "m")


class TestSentence:
    def test_the_best_comes_first_with_its_numbers(self):
        text = told(a=(0.01, 0.02, 0.03, 0), b=(0.02, 0.05, 0.08, 0))
        assert text.startswith("b helped most, 50.0 % → 55.0 % (+5.0 points, 95 % interval +2.0 to +8.0); a helped too.")
        assert text.endswith("No run lost more than one point on clean images.")

    def test_nothing_helped_some_hurt_some_are_undecided(self):
        text = told(a=(-0.03, -0.02, -0.01, 0), b=(-0.01, 0.01, 0.03, 0), c=(-0.02, 0.0, 0.02, 0), d=(0, 0, 0, 0))
        assert text == (
            "No run helped: no interval lies above zero. a hurt: the interval lies below zero. "
            "b and c: undecided, the interval includes zero. d made no difference to the accuracy. "
            "No run lost more than one point on clean images."
        )

    def test_a_loss_on_clean_images_is_told(self):
        text = told(a=(0.01, 0.02, 0.03, -0.03), b=(0.01, 0.02, 0.03, -0.06), c=(0.01, 0.02, 0.03, -0.005))
        assert text.endswith("On clean images b lost 6.0 points and a lost 3.0 points.")

    def test_the_control_is_left_out(self):
        assert "none" not in told(none=(0, 0, 0, 0), a=(0.01, 0.02, 0.03, 0))


class TestMarkdown:
    def test_runs_link_to_their_pages(self, results):
        text = report.markdown(results, {("vit", "actmad"): "#/experiments/1/runs/7"})
        assert "| vit | [actmad](#/experiments/1/runs/7) |" in text
        assert "| vit | views |" in text

    def test_a_long_table_is_cut_between_rows(self, results):
        runs = [f"run_{number}" for number in range(80)]
        summary = {("vit", run): results.summary["vit", "actmad"] for run in runs}
        adapted = {key: {} for key in summary}
        many = report.Results(("vit",), tuple(runs), summary, results.by_corruption, results.by_severity, adapted)
        text = report.markdown(many, dict.fromkeys(summary, f"#/experiments/1/runs/{'0' * 32}"))
        assert len(text) <= tracking._TAG_LIMIT
        assert "comparison.json" in text
        assert all(line.endswith(" |") for line in text.splitlines() if line.startswith("| vit"))


class TestPictures:
    def test_are_what_adapt_sees(self, outputs):
        from tttlab.corruptions import corrupt_all

        test = ImageSet.load(outputs / "data" / "test")
        pictures = report.shift_pictures(test, CORRUPTIONS, SEVERITIES, seed=3)
        assert list(pictures) == list(CORRUPTIONS)
        clean, _, hardest = pictures["gaussian_noise"]
        (place,) = np.flatnonzero((test.pixels == clean).all(axis=(1, 2, 3)))
        everything = corrupt_all(np.asarray(test.pixels), test.image_ids, "gaussian_noise", 5, seed=3)
        assert np.array_equal(hardest, everything[place])

    def test_large_images_become_small_pictures(self):
        pixels = np.zeros((2, 224, 224, 3), np.uint8)
        pixels[:, :112] = 200
        test = ImageSet(pixels, np.zeros(2, np.int64), ("a", "b"), ("c",))
        pictures = report.shift_pictures(test, ["brightness"], [1], seed=0)
        assert [image.shape for image in pictures["brightness"]] == [(64, 64, 3)] * 2
        assert (pictures["brightness"][0][:30] == 200).all()


def test_a_single_control_run_still_makes_a_report(results):
    only = report.Results(
        ("vit",), ("none",), {("vit", "none"): results.summary["vit", "none"]},
        results.by_corruption.query("model == 'vit' and run == 'none'"),
        results.by_severity.query("model == 'vit' and run == 'none'"), {("vit", "none"): {}},
    )  # fmt: skip
    drawings = report.draw(only, {"fog": [np.zeros((4, 4, 3), np.uint8)] * 2}, [1])
    words = "".join(Page(report.render(only, drawings, {}, "note")).words)
    assert plots.CONTROL in words
    assert "only the control" in words
