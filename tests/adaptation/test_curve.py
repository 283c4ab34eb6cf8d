"""Predictions along the steps: each is made once, and the clock counts the last one alone."""

import pytest
import torch

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation import adapter, curve
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.curve import Curve
from tttlab.config.inner_loop import InnerLoop
from tttlab.methods.memo import MEMO


class Clock:
    """A clock that goes on only when told, in seconds."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float, value: torch.Tensor):
        def work() -> torch.Tensor:
            self.now += seconds
            return value

        return work


@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 1), (2,), ()])
def test_predictions_for_the_record_alone_take_no_time(monkeypatch, steps):
    clock = Clock()
    monkeypatch.setattr(curve, "time", clock)
    logits = {step: torch.full((2, 3), float(step)) for step in range(3)}
    along = Curve(steps, torch.device("cpu"))
    for step in range(3):
        clock.now += 1.0 if step else 0.0  # the training of a step
        along.note(step, clock.takes(0.25, logits[step]))
    final = along.after_all(2, clock.takes(0.25, logits[2]))
    assert torch.equal(final, logits[2])
    assert along.spent() == pytest.approx(2250)  # two steps and one prediction
    found, milliseconds = along.collect(final, logits[0], torch.zeros(2, 3))
    for column, step in enumerate(steps):
        assert torch.equal(found[:, column], logits[step])
        # of a group of two images
        assert milliseconds[:, column].tolist() == pytest.approx([(1000 * step + 250) / 2] * 2)


@pytest.mark.parametrize(
    ("loop", "record", "predictions"),
    [
        ({}, (0, 1, 2), 3),  # the first is the source network's, the last the adapted one's
        ({}, (1,), 3),
        ({}, (), 2),
        ({"normalisation": "shrink"}, (0, 1, 2), 4),  # normalisation alone already changes it
        ({"average": 2}, (0, 1, 2), 4),
    ],
)
def test_no_prediction_is_made_twice(monkeypatch, loop, record, predictions):
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm", **loop)
    counts = []

    def counting(function):
        def call(*arguments):
            counts.append(function.__name__)
            return function(*arguments)

        return call

    for name in ("predict", "predict_by_source"):
        monkeypatch.setattr(adapter, name, counting(getattr(adapter, name)))
    result = adapt(
        network, shifted(), MEMO(num_views=2), loop, statistics=statistics, record=record
    )
    assert len(counts) == predictions
    if 2 in record:
        assert torch.equal(result.logits_at[:, -1], result.logits)
    same = torch.equal(result.logits_at[:, 0], result.source_logits) if 0 in record else None
    assert same in ((True, None) if len(counts) < 4 else (False,))
