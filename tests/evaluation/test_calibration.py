import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from tttlab.evaluation.calibration import NUM_BINS, calibration_error, reliability


def table(confidences, correct, groups=None, num_groups=1):
    confidences, correct = np.asarray(confidences, float), np.asarray(correct, float)
    groups = np.zeros(len(confidences), int) if groups is None else np.asarray(groups)
    return reliability(confidences, correct, groups, num_groups)


def test_worked_by_hand():
    # Bin 13 holds 0.9 and 0.92, one right of two; bin 7 holds 0.5, right; bin 14 holds 1.0, right.
    bins = table([0.9, 0.92, 0.5, 1.0], [1, 0, 1, 1])
    assert np.flatnonzero(bins.count[0]).tolist() == [7, 13, 14]
    assert bins.confidence[0, 13] == pytest.approx(0.91)
    assert bins.accuracy[0, [7, 13, 14]].tolist() == [1, 0.5, 1]
    assert calibration_error(bins)[0] == pytest.approx((2 * 0.41 + 0.5 + 0) / 4)


def test_edges_belong_to_the_bin_below():
    bins = table(np.linspace(0, 1, NUM_BINS + 1), np.ones(NUM_BINS + 1))
    assert bins.count[0].tolist() == [2] + [1] * (NUM_BINS - 1)


def test_against_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 6, generator=generator).mul(2).softmax(-1)
    labels = torch.randint(6, (500,), generator=generator)
    confidence, predicted = probabilities.max(-1)
    errors = calibration_error(table(confidence.numpy(), (predicted == labels).numpy()))
    expected = multiclass_calibration_error(
        probabilities, labels, num_classes=6, n_bins=NUM_BINS, norm="l1"
    )
    assert errors[0] == pytest.approx(expected.item(), abs=1e-6)


def test_groups_at_once_are_each_on_their_own():
    generator = np.random.default_rng(1)
    confidences, correct = generator.random(300), generator.integers(2, size=300)
    groups = generator.integers(3, size=300)
    errors = calibration_error(table(confidences, correct, groups, num_groups=4))
    for group in range(3):
        rows = groups == group
        expected = calibration_error(table(confidences[rows], correct[rows]))[0]
        assert errors[group] == pytest.approx(expected)
    assert np.isnan(errors[3])


def test_right_as_often_as_said_has_little_error():
    generator = np.random.default_rng(2)
    confidences = generator.random(100_000)
    assert calibration_error(table(confidences, generator.random(100_000) < confidences))[0] < 0.01
