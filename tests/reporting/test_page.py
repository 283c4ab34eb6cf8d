import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tests.helpers import evaluated
from tttlab.data.image_sets import ImageSet
from tttlab.evaluation.results import Results, shift_name
from tttlab.reporting import about, drawings, page, pictures, signal_drawings
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


FLIPS = ("wrong_to_right", "right_to_wrong")


class Page(HTMLParser):
    """A parsed page: its addresses, ids, figures, words, tables and headline cells.

    It fails on elements that are closed in the wrong order.
    """

    VOID = ("meta", "br", "img", "path", "rect", "circle", "image", "use", "line", "link")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.figures, self.ids, self.words, self.open = [], [], [], [], []
        self.cells, self.tables = {}, {}
        self._row = self._key = self._table = None
        self.text = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
        self.addresses += [attrs[name] for name in names if name in attrs]
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
        in_cell = self.open and self.open[-1] not in ("tr", "tbody", "thead", "table")
        if self._table and self._table[-1] and in_cell:
            self._table[-1][-1] += data
            if self._row and self._key:
                self.cells[self._row, self._key] = self.cells.get((self._row, self._key), "") + data


SHIFTS = list_shifts(evaluated.CORRUPTIONS, evaluated.SEVERITIES)


def without_figures(_name, _drawing) -> str:
    """Stand for what takes most of a page's time, where a test does not look at it."""
    return "<svg></svg>"


def render(
    outputs,
    models=MODELS,
    runs=RUNS,
    results=None,
    corruptions=evaluated.CORRUPTIONS,
    sets=None,
    svg=without_figures,
) -> Page:
    """Make a page as the stage does, which gives no ``svg``."""
    results, sets = results or Results.read(outputs, list(product(models, runs))), sets or {}
    test = ImageSet.load(outputs / "data" / "test")
    shifts = [*SHIFTS, *(Shift(name, 0, images) for name, images in sets.items())]
    shown = pictures.shift_pictures(test, corruptions, evaluated.SEVERITIES, 3)
    drawn = drawings.draw(results, shown, evaluated.SEVERITIES, pictures.set_pictures(shifts))
    trained = [key for key in results.summary if results.trains(*key)]
    flips = [
        pictures.read_flips(outputs, *key, test, shifts, 3, training_seed=0) for key in trained
    ]
    settings = evaluated.settings(corruptions, sets=sets)
    note = about.note(results, test.source, settings, "episodic")
    shown_flips = list(filter(None, flips))
    return Page(page.render(results, drawn, SETTINGS, note, shown_flips, svg=svg))


def sections(rendered: Page) -> list[str]:
    return [name for name in rendered.ids if name in page.SECTIONS]


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
    return render(outputs, svg=None)


class TestPage:
    def test_needs_no_network(self, full):
        assert all(address.startswith(("#", "data:")) for address in full.addresses)
        external = r"url\(\s*['\"]?(?!#)|@import|<link|<iframe|<script[^>]+src"
        assert not re.search(external, full.text)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", full.text)

    def test_is_well_formed_with_unique_ids_that_links_find(self, full):
        assert not full.open
        assert len(full.ids) == len(set(full.ids))
        targets = {address[1:] for address in full.addresses if address.startswith("#")}
        assert targets <= set(full.ids)

    def test_sections_come_in_order_and_in_the_contents(self, full):
        targets = [address[1:] for address in full.addresses]
        assert sections(full) == list(page.SECTIONS)
        assert [name for name in targets if name in page.SECTIONS] == list(page.SECTIONS)

    def test_shows_every_figure_once(self, full):
        kinds = ("overview", "gain", "intervals", "steps", "distance", "alignment", "reliability")
        per_model = [f"{kind}_{model}" for kind in kinds for model in MODELS]
        expected = [*per_model, "severity", "estimated", "cost", "examples"]
        assert sorted(full.figures) == sorted(expected)

    def test_nothing_unknown_is_written_out(self, full):
        assert not re.search(r"\b(nan|None|NaN|inf)\b", "".join(full.words))

    def test_text_from_outside_stays_text(self, full):
        words = "".join(full.words)
        assert "<script>alert" not in full.text
        assert "</pre><script>alert(1)</script>" in words
        assert "a <source>" in words
        assert "b <i>" in words

    def test_same_input_same_page(self, small):
        pair = ("vit",), ("none", "actmad")
        first, second = (render(small, *pair, svg=None).text for _ in range(2))
        assert first == second


