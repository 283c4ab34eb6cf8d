"""The choice of a gate, made like that of every other setting.

It is made on labeled source images, under corruptions that are never tested on.
"""

from collections.abc import Callable, Mapping

import numpy as np

from tttlab.adaptation.gate import ABOVE, Gate
from tttlab.adaptation.signals import Signal
from tttlab.evaluation.intervals import crossed_standard_error

QUANTILES = np.linspace(0, 0.95, 20)


def choose_gate(
    signals: Mapping[Signal, np.ndarray],
    source: np.ndarray,
    adapted: np.ndarray,
    image: np.ndarray,
    corruption: np.ndarray,
    clean_penalty: float,
    saves: Callable[[Gate], bool] = lambda _gate: True,
) -> Gate | None:
    """Choose a gate on labeled images; none if adapting to all is better or takes no longer.

    A gate must work under shifts that it has not seen. So signals are judged by cross-validation:
    each corruption is left out once, the threshold is fitted on the others, and the score is taken
    under the one left out. Candidates are the signals whose score is within one standard error of
    the best choice (which may be no gate) and whose gates save time. The first in the order of
    `ABOVE` is taken: a signal that grows with the shift by construction is preferred to a network's
    belief about itself. Its threshold is then fitted under all corruptions.

    Args:
        signals: signal → values ``(N,)``; a signal with values that are not finite is ignored.
        source: ``(N,)``, whether the source network is right.
        adapted: ``(N,)``, whether the adapted network is right.
        image: ``(N,)``, number of the image, which is seen under every corruption type.
        corruption: ``(N,)``, number of the image's corruption type, -1 for clean images.
        clean_penalty: points of the score for every point lost on clean images.
        saves: tells whether a gate saves time; see `tttlab.adaptation.gate.saves_time`.

    Returns:
        the gate; None if all candidates open for every image or save no time.
    """
    clean = corruption < 0
    usable = {
        signal: signals[signal]
        for signal in ABOVE
        if signal in signals and np.isfinite(signals[signal]).all()
    }
    if len(set(corruption[~clean].tolist())) < 2 or (source == adapted).all():
        return None
    judged = {
        signal: leave_one_out(signal, values, source, adapted, corruption, clean_penalty)
        for signal, values in usable.items()
    }
    scores: dict[Signal | None, float] = {signal: value for signal, (value, _) in judged.items()}
    scores[None] = score(source, adapted, clean, clean_penalty)  # adapting to every image
    best = max(scores, key=scores.__getitem__)
    best_right = adapted[~clean] if best is None else judged[best][1]
    for signal, (value, right) in judged.items():
        gate = fit_threshold(signal, usable[signal], source, adapted, clean, clean_penalty)
        # Images and corruption types are both random, as in every other comparison of tuning.
        error = crossed_standard_error(
            by_image_and_type(best_right - right, image[~clean], corruption[~clean])
        )
        near = scores[best] - value <= error + 1e-9
        if near and not gate.opens(usable[signal]).all() and saves(gate):
            return gate
    return None


def by_image_and_type(values: np.ndarray, image: np.ndarray, corruption: np.ndarray) -> np.ndarray:
    """Arrange values ``(N,)`` as ``(images, types)``: means, for a type may have severities.

    Every image is seen under every type.
    """
    images, rows = np.unique(image, return_inverse=True)
    types, columns = np.unique(corruption, return_inverse=True)
    sums, counts = np.zeros((2, len(images), len(types)))
    np.add.at(sums, (rows, columns), values)
    np.add.at(counts, (rows, columns), 1)
    return sums / counts


def leave_one_out(
    signal: Signal,
    values: np.ndarray,
    source: np.ndarray,
    adapted: np.ndarray,
    corruption: np.ndarray,
    clean_penalty: float,
) -> tuple[float, np.ndarray]:
    """Judge a signal under each corruption with a threshold fitted under the others.

    Arguments are those of `choose_gate`, and the signal's values ``(N,)``.

    Returns:
        mean score, and whether each shifted image is classified right with the gate.
    """
    clean, scores, right = corruption < 0, [], np.zeros(len(values))
    for kind in sorted(set(corruption[~clean].tolist())):
        held_out = corruption == kind
        fit, test = ~held_out, clean | held_out
        gate = fit_threshold(
            signal, values[fit], source[fit], adapted[fit], clean[fit], clean_penalty
        )
        gated = np.where(gate.opens(values), adapted, source)
        scores.append(score(source[test], gated[test], clean[test], clean_penalty))
        right[held_out] = gated[held_out]
    return float(np.mean(scores)), right[~clean]


def fit_threshold(
    signal: Signal,
    values: np.ndarray,
    source: np.ndarray,
    adapted: np.ndarray,
    clean: np.ndarray,
    clean_penalty: float,
) -> Gate:
    """Fit the threshold: the quantile of the signal with the highest score.

    Of several with this score it is the one that opens for the fewest images. Arguments are those
    of `choose_gate`, and which images are ``clean (N,)``.
    """
    shares = QUANTILES if ABOVE[signal] else 1 - QUANTILES
    gates = [Gate(signal, float(threshold)) for threshold in np.unique(np.quantile(values, shares))]

    def key(gate: Gate) -> tuple[float, float]:
        opened = np.asarray(gate.opens(values))
        gated = np.where(opened, adapted, source)
        return score(source, gated, clean, clean_penalty), -float(opened.mean())

    return max(gates, key=key)


def score(
    source: np.ndarray, adapted: np.ndarray, clean: np.ndarray, clean_penalty: float
) -> float:
    """Accuracy on shifted images, less a penalty for accuracy lost on the ``clean (N,)`` ones."""
    lost = source[clean].mean() - adapted[clean].mean() if clean.any() else 0.0
    return float(adapted[~clean].mean() - clean_penalty * max(lost, 0.0))
