"""An answer depends on the image and the wish alone, whatever else is asked at the same time."""

import base64
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.helpers import served
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.memo import MEMO
from tttlab.serving import answers
from tttlab.serving import service as service_module
from tttlab.serving.adaptive_model import ServedRun
from tttlab.serving.answers import Wish, answer
from tttlab.serving.pictures import Limits
from tttlab.serving.service import Busy, Late, Service

IMAGES = list(np.random.default_rng(0).integers(256, size=(12, 16, 16, 3), dtype=np.uint8))
OTHERS = np.random.default_rng(1).integers(256, size=(1000, 16, 16, 3), dtype=np.uint8)
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.model(tmp_path_factory.mktemp("network"), torch.float64)[0]


@pytest.fixture
def service(model):
    return Service(model)


def numbers(row):
    curve = [value for point in row.get("curve", []) for value in point["probabilities"].values()]
    losses = row["loss_before"] or 0, row["loss_after"] or 0
    both = *row["source_probabilities"].values(), *row["probabilities"].values()
    return np.array([*both, *curve, *losses, row["distance"]])


def assert_same(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in ("run", "class", "source_class", "gate", "fell_back"):
            assert row[name] == other[name]
        np.testing.assert_allclose(numbers(row), numbers(other), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("run", served.LOOPS)
def test_an_image_alone_in_a_batch_and_after_a_thousand_others_gets_the_same_answer(run, service):
    wish = Wish(run=run, gate=False, return_curve=True)
    alone = [row for image in IMAGES for row in service.answer([image], wish)]
    assert_same(service.answer(IMAGES, wish), alone)
    assert_same(service.answer(IMAGES[::-1], wish)[::-1], alone)
    quick = Wish(run="none")
    for start in range(0, len(OTHERS), 64):
        service.answer(OTHERS[start : start + 64], quick)
        if start < 192:
            service.answer(OTHERS[start : start + 16], wish)
    assert_same(service.answer(IMAGES, wish), alone)
    assert_same([service.answer([image, image], wish)[1] for image in IMAGES], alone)
    if run not in ("none",):  # else nothing could be mixed up
        apart = [np.abs(numbers(row) - numbers(alone[0])).max() for row in alone[1:]]
        assert min(apart) > 1000 * TOLERANCE


def test_requests_in_parallel_get_their_own_answers(service):
    wishes = [Wish(run=run, gate=gate) for run in served.LOOPS for gate in (True, False)]
    wishes += [Wish(steps=1), Wish(seed=7)]
    asked = [(images, wish) for wish in wishes for images in (IMAGES[:1], IMAGES[1:4], IMAGES[4:5])]
    alone = [service.answer(*one) for one in asked]
    order = np.random.default_rng(2).permutation(3 * len(asked)) % len(asked)
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda number: service.answer(*asked[number]), order))
    for number, rows in zip(order, found, strict=True):
        assert_same(rows, alone[number])
    assert service.waiting == 0


def test_an_answer_is_what_adapting_gives(model, service):
    """Through the adapter itself, with the views of an image keyed by its pixels."""
    import hashlib

    task = model.runs["simclr"].task
    image = torch.from_numpy(IMAGES[0]).double().permute(2, 0, 1)[None] / 255
    key = hashlib.sha256(IMAGES[0].tobytes()).hexdigest()
    result = adapt(
        task.network,
        image,
        task.method,
        task.loop,
        statistics=task.statistics,
        image_ids=[key],
        seed=task.seed,
    )
    (row,) = service.answer(IMAGES[:1], Wish(run="simclr", gate=False))
    # `as_images` rounds to float32 first.
    found = list(row["probabilities"].values())
    np.testing.assert_allclose(found, result.logits.softmax(-1)[0], atol=1e-6)
    assert row["loss_after"] == pytest.approx(float(result.losses[0, -1]), abs=1e-5)
    assert row["probabilities"] != row["source_probabilities"]


@dataclass(frozen=True)
class Exploding(MEMO):
    """With a large learning rate its loss, squares of logits, is beyond all numbers."""

    def loss(self, net, views, statistics, state):
        return net(views).logits.square().sum(), state


def strict(rows):
    """Write rows as JSON that every reader knows, and read them again."""
    return json.loads(json.dumps(rows, allow_nan=False))


