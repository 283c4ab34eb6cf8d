"""What the demo shows: the numbers of `adapt`, and the views that it really looked at."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import networks, served
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import adapt_gated
from tttlab.adaptation.method import Method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.views import random_masks
from tttlab.errors import UserError
from tttlab.methods.dressed import Dressed
from tttlab.methods.mae import MAETraining
from tttlab.methods.views import ViewAverage
from tttlab.seeding import torch_generator
from tttlab.serving import showing
from tttlab.serving.adaptive_model import ServedRun
from tttlab.serving.answers import Wish
from tttlab.serving.service import Service
from tttlab.serving.showing import Picture, show
from tttlab.shifts.corruptions import corrupt_all
from tttlab.shifts.shift import Shift


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.model(tmp_path_factory.mktemp("network"), torch.float64)[0]


def pixels(count=1, seed=5):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


PICTURE = Picture(pixels()[0], "folder/one.png", "cat")


def as_adapt_takes_them(shown):
    return as_images(torch.from_numpy(shown.pixels[None].copy())).double()


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", list(served.LOOPS))
def test_the_numbers_are_those_of_adapt(model, name, gate):
    shown = show(model, PICTURE, "fog", 3, Wish(name, gate))
    run, task = model.runs[name], model.runs[name].task
    arguments = task.network, as_adapt_takes_them(shown), task.method, task.loop
    options = {
        "statistics": task.statistics,
        "image_ids": [PICTURE.key],
        "seed": task.seed,
        "record": range(task.loop.steps + 1),
    }
    if gate and run.gate:
        result, (opened,) = adapt_gated(*arguments, run.gate, **options)
        assert shown.gate.opened == shown.says["gate"] == opened
    else:
        result = adapt(*arguments, **options)
        assert shown.gate is shown.says["gate"] is None
    told = [list(row["probabilities"].values()) for row in shown.says["curve"]]
    told = torch.tensor(told, dtype=torch.float64)
    torch.testing.assert_close(told, result.logits_at[0].softmax(-1))
    for side, logits in (("", result.logits[0]), ("source_", result.source_logits[0])):
        told = torch.tensor(list(shown.says[f"{side}probabilities"].values()), dtype=torch.float64)
        torch.testing.assert_close(told, logits.softmax(-1))
        assert shown.says[f"{side}class"] == served.CLASSES[logits.argmax()]
    losses = [row["loss"] for row in shown.says["curve"] if row["loss"] is not None]
    finite = result.losses[0][result.losses[0].isfinite()]
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), finite)
    assert len(losses) == (task.loop.steps + 1 if run.takes_steps else 0)


def test_fewer_steps_are_the_beginning_of_more(model):
    """So that one slider leads along the steps."""
    curves = [show(model, PICTURE, wish=Wish("simclr", False, n)).says["curve"] for n in (1, 4)]
    assert [len(curve) for curve in curves] == [2, 5]
    for short, long in zip(*curves, strict=False):
        assert short["probabilities"] == pytest.approx(long["probabilities"], abs=1e-9)
    assert curves[0][0]["loss"] == pytest.approx(curves[1][0]["loss"], abs=1e-9)


@pytest.mark.parametrize("name", ["memo", "simclr"])
def test_the_views_are_those_that_training_looks_at(model, name, monkeypatch):
    task, seen = model.runs[name].task, []
    draw = type(task.method).views

    def spy(method, network, images, generators):
        views = draw(method, network, images, generators)
        seen.append(views[0])
        return views

    shown = show(model, PICTURE, "contrast", 5, Wish(name, False))
    monkeypatch.setattr(type(task.method), "views", spy)
    adapt(
        *(task.network, as_adapt_takes_them(shown), task.method, task.loop),
        statistics=task.statistics,
        image_ids=[PICTURE.key],
        seed=task.seed,
        images_per_step=1,
    )
    assert len(shown.views) == task.loop.steps == 2
    drawn = seen[-2:]  # after those of the check
    for told, views in zip(shown.views, drawn, strict=True):
        assert told.dtype == np.uint8
        expected = views.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        assert told.shape == expected.shape
        assert np.abs(told - expected).max() <= 0.5 + 1e-9


def test_a_run_that_averages_shows_what_it_averages_over_and_others_show_nothing(model):
    (averaged,) = show(model, PICTURE, wish=Wish("averaged")).views
    assert averaged.shape == (3, 16, 16, 3)
    assert show(model, PICTURE, wish=Wish("shrink")).views == ()
    assert show(model, PICTURE, wish=Wish("none")).views == ()
    assert show(model, PICTURE, wish=Wish("simclr", steps=0)).views == ()


def test_of_a_masked_image_the_hidden_patches_are_grey():
    network = networks.vit()
    size, images = 16, networks.images(1, seed=2)
    method = MAETraining(num_views=3, mask_ratio=0.75)
    run = ServedRun(Task(network, method, InnerLoop(steps=2), seed=4))
    told = showing.look(run, images, "a")
    patch, count = network.head.patch_size, network.head.num_patches
    across = size // patch
    for step, masks in enumerate(told):
        kept, _ = random_masks([torch_generator(4, "views", "a", step)], 3, count, 0.75)
        expected = np.full((3, size, size, 3), 128, np.uint8)  # 127.5, rounded
        exact = np.rint(images[0].permute(1, 2, 0).double().numpy() * 255)
        for view, patches in enumerate(kept[0].tolist()):
            for number in patches:
                rows = slice(number // across * patch, (number // across + 1) * patch)
                columns = slice(number % across * patch, (number % across + 1) * patch)
                expected[view, rows, columns] = exact[rows, columns]
        assert np.abs(masks.astype(int) - expected).max() <= 1
    assert len(told) == 2


def test_an_image_is_shifted_as_the_pipeline_shifts_it_among_others(model):
    some = pixels(3)
    names = ("a.png", "folder/one.png", "b.png")
    images = ImageSet(some, np.array([0, 2, 1]), names, tuple(served.CLASSES))
    seed = model.runs["memo"].task.seed
    expected = Shift("snow", 4).apply(images, seed)[1]
    shown = show(model, Picture(some[1], names[1]), "snow", 4, Wish("memo"))
    np.testing.assert_array_equal(shown.pixels, expected)
    assert (shown.pixels != some[1]).any()
    untouched = show(model, Picture(some[1], names[1]), None, 4, Wish("memo"))
    np.testing.assert_array_equal(untouched.pixels, some[1])


def test_the_gate_says_what_it_read(model):
    for name, key in (("memo", "distance"), ("simclr", "source_confidence")):
        shown = show(model, PICTURE, "fog", 5, Wish(name))
        threshold = model.runs[name].gate.threshold
        assert shown.gate.value == pytest.approx(shown.says[key], rel=1e-6)
        assert shown.gate.threshold == threshold
        above = shown.gate.value >= threshold
        assert shown.gate.opened == (above if key == "distance" else not above)


def test_a_shut_gate_leaves_the_networks_answer(model):
    shut = replace(model.runs["memo"], gate=replace(model.runs["memo"].gate, threshold=1e9))
    model = replace(model, runs={**model.runs, "memo": shut})
    shown = show(model, PICTURE, wish=Wish("memo"))
    assert not shown.gate.opened
    assert shown.says["probabilities"] == shown.says["source_probabilities"]
    opened = show(model, PICTURE, wish=Wish("memo", gate=False))
    assert opened.gate is None
    assert opened.says["probabilities"] != opened.says["source_probabilities"]


def test_all_runs_are_asked_about_the_same_image_with_their_own_settings(model):
    shown = show(model, PICTURE, "frost", 2, Wish("memo", False, 3))
    assert list(shown.runs) == list(model.runs)
    assert shown.runs["memo"] is shown.says
    assert len(shown.says["curve"]) == 4
    for name in ("none", "shrink", "averaged", "simclr"):
        alone = show(model, PICTURE, "frost", 2, Wish(name, False)).says
        for key in ("probabilities", "source_probabilities"):
            assert shown.runs[name][key] == pytest.approx(alone[key], abs=1e-9)
        assert shown.runs[name]["milliseconds"] > 0
    assert shown.runs["none"]["probabilities"] == shown.runs["none"]["source_probabilities"]


def test_runs_that_have_answered_already_are_not_asked_again(model, monkeypatch):
    known, asked, ask = {}, [], showing.answer

    def spy(run, *arguments, **options):
        asked.append(run.task.loop.steps)
        return ask(run, *arguments, **options)

    monkeypatch.setattr(showing, "answer", spy)
    first = show(model, PICTURE, "fog", 3, Wish("memo"), known)
    assert len(asked) == len(model.runs)
    assert known.keys() == model.runs.keys() - {"memo"}
    again = show(model, PICTURE, "fog", 3, Wish("memo", steps=5), known)
    assert asked[len(model.runs) :] == [5]
    assert all(again.runs[name] is first.runs[name] for name in known)
    assert list(again.runs) == list(model.runs)
    other = show(model, PICTURE, "fog", 3, Wish("simclr"), known)
    assert other.runs["memo"]["probabilities"] == pytest.approx(first.says["probabilities"])


def test_a_photo_gets_the_answer_that_a_server_gives(model):
    photo = pixels(seed=8)[0]
    shown = show(model, Picture.own(photo), wish=Wish("simclr"))
    (row,) = Service(model).answer([photo], Wish("simclr"))
    assert shown.truth is None
    for key in ("class", "source_class", "gate", "fell_back"):
        assert shown.says[key] == row[key]
    for key in ("confidence", "distance", "loss_before", "loss_after"):
        assert shown.says[key] == pytest.approx(row[key], rel=1e-6)


def test_distances_are_those_that_answers_tell_and_a_spread_is_of_their_quantiles(model):
    some = pixels(4, seed=3)
    told = [show(model, Picture.own(image)).says["distance"] for image in some]
    np.testing.assert_allclose(showing.distances(model, some), told, rtol=1e-6)
    spread = showing.Spread.of(np.arange(101.0))
    assert (spread.low, spread.middle, spread.high) == (5.0, 50.0, 95.0)


class Sharper(Method):
    def predict(self, net, image, views, statistics):
        return 2 * net(image[None]).logits[0]


def test_a_run_is_told_in_a_few_words(model):
    assert {name: showing.does(run) for name, run in model.runs.items()} == {
        "none": "the network as it is",
        "shrink": "re-normalises",
        "averaged": "averages over 3 views",
        "memo": "re-normalises, trains 2 steps",
        "simclr": "trains 2 steps",
    }
    run, mixed = model.runs["shrink"], InnerLoop(steps=0, normalisation="mixed")
    for method, loop, words in (
        (Dressed(), InnerLoop(steps=0), "re-normalises"),
        (Dressed(num_views=8), InnerLoop(steps=0), "re-normalises, averages over 8 views"),
        (ViewAverage(4), mixed, "re-normalises, averages over 4 views"),
        (Sharper(), InnerLoop(steps=0), "changes the answer only"),
    ):
        task = replace(run.task, method=method, loop=loop)
        assert showing.does(replace(run, task=task)) == words


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ({"wish": Wish("mmo")}, "run: unknown run 'mmo'; did you mean 'memo'"),
        ({"wish": Wish("tent")}, "run: tent, which adapts along a stream"),
        ({"wish": Wish("none", steps=2)}, "steps: run none trains nothing"),
        ({"corruption": "rain"}, "corruption: expected a known name, found 'rain'"),
        ({"corruption": "fog", "severity": 6}, "severity of fog: expected 1, 2, 3, 4 or 5"),
    ],
)
def test_an_unknown_choice_ends_in_one_line(model, choice, line):
    with pytest.raises(UserError, match=line):
        show(model, PICTURE, **choice)


def test_a_picture_is_corrupted_at_its_strength():
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for strength in ("own", "cifar10_c"):
        shifted = Picture(small, "a", strength=strength).shifted("fog", 3, 1)
        expected = corrupt_all(small[None], ["a"], "fog", 3, 1, strength)[0]
        np.testing.assert_array_equal(shifted, expected)
