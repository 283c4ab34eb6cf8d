"""The verdict: what is recommended, in which words, and by which numbers."""

import pandas as pd
import pytest

from tttlab.config.inner_loop import Augmentation
from tttlab.evaluation.recommendation import recommend, worth_running
from tttlab.evaluation.results import Results
from tttlab.reporting.lines import write_code
from tttlab.reporting.verdict import actions, sentence

SETTINGS = {
    "none": {"method": "NoAdaptation()"},
    "shrink": {"method": "NoAdaptation()", "normalisation": "shrink", "threshold": 2.0},
    "average": {"method": "NoAdaptation()", "normalisation": "source", "average": 8},
    "both": {"method": "NoAdaptation()", "normalisation": "shrink", "average": 8},
    "memo": {"method": "MEMO(num_views=8)", "steps": 1, "lr": 0.01, "normalisation": "source"},
}


def entry(gain=0.0, low=None, high=None, *, clean=0.0, training=None, labeled=True):
    """Write what metrics.json has of a run, in points, about a source accuracy of 61.3 %."""
    low, high = (gain if value is None else value for value in (low, high))
    training = training or (None, None, None)
    numbers = {
        "accuracy_source": 0.613 if labeled else None,
        "accuracy_adapted": 0.613 + gain / 100 if labeled else None,
        "gain": gain / 100 if labeled else None,
        "gain_low": low / 100 if labeled else None,
        "gain_high": high / 100 if labeled else None,
        "clean_source": 0.9,
        "clean_adapted": 0.9 + clean / 100,
        "milliseconds_p50": 85.2,
    }
    names = ("training_gain", "training_gain_low", "training_gain_high")
    values = (None if value is None else value / 100 for value in training)
    return numbers | dict(zip(names, values, strict=True))


def tuning_of(lead, error=0.0, *, trains=False):
    """Write what tuning tells of a run: its lead and the error of it, fractions."""
    chosen = {"steps": 1} if trains else {}
    told = {"lead": lead, "lead_error": error, "gain": lead + 0.01, "settings": chosen}
    return {"tuned": True, **told}


def results(entries, leads, tables=None, settings=SETTINGS):
    """Make results of one model from the entries and the leads in tuning, in points, by run."""
    entries = {"none": entry()} | entries
    tuned = {
        run: tuning_of(value / 100, trains=bool(settings[run].get("steps")))
        for run, value in leads.items()
    }
    adapted = {
        ("m", run): {"settings": settings[run] | {"run": run}, "tuning": tuned.get(run, {})}
        for run in entries
    }
    summary = {("m", run): value for run, value in entries.items()}
    return Results(("m",), tuple(entries), summary, tables or {}, adapted)


def test_what_a_run_does_is_read_from_the_settings_that_it_used():
    found = results({run: entry() for run in SETTINGS}, {})
    assert [actions(found, "m", run) for run in SETTINGS] == [
        ("other",),
        ("normalise",),
        ("average",),
        ("normalise", "average"),
        ("train",),
    ]


def test_a_method_may_normalise_and_average_itself_whatever_its_name():
    found = results({"one": entry()}, {}, settings=SETTINGS | {"one": {"method": "Mine()"}})
    assert actions(found, "m", "one") == ("other",)
    found.adapted["m", "one"]["averages"] = True
    assert actions(found, "m", "one") == ("average",)
    found.adapted["m", "one"]["normalises"] = True
    assert actions(found, "m", "one") == ("normalise", "average")


def test_tuning_recommends_and_the_test_images_have_no_say():
    """The best on the test images is not the one that tuning scored highest."""
    entries = {"shrink": entry(9, 7, 11), "average": entry(1, -1, 3), "both": entry(-4, -6, -2)}
    for leads, expected in (
        ({"shrink": 1.0, "average": 2.0}, "average"),
        ({"shrink": 1.0, "both": 3.0, "average": 2.0}, "both"),
        ({"shrink": -0.5, "average": 0.0}, None),
        ({}, None),
    ):
        assert recommend(results(entries, leads).records("m")) == expected


def test_a_run_that_scored_below_the_network_is_not_worth_running():
    tuned = {"a": tuning_of(-0.02), "b": tuning_of(0.0, trains=True)}
    assert worth_running(tuned) is None
    assert worth_running(tuned | {"c": tuning_of(0.01)}) == "c"
    assert worth_running({"none": {"tuned": False}}) is None


