"""A gate: adapt only where it is expected to help, judged without labels.

The rule is one threshold on one signal, so that it can be read, and it is chosen like every other setting: on labeled source
images under corruptions that are never tested on.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.signals import LARGEST, Signal, measure
from tttlab.adaptation.task import Task
from tttlab.networks.network import evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import Groups, Wish

ABOVE: dict[Signal, bool] = {
    "distance": True,
    "loss": True,
    "confidence": False,
}  # the side on which an image looks shifted
QUANTILES = np.linspace(0, 0.95, 20)


@dataclass(frozen=True)
class Gate:
    """Adapt to an image where its signal lies on the shifted side of a threshold.

    Attributes:
        signal: ``confidence`` of the source network's prediction, ``distance`` to the source (see `tttlab.adaptation.signals`),
            or the method's ``loss`` before the first step.
        threshold: in the signal's own unit; below it for the confidence, above it for the others, an image is adapted to.
    """

    signal: Signal
    threshold: float

    def opens(self, values: Tensor | np.ndarray) -> Any:
        """Tell for which signals ``(N,)`` to adapt; one that is not a number keeps the gate shut."""
        return values >= self.threshold if ABOVE[self.signal] else values <= self.threshold


def adapt_gated(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    gate: Gate,
    *,
    statistics: Statistics,
    image_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    images_per_step: Wish | Groups = "auto",
    **settings: Any,
) -> tuple[Adaptation, Tensor]:
    """Adapt to the images for which a gate opens; the others keep the source's prediction and cost no step.

    Args:
        network: as for `adapt`, and so are all other arguments.
        images: ``(N, 3, H, W)``.
        method: what to minimise.
        loop: how.
        gate: the gate.
        statistics: source statistics.
        image_ids: names of the images.
        seed: of all random streams.
        images_per_step: images worked on at once, or what one call has learnt of it for the next.
        settings: further arguments of `adapt`.

    Returns:
        what `adapt` returns, with losses that are not numbers where the gate is shut, and where it was open ``(N,)``.
    """
    task = Task(network, method, loop, statistics, seed).ready(images.device)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    groups = images_per_step if isinstance(images_per_step, Groups) else Groups(images_per_step)
    with evaluating(task.network):
        began = time.perf_counter()
        sizes = groups.of(gate.signal, largest=LARGEST, timed=False)
        source, values = measure(gate.signal, task, images, names, sizes)
        opened = gate.opens(values.cpu())
        looked = (time.perf_counter() - began) * 1e3 / max(len(images), 1)
    count, source = len(images), source.cpu()
    if not opened.any():
        nothing = (
            torch.full((count, 1), float("nan")),
            torch.zeros(count, dtype=torch.bool),
            torch.full((count,), looked),
        )
        return Adaptation(
            source, source, *nothing, source[:, None][:, :0], torch.zeros(count, 0)
        ), opened
    inner = adapt(
        network,
        images[opened],
        method,
        loop,
        statistics=statistics,
        seed=seed,
        image_ids=list(compress(names, opened.tolist())),
        images_per_step=groups.of("adapt"),
        **settings,
    )

    def spread(part: Tensor, elsewhere: Tensor) -> Tensor:
        return elsewhere.to(part).masked_scatter(opened.view(-1, *[1] * (part.ndim - 1)), part)

    steps = inner.logits_at.shape[1]
    return Adaptation(
        logits=spread(inner.logits, source),
        source_logits=source,
        losses=spread(inner.losses, torch.full((count, inner.losses.shape[1]), float("nan"))),
        fell_back=spread(inner.fell_back, torch.zeros(count)),
        milliseconds=spread(inner.milliseconds, torch.zeros(count)) + looked,
        logits_at=spread(inner.logits_at, source[:, None].expand(-1, steps, -1)),
        milliseconds_at=spread(inner.milliseconds_at, torch.zeros(count, steps)) + looked,
    ), opened


def choose_gate(
    signals: Mapping[Signal, np.ndarray],
    source: np.ndarray,
    adapted: np.ndarray,
    corruption: np.ndarray,
    clean_penalty: float,
    saves: Callable[[Gate], bool] = lambda _gate: True,
) -> Gate | None:
    """Choose a gate on labeled images, or none if adapting to every image is better or no dearer.

    A gate must hold under shifts that it has not seen, so every signal is judged by leaving out one corruption after another:
    its threshold is fitted without, and judged under, the one left out. Of the signals that are within one standard error of
    the best choice (no gate among them) and save more time than they cost, the first of `ABOVE` is taken: what grows with the
    shift by construction is to be preferred to what a network believes of itself. Its threshold is then fitted on all.

    Args:
        signals: per signal its values ``(N,)``; one with values that are not finite is left aside.
        source: ``(N,)`` whether the source network is right.
        adapted: ``(N,)`` whether the adapted one is.
        corruption: ``(N,)`` number of the corruption type that an image is under, -1 for none.
        clean_penalty: points of the score for every point lost on clean images.
        saves: tells whether adapting behind a gate takes less time than adapting to every image; see `saves_time`.

    Returns:
        the gate; None where none is that good but those that open for every image or cost more than they save.
    """
    found = good_gates(signals, source, adapted, corruption, clean_penalty)
    return next((gate for gate in found if saves(gate)), None)


def good_gates(
    signals: Mapping[Signal, np.ndarray],
    source: np.ndarray,
    adapted: np.ndarray,
    corruption: np.ndarray,
    clean_penalty: float,
) -> Iterator[Gate]:
    """Yield the gates that lose nothing, in the order of preference; arguments as for `choose_gate`."""
    clean = corruption < 0
    usable = {
        signal: signals[signal]
        for signal in ABOVE
        if signal in signals and np.isfinite(signals[signal]).all()
    }
    if len(set(corruption[~clean].tolist())) < 2 or (source == adapted).all():
        return
    judged = {
        signal: left_out(signal, values, source, adapted, corruption, clean_penalty)
        for signal, values in usable.items()
    }
    scores = {signal: value for signal, (value, _) in judged.items()} | {
        None: score(source, adapted, clean, clean_penalty)
    }
    best = max(scores, key=scores.__getitem__)
    right = adapted[~clean] if best is None else judged[best][1]
    for signal, (value, own) in judged.items():
        gate = fit_threshold(signal, usable[signal], source, adapted, clean, clean_penalty)
        near = scores[best] - value <= (right - own).std(ddof=1) / np.sqrt(len(own)) + 1e-9
        if near and not gate.opens(usable[signal]).all():
            yield gate


def saves_time(
    task: Task,
    gate: Gate,
    images: Tensor,
    image_ids: Sequence[str],
    groups: Groups,
    repeats: int = 3,
) -> bool:
    """Tell whether adapting behind a gate, its signal included, is faster than adapting to all.

    Both are timed side by side on the same images, and each one's fastest time counts: whatever
    else the machine does can only make it slower.

    Args:
        task: what the images are adapted by.
        gate: the gate.
        images: ``(N, 3, H, W)``.
        image_ids: names of the images.
        groups: how many images at once.
        repeats: how often each is timed.
    """
    about = {"statistics": task.statistics, "image_ids": image_ids, "seed": task.seed}
    loop = task.network, images, task.method, task.loop

    def gated() -> None:
        adapt_gated(*loop, gate, images_per_step=groups, **about)

    def free() -> None:
        adapt(*loop, images_per_step=groups.of("adapt"), **about)

    seconds = np.array([[_seconds(gated), _seconds(free)] for _ in range(repeats)]).min(0)
    return bool(seconds[0] < seconds[1])


def _seconds(call: Callable[[], Any]) -> float:
    """Time a call whose results are on the CPU, so that a GPU is done when it ends."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def left_out(
    signal: Signal,
    values: np.ndarray,
    source: np.ndarray,
    adapted: np.ndarray,
    corruption: np.ndarray,
    clean_penalty: float,
) -> tuple[float, np.ndarray]:
    """Judge a signal under each corruption by a threshold fitted on the others; arguments as for `choose_gate`.

    Returns:
        mean score, and whether each shifted image is classified right with the gate.
    """
    clean, scores, right = corruption < 0, [], np.zeros(len(values))
    for kind in sorted(set(corruption[~clean].tolist())):
        inside, rest = clean | (corruption == kind), clean | (corruption != kind)
        gate = fit_threshold(
            signal, values[rest], source[rest], adapted[rest], clean[rest], clean_penalty
        )
        gated = np.where(gate.opens(values), adapted, source)
        scores.append(score(source[inside], gated[inside], clean[inside], clean_penalty))
        right[corruption == kind] = gated[corruption == kind]
    return float(np.mean(scores)), right[~clean]


def fit_threshold(
    signal: Signal,
    values: np.ndarray,
    source: np.ndarray,
    adapted: np.ndarray,
    clean: np.ndarray,
    clean_penalty: float,
) -> Gate:
    """Find the threshold of the highest score among quantiles of the signal; of equals the one that adapts least."""
    shares = QUANTILES if ABOVE[signal] else 1 - QUANTILES
    gates = [Gate(signal, float(threshold)) for threshold in np.unique(np.quantile(values, shares))]

    def key(gate: Gate) -> tuple[float, float]:
        opened = np.asarray(gate.opens(values))
        return score(source, np.where(opened, adapted, source), clean, clean_penalty), -float(
            opened.mean()
        )

    return max(gates, key=key)


def score(
    source: np.ndarray, adapted: np.ndarray, clean: np.ndarray, clean_penalty: float
) -> float:
    """Accuracy on shifted images, less the penalty for what is lost on the ``clean (N,)`` ones; others as for `choose_gate`."""
    lost = source[clean].mean() - adapted[clean].mean() if clean.any() else 0.0
    return float(adapted[~clean].mean() - clean_penalty * max(lost, 0.0))