def test_a_run_that_diverges_answers_in_valid_json(model):
    loop = InnerLoop(steps=1, lr=1e200, trainable=("classifier",))
    run = ServedRun(replace(model.runs["memo"].task, method=Exploding(), loop=loop))
    images = torch.from_numpy(np.stack(IMAGES[:2])).double().permute(0, 3, 1, 2) / 255
    result = adapt(run.task.network, images, run.task.method, loop, image_ids=["a", "b"], seed=3)
    assert result.losses[:, 1].isinf().all()
    rows = answer(run, images, ["a", "b"], model.classes, return_curve=True)
    assert strict(rows) == rows
    for row, losses in zip(rows, result.losses, strict=True):
        assert (row["fell_back"], row["loss_after"]) == (True, None)
        assert row["loss_before"] == pytest.approx(float(losses[0]))
        assert [point["loss"] for point in row["curve"]] == [row["loss_before"], None]
        assert row["probabilities"] == row["source_probabilities"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_a_network_that_gives_no_numbers_answers_in_valid_json(model, monkeypatch):
    """Neither probabilities nor distance are finite."""
    distances = torch.tensor([math.inf, math.nan], dtype=torch.float64)
    monkeypatch.setattr(answers, "measure_signal", lambda *_: (None, distances))
    run = model.runs["none"]
    images = torch.full((2, 3, 16, 16), math.nan, dtype=torch.float64)
    rows = answer(run, images, ["a", "b"], model.classes, return_curve=True)
    assert strict(rows) == rows
    nothing = dict.fromkeys(served.CLASSES)
    for row in rows:
        assert row["class"] in served.CLASSES
        assert (row["confidence"], row["source_confidence"], row["distance"]) == (None, None, None)
        assert row["probabilities"] == row["source_probabilities"] == nothing
        assert row["curve"][0]["probabilities"] == nothing


def test_the_wish_decides(service):
    one = IMAGES[:1]
    assert service.answer(one)[0]["run"] == "memo"
    assert service.answer(one, Wish(run="none"))[0]["gate"] is None
    gated = service.answer(IMAGES, Wish(run="memo"))
    assert {row["gate"] for row in gated} <= {True, False}
    for row in gated:
        assert row["gate"] == (row["distance"] > 1.5)
    curve = service.answer(one, Wish(steps=1, return_curve=True, gate=False))[0]["curve"]
    assert [point["step"] for point in curve] == [0, 1]
    seeds = [service.answer(one, Wish(seed=seed, gate=False))[0] for seed in (1, 1, 2)]
    assert_same(seeds[:1], seeds[1:2])
    assert np.abs(numbers(seeds[0]) - numbers(seeds[2])).max() > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("images", "wish", "line"),
    [
        ([], Wish(), "expected 1 to 64 images, found 0"),
        (OTHERS[:65], Wish(), "expected 1 to 64 images, found 65"),
        ([IMAGES[0], "no image"], Wish(), "image 2: expected an image in base64"),
        (IMAGES[:1], Wish(run="memmo"), "run: unknown run 'memmo'; did you mean 'memo'?"),
        (IMAGES[:1], Wish(run="tent"), "run: tent, which adapts along a stream"),
        (IMAGES[:1], Wish(steps=51), "steps: expected an integer from 0 to 50, found 51"),
        (IMAGES[:1], Wish(steps=-1), "steps: expected an integer from 0 to 50, found -1"),
        (IMAGES[:1], Wish(run="shrink", steps=1), "steps: run shrink trains nothing"),
    ],
)
def test_a_mistake_is_told_in_one_line(images, wish, line, service):
    with pytest.raises(UserError) as caught:
        service.answer(images, wish)
    assert line in str(caught.value)
    assert service.waiting == 0


def test_the_pixels_of_a_request_are_counted_together(model):
    service = Service(model, replace(Limits(), pixels=3 * 16 * 16))
    assert len(service.answer(IMAGES[:3])) == 3
    with pytest.raises(UserError, match="at most 768 pixels together, found 1,024"):
        service.answer(IMAGES[:4])


@pytest.fixture
def held(monkeypatch):
    """Adapting waits until it may: → (may, begun, the numbers of images adapted to together)."""
    may, begun, sizes = threading.Event(), threading.Semaphore(0), []
    real = service_module.answer

    def wait(run, images, *more):
        sizes.append(len(images))
        begun.release()
        assert may.wait(20)
        return real(run, images, *more)

    monkeypatch.setattr(service_module, "answer", wait)
    yield may, begun, sizes
    may.set()