@pytest.mark.parametrize(
    ("trained", "error", "control", "expected"),
    [
        (0.05, 0.02, 0.02, "ssl"),
        (0.05, 0.03, 0.02, "shrink"),
        (0.05, 0.03, -0.01, "ssl"),
        (0.05, 0.06, -0.01, None),  # it may lead the network as it is by chance alone
        (0.05, 0.01, 0.05, "shrink"),
        (-0.01, 0.0, -0.02, None),
    ],
)
def test_a_run_that_trains_must_lead_all_that_do_not_by_more_than_its_standard_error(
    trained, error, control, expected
):
    tunings = {"ssl": tuning_of(trained, error, trains=True), "shrink": tuning_of(control)}
    assert worth_running(tunings) == expected
    # Among runs that all train, the highest score must lead the network as it is; among runs that
    # all do not, it decides.
    alone = {"ssl": tunings["ssl"], "b": tuning_of(0.01, 0.001, trains=True)}
    assert worth_running(alone) == ("b" if trained < 0 else "ssl" if trained > error else None)
    assert worth_running({"shrink": tunings["shrink"], "b": tuning_of(0.03, 9)}) == (
        "shrink" if control > 0.03 else "b"
    )


@pytest.mark.parametrize(
    ("run", "found", "expected"),
    [
        (
            "both",
            entry(4.2, 1.1, 7.3, clean=-0.3),
            "Re-normalise and average over views (run both): the shifted images went "
            "from 61.3 % to 65.5 %, +4.2 points (95 % interval +1.1 to +7.3), "
            "−0.3 points on clean images, 85.2 ms per image.",
        ),
        (
            "both",
            entry(0.7, -0.5, 1.9),
            "Undecided: re-normalising and averaging over views (run both), which tuning on source "
            "images recommends, took the shifted images from 61.3 % to 62.0 %, +0.7 points (95 % "
            "interval −0.5 to +1.9), which includes zero, 0.0 points on clean images, "
            "85.2 ms per image.",
        ),
        (
            "both",
            entry(-2, -3, -1),
            "Leave the network as it is: re-normalising and averaging over views (run both), which "
            "tuning on source images recommends, hurt the shifted images, from 61.3 % to 59.3 %, "
            "−2.0 points (95 % interval −3.0 to −1.0), 0.0 points on clean images, "
            "85.2 ms per image.",
        ),
        (
            "both",
            entry(0, 0, 0),
            "Leave the network as it is: re-normalising and averaging over views (run both), which "
            "tuning on source images recommends, changed no prediction of the shifted images, "
            "0.0 points on clean images, 85.2 ms per image.",
        ),
    ],
)
def test_the_sentence_is_as_sure_as_the_interval(run, found, expected):
    assert sentence(results({run: found}, {run: 1.0}), "m") == expected


def test_networks_that_are_ahead_without_adapting_are_named():
    """The farthest ahead with its interval; those that are not ahead for certain not at all."""
    columns = ("model", "run", "other", "lead", "lead_low", "lead_high")
    lines = [
        ("m", "both", "groupnorm", 0.03, 0.01, 0.05),
        ("m", "both", "augmix", 0.042, 0.02, 0.064),
        ("m", "both", "wider", 0.02, -0.01, 0.05),
        ("augmix", "none", "m", -0.05, -0.06, -0.04),
    ]
    found = {"both": entry(4.2, 1.1, 7.3)}
    for count, words in (
        (4, "; without adapting, augmix is +4.2 [+2.0, +6.4] ahead of that, and so is groupnorm."),
        (1, "; without adapting, groupnorm is +3.0 [+1.0, +5.0] ahead of that."),
        (0, "85.2 ms per image."),
    ):
        tables = {"networks": pd.DataFrame(lines[:count], columns=columns)}
        assert sentence(results(found, {"both": 1.0}, tables), "m").endswith(words)


def test_each_step_alone_is_told_with_its_interval():
    """Of several runs of a kind the one that tuning scored highest stands for it."""
    entries = {
        "shrink": entry(3, 1, 5),
        "bn": entry(8, 6, 10),
        "average": entry(0.4, -1, 1.8),
        "both": entry(4, 2, 6),
        "memo": entry(1, -2, 4, training=(-1.5, -2.0, -1.0)),
    }
    settings = SETTINGS | {"bn": SETTINGS["shrink"] | {"normalisation": "mixed"}}
    leads = {"shrink": 2.0, "bn": 1.0, "both": 3.0, "memo": 0.5, "average": 0.1}
    text = sentence(results(entries, leads, settings=settings), "m")
    assert text.startswith("Re-normalise and average over views (run both): ")
    assert text.endswith(
        "; re-normalising alone (run shrink) +3.0 [+1.0, +5.0], averaging over views alone (run "
        "average) +0.4 [−1.0, +1.8] (undecided), the steps of training (run memo) "
        "−1.5 [−2.0, −1.0]."
    )


