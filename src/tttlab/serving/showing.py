"""One image from every side: all that the demo shows of it, computed and not yet drawn."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tttlab.adaptation.method import overrides
from tttlab.adaptation.predicting import CLASSES
from tttlab.adaptation.signals import Signal, measure_signal
from tttlab.data.pixels import as_images
from tttlab.networks.network import evaluating
from tttlab.runtime.group_size import Groups
from tttlab.seeding import torch_generator
from tttlab.serving.adaptive_model import AdaptiveModel, ServedRun
from tttlab.serving.answers import Wish, answer
from tttlab.shifts.corruptions import corrupt_all

QUANTILES = (0.05, 0.5, 0.95)
GREY = 0.5  # of the patches that a mask hides


@dataclass(frozen=True)
class Picture:
    """An image before it is shifted.

    Attributes:
        pixels: ``(S, S, 3)`` uint8, as the network sees it.
        key: its name, which keys its random streams.
        truth: the name of its class; None: unknown.
        strength: whose strengths corruptions of it have, as ``shifts.strength`` says.
    """

    pixels: np.ndarray
    key: str
    truth: str | None = None
    strength: str = "own"

    @classmethod
    def own(cls, pixels: np.ndarray) -> "Picture":
        """Name an image of unknown class by its pixels, as a server does."""
        return cls(pixels, hashlib.sha256(pixels.tobytes()).hexdigest())

    def shifted(self, corruption: str | None, severity: int, seed: int) -> np.ndarray:
        """Corrupt it as the pipeline corrupts the test image of this name; None: not at all."""
        if corruption is None:
            return self.pixels
        shown = self.pixels[None], [self.key]
        return corrupt_all(*shown, corruption, severity, seed, self.strength)[0]


@dataclass(frozen=True)
class GateSays:
    """What a gate says of one image.

    Attributes:
        signal: which signal it reads.
        value: the image's, NaN if it is not finite.
        threshold: of the gate.
        opened: whether it lets the run adapt.
    """

    signal: Signal
    value: float
    threshold: float
    opened: bool


@dataclass(frozen=True)
class Showing:
    """What one model says of one image.

    Attributes:
        picture: the image before it was shifted.
        pixels: what is asked about, ``(S, S, 3)`` uint8.
        run: the chosen run.
        says: the chosen run's answer with its ``curve``, as `tttlab.serving.answers.answer` tells.
        views: what it looks at, ``(V, S, S, 3)`` uint8 for every step that it may take; one entry
            for a run that only averages; none where it looks at the image alone, or at no images.
        gate: what the chosen run's gate says; None: it has none, or it was not asked.
        runs: answers of all runs, the chosen one among them, by name. The others keep their own
            settings.
    """

    picture: Picture
    pixels: np.ndarray
    run: str
    says: dict[str, Any]
    views: tuple[np.ndarray, ...]
    gate: GateSays | None
    runs: dict[str, dict[str, Any]]

    @property
    def truth(self) -> str | None:
        """The name of the image's class; None: unknown."""
        return self.picture.truth


def show(
    model: AdaptiveModel,
    picture: Picture,
    corruption: str | None = None,
    severity: int = 3,
    wish: Wish = Wish(),
    known: dict[str, dict[str, Any]] | None = None,
) -> Showing:
    """Ask a model about one image, by the run that is wished for and by all others.

    Args:
        model: what to ask.
        picture: the image.
        corruption: what to do to it first; None: nothing.
        severity: of the corruption, 1 to 5.
        wish: the run, and how it is to adapt; the others follow their gates if it does.
        known: what other runs have said of this very image; filled with what is missing, so that
            they need not be asked again while only the chosen run's steps change.

    Raises:
        UserError: the wish, the corruption or the severity is unknown.
    """
    name, chosen = wish.applied(model)
    pixels = picture.shifted(corruption, severity, chosen.task.seed)
    images, keys = as_images(torch.from_numpy(pixels[None].copy())).to(model.like), [picture.key]
    single = Groups(1)  # to learn a better size takes longer than one image
    (says,) = answer(chosen, images, keys, model.classes, return_curve=True, groups=single)
    known = {} if known is None else known
    for other, run in model.runs.items():
        if other != name and other not in known:
            kept = run if wish.gate else replace(run, gate=None)
            (known[other],) = answer(kept, images, keys, model.classes, groups=single)
    runs = {other: says if other == name else known[other] for other in model.runs}
    gate = ask_gate(chosen, images, picture.key, says)
    return Showing(picture, pixels, name, says, look(chosen, images, picture.key), gate, runs)


