import math
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tests.helpers import evaluated
from tttlab.data.image_sets import ImageSet
from tttlab.evaluation.results import Results, shift_name
from tttlab.reporting import drawings, page, pictures, report
from tttlab.reporting.plots import CONTROL
from tttlab.reporting.tables import distances
from tttlab.reporting.words import percent, probability, significant
from tttlab.shifts.shift import Shift, list_shifts

MODELS, RUNS = evaluated.MODELS, tuple(evaluated.RUNS)
SETTINGS = {"seed": 3, "models": {"vit": {"note": "</pre><script>alert(1)</script>"}}}
SECTIONS = {
    "reliability": "calibration",
    "steps": "steps",
    "tuning": "tuning",
    "alignment": "alignment",
    "correlations": "alignment",
    "distances": "distance",
}


class Page(HTMLParser):
    """What a test wants to know of a page: addresses, ids, figures, headlines' and tables' cells, and what lies in what."""

    VOID = ("meta", "br", "img", "path", "rect", "circle", "image", "use", "line", "link")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.figures, self.cells, self.ids, self.words, self.tables, self.open = (
            [],
            [],
            {},
            [],
            [],
            {},
            [],
        )
        self._row = self._key = self._table = None
        self.text = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        places = ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
        self.addresses += [attrs[name] for name in places if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "figure" and "id" in attrs:
            self.figures.append(attrs["id"].removeprefix("figure-"))
        if tag == "table":
            self._table = self.tables.setdefault(attrs.get("id"), [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
            self._row = attrs.get("data-row")
        if tag in ("td", "th") and self._table:
            self._table[-1].append("")
            self._key = attrs.get("data-key")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if (
            self._table
            and self._table[-1]
            and self.open[-1] not in ("tr", "tbody", "thead", "table")
        ):
            self._table[-1][-1] += data
            if self._row and self._key:
                self.cells[self._row, self._key] = self.cells.get((self._row, self._key), "") + data


SHIFTS = list_shifts(evaluated.CORRUPTIONS, evaluated.SEVERITIES)


def render(
    outputs, models=MODELS, runs=RUNS, results=None, corruptions=evaluated.CORRUPTIONS, sets=None
) -> Page:
    """Make a page as the stage does."""
    results, sets = results or Results.read(outputs, list(product(models, runs))), sets or {}
    test = ImageSet.load(outputs / "data" / "test")
    shifts = [*SHIFTS, *(Shift(name, 0, images) for name, images in sets.items())]
    shown = pictures.shift_pictures(test, corruptions, evaluated.SEVERITIES, 3)
    drawn = drawings.draw(results, shown, evaluated.SEVERITIES, pictures.set_pictures(shifts))
    trained = [key for key in results.summary if results.trains(*key)]
    flips = [
        pictures.read_flips(outputs, *key, test, shifts, 3, training_seed=0) for key in trained
    ]
    note = report.about(
        results, test.source, evaluated.settings(corruptions, sets=sets), "episodic"
    )
    return Page(page.render(results, drawn, SETTINGS, note, [found for found in flips if found]))


def sections(page) -> list[str]:
    return [name for name in page.ids if name in page_sections()]


def page_sections() -> set[str]:
    return set(page.SECTIONS)


def number(text: str) -> float:
    return float(re.sub(r"[^\d.+−-]", "", text.split(" ")[0]).replace("−", "-"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    evaluated.write_project(root)
    return root


@pytest.fixture(scope="module")
def results(outputs):
    return Results.read(outputs, list(product(MODELS, RUNS)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make a project of one model and two runs, with all tables."""
    root = tmp_path_factory.mktemp("small")
    evaluated.write_project(root, models=("vit",), runs=("none", "actmad"), images=12)
    return root


@pytest.fixture(scope="module")
def full(outputs):
    return render(outputs)


class TestPage:
    def test_needs_no_network(self, full):
        assert all(address.startswith(("#", "data:")) for address in full.addresses)
        assert not re.search(
            r"url\(\s*['\"]?(?!#)|@import|<link|<iframe|<script[^>]+src", full.text
        )
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", full.text)

    def test_is_well_formed_with_unique_ids_that_links_find(self, full):
        assert not full.open
        assert len(full.ids) == len(set(full.ids))
        assert {address[1:] for address in full.addresses if address.startswith("#")} <= set(
            full.ids
        )

    def test_sections_come_in_order_and_in_the_contents(self, full):
        assert sections(full) == list(page.SECTIONS)
        assert [
            address[1:] for address in full.addresses if address[1:] in page_sections()
        ] == list(page.SECTIONS)

    def test_shows_every_figure_once(self, full):
        per_model = [
            f"{name}_{m}"
            for name in ("gain", "intervals", "steps", "distance", "alignment", "reliability")
            for m in MODELS
        ]
        assert sorted(full.figures) == sorted(
            [*per_model, "severity", "estimated", "cost", "examples"]
        )

    def test_nothing_unknown_is_written_out(self, full):
        assert not re.search(r"\b(nan|None|NaN|inf)\b", "".join(full.words))

    def test_text_from_outside_stays_text(self, full):
        words = "".join(full.words)
        assert "<script>alert" not in full.text
        assert "</pre><script>alert(1)</script>" in words
        assert "a <source>" in words
        assert "b <i>" in words

    def test_same_input_same_page(self, small):
        assert (
            render(small, ("vit",), ("none", "actmad")).text
            == render(small, ("vit",), ("none", "actmad")).text
        )


class TestHeadline:
    def test_numbers_are_those_of_metrics_json(self, full, results):
        for (model, run), entry in results.summary.items():
            cells = {
                key: text for (row, key), text in full.cells.items() if row == f"{model}/{run}"
            }
            for key in ("accuracy_source", "accuracy_adapted", "gain"):
                assert number(cells[key]) == pytest.approx(100 * entry[key], abs=0.0501)
            low, high = cells["interval"].strip("[]").split(", ")
            assert number(low) == pytest.approx(100 * entry["gain_low"], abs=0.0501)
            assert number(high) == pytest.approx(100 * entry["gain_high"], abs=0.0501)
            clean = 100 * (entry["clean_adapted"] - entry["clean_source"])
            assert number(cells["clean"]) == pytest.approx(clean, abs=0.0501)
            median, tail = cells["milliseconds"].split(" / ")
            assert number(median) == pytest.approx(entry["milliseconds_p50"], rel=0.02, abs=0.00501)
            assert number(tail) == pytest.approx(entry["milliseconds_p95"], rel=0.02, abs=0.00501)
            assert number(cells["fell_back"]) == entry["fell_back"]
            assert cells["memory"] == "312"

    def test_memory_has_a_column_only_where_it_is_known(self, tmp_path):
        """On CPUs it is not."""
        evaluated.write_project(tmp_path, models=("vit",), runs=("none", "actmad"), images=12)
        pages = [render(tmp_path, ("vit",), ("none", "actmad"))]
        for path in (tmp_path / "runs").glob("*.json"):
            path.write_text(path.read_text().replace("312.4", "null"))
        pages.append(render(tmp_path, ("vit",), ("none", "actmad")))
        assert [("vit/none", "memory") in page.cells for page in pages] == [True, False]
        assert [" ".join(page.words).count("GPU memory") for page in pages] == [2, 0]
        widths = [
            [line.count("<td") for line in page.text.split("<tr")[1:] if "data-row=" in line]
            for page in pages
        ]
        assert [before - after for before, after in zip(*widths, strict=True)] == [1] * len(
            widths[0]
        )

    def test_training_and_gate_stand_where_there_are_any(self, full, results):
        for (model, run), entry in results.summary.items():
            gate = {
                key: text for (row, key), text in full.cells.items() if row == f"{model}/{run}/gate"
            }
            trained = full.cells.get((f"{model}/{run}", "training"))
            assert bool(gate) == bool(trained) == (run in ("ssl", "actmad"))
            if gate:
                assert number(trained) == pytest.approx(100 * entry["training_gain"], abs=0.0501)
                assert number(gate["accuracy_adapted"]) == pytest.approx(
                    100 * entry["gated"]["accuracy_adapted"], abs=0.0501
                )
                assert f"{100 * entry['gated']['open']:.1f}" in gate["open"]
                assert number(gate["milliseconds"].removeprefix("mean ")) == pytest.approx(
                    entry["gated"]["milliseconds"], rel=0.02
                )


class TestTables:
    def test_tuning_shows_every_choice_and_labels_the_oracle(self, full, results):
        rows = results.rows("tuning", model="vit", run="actmad").set_index("choice")
        lines = full.tables["table-tuning"]
        start = lines.index(["vit · actmad"])
        assert [number(line[3]) for line in lines[start + 1 : start + 5]] == pytest.approx(
            100 * rows["accuracy"], abs=0.0501
        )
        assert "upper bound" in lines[start + 4][0]
        assert "not a result" in lines[start + 4][0]

    def test_what_was_searched_stands_beside_what_was_chosen(self, full):
        lines = full.tables["table-searched"]
        assert [line[0] for line in lines[1:]] == ["convnet", "bn", "actmad", "vit", "bn", "actmad"]
        assert lines[2] == ["bn", "prior: 0.1, 0.4", "prior 0.1", "prior", "84.0", "84.0"]
        assert lines[3] == [
            "actmad",
            "lr: 0.1, 0.03; clip: null, 1; trainable: norm, [blocks.0, norm]; steps: 1, 5",
            "lr 0.03, clip null, trainable [blocks.0, norm], steps 5",
            "clip",
            "87.2",
            "86.1",
        ]

    def test_distances_are_those_of_the_table(self, full, results):
        rows = results.rows("distances", model="vit", reference="labeled", metric="mmd").set_index(
            "target"
        )
        (line,) = [line for line in full.tables["table-distance-vit"] if line[0] == "squared MMD"]
        shifted = rows.drop("clean")
        assert line[2].startswith(significant(rows.loc["clean", "value"]))
        assert f"floor {significant(rows.loc['clean', 'floor'])}" in line[2]
        assert line[3].startswith(significant(shifted["value"].mean()))
        assert (
            f"beyond the floor: {(shifted['value'] > shifted['floor_high']).sum()} of {len(shifted)}"
            in line[3]
        )
        assert shift_name(shifted["value"].idxmax()) in line[4]
        assert len(full.tables["table-distances-labeled-vit"]) == 1 + len(rows)

    def test_the_farthest_estimate_is_the_lowest(self, results):
        rows = results.rows(
            "distances", model="vit", reference="labeled", metric="estimated_accuracy"
        )
        (table,) = [
            table for table in distances.distance_summary(results) if table.name == "distance-vit"
        ]
        (line,) = [line for line in table.lines if "(confidence drop)" in line.cells[0].text]
        assert line.cells[4].text == percent(rows[rows["target"] != "clean"]["value"].min())

    def test_several_seeds_give_their_mean_and_the_largest_p(self, results):
        rows = results.rows("distances", model="vit").assign(seed=1)
        other = rows.assign(seed=0, value=rows["value"] + 2, p=1.0)
        both = Results(
            ("vit",),
            ("none",),
            {("vit", "none"): {"seeds": 2}},
            {"distances": pd.concat([rows, other])},
        )
        (table,) = distances.distance_summary(both)
        line = next(line for line in table.lines if line.cells[0].text == "squared MMD")
        clean = rows[
            (rows["reference"] == "labeled")
            & (rows["target"] == "clean")
            & (rows["metric"] == "mmd")
        ]
        assert line.cells[2].text == significant(clean["value"].iloc[0] + 1)
        assert "p 1.00" in line.cells[2].note

    def test_correlations_mark_what_is_known_without_labels(self, full, results):
        rows = results.rows("correlations", model="vit", run="actmad", level="shift").set_index(
            "signal"
        )
        lines = {line[0]: line for line in full.tables["table-correlations-vit"]}
        assert lines["distance to the source"][1] == "yes"
        assert lines["gradient alignment"][1] == "no"
        assert number(lines["gradient alignment"][-1].split("p")[0]) == pytest.approx(
            rows.loc["cosine", "spearman"], abs=0.00501
        )

    def test_the_gate_shows_harm_with_and_without(self, full, results):
        entry = results.summary["vit", "ssl"]
        lines = full.tables["table-gates"]
        start = lines.index(["vit · ssl: adapts where the distance is ≥ 1.6"])
        without, gated = lines[start + 1 : start + 3]
        assert [number(text) for text in without[3:5]] == [
            entry["wrong_to_right"],
            entry["right_to_wrong"],
        ]
        assert [number(text) for text in gated[3:5]] == [
            entry["gated"][key] for key in ("wrong_to_right", "right_to_wrong")
        ]
        assert number(gated[1]) == pytest.approx(100 * entry["gated"]["gain"], abs=0.0501)
        means = [entry["milliseconds_mean"], entry["gated"]["milliseconds"]]
        assert [number(line[-1]) for line in (without, gated)] == pytest.approx(means, rel=0.02)

    def test_every_shift_has_its_flips_and_tests(self, full, results):
        rows = results.rows("by_shift", model="convnet", run="shrink")
        lines = full.tables["table-shifts-convnet-shrink"][1:]
        assert [line[0] for line in lines] == [shift_name(name) for name in rows["shift"]]
        assert [[int(line[6]), int(line[7])] for line in lines] == rows[
            ["wrong_to_right", "right_to_wrong"]
        ].to_numpy().tolist()
        assert [line[9] for line in lines] == [probability(p) for p in rows["mcnemar_holm"]]
        assert "table-shifts-convnet-none" not in full.tables


class TestSettings:
    def test_a_learning_rate_stands_only_where_something_is_learnt(self, outputs):
        pairs = [("vit", run) for run in ("none", "bn", "actmad")]
        read = Results.read(outputs, pairs)
        idle = {"protocol": "episodic", "normalisation": "mixed", "prior": 0.1}
        adapted = {
            key: {"settings": idle if key[1] != "actmad" else idle | {"lr": 0.1, "steps": 5}}
            for key in pairs
        }
        found = render(
            outputs, results=Results(read.models, read.runs, read.summary, read.tables, adapted)
        )
        lines = {line[1]: line[2] for line in found.tables[None] if line[0] == "vit"}
        assert lines == {"none": "", "bn": "", "actmad": "lr 0.1, steps 5"}
        assert "The same for all: protocol episodic, normalisation mixed, prior 0.1." in "".join(
            found.words
        )


class TestMissing:
    @pytest.mark.parametrize("name", list(SECTIONS))
    def test_a_section_vanishes_with_its_table(self, small, name):
        results = Results.read(small, list(product(("vit",), ("none", "actmad"))))
        tables = {key: table for key, table in results.tables.items() if key != name}
        less = Results(results.models, results.runs, results.summary, tables, results.adapted)
        found = [
            one.name
            for one in page._sections(
                less, drawings.draw(less, {"fog": [np.zeros((4, 4, 3), np.uint8)] * 2}, [1]), []
            )
        ]
        parts = {table.name for make in page._TABLES for table in make(less)}
        kept = {
            "steps",
            "tuning",
            "alignment",
            "distance",
        }  # losses, searches, gates and distances are told without it
        assert (SECTIONS[name] in found) == (SECTIONS[name] in kept)
        assert not any(
            part.startswith(
                {"distances": "distance", "correlations": "correlations"}.get(name, "?")
            )
            for part in parts
        )

    def test_without_any_optional_table(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), optional=(), gated=(), images=12
        )
        bare = render(tmp_path, ("vit",), ("none", "actmad"))
        assert sections(bare) == [
            "gain",
            "severity",
            "steps",
            "tuning",
            "distance",
            "flips",
            "cost",
            "shifts",
            "examples",
        ]
        assert "loss" in bare.figures
        assert not re.search(r"\b(nan|None|gate)\b", "".join(bare.words))

    def test_without_labels(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), labeled=False, images=12
        )
        results = Results.read(tmp_path, list(product(("vit",), ("none", "actmad"))))
        page = render(tmp_path, results=results)
        words = "".join(page.words)
        assert "no labels, so accuracy is unknown" in words
        assert sections(page) == ["steps", "tuning", "distance", "examples"]
        assert not re.search(r"\b(nan|None)\b", words)
        changed = results.changed("vit", "actmad")
        assert number(page.cells["vit/actmad", "changed"]) == pytest.approx(
            100 * changed, abs=0.0501
        )
        assert "accuracy_source" not in {key for _, key in page.cells}

    def test_without_labels_of_shifted_images_the_clean_ones_still_count(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), labeled="clean", images=12
        )
        results = Results.read(tmp_path, list(product(("vit",), ("none", "actmad"))))
        page = render(tmp_path, results=results)
        entry = results.summary["vit", "actmad"]
        lost = 100 * (entry["clean_adapted"] - entry["clean_source"])
        assert number(page.cells["vit/actmad", "clean"]) == pytest.approx(lost, abs=0.0501)
        assert "better under" not in "".join(page.words)  # of the shifts nothing is known

    def test_a_single_run_beside_the_control(self, small):
        assert sections(render(small, ("vit",), ("none", "actmad"))) == list(page.SECTIONS)

    def test_only_the_control(self, tmp_path):
        evaluated.write_project(tmp_path, models=("vit",), runs=("none",), images=12)
        alone = render(tmp_path, ("vit",), ("none",))
        words = "".join(alone.words)
        assert CONTROL in words
        assert "only the control" in words
        assert sections(alone) == ["distance", "examples"]

    @pytest.mark.parametrize("alone", MODELS)
    def test_a_model_with_only_the_control_beside_one_with_more(self, tmp_path, alone):
        (other,) = set(MODELS) - {alone}
        evaluated.write_project(
            tmp_path, runs=("none", "actmad"), images=12, only={"actmad": (other,)}
        )
        pairs = [
            (model, run)
            for model in MODELS
            for run in ("none", "actmad")
            if run == "none" or model == other
        ]
        results = Results.read(tmp_path, pairs)
        found = render(tmp_path, results=results)
        kinds = ("gain", "intervals", "reliability", "steps", "distance", "alignment")
        both = [f"{name}_{model}" for model in MODELS for name in kinds]
        assert set(both) & set(found.figures) == {name for name in both if name.endswith(other)}
        words = "".join(found.words)
        assert f"{alone}: There is nothing to compare: this model has only the control." in words
        assert not re.search(r"\b(nan|None|NaN)\b", words)
        captions = (
            "Colour grows with",
            "They are not widened",
            "Step 0 is the run's",
            "A point per shift, larger at",
            "It needs labels",
            "Shifted predictions in 15 bins",
            "Spearman's rank correlation with",
        )
        for caption in captions:
            assert caption.lower() in words.lower(), caption
        severity = dict(drawings._severity(results))["severity"].figure
        assert [text.get_text() for text in severity.legends[0].get_texts()] == [
            "source, not adapted",
            "actmad",
        ]

    def test_several_seeds_are_told(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), seeds=(0, 1, 2), images=12
        )
        page = render(tmp_path, ("vit",), ("none", "actmad"))
        words = "".join(page.words)
        assert "trained with 3 seeds" in words
        assert "12 images × 3 training seeds" in words
        assert "sd over seeds 0.4" in page.cells["vit/actmad", "interval"]

    def test_unknown_numbers_become_dashes(self, small):
        results = Results.read(small, list(product(("vit",), ("none", "actmad"))))
        holes = {name: table.copy() for name, table in results.tables.items()}
        columns = {
            "by_shift": ["gain_low", "mcnemar_p", "mcnemar_holm", "distance"],
            "by_corruption": ["gain_low", "gain_high"],
            "steps": ["clean_accuracy", "loss"],
            "tuning": ["gain", "step"],
            "alignment": ["cosine_low", "cosine_high"],
            "distances": ["p", "floor"],
            "correlations": ["spearman", "p"],
        }
        for name, own in columns.items():
            holes[name].loc[::2, own] = math.nan
        unknown = (
            "gain_low",
            "gain_high",
            "clean_source",
            "training_gain_low",
            "training_gain_high",
            "ece_source",
        )
        summary = {
            key: {**entry, **dict.fromkeys(unknown)} for key, entry in results.summary.items()
        }
        page = render(
            small,
            results=Results(
                ("vit",), ("none", "actmad"), summary, holes, {key: {} for key in summary}
            ),
        )
        assert not re.search(r"\b(nan|None|NaN)\b", "".join(page.words))


class TestDrawings:
    def test_the_heat_map_is_bold_where_a_severity_is_significant(self, results):
        table = drawings._with_mean(results, "convnet").query("corruption != @drawings.ALL")
        shifts = results.rows("by_shift", model="convnet")
        for row in table.itertuples():
            own = shifts[(shifts["run"] == row.run) & (shifts["corruption"] == row.corruption)]
            assert row.significant == (own["mcnemar_holm"].min() < 0.05)
        assert table["significant"].nunique() == 2

    def test_rank_correlations_are_those_of_the_table(self, results):
        (row,) = results.rows(
            "correlations", model="vit", run="ssl", level="shift", signal="distance"
        ).itertuples()
        figure = dict(drawings._distance(results))["distance_vit"].figure
        told = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert f"Spearman {row.spearman:+.2f}, p {probability(row.p)}".replace("-", "−") in told

    def test_truth_stands_beside_the_estimate_of_the_same_shift(self, results):
        axes = dict(drawings._estimates(results))["estimated"].figure.axes[1]
        shifts = results.rows("by_shift", model="vit", run="none")
        assert np.allclose(axes.collections[0].get_offsets()[:, 0], 100 * shifts["accuracy_source"])

    def test_without_adaptation_means_the_control_whatever_run_comes_first(self, outputs, results):
        """Also where that run is not for all models, or where its own look at the source network differs."""
        runs = ("actmad", *(run for run in RUNS if run != "actmad"))
        pairs = [
            (model, run) for model in MODELS for run in runs if run != "actmad" or model == "vit"
        ]
        other = Results.read(outputs, pairs)
        for name in ("by_shift", "by_corruption", "by_severity"):
            table = other.tables[name]
            shown = table["accuracy_source"] + 0.01 * (table["run"] != CONTROL)
            table = table.assign(accuracy_source=shown)
            other.tables[name] = table.sort_values(
                "run", kind="stable", key=lambda names: names.map(runs.index)
            )
        estimated = dict(drawings._estimates(other))["estimated"].figure
        assert [axes.get_title(loc="left") for axes in estimated.axes] == list(MODELS)
        severity = dict(drawings._severity(other))["severity"].figure
        maps = dict(drawings._gains(other))
        for number, model in enumerate(MODELS):
            (shown,) = {
                tuple(dots.get_offsets()[:, 0]) for dots in estimated.axes[number].collections
            }
            truth = results.rows("by_shift", model=model, run="none")["accuracy_source"]
            assert sorted(shown) == pytest.approx(sorted(100 * truth))
            by_severity = results.rows("by_severity", model=model, run="none")["accuracy_source"]
            assert severity.axes[number].lines[0].get_ydata() == pytest.approx(
                100 * by_severity.to_numpy()
            )
            told = [
                text.get_text()
                for text in maps[f"gain_{model}"].figure.axes[0].texts
                if text.get_position()[1] < -1
            ]
            own = results.rows("by_corruption", model=model, run="none")["accuracy_source"]
            assert told == [
                percent(value)
                for value in (*own, results.summary[model, "none"]["accuracy_source"])
            ]

    def test_the_gate_is_a_point_of_its_own_in_cost(self, results):
        axes = dict(drawings._cost(results))["cost"].figure.axes[1]
        found = {tuple(dots.get_offsets()[0].round(6)) for dots in axes.collections[1::2]}
        entry = results.summary["vit", "actmad"]
        for side, cost in ((entry, "milliseconds_mean"), (entry["gated"], "milliseconds")):
            assert (round(side[cost], 6), round(100 * side["gain"], 6)) in found
        assert len(found) == 8


class TestFlips:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, outputs):
        test = ImageSet.load(outputs / "data" / "test")
        return test, pictures.read_flips(outputs, "vit", "actmad", test, SHIFTS, 3, training_seed=0)

    def test_are_flips_of_the_predictions(self, outputs, found):
        test, flips = found
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet").query(
            "shift != 'clean'"
        )
        for side, after in ((flips.wrong_to_right, True), (flips.right_to_wrong, False)):
            for flip in side:
                image, shift = flip.title.split(", ")
                name = f"{shift.rsplit(' ', 1)[0].replace(' ', '_')}-{shift.rsplit(' ', 1)[1]}"
                ((_, row),) = table[
                    (table["image_id"] == image) & (table["shift"] == name)
                ].iterrows()
                assert flip.truth == test.classes[row["label"]]
                assert flip.before == (
                    test.classes[row["source_prediction"]],
                    row["source_confidence"],
                )
                assert flip.after == (
                    test.classes[row["adapted_prediction"]],
                    row["adapted_confidence"],
                )
                assert (flip.after[0] == flip.truth) == after
                assert (flip.before[0] == flip.truth) != after
                assert flip.gate_open == row["gate_open"]

    def test_counts_and_limit(self, outputs, found, results):
        flips = found[1]
        entry = results.summary["vit", "actmad"]
        assert flips.counts == (entry["wrong_to_right"], entry["right_to_wrong"])
        assert len(flips.wrong_to_right) == min(pictures.FLIPS, flips.counts[0]) > 0

    def test_are_drawn_by_seed_whatever_the_order_of_the_rows(self, outputs, found, tmp_path):
        test, flips = found
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        (tmp_path / "predictions" / "vit").mkdir(parents=True)
        table.sample(frac=1, random_state=0).to_parquet(
            tmp_path / "predictions" / "vit" / "actmad.parquet"
        )
        assert (
            pictures.read_flips(tmp_path, "vit", "actmad", test, SHIFTS, 3, training_seed=0)
            == flips
        )
        other = pictures.read_flips(tmp_path, "vit", "actmad", test, SHIFTS, 4, training_seed=0)
        assert {flip.title for flip in other.wrong_to_right} != {
            flip.title for flip in flips.wrong_to_right
        }

    def test_the_picture_is_what_adapt_sees(self, found):
        from tttlab.shifts.corruptions import corrupt_all

        test, flips = found
        flip = flips.wrong_to_right[0]
        image, shift = flip.title.split(", ")
        everything = corrupt_all(
            np.asarray(test.pixels), test.image_ids, shift[:-2].replace(" ", "_"), int(shift[-1]), 3
        )
        assert flip.image == pictures.data_address(everything[test.image_ids.index(image)])

    def test_none_without_predictions_or_labels(self, outputs, found, tmp_path):
        test, _ = found
        assert (
            pictures.read_flips(tmp_path, "vit", "actmad", test, SHIFTS, 3, training_seed=0) is None
        )
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        (tmp_path / "predictions" / "vit").mkdir(parents=True)
        table.assign(label=-1).to_parquet(tmp_path / "predictions" / "vit" / "actmad.parquet")
        assert (
            pictures.read_flips(tmp_path, "vit", "actmad", test, SHIFTS, 3, training_seed=0) is None
        )


SETS = {
    "photos/by night": evaluated.blobs(30, "test", seed=1),
    "photos/from afar": evaluated.blobs(9, "afar", seed=2),
}


class TestSets:
    """Images that came shifted, of another number than the test images, some under a name that the test images have too."""

    @pytest.fixture(scope="class")
    @classmethod
    def own(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("sets")
        evaluated.write_project(
            root, models=("vit",), runs=("none", "actmad"), images=12, sets=SETS
        )
        return root

    def test_stand_beside_the_corruptions(self, own):
        found = render(own, ("vit",), ("none", "actmad"), sets=SETS)
        assert {"examples", "examples_of_sets", "severity"} <= set(found.figures)
        assert [line[:2] for line in found.tables["table-shifts-vit-actmad"][-2:]] == [
            ["photos/by night", "30"],
            ["photos/from afar", "9"],
        ]
        words = "".join(found.words)
        assert "n = 9–30 images" in words
        assert "clean and those of photos, each adapted to on its own" in words
        assert not re.search(r"\b(nan|None)\b", words)

    def test_folders_that_differ_in_a_sign_alone_are_told_apart(self, tmp_path):
        """Also where a sign means something in a figure's text, such as the dollars around a formula."""
        names = [
            f"photos/{name}"
            for name in ("a b", "a_b", "a-b", "a,b", "$x^{$", "a$b$", "<i>&amp;", "1e5", "nan")
        ]
        sets = {name: evaluated.blobs(6, name, seed=number) for number, name in enumerate(names)}
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), images=6, corruptions=(), sets=sets
        )
        found = render(tmp_path, ("vit",), ("none", "actmad"), corruptions=(), sets=sets)
        assert [line[0] for line in found.tables["table-shifts-vit-actmad"][2:]] == names
        assert [line[0] for line in found.tables["table-distances-labeled-vit"][2:]] == names
        results = Results.read(tmp_path, [("vit", "none"), ("vit", "actmad")])
        shown, intervals = (drawn.figure.axes[0] for _, drawn in drawings._gains(results))
        assert [label.get_text() for label in shown.get_xticklabels()] == [*names, drawings.ALL]
        assert [label.get_text() for label in intervals.get_yticklabels()] == [*names, drawings.ALL]
        figure = pictures.draw_pictures(
            {name: [images.pixels[0]] for name, images in sets.items()}, [""], "examples"
        )
        titles = [axes.get_title() for axes in figure.axes]
        assert len(set(titles)) == len(names)
        assert all(title.startswith("photos\n") for title in titles)

    def test_without_corruptions_nothing_is_said_of_severities(self, tmp_path):
        runs = ("none", "actmad")
        evaluated.write_project(
            tmp_path, models=("vit",), runs=runs, images=12, corruptions=(), sets=SETS
        )
        found = render(tmp_path, ("vit",), runs, corruptions=(), sets=SETS)
        assert not {"examples", "severity"} & set(found.figures)
        assert "severity" not in sections(found)
        assert "examples_of_sets" in found.figures

    def test_a_flip_shows_the_image_of_its_own_set(self, own):
        test = ImageSet.load(own / "data" / "test")
        shifts = [*SHIFTS, *(Shift(name, 0, images) for name, images in SETS.items())]
        flips = pictures.read_flips(
            own, "vit", "actmad", test, shifts, 3, training_seed=0, at_most=1000
        )
        seen = dict.fromkeys(SETS, 0)
        for flip in (*flips.wrong_to_right, *flips.right_to_wrong):
            image, shift = flip.title.split(", ")
            if shift in seen:
                images = SETS[shift]
                assert flip.image == pictures.data_address(
                    images.pixels[images.image_ids.index(image)]
                )
                seen[shift] += 1
        assert all(seen.values())

    def test_a_few_of_each_are_shown_in_order(self):
        shown = pictures.set_pictures(
            [*SHIFTS, *(Shift(name, 0, images) for name, images in SETS.items())], at_most=10
        )
        assert {name: len(images) for name, images in shown.items()} == {
            "photos/by night": 10,
            "photos/from afar": 9,
        }
        assert np.array_equal(shown["photos/by night"][3], SETS["photos/by night"].pixels[3])

    def test_clean_images_of_another_set_are_no_example_of_a_shift(self):
        assert pictures.set_pictures([Shift(images=evaluated.blobs(3)), *SHIFTS[1:]]) == {}


class TestPictures:
    def test_are_what_adapt_sees(self, outputs):
        from tttlab.shifts.corruptions import corrupt_all

        test = ImageSet.load(outputs / "data" / "test")
        shown = pictures.shift_pictures(test, evaluated.CORRUPTIONS, evaluated.SEVERITIES, seed=3)
        assert list(shown) == list(evaluated.CORRUPTIONS)
        clean, _, hardest = shown["gaussian_noise"]
        (place,) = np.flatnonzero((test.pixels == clean).all(axis=(1, 2, 3)))
        everything = corrupt_all(
            np.asarray(test.pixels), test.image_ids, "gaussian_noise", 5, seed=3
        )
        assert np.array_equal(hardest, everything[place])

    def test_large_images_become_small_pictures(self):
        pixels = np.zeros((2, 224, 224, 3), np.uint8)
        pixels[:, :112] = 200
        test = ImageSet(pixels, np.zeros(2, np.int64), ("a", "b"), ("c",))
        shown = pictures.shift_pictures(test, ["brightness"], [1], seed=0)
        assert [image.shape for image in shown["brightness"]] == [(64, 64, 3)] * 2
        assert (shown["brightness"][0][:30] == 200).all()

    @pytest.mark.parametrize(("side", "kind"), [(16, "png"), (64, "jpeg")])
    def test_addresses_hold_the_picture(self, side, kind):
        import base64
        import io

        from PIL import Image

        image = np.full((side, side, 3), 90, np.uint8)
        head, data = pictures.data_address(image).split(",")
        assert head == f"data:image/{kind};base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert np.abs(np.asarray(opened).astype(int) - image).max() <= 2