@pytest.mark.parametrize(
    ("control", "over", "expected"),
    [
        (
            "shrink",
            (0.5, 0.1, 0.9),
            "−1.5 [−2.0, −1.0], memo above shrink, which tuning scored highest of the runs "
            "that train nothing and take no more time, +0.5 [+0.1, +0.9].",
        ),
        (
            "shrink",
            (0.1, -0.3, 0.5),
            "−1.5 [−2.0, −1.0], memo above shrink, which tuning scored highest of the runs "
            "that train nothing and take no more time, +0.1 [−0.3, +0.5] (undecided).",
        ),
        ("none", (1, -2, 4), "−1.5 [−2.0, −1.0]."),  # that is its gain, told already
        (None, (None, None, None), "−1.5 [−2.0, −1.0]."),
    ],
)
def test_training_is_told_beside_the_best_control(control, over, expected):
    trained = entry(1, -2, 4, training=(-1.5, -2.0, -1.0)) | {"control": control}
    names = ("over_control", "over_control_low", "over_control_high")
    trained |= {
        name: None if value is None else value / 100
        for name, value in zip(names, over, strict=True)
    }
    entries = {"shrink": entry(3, 1, 5), "memo": trained}
    assert sentence(results(entries, {"shrink": 2.0, "memo": 0.5}), "m").endswith(expected)


def test_re_normalising_alone_is_the_run_that_does_it_as_the_recommended_one():
    """`bn` scored higher in tuning, and tells nothing of what training adds on top of `shrink`."""
    settings = SETTINGS | {
        "bn": {"method": "NoAdaptation()", "normalisation": "mixed"},
        "trained": {**SETTINGS["memo"], "normalisation": "shrink"},
    }
    entries = {
        "shrink": entry(12, 11, 13),
        "bn": entry(4, 3, 5),
        "trained": entry(12.5, 11, 14, training=(0.5, -0.5, 1.5)),
    }
    leads = {"shrink": 1.0, "bn": 2.0, "trained": 3.0}
    found = sentence(results(entries, leads, settings=settings), "m")
    assert "re-normalising alone (run shrink) +12.0 [+11.0, +13.0]" in found
    assert "run bn" not in found


def test_where_nothing_helped_the_sentence_says_so():
    entries = {"shrink": entry(0.5, -1, 2), "average": entry(-3, -4, -2)}
    text = sentence(results(entries, {"shrink": -0.1, "average": -2.0}), "m")
    assert text == (
        "Leave the network as it is: on source images under held-out corruptions no run scored "
        "above it; nothing helped: re-normalising alone (run shrink) +0.5 [−1.0, +2.0] "
        "(undecided), averaging over views alone (run average) −3.0 [−4.0, −2.0]."
    )


def test_of_too_few_images_the_sentence_says_neither_helped_nor_undecided():
    """One image gives a gain but no interval."""
    nan = float("nan")
    trained = entry(2, nan, nan, training=(0.5, nan, nan)) | {"control": "average"}
    trained |= {"over_control": 0.01, "over_control_low": None, "over_control_high": None}
    entries = {"shrink": entry(3, nan, nan), "average": entry(1, nan, nan), "memo": trained}
    entries = {
        run: {name: None if value != value else value for name, value in found.items()}
        for run, found in entries.items()
    }
    text = sentence(results(entries, {"shrink": 2.0, "average": 1.0, "memo": -1.0}), "m")
    assert text == (
        "Undecided: re-normalising (run shrink), which tuning on source images recommends, took "
        "the shifted images from 61.3 % to 64.3 %, +3.0 points, too few images to tell, 0.0 points "
        "on clean images, 85.2 ms per image; averaging over views alone (run average) +1.0 (too "
        "few images to tell), the steps of training (run memo) +0.5 (too few images to tell), memo "
        "above average, which tuning scored highest of the runs that train nothing and take no "
        "more time, +1.0 (too few images to tell)."
    )


def test_what_only_the_test_images_show_is_not_recommended_but_told():
    entries = {"shrink": entry(9, 7, 11), "average": entry(-3, -4, -2)}
    text = sentence(results(entries, {"shrink": -0.1, "average": 1.0}), "m")
    assert text.startswith("Leave the network as it is: averaging over views (run average)")
    assert text.endswith(
        "; that shrink helped is known from these test images alone, so confirm it on others."
    )
    assert "confirm" not in sentence(results(entries, {"shrink": 2.0, "average": 1.0}), "m")


def test_runs_that_were_not_tuned_are_not_recommended():
    text = sentence(results({"shrink": entry(9, 7, 11)}, {}), "m")
    assert text.startswith("Nothing is recommended, for no run for single images was tuned; ")