def ask_gate(run: ServedRun, images: Tensor, key: str, says: Mapping[str, Any]) -> GateSays | None:
    """Tell what a run's gate says of one image ``(1, 3, H, W)``, about which it gave an answer."""
    if run.gate is None:
        return None
    signal, threshold = run.gate.signal, run.gate.threshold
    with evaluating(run.task.network):
        _, values = measure_signal(signal, run.task, images, [key], 1)
    return GateSays(signal, float(values[0]), threshold, says["gate"])


def look(run: ServedRun, images: Tensor, key: str) -> tuple[np.ndarray, ...]:
    """Draw the views of one image ``(1, 3, H, W)`` as the adapter draws them, step by step."""
    task = run.task.ready(images.device)
    if not run.takes_steps and task.loop.average:
        looks = CLASSES.looks(images, task.loop, [torch_generator(task.seed, "average", key)])
        return (as_pixels(looks[0, 1:]),)
    if not run.takes_steps and not overrides(task.method, "predict"):
        return ()
    drawn = []
    for step in range(task.loop.steps if run.takes_steps else 1):
        streams = [torch_generator(task.seed, "views", key, step)]
        views = task.method.views(task.network, images, streams)
        if isinstance(views, Mapping) and {"image", "keep"} <= views.keys():
            patch = task.network.head.patch_size
            drawn.append(as_pixels(masked(views["image"][0, 0], views["keep"][0], patch)))
        elif overrides(task.method, "views") and is_pictures(views, images):
            drawn.append(as_pixels(views[0]))
    return tuple(drawn)


def is_pictures(views: Any, images: Tensor) -> bool:
    """Tell whether views of images ``(1, 3, H, W)`` are such images: ``(1, V, 3, H, W)``."""
    shaped = isinstance(views, Tensor) and views.ndim == 5
    return shaped and views.shape[2:] == images.shape[1:]


def masked(image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """Hide all patches of an image ``(3, H, W)`` but the kept ones ``(V, L)``: ``(V, 3, H, W)``."""
    height, width = (side // patch for side in image.shape[1:])
    seen = torch.zeros(len(kept), height * width, device=image.device)
    seen.scatter_(1, kept, 1.0)
    seen = seen.view(-1, 1, height, width)
    seen = seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return seen * image + (1 - seen) * GREY


def as_pixels(images: Tensor) -> np.ndarray:
    """Turn images ``(N, 3, H, W)`` in [0, 1] into ``(N, H, W, 3)`` uint8; others are clipped."""
    values = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return values.movedim(1, -1).cpu().numpy()


@dataclass(frozen=True)
class Spread:
    """Where the distances of images lie: their 5 %, 50 % and 95 % quantiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, distances: np.ndarray) -> "Spread":
        """Measure it."""
        return cls(*map(float, np.quantile(distances, QUANTILES)))


def distances(model: AdaptiveModel, pixels: np.ndarray) -> np.ndarray:
    """Measure the distances to the source, as answers tell them, of ``(N, S, S, 3)``: ``(N,)``."""
    task = next(iter(model.runs.values())).task
    images = as_images(torch.from_numpy(np.array(pixels))).to(model.like)
    with evaluating(task.network):
        _, values = measure_signal("distance", task, images, list(map(str, range(len(images)))))
    return values.cpu().numpy()


def does(run: ServedRun) -> str:
    """Say in a few words what a run does to an image."""
    task, words = run.task, []
    if task.loop.normalisation != "source" or task.method.normalises:
        words.append("re-normalises")
    if views := task.loop.average or task.method.averaged_views():
        words.append(f"averages over {views} views")
    elif overrides(task.method, "predict") and not run.takes_steps and not words:
        words.append("changes the answer only")
    if run.takes_steps:
        words.append(f"trains {task.loop.steps} step{'s' if task.loop.steps > 1 else ''}")
    return ", ".join(words) or "the network as it is"