class TestHeadline:
    def test_numbers_are_those_of_metrics_json(self, full, results):
        for (model, run), entry in results.summary.items():
            name = f"{model}/{run}"
            cells = {key: text for (row, key), text in full.cells.items() if row == name}
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
        """On CPUs the memory is not known."""
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
        differences = [known - unknown for known, unknown in zip(*widths, strict=True)]
        assert differences == [1] * len(widths[0])

    def test_training_and_gate_stand_where_there_are_any(self, full, results):
        for (model, run), entry in results.summary.items():
            name = f"{model}/{run}"
            gate = {key: text for (row, key), text in full.cells.items() if row == f"{name}/gate"}
            trained = full.cells.get((name, "training"))
            assert bool(gate) == bool(trained) == (run in ("ssl", "actmad"))
            if gate:
                gated = entry["gated"]
                assert number(trained) == pytest.approx(100 * entry["training_gain"], abs=0.0501)
                over = full.cells[name, "over_control"]
                assert number(over) == pytest.approx(100 * entry["over_control"], abs=0.0501)
                assert over.endswith("views")
                accuracy = number(gate["accuracy_adapted"])
                assert accuracy == pytest.approx(100 * gated["accuracy_adapted"], abs=0.0501)
                assert f"{100 * gated['open']:.1f}" in gate["open"]
                cost = number(gate["milliseconds"].removeprefix("mean "))
                assert cost == pytest.approx(gated["milliseconds"], rel=0.02)
            else:
                assert (name, "over_control") not in full.cells


class TestTables:
    def test_tuning_shows_every_choice_and_labels_the_oracle(self, full, results):
        rows = results.rows("tuning", model="vit", run="actmad").set_index("choice")
        lines = full.tables["table-tuning"]
        start = lines.index(["vit · actmad"])
        accuracies = [number(line[3]) for line in lines[start + 1 : start + 5]]
        assert accuracies == pytest.approx(100 * rows["accuracy"], abs=0.0501)
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
        rows = results.rows("distances", model="vit", reference="labeled", metric="mmd")
        rows = rows.set_index("target")
        (line,) = [line for line in full.tables["table-distance-vit"] if line[0] == "squared MMD"]
        shifted = rows.drop("clean")
        far = (shifted["value"] > shifted["floor_high"]).sum()
        assert line[2].startswith(significant(rows.loc["clean", "value"]))
        assert f"floor {significant(rows.loc['clean', 'floor'])}" in line[2]
        assert line[3].startswith(significant(shifted["value"].mean()))
        assert f"beyond the floor: {far} of {len(shifted)}" in line[3]
        assert shift_name(shifted["value"].idxmax()) in line[4]
        assert len(full.tables["table-distances-labeled-vit"]) == 1 + len(rows)

    def test_the_farthest_estimate_is_the_lowest(self, results):
        options = {"model": "vit", "reference": "labeled", "metric": "estimated_accuracy"}
        rows = results.rows("distances", **options)
        tables = {table.name: table for table in distances.distance_summary(results)}
        lines = tables["distance-vit"].lines
        (line,) = [line for line in lines if "(confidence drop)" in line.cells[0].text]
        assert line.cells[4].text == percent(rows[rows["target"] != "clean"]["value"].min())

    def test_several_seeds_give_their_mean_and_the_largest_p(self, results):
        rows = results.rows("distances", model="vit").assign(seed=1)
        second_seed = rows.assign(seed=0, value=rows["value"] + 2, p=1.0)
        tables = {"distances": pd.concat([rows, second_seed])}
        two_seeds = Results(("vit",), ("none",), {("vit", "none"): {"seeds": 2}}, tables)
        (table,) = distances.distance_summary(two_seeds)
        line = next(line for line in table.lines if line.cells[0].text == "squared MMD")
        pair = (rows["reference"] == "labeled") & (rows["target"] == "clean")
        clean = rows[pair & (rows["metric"] == "mmd")]["value"].iloc[0]
        assert line.cells[2].text == significant(clean + 1)
        assert "p 1.00" in line.cells[2].note

    def test_correlations_mark_what_is_known_without_labels(self, full, results):
        rows = results.rows("correlations", model="vit", run="actmad", level="corruption")
        expected = rows.set_index("signal").loc["cosine", "spearman"]
        lines = {line[0]: line for line in full.tables["table-correlations-vit"]}
        assert lines["distance to the source"][1] == "yes"
        assert lines["gradient alignment"][1] == "no"
        spearman = number(lines["gradient alignment"][-1].split("p")[0])
        assert spearman == pytest.approx(expected, abs=0.00501)

    def test_the_gate_shows_harm_with_and_without(self, full, results):
        entry = results.summary["vit", "ssl"]
        lines = full.tables["table-gates"]
        start = lines.index(["vit · ssl: adapts where the distance is ≥ 1.6"])
        without, gated = lines[start + 1 : start + 3]
        for line, side in ((without, entry), (gated, entry["gated"])):
            flips = [side["wrong_to_right"], side["right_to_wrong"]]
            assert [number(text) for text in line[3:5]] == flips
        assert number(gated[1]) == pytest.approx(100 * entry["gated"]["gain"], abs=0.0501)
        means = [entry["milliseconds_mean"], entry["gated"]["milliseconds"]]
        assert [number(line[-1]) for line in (without, gated)] == pytest.approx(means, rel=0.02)

    def test_every_shift_has_its_flips_and_tests(self, full, results):
        rows = results.rows("by_shift", model="convnet", run="shrink")
        lines = full.tables["table-shifts-convnet-shrink"][1:]
        assert [line[0] for line in lines] == [shift_name(name) for name in rows["shift"]]
        flips = rows[["wrong_to_right", "right_to_wrong"]].to_numpy().tolist()
        assert [[int(line[6]), int(line[7])] for line in lines] == flips
        assert [line[9] for line in lines] == [probability(p) for p in rows["mcnemar_holm"]]
        assert "table-shifts-convnet-none" not in full.tables


