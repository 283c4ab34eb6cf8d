"""The report's words fit what was run: corruptions, natural shifts, both, or neither."""

import re
from itertools import product

import pandas as pd
import pytest

from tests.helpers import evaluated
from tests.reporting.test_page import Page, render, sections
from tttlab.config.experiments import Online
from tttlab.config.values import UNCORRUPTED
from tttlab.evaluation.results import Results, name_shifts
from tttlab.reporting import about, drawings, report, tested, verdict
from tttlab.reporting.words import points

RUNS = ("none", "shrink", "actmad")
SETS = {
    "photos/night": evaluated.blobs(9, "night", seed=1),
    "photos/snow": evaluated.blobs(12, "snow", seed=2),
    "paintings/oil": evaluated.blobs(12, "oil", seed=3),
}
ONE = {UNCORRUPTED: evaluated.blobs(12, "test", seed=1)}
KINDS = {
    "corruptions": {"corruptions": evaluated.CORRUPTIONS, "sets": {}},
    "natural": {"corruptions": (), "sets": SETS},
    "mixed": {"corruptions": evaluated.CORRUPTIONS, "sets": SETS},
    "themselves": {"corruptions": (), "sets": ONE},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> tuple[str, Results, Page]:
    """One project of each kind, with its page."""
    root, options = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    evaluated.write_project(root, models=("vit",), runs=RUNS, images=12, **options)
    results = Results.read(root, list(product(("vit",), RUNS)))
    return request.param, results, render(root, results=results, **options)


def words_of(page: Page) -> str:
    """The page's words but for params.yaml, the names of methods and what tuning saw."""
    return re.sub(r"\s+", " ", "".join(page.words)).replace("under corruptions that are not", "")


def test_severity_and_corruption_are_said_only_where_there_are_any(made):
    kind, _, page = made
    words = words_of(page).lower()
    graded = kind in ("corruptions", "mixed")
    assert ("severit" in words) == graded
    assert ("corruption" in words) == graded
    assert ("severity" in sections(page)) == graded


def test_the_section_and_the_figures_are_named_after_what_was_tested(made):
    kind, _, page = made
    words = words_of(page)
    heads = re.findall(r"Gain per (corruption|shift)", words)
    assert (
        set(heads)
        == {
            "corruptions": {"corruption"},
            "natural": {"shift"},
            "mixed": {"shift"},
            "themselves": set(),  # one shift: the first figure shows its gain
        }[kind]
    )
    assert ("gain_vit" in page.figures) == (kind != "themselves")
    assert page.figures[0] == "overview_vit"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "corruptions",
            "Accuracy with minus without adaptation, over all corruptions, n = 12 images under "
            "every corruption. Clean: the change on the same images without any corruption.",
        ),
        (
            "natural",
            "Accuracy with minus without adaptation, over all shifts, n = 9–12 images per shift. "
            "Clean: the change on the test images that are not shifted.",
        ),
        (
            "mixed",
            "Accuracy with minus without adaptation, over all shifts, n = 9–12 images per shift. "
            "Clean: the change on the test images as they are, without any shift.",
        ),
        (
            "themselves",
            "Accuracy with minus without adaptation, on the shifted images, n = 12 images. Clean: "
            "the change on labeled images that training has set aside: nothing is shifted there.",
        ),
    ],
)
def test_the_first_captions_sentences(made, kind, sentence):
    if made[0] == kind:
        assert sentence in words_of(made[2])


@pytest.mark.parametrize(
    ("kind", "sentences"),
    [
        (
            "corruptions",
            (
                "Accuracy with minus without adaptation, mean over the severities; above,",
                "p of McNemar's test at a severity is below 0.05",
                "A point per shift, larger at higher severity; hollow: clean.",
                "not widened for looking at many corruptions at once",
                "Over the test images, each under all its corruptions.",
            ),
        ),
        (
            "natural",
            (
                "Accuracy with minus without adaptation; above, the accuracy without.",
                "p of McNemar's test is below 0.05",
                "A point per shift; hollow: clean.",
                "not widened for looking at many shifts at once",
                "Over the test images. Above zero",
            ),
        ),
        (
            "mixed",
            (
                "A point per corruption and severity, larger where that is higher, and one per "
                "natural shift; hollow: clean.",
                "Accuracy by severity, mean of 4 corruptions, n = 12 images",
            ),
        ),
        ("themselves", ("test images", "labeled → test images")),
    ],
)
def test_captions_and_explanations(made, kind, sentences):
    if made[0] == kind:
        words = words_of(made[2])
        for sentence in sentences:
            assert sentence in words