def wait_for(service, waiting):
    deadline = time.monotonic() + 20
    while service.waiting != waiting and time.monotonic() < deadline:
        time.sleep(0.002)
    assert service.waiting == waiting


def test_a_full_queue_refuses_and_one_that_takes_too_long_is_late(model, held):
    may, begun, sizes = held
    service = Service(model, replace(Limits(), waiting=4))
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(service.answer, IMAGES[:2])
        assert begun.acquire(timeout=20)
        service.limits = replace(service.limits, seconds=0.2)
        with pytest.raises(Late, match=r"no answer within 0\.2 s; send fewer images"):
            service.answer(IMAGES[2:4])
        assert service.waiting == 2
        service.limits = Limits()
        second = threads.submit(service.answer, IMAGES[2:4])
        wait_for(service, 4)
        with pytest.raises(Busy, match="4 images wait already; try again later"):
            service.answer(IMAGES[4:5])
        may.set()
        assert len(first.result(20)) + len(second.result(20)) == 4
    assert sizes == [2, 2]  # nobody began with what was late


def test_a_request_does_not_wait_for_those_that_decode_longer_than_it_may(model):
    service = Service(model, replace(Limits(), seconds=0.05))
    with ExitStack() as slots:
        for _ in range(os.cpu_count()):
            slots.enter_context(service._decoding)
        with pytest.raises(Late, match=r"no answer within 0\.05 s; send fewer images"):
            service.answer(IMAGES[:1])
    service.limits = replace(service.limits, seconds=float("inf"))
    assert len(service.answer(IMAGES[:1])) == 1


def test_a_request_stops_decoding_when_its_time_is_over(model, monkeypatch):
    service, decoded = Service(model, replace(Limits(), seconds=0.05)), []

    def slowly(*_arguments):
        decoded.append(1)
        time.sleep(0.04)

    monkeypatch.setattr(service_module, "squared", slowly)
    with pytest.raises(Late, match=r"no answer within 0\.05 s; send fewer images"):
        service.answer(IMAGES[:6])
    assert 1 <= len(decoded) < 4


def test_requests_that_wait_are_adapted_to_together_and_watched(model, held):
    may, begun, sizes = held
    service, seen = Service(model, together=4), []  # a group of seven is one request's

    class Watcher:
        def worked(self, run, images):
            seen.append((run, images))

        def answered(self, rows, seconds):
            seen.append(([row["run"] for row in rows], seconds > 0))

    service.watchers.append(Watcher())
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(service.answer, IMAGES[:1])]
        assert begun.acquire(timeout=20)
        for number in range(1, 7):
            asked.append(threads.submit(service.answer, IMAGES[number : number + 1]))
            wait_for(service, number + 1)
        may.set()
        found = [future.result(20)[0] for future in asked]
    assert sizes == [1, 4, 2]
    worked = [one for one in seen if isinstance(one[0], str)]
    assert worked == [("memo", 1), ("memo", 4), ("memo", 2)]
    assert [one for one in seen if one not in worked] == [(["memo"], True)] * 7
    assert_same(found, service.answer(IMAGES[:7]))


def test_an_image_that_fails_harms_no_other(model, monkeypatch):
    real = service_module.answer
    poison = torch.from_numpy(IMAGES[3]).permute(2, 0, 1).double() / 255

    def fail(run, images, *more):
        if any(torch.allclose(image, poison, atol=1e-6) for image in images):
            raise RuntimeError("poisoned")
        return real(run, images, *more)

    monkeypatch.setattr(service_module, "answer", fail)
    service = Service(model)
    expected = {n: service.answer(IMAGES[n : n + 1]) for n in range(8) if n != 3}
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(service.answer, IMAGES[n % 8 : n % 8 + 1]) for n in range(32)]
        for number, future in enumerate(asked):
            if number % 8 == 3:
                with pytest.raises(RuntimeError, match="poisoned"):
                    future.result(30)
            else:
                assert_same(future.result(30), expected[number % 8])


def test_base64_and_arrays_of_the_same_picture_get_the_same_answer(service):
    from tests.helpers.bodies import GOOD

    text = base64.b64encode(GOOD).decode()
    assert_same(service.answer([GOOD]), service.answer([text]))