class TestSettings:
    def test_a_learning_rate_stands_only_where_something_is_learnt(self, outputs):
        pairs = [("vit", run) for run in ("none", "bn", "actmad")]
        read = Results.read(outputs, pairs)
        idle = {"protocol": "episodic", "normalisation": "mixed", "prior": 0.1}
        adapted = {pair: {"settings": idle} for pair in pairs}
        adapted["vit", "actmad"] = {"settings": idle | {"lr": 0.1, "steps": 5}}
        rendered = render(outputs, results=replace(read, adapted=adapted))
        lines = {line[1]: line[2] for line in rendered.tables[None] if line[0] == "vit"}
        common = "The same for all: protocol episodic, normalisation mixed, prior 0.1."
        assert lines == {"none": "", "bn": "", "actmad": "lr 0.1, steps 5"}
        assert common in "".join(rendered.words)


class TestMissing:
    @pytest.mark.parametrize("name", list(SECTIONS))
    def test_a_section_vanishes_with_its_table(self, small, name):
        results = Results.read(small, list(product(("vit",), ("none", "actmad"))))
        tables = {key: table for key, table in results.tables.items() if key != name}
        less = replace(results, tables=tables)
        drawn = drawings.draw(less, {"fog": [np.zeros((4, 4, 3), np.uint8)] * 2}, [1])
        section_names = [section.name for section in page._sections(less, drawn, [])]
        # These sections also show losses, searches, gates and the distances of images.
        kept = {"steps", "tuning", "alignment", "distance"}
        assert (SECTIONS[name] in section_names) == (SECTIONS[name] in kept)
        table_names = {table.name for make in page._TABLES for table in make(less)}
        prefix = {"distances": "distance", "correlations": "correlations"}.get(name, "?")
        assert not any(table_name.startswith(prefix) for table_name in table_names)

    def test_without_any_optional_table(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), optional=(), gated=(), images=12
        )
        rendered = render(tmp_path, ("vit",), ("none", "actmad"))
        assert sections(rendered) == [
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
        assert "loss" in rendered.figures
        assert not re.search(r"\b(nan|None|gate)\b", "".join(rendered.words))

    def test_without_labels(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), labeled=False, images=12
        )
        results = Results.read(tmp_path, list(product(("vit",), ("none", "actmad"))))
        rendered = render(tmp_path, results=results)
        words = "".join(rendered.words)
        assert "no labels, so accuracy is unknown" in words
        assert sections(rendered) == ["steps", "tuning", "distance", "examples"]
        assert not re.search(r"\b(nan|None)\b", words)
        changed = 100 * results.changed("vit", "actmad")
        cell = rendered.cells["vit/actmad", "changed"]
        assert number(cell) == pytest.approx(changed, abs=0.0501)
        assert "accuracy_source" not in {key for _, key in rendered.cells}

    def test_without_labels_of_shifted_images_the_clean_ones_still_count(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), labeled="clean", images=12
        )
        results = Results.read(tmp_path, list(product(("vit",), ("none", "actmad"))))
        rendered = render(tmp_path, results=results)
        entry = results.summary["vit", "actmad"]
        change = 100 * (entry["clean_adapted"] - entry["clean_source"])
        cell = rendered.cells["vit/actmad", "clean"]
        assert number(cell) == pytest.approx(change, abs=0.0501)
        words = "".join(rendered.words)
        assert "better under" not in words  # the shifts have no labels
        assert "shifts" not in sections(rendered)  # nor is there anything to list
        assert not re.search(r"\b(nan|None)\b", words)

    def test_flips_are_whole_numbers_and_dashes_where_only_some_shifts_have_labels(self, tmp_path):
        runs, labeled = ("none", "actmad"), ("clean", "photos/by night")
        options = {"images": 12, "corruptions": (), "sets": SETS}
        evaluated.write_project(tmp_path, models=("vit",), runs=runs, labeled=labeled, **options)
        results = Results.read(tmp_path, list(product(("vit",), runs)))
        rendered = render(tmp_path, results=results, corruptions=(), sets=SETS)
        rows = results.rows("by_shift", run="actmad").set_index("shift")
        lines = {line[0]: line for line in rendered.tables["table-shifts-vit-actmad"][1:]}
        for name in labeled:
            expected = [str(int(rows.loc[name, key])) for key in ("n", *FLIPS)]
            assert [lines[name][1], *lines[name][6:8]] == expected
        assert lines["photos/from afar"] == ["photos/from afar", "9", *["–"] * 8]
        words = "".join(rendered.words)
        better, worse = (
            results.summary["vit", "actmad"][f"shifts_{k}"] for k in ("helped", "hurt")
        )
        assert f"better under {better}, worse under {worse} of 2" in words
        assert not re.search(r"\b(nan|None)\b", words)

    def test_a_single_run_beside_the_control(self, small):
        assert sections(render(small, ("vit",), ("none", "actmad"))) == list(page.SECTIONS)

    def test_only_the_control(self, tmp_path):
        evaluated.write_project(tmp_path, models=("vit",), runs=("none",), images=12)
        rendered = render(tmp_path, ("vit",), ("none",))
        words = "".join(rendered.words)
        assert CONTROL in words
        assert "only the control" in words
        assert sections(rendered) == ["distance", "examples"]

    @pytest.mark.parametrize("alone", MODELS)
    def test_a_model_with_only_the_control_beside_one_with_more(self, tmp_path, alone):
        (adapted,) = set(MODELS) - {alone}
        runs = ("none", "actmad")
        evaluated.write_project(tmp_path, runs=runs, images=12, only={"actmad": (adapted,)})
        pairs = [pair for pair in product(MODELS, runs) if pair != (alone, "actmad")]
        results = Results.read(tmp_path, pairs)
        rendered = render(tmp_path, results=results)
        kinds = ("gain", "intervals", "reliability", "steps", "distance", "alignment")
        names = {model: {f"{kind}_{model}" for kind in kinds} for model in MODELS}
        assert (names[alone] | names[adapted]) & set(rendered.figures) == names[adapted]
        words = "".join(rendered.words)
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
        labels = [text.get_text() for text in severity.legends[0].get_texts()]
        assert labels == ["source, not adapted", "actmad"]

    def test_several_seeds_are_told(self, tmp_path):
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), seeds=(0, 1, 2), images=12
        )
        rendered = render(tmp_path, ("vit",), ("none", "actmad"))
        words = "".join(rendered.words)
        assert "trained with 3 seeds" in words
        assert "12 images × 3 training seeds" in words
        assert "sd over seeds 0.4" in rendered.cells["vit/actmad", "interval"]

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
        for name, with_holes in columns.items():
            holes[name].loc[::2, with_holes] = math.nan
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
        adapted = {key: {} for key in summary}
        results = Results(("vit",), ("none", "actmad"), summary, holes, adapted)
        rendered = render(small, results=results)
        assert not re.search(r"\b(nan|None|NaN)\b", "".join(rendered.words))


