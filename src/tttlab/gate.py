"""A gate: adapt only where it is expected to help, judged without labels.

The rule is one threshold on one signal, so that it can be read, and it is chosen like every other setting: on labeled source
images under corruptions that are never tested on.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adapter import Adaptation, adapt
from tttlab.inner_loop import InnerLoop
from tttlab.method import Method
from tttlab.networks import as_network, evaluating
from tttlab.signals import Signal, measure
from tttlab.source_statistics import Statistics

ABOVE: dict[Signal, bool] = {"confidence": False, "distance": True, "loss": True}  # the side on which an image looks shifted
QUANTILES = np.linspace(0, 0.95, 20)


@dataclass(frozen=True)
class Gate:
    """Adapt to an image where its signal lies on the shifted side of a threshold.

    Attributes:
        signal: ``confidence`` of the source network's prediction, ``distance`` to the source (see `tttlab.signals`), or the
            method's ``loss`` before the first step.
        threshold: in the signal's own unit; below it for the confidence, above it for the others, an image is adapted to.
    """

    signal: Signal
    threshold: float

    def opens(self, values: Tensor | np.ndarray) -> Any:
        """Tell for which signals ``(N,)`` to adapt; one that is not a number keeps the gate shut."""
        return values >= self.threshold if ABOVE[self.signal] else values <= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Write the gate as JSON can hold it."""
        return asdict(self)


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
        settings: further arguments of `adapt`.

    Returns:
        what `adapt` returns, with losses that are not numbers where the gate is shut, and where it was open ``(N,)``.
    """
    network = as_network(network)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    own = {name: value.to(images.device) for name, value in statistics.items()}
    with evaluating(network):
        began = time.perf_counter()
        source, values = measure(gate.signal, network, images, method, loop, statistics=own, image_ids=names, seed=seed)
        opened = gate.opens(values.cpu())
        looked = (time.perf_counter() - began) * 1e3 / max(len(images), 1)
    count, source = len(images), source.cpu()
    if not opened.any():
        nothing = torch.full((count, 1), float("nan")), torch.zeros(count, dtype=torch.bool), torch.full((count,), looked)
        return Adaptation(source, source, *nothing, source[:, None][:, :0], torch.zeros(count, 0)), opened
    inner = adapt(network, images[opened], method, loop, statistics=statistics, seed=seed,
                  image_ids=list(compress(names, opened.tolist())), **settings)  # fmt: skip

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
    signals: Mapping[Signal, np.ndarray], source: np.ndarray, adapted: np.ndarray, clean: np.ndarray, clean_penalty: float
) -> tuple[Gate | None, float]:
    """Choose the gate with the highest score on labeled images, or none if adapting to every image scores highest.

    Args:
        signals: per signal its values ``(N,)``, NaN where it has none.
        source: ``(N,)`` whether the source network is right.
        adapted: ``(N,)`` whether the adapted one is.
        clean: ``(N,)`` which of the images are not shifted.
        clean_penalty: points of the score for every point lost on them.

    Returns:
        gate and score; of equal scores the gate that adapts to the fewest images wins, since it costs least.
    """
    best, best_key = None, (score(source, adapted, clean, clean_penalty), -1.0)
    for signal, values in signals.items():
        if not np.isfinite(values).all():
            continue
        for threshold in np.unique(np.quantile(values, QUANTILES)):
            gate = Gate(signal, float(threshold))
            opened = np.asarray(gate.opens(values))
            key = (score(source, np.where(opened, adapted, source), clean, clean_penalty), float(-opened.mean()))
            if key > best_key:
                best, best_key = gate, key
    return best, best_key[0]


def score(source: np.ndarray, adapted: np.ndarray, clean: np.ndarray, clean_penalty: float) -> float:
    """Accuracy on shifted images, less the penalty for what is lost on clean ones; arguments as for `choose_gate`."""
    lost = source[clean].mean() - adapted[clean].mean() if clean.any() else 0.0
    return float(adapted[~clean].mean() - clean_penalty * max(lost, 0.0))