def test_distances_to_one_shift_have_no_mean_and_no_farthest(made):
    kind, _, page = made
    heads = page.tables["table-distance-vit"][0]
    many = ["labeled → shifted, mean", "labeled → shifted, farthest"]
    last = ["labeled → test images"] if kind == "themselves" else many
    assert heads == ["vit", "unlabeled → labeled", "labeled → clean", *last]


def test_controls_are_the_runs_that_do_not_train(made):
    assert about.controls(made[1]) == [
        "none leaves the network alone.",
        "shrink does not train: a gain that it also gives is not a gain of training.",
    ]


def test_streams_without_severities_do_not_speak_of_them():
    for shifts in ("separate", "continual", "gradual", "mixed"):
        stream = Online(batch_size=64, order="shuffled", shifts=shifts)
        assert "severity" not in about.arrival(stream, graded=False)
    mixed = Online(batch_size=64, order="shuffled", shifts="mixed")
    assert about.arrival(mixed, graded=False) == ("the shifts mixed in one stream (batches of 64)")
    assert about.arrival(mixed) == ("the shifts of a severity mixed in one stream (batches of 64)")


def test_seeds_are_counted_apart_from_images(tmp_path):
    evaluated.write_project(
        tmp_path, models=("vit",), runs=RUNS, images=12, seeds=(0, 1, 2), sets=SETS
    )
    shown = tested.Tested.of(Results.read(tmp_path, list(product(("vit",), RUNS))))
    assert shown.sample == "n = 9–12 images × 3 training seeds per shift"
    assert shown.count == len(evaluated.CORRUPTIONS) * 2 + len(SETS)


SOME = {
    "photos/a": evaluated.blobs(20, "a", seed=1),
    "photos/b": evaluated.blobs(30, "b", seed=2),
    "photos/c": evaluated.blobs(25, "c", seed=3),
}
MISSING = "There are no labels for photos/b: 30 of the 50 shifted images count in no accuracy"


def partly_labeled(root, labeled, names=tuple(SOME), corruptions=()) -> Results:
    """Write a project of which only some shifts have labels."""
    sets = {name: SOME[name] for name in names}
    options = {"models": ("vit",), "runs": RUNS, "images": 12, "corruptions": corruptions}
    evaluated.write_project(root, sets=sets, labeled=labeled, **options)
    return Results.read(root, list(product(("vit",), RUNS)))


@pytest.fixture(scope="module")
def one_of_two(tmp_path_factory) -> tuple[Results, Page]:
    """A set whose domain a has labels, 20, and whose domain b has none."""
    root = tmp_path_factory.mktemp("partly")
    names = ("photos/a", "photos/b")
    results = partly_labeled(root, ("clean", "photos/a"), names)
    sets = {name: SOME[name] for name in names}
    return results, render(root, results=results, corruptions=(), sets=sets)


def test_a_gain_is_over_the_shifts_with_labels_and_counts_only_their_images(one_of_two):
    results, page = one_of_two
    entry = results.summary["vit", "actmad"]
    (row,) = results.rows("by_shift", run="actmad", shift="photos/a").itertuples()
    assert entry["gain"] == pytest.approx(row.gain)  # b has no say
    words = words_of(page)
    assert "without adaptation, over the shifts with labels (photos/a), n = 20 images. " in words
    assert "in percentage points, over the shifts with labels (photos/a)." in words
    caption = "Accuracy is over the shifts with labels (photos/a); loss and time are over all."
    assert caption in words  # of the curves along the steps
    assert "over all shifts" not in words
    assert "20–30" not in words


def test_the_shifts_without_labels_are_named(one_of_two):
    results, page = one_of_two
    shown = tested.Tested.of(results)
    assert (shown.count, shown.labeled, shown.unlabeled) == (1, ("photos/a",), ("photos/b",))
    sentence = f"{MISSING} and no gain."
    assert tested.without_labels(results) == sentence
    assert f"without labels. {sentence}" in words_of(page)  # the note
    assert verdict.sentence(results, "vit").endswith(f". {sentence}")
    assert report.plain_table(results).splitlines()[-1] == sentence
    assert f"\n\n{sentence}\n\n| model" in report.markdown(results, {})


def test_figures_of_gains_show_only_shifts_with_labels(tmp_path):
    results = partly_labeled(tmp_path, ("clean", "photos/a", "photos/c"))
    table = drawings._with_mean(results, "vit")
    assert list(dict.fromkeys(table["corruption"])) == ["photos/a", "photos/c", "all with labels"]
    drawn = drawings.draw(results, {}, [])
    title = "vit: gain, percentage points, n = 20–25 images per shift"
    assert drawn["gain_vit"].figure.get_suptitle() == title
    texts = [text.get_text() for text in drawn["gain_vit"].figure.axes[0].texts]
    assert "nan" not in texts
    title = "Gain over the shifts with labels (photos/a and photos/c) and cost, n = 20–25 images"
    assert drawn["cost"].figure.get_suptitle().startswith(title)
    assert "distance_vit" not in drawn  # two points show no order