class TestDrawings:
    def test_the_heat_map_is_bold_where_a_severity_is_significant(self, results):
        table = drawings._with_mean(results, "convnet").query("corruption != @drawings.ALL")
        shifts = results.rows("by_shift", model="convnet")
        for row in table.itertuples():
            same = (shifts["run"] == row.run) & (shifts["corruption"] == row.corruption)
            assert row.significant == (shifts[same]["mcnemar_holm"].min() < 0.05)
        assert table["significant"].nunique() == 2

    def test_rank_correlations_are_those_of_the_table(self, results):
        options = {"model": "vit", "run": "ssl", "level": "corruption", "signal": "distance"}
        (row,) = results.rows("correlations", **options).itertuples()
        note = f"Spearman {row.spearman:+.2f}, p {probability(row.p)}".replace("-", "−")
        figure = dict(signal_drawings.draw_distance(results))["distance_vit"].figure
        assert note in [text.get_text() for axes in figure.axes for text in axes.texts]

    def test_truth_stands_beside_the_estimate_of_the_same_shift(self, results):
        axes = dict(signal_drawings.draw_estimates(results))["estimated"].figure.axes[1]
        shifts = results.rows("by_shift", model="vit", run="none")
        assert np.allclose(axes.collections[0].get_offsets()[:, 0], 100 * shifts["accuracy_source"])

    def test_without_adaptation_means_the_control_whatever_run_comes_first(self, outputs, results):
        """Also if that run lacks a model, or if its accuracy of the source network differs."""
        runs = ("actmad", *(run for run in RUNS if run != "actmad"))
        pairs = [pair for pair in product(MODELS, runs) if pair[1] != "actmad" or pair[0] == "vit"]
        reordered = Results.read(outputs, pairs)
        for name in ("by_shift", "by_corruption", "by_severity"):
            table = reordered.tables[name]
            accuracy = table["accuracy_source"] + 0.01 * (table["run"] != CONTROL)
            table = table.assign(accuracy_source=accuracy)
            reordered.tables[name] = table.sort_values(
                "run", kind="stable", key=lambda names: names.map(runs.index)
            )
        estimated = dict(signal_drawings.draw_estimates(reordered))["estimated"].figure
        assert [axes.get_title(loc="left") for axes in estimated.axes] == list(MODELS)
        severity = dict(drawings._severity(reordered))["severity"].figure
        maps = dict(drawings._gains(reordered))
        for number, model in enumerate(MODELS):
            collections = estimated.axes[number].collections
            (drawn,) = {tuple(dots.get_offsets()[:, 0]) for dots in collections}
            of_control = {"model": model, "run": "none"}
            truth = results.rows("by_shift", **of_control)["accuracy_source"]
            assert sorted(drawn) == pytest.approx(sorted(100 * truth))
            truth = results.rows("by_severity", **of_control)["accuracy_source"].to_numpy()
            assert severity.axes[number].lines[0].get_ydata() == pytest.approx(100 * truth)
            texts = maps[f"gain_{model}"].figure.axes[0].texts
            drawn = [text.get_text() for text in texts if text.get_position()[1] < -1]
            truth = results.rows("by_corruption", **of_control)["accuracy_source"]
            mean = results.summary[model, "none"]["accuracy_source"]
            assert drawn == [percent(value) for value in (*truth, mean)]

    def test_the_gate_is_a_point_of_its_own_in_cost(self, results):
        axes = dict(drawings._cost(results))["cost"].figure.axes[1]
        points = {tuple(dots.get_offsets()[0].round(6)) for dots in axes.collections[1::2]}
        entry = results.summary["vit", "actmad"]
        for side, cost in ((entry, "milliseconds_mean"), (entry["gated"], "milliseconds")):
            assert (round(side[cost], 6), round(100 * side["gain"], 6)) in points
        assert len(points) == 8


