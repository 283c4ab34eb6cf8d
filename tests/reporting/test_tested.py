"""The report's words fit what was run: corruptions, natural shifts, both, or neither."""

import re
from itertools import product

import pytest

from tests.helpers import evaluated
from tests.reporting.test_page import Page, render, sections
from tttlab.config.experiments import Online
from tttlab.config.values import UNCORRUPTED
from tttlab.evaluation.results import Results
from tttlab.reporting import about, tested

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