def test_without_labels_the_sentence_tells_what_is_known():
    entries = {"none": entry(labeled=False), "shrink": entry(labeled=False, clean=-0.2)}
    shifts = {
        "model": "m",
        "run": "none",
        "shift": ["clean", "test"],
        "distance": [1.02, 3.4],
    }
    changes = {"model": "m", "run": "shrink", "corruption": ["test"], "n": [50], "changed": [7]}
    estimates = {
        "model": "m",
        "reference": "labeled",
        "target": ["clean", "test"],
        "metric": "estimated_accuracy_atc",
        "value": [0.91, 0.58],
    }
    frames = {"by_shift": shifts, "by_corruption": changes, "distances": estimates}
    tables = {name: pd.DataFrame(table) for name, table in frames.items()}
    assert sentence(results(entries, {"shrink": 2.0}, tables), "m") == (
        "The test images have no labels, so that their accuracy is unknown; tuning on source "
        "images under held-out corruptions recommends re-normalising (run shrink), +3.0 points "
        "there; it changes 14.0 % of the test images' predictions, −0.2 points on clean images, "
        "85.2 ms per image; their distance to the source is 3.40, that of clean images 1.02; the "
        "accuracy of the network as it is, estimated from its confidence, is 58.0 %."
    )


def test_the_lines_name_only_what_acts(tmp_path):
    settings = SETTINGS["both"] | {"run": "both", "seed": 3, "trainable": ["a", "b"]}
    views = Augmentation(0.5, True, 0.1)
    code = write_code(settings, "tttlab.methods.none", views, tmp_path, "m/0")
    assert (
        "InnerLoop(steps=0, normalisation='shrink', trainable=('a', 'b'), average=8, "
        "augmentation=Augmentation(min_scale=0.5, flip=True, jitter=0.1))"
    ) in code
    assert "seed=3" in code
    assert len([line for line in code.splitlines() if "=" in line and "import" not in line]) == 6
    plain = write_code(
        SETTINGS["none"] | {"seed": 0}, "tttlab.methods.none", views, tmp_path, "m/0"
    )
    assert "Augmentation" not in plain
    compile(code + plain, "lines", "exec")


def test_a_run_that_trains_and_may_lead_by_chance_is_not_said_to_score_no_higher():
    found = results({"memo": entry(1, -1, 3), "shrink": entry(1, -1, 3)}, {"shrink": -0.5})
    found.adapted["m", "memo"]["tuning"] = tuning_of(0.03, 0.04, trains=True)
    assert recommend(found.records("m")) is None
    assert sentence(found, "m").startswith(
        "Leave the network as it is: on source images under held-out corruptions memo scored above "
        "it, but by no more than its standard error; "
    )


def test_one_image_has_no_interval_and_no_verdict():
    one = entry(0.7) | {"gain_low": None, "gain_high": None}
    found = results({"both": one, "shrink": one}, {"both": 1.0})
    assert sentence(found, "m") == (
        "Undecided: re-normalising and averaging over views (run both), which tuning on source "
        "images recommends, took the shifted images from 61.3 % to 62.0 %, +0.7 points, too few "
        "images to tell, 0.0 points on clean images, 85.2 ms per image; re-normalising alone (run "
        "shrink) +0.7 (too few images to tell)."
    )


def test_a_run_above_its_control_on_one_image_has_no_interval():
    one = entry(0.7, training=(0.2, 0, 0)) | {"gain_low": None, "gain_high": None}
    one |= {"training_gain_low": None, "training_gain_high": None, "control": "shrink"}
    one |= {"over_control": 0.01, "over_control_low": None, "over_control_high": None}
    assert sentence(results({"memo": one}, {"memo": 1.0}), "m").endswith(
        "; memo above shrink, which tuning scored highest of the runs that train nothing and take "
        "no more time, +1.0 (too few images to tell)."
    )


def test_where_a_stream_helped_it_is_not_said_that_nothing_did():
    settings = SETTINGS | {"tent": {"method": "Tent()", "steps": 1, "protocol": "online"}}
    entries = {"shrink": entry(-3, -4, -2), "tent": entry(9, 7, 11)}
    text = sentence(results(entries, {"shrink": -0.5}, settings=settings), "m")
    alone = "re-normalising alone (run shrink) −3.0 [−4.0, −2.0]"
    assert text.endswith(f"; no run for single images helped: {alone}.")


def test_scores_of_streams_do_not_count_where_no_run_for_single_images_was_tuned():
    settings = SETTINGS | {"tent": {"method": "Tent()", "steps": 1, "protocol": "online"}}
    entries = {"shrink": entry(9, 7, 11), "tent": entry(9, 7, 11)}
    text = sentence(results(entries, {"tent": 2.0}, settings=settings), "m")
    assert text.startswith("Nothing is recommended, for no run for single images was tuned; ")


def test_a_model_with_the_control_alone_is_told_from_settings_with_the_control_alone():
    alone = results({}, {})
    assert sentence(alone, "m") == (
        "There is nothing to judge: params.yaml lists only the control."
    )
    of_others = Results(("m",), ("none", "shrink"), alone.summary, {}, alone.adapted)
    assert sentence(of_others, "m") == (
        "There is nothing to judge: this model has only the control."
    )