class TestFlips:
    @pytest.fixture(scope="class")
    @classmethod
    def examples(cls, outputs):
        test = ImageSet.load(outputs / "data" / "test")
        return test, pictures.read_flips(outputs, "vit", "actmad", test, SHIFTS, 3, training_seed=0)

    def test_are_flips_of_the_predictions(self, outputs, examples):
        test, flips = examples
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        table = table[table["shift"] != "clean"]
        for side, after in ((flips.wrong_to_right, True), (flips.right_to_wrong, False)):
            for flip in side:
                image, shift = flip.title.split(", ")
                corruption, severity = shift.rsplit(" ", 1)
                name = f"{corruption.replace(' ', '_')}-{severity}"
                rows = table[(table["image_id"] == image) & (table["shift"] == name)]
                (row,) = rows.itertuples()
                source = test.classes[row.source_prediction], row.source_confidence
                adapted = test.classes[row.adapted_prediction], row.adapted_confidence
                assert flip.truth == test.classes[row.label]
                assert flip.before == source
                assert flip.after == adapted
                assert (flip.after[0] == flip.truth) == after
                assert (flip.before[0] == flip.truth) != after
                assert flip.gate_open == row.gate_open

    def test_counts_and_limit(self, outputs, examples, results):
        flips = examples[1]
        entry = results.summary["vit", "actmad"]
        assert flips.counts == (entry["wrong_to_right"], entry["right_to_wrong"])
        assert len(flips.wrong_to_right) == min(pictures.FLIPS, flips.counts[0]) > 0

    def test_are_drawn_by_seed_whatever_the_order_of_the_rows(self, outputs, examples, tmp_path):
        test, flips = examples
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        path = tmp_path / "predictions" / "vit" / "actmad.parquet"
        path.parent.mkdir(parents=True)
        table.sample(frac=1, random_state=0).to_parquet(path)
        again, reseeded = (
            pictures.read_flips(tmp_path, "vit", "actmad", test, SHIFTS, seed, training_seed=0)
            for seed in (3, 4)
        )
        assert again == flips
        titles = {flip.title for flip in flips.wrong_to_right}
        assert {flip.title for flip in reseeded.wrong_to_right} != titles

    def test_the_picture_is_what_adapt_sees(self, examples):
        from tttlab.shifts.corruptions import corrupt_all

        test, flips = examples
        flip = flips.wrong_to_right[0]
        image, shift = flip.title.split(", ")
        corruption, severity = shift[:-2].replace(" ", "_"), int(shift[-1])
        pixels = np.asarray(test.pixels)
        corrupted = corrupt_all(pixels, test.image_ids, corruption, severity, 3)
        assert flip.image == pictures.data_address(corrupted[test.image_ids.index(image)])

    def test_none_without_predictions_or_labels(self, outputs, examples, tmp_path):
        test, _ = examples
        arguments = tmp_path, "vit", "actmad", test, SHIFTS, 3
        assert pictures.read_flips(*arguments, training_seed=0) is None
        table = pd.read_parquet(outputs / "predictions" / "vit" / "actmad.parquet")
        path = tmp_path / "predictions" / "vit" / "actmad.parquet"
        path.parent.mkdir(parents=True)
        table.assign(label=-1).to_parquet(path)
        assert pictures.read_flips(*arguments, training_seed=0) is None