def test_accuracy_by_severity_needs_labels_of_corrupted_images(tmp_path):
    corruptions = evaluated.CORRUPTIONS
    results = partly_labeled(tmp_path, ("photos/a",), ("photos/a",), corruptions)
    assert "severity" not in drawings.draw(results, {}, [])
    missing = "fog, frost, gaussian noise and jpeg compression: 96 of the 116 shifted images"
    assert missing in tested.without_labels(results)


def test_a_corruption_with_labels_at_some_severities_is_named_with_those():
    rows = [("clean", "none", None), ("fog-1", "fog", 0.5), ("fog-5", "fog", None)]
    rows += [("photos/b", "photos/b", None), ("frost-1", "frost", 0.5), ("frost-5", "frost", 0.5)]
    table = pd.DataFrame(rows, columns=["shift", "corruption", "accuracy_source"])
    assert name_shifts(pd.concat([table, table]), labeled=True) == ["fog 1", "frost"]
    assert name_shifts(table, labeled=False) == ["fog 5", "photos/b"]


@pytest.mark.parametrize("labeled", [True, "clean", False])
def test_where_all_or_none_have_labels_none_is_named(tmp_path, labeled):
    results = partly_labeled(tmp_path, labeled)
    shown = tested.Tested.of(results)
    assert (shown.unlabeled, shown.over_all) == ((), "over all shifts")
    assert shown.sample == shown.sample_of_all == "n = 20–30 images per shift"
    assert tested.without_labels(results) == ""
    assert report.plain_table(results).splitlines()[-1].split()[:2] in (
        ["with", "gate"],
        ["vit", "actmad"],
    )


def test_many_names_are_cut(tmp_path):
    sets = {f"photos/{number:02d}": evaluated.blobs(3, f"{number}") for number in range(20)}
    known = tuple(sets)[:5]
    options = {"models": ("vit",), "runs": ("none", "shrink"), "images": 3, "corruptions": ()}
    evaluated.write_project(tmp_path, sets=sets, labeled=known, **options)
    results = Results.read(tmp_path, list(product(("vit",), ("none", "shrink"))))
    assert tested.Tested.of(results).over_all == "over the shifts with labels"
    sentence = tested.without_labels(results)
    assert sentence.startswith("There are no labels for photos/05, photos/06, ")
    assert "photos/16 and 3 more: 45 of the 60 shifted images" in sentence


def test_clean_images_without_labels_are_not_spoken_of(tmp_path):
    """The test images have no labels, as they are and corrupted; a set that comes shifted has."""
    corruptions, known = evaluated.CORRUPTIONS, ("photos/a", "photos/c")
    results = partly_labeled(tmp_path, known, known, corruptions)
    sets = {name: SOME[name] for name in known}
    page = render(tmp_path, results=results, corruptions=corruptions, sets=sets)
    words = words_of(page)
    assert "n = 20–25 images per shift. vit:" in words  # the caption ends before the sentences
    assert "Clean: the change" not in words
    assert "the price where nothing had to be adapted" not in words
    plain, markdown = report.plain_table(results), report.markdown(results, {})
    assert "clean" not in plain
    assert "clean" not in markdown
    columns = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_one_image_is_one_and_has_no_interval(tmp_path):
    runs = ("none", "actmad")
    options = {"models": ("vit",), "runs": runs, "images": 1, "test": evaluated.blobs(1)}
    evaluated.write_project(tmp_path, **options)
    results = Results.read(tmp_path, list(product(("vit",), runs)))
    assert tested.Tested.of(results).sample == "n = 1 image under every corruption"
    sentence = report.sentence(results, "vit")
    assert "Points by training alone: actmad 0.0 (too few images to tell)." in sentence
    assert "undecided" not in sentence
    title = titles_of(results)["distance_vit"]
    assert title == "vit: gain along the distance to the source, 1 prediction per point"


def test_points_of_sets_of_different_sizes_say_from_which_to_which(tmp_path):
    results = partly_labeled(tmp_path, True)
    assert titles_of(results)["distance_vit"].endswith(", 12–30 predictions per point")


def test_the_gate_is_not_told_of_clean_images_without_labels(tmp_path):
    results = partly_labeled(tmp_path, ("photos/a",))
    gain = points(results.summary["vit", "actmad"]["gated"]["gain"])
    assert f"With the gate: actmad {gain}." in report.sentence(results, "vit")


def titles_of(results: Results) -> dict[str, str]:
    """Draw all figures, and give their titles by name."""
    return {
        name: drawing.figure.get_suptitle()
        for name, drawing in drawings.draw(results, {}, []).items()
    }