SETS = {
    "photos/by night": evaluated.blobs(30, "test", seed=1),
    "photos/from afar": evaluated.blobs(9, "afar", seed=2),
}


class TestSets:
    """Sets of shifted images, in other numbers than the test set; some share names with it."""

    @pytest.fixture(scope="class")
    @classmethod
    def project(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("sets")
        evaluated.write_project(
            root, models=("vit",), runs=("none", "actmad"), images=12, sets=SETS
        )
        return root

    def test_stand_beside_the_corruptions(self, project):
        rendered = render(project, ("vit",), ("none", "actmad"), sets=SETS)
        assert {"examples", "examples_of_sets", "severity"} <= set(rendered.figures)
        last = [line[:2] for line in rendered.tables["table-shifts-vit-actmad"][-2:]]
        assert last == [["photos/by night", "30"], ["photos/from afar", "9"]]
        words = "".join(rendered.words)
        assert "n = 9–30 images" in words
        assert "clean and those of photos, each adapted to on its own" in words
        assert not re.search(r"\b(nan|None)\b", words)

    def test_folders_that_differ_in_a_sign_alone_are_told_apart(self, tmp_path):
        """Also with characters that mean something in a figure's text, as dollars in a formula."""
        folders = ("a b", "a_b", "a-b", "a,b", "$x^{$", "a$b$", "<i>&amp;", "1e5", "nan")
        names = [f"photos/{folder}" for folder in folders]
        sets = {name: evaluated.blobs(6, name, seed=number) for number, name in enumerate(names)}
        evaluated.write_project(
            tmp_path, models=("vit",), runs=("none", "actmad"), images=6, corruptions=(), sets=sets
        )
        rendered = render(tmp_path, ("vit",), ("none", "actmad"), corruptions=(), sets=sets)
        assert [line[0] for line in rendered.tables["table-shifts-vit-actmad"][2:]] == names
        assert [line[0] for line in rendered.tables["table-distances-labeled-vit"][2:]] == names
        results = Results.read(tmp_path, [("vit", "none"), ("vit", "actmad")])
        heat_map, intervals = (drawn.figure.axes[0] for _, drawn in drawings._gains(results))
        expected = [*names, drawings.ALL]
        assert [label.get_text() for label in heat_map.get_xticklabels()] == expected
        assert [label.get_text() for label in intervals.get_yticklabels()] == expected
        first_images = {name: [images.pixels[0]] for name, images in sets.items()}
        figure = pictures.draw_pictures(first_images, [""], "examples")
        titles = [axes.get_title() for axes in figure.axes]
        assert len(set(titles)) == len(names)
        assert all(title.startswith("photos\n") for title in titles)

    def test_without_corruptions_nothing_is_said_of_severities(self, tmp_path):
        runs = ("none", "actmad")
        evaluated.write_project(
            tmp_path, models=("vit",), runs=runs, images=12, corruptions=(), sets=SETS
        )
        rendered = render(tmp_path, ("vit",), runs, corruptions=(), sets=SETS)
        assert not {"examples", "severity"} & set(rendered.figures)
        assert "severity" not in sections(rendered)
        assert "examples_of_sets" in rendered.figures

    def test_a_flip_shows_the_image_of_its_own_set(self, project):
        test = ImageSet.load(project / "data" / "test")
        shifts = [*SHIFTS, *(Shift(name, 0, images) for name, images in SETS.items())]
        flips = pictures.read_flips(
            project, "vit", "actmad", test, shifts, 3, training_seed=0, at_most=1000
        )
        counts = dict.fromkeys(SETS, 0)
        for flip in (*flips.wrong_to_right, *flips.right_to_wrong):
            image, shift = flip.title.split(", ")
            if shift in counts:
                images = SETS[shift]
                pixels = images.pixels[images.image_ids.index(image)]
                assert flip.image == pictures.data_address(pixels)
                counts[shift] += 1
        assert all(counts.values())

    def test_a_few_of_each_are_shown_in_order(self):
        shifts = [*SHIFTS, *(Shift(name, 0, images) for name, images in SETS.items())]
        shown = pictures.set_pictures(shifts, at_most=10)
        counts = {name: len(images) for name, images in shown.items()}
        assert counts == {"photos/by night": 10, "photos/from afar": 9}
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
        (index,) = np.flatnonzero((test.pixels == clean).all(axis=(1, 2, 3)))
        pixels = np.asarray(test.pixels)
        corrupted = corrupt_all(pixels, test.image_ids, "gaussian_noise", 5, seed=3)
        assert np.array_equal(hardest, corrupted[index])

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
