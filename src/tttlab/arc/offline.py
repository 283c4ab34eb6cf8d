"""Training of one network on the pairs of many tasks: offline, or on all tasks to be solved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.building import draw
from tttlab.arc.canvas import UNASKED, Canvas, Tokens, sizes
from tttlab.arc.demonstrations import as_array, draw_pairs, pixel_loss
from tttlab.arc.settings import Settings
from tttlab.arc.tasks import ArcTask
from tttlab.runtime.ranks import Share
from tttlab.seeding import torch_generator
from tttlab.training.optimisers import Recipe
from tttlab.training.trainer import Row, Task, Trainer

_NOISE = 12.0  # tokens; pairs whose lengths differ by less share batches at random


@dataclass(frozen=True)
class Pairs:
    """Pairs under auxiliary tasks.

    Attributes:
        grids: inputs and outputs ``(N, 2, G, G)``, padded.
        auxiliary: ``(N,)``, number of the auxiliary task among those of all tasks.
        count: auxiliary tasks.
    """

    grids: Tensor
    auxiliary: Tensor
    count: int

    def __len__(self) -> int:
        return len(self.grids)


def gather(
    tasks: Sequence[ArcTask], auxiliaries: Sequence[Sequence[Auxiliary]], side: int
) -> Pairs:
    """Put the demonstrations of tasks, under each one's auxiliary tasks, into one set."""
    grids, numbers, count = [], [], 0
    for task, own in zip(tasks, auxiliaries, strict=True):
        places = len(task.demonstrations)
        shown = replace(task, questions=())
        grids.append(as_array(shown, own, places, 0, side).reshape(-1, 2, side, side))
        numbers.append(count + np.repeat(np.arange(len(own)), places))
        count += len(own)
    return Pairs(
        torch.from_numpy(np.concatenate(grids)), torch.from_numpy(np.concatenate(numbers)), count
    )


def training_pairs(
    settings: Settings, tasks: Sequence[ArcTask], invented: Sequence[ArcTask]
) -> Pairs:
    """Put all that the offline training sees into one set.

    Invented tasks are taken as they are: they come in all turns and colours.
    """
    drawn = draw(settings, tasks, settings.auxiliary.offline) + draw(settings, invented, 0)
    return gather([*tasks, *invented], drawn, settings.tasks.largest)


@dataclass
class PairLoader:
    """Batches of pairs of about the same length, drawn on a canvas; every pair once an epoch.

    A batch's ``share_of_pixels`` is this rank's share of the pixels that the whole batch asks for,
    over its share of the pairs: a mean over pixels times this is to be weighted by pairs.

    Attributes:
        pairs: what to draw.
        canvas: what to draw on.
        batch_size: largest number of pairs in a batch of all ranks together.
        seed: of all random streams.
        rank: number of this process.
        ranks: number of processes.
        shares: this rank's part of each batch of the epoch.
    """

    pairs: Pairs
    canvas: Canvas
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    shares: list[Share] = field(default_factory=list)

    def __post_init__(self) -> None:
        height, width = sizes(self.pairs.grids)  # (N, 2)
        given, asked = (height * width)[:, 0], ((height + 1) * (width + 1))[:, 1]
        self._lengths = torch.maximum(given, asked)
        self.set_epoch(0)

    @property
    def sampler(self) -> "PairLoader":
        """Return itself: it says which pairs come when."""
        return self

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of an epoch, the same on every rank."""
        generator = torch_generator(self.seed, "pairs", epoch)
        noise = torch.rand(len(self.pairs), generator=generator) * _NOISE
        ordered = (self._lengths + noise).argsort()
        # Batches differ by at most one pair, so that none is smaller than the number of ranks.
        batches = ordered.tensor_split(len(self))
        order = torch.randperm(len(batches), generator=generator)
        self._batches = [batches[number] for number in order]
        self.shares = [Share(len(batch), self.rank, self.ranks) for batch in self._batches]
        self._draws = torch.rand(len(self.pairs), 3, generator=generator)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, share in zip(self._batches, self.shares, strict=True):
            own = batch[share.own]
            tokens, targets = draw_pairs(
                self.canvas, self.pairs.grids[own], self.pairs.auxiliary[own], self._draws[own]
            )
            asked = self._asked_pixels(batch)
            part = asked[share.own].sum() / asked.sum() * self.ranks / share.weight
            yield {**tokens._asdict(), "targets": targets, "share_of_pixels": part}

    def _asked_pixels(self, batch: Tensor) -> Tensor:
        """Count the pixels ``(N,)`` that some pairs ask for: the output and its border."""
        height, width = sizes(self.pairs.grids[batch])
        placement = self.canvas.draw_placement(height.amax(1), width.amax(1), self._draws[batch])
        return placement.scale.square() * (height[:, 1] + 1) * (width[:, 1] + 1)


@dataclass(frozen=True)
class PairTrainer(Trainer):
    """A trainer on pairs in place of images.

    Attributes:
        canvas: what they are drawn on.
    """

    unit: str = "pair"
    canvas: Canvas = field(kw_only=True)

    def open_loader(self, pairs: Pairs, task: Task) -> PairLoader:
        """Open the loader of all epochs."""
        ranks = {"rank": self.fabric.global_rank, "ranks": self.fabric.world_size}
        return PairLoader(pairs, self.canvas, task.recipe.batch_size, self.seed, **ranks)


def train(
    trainer: PairTrainer, network: nn.Module, pairs: Pairs, recipe: Recipe, name: str
) -> list[Row]:
    """Train a network on pairs, in place.

    Args:
        trainer: device, seed, resuming.
        network: a `CanvasTransformer` with a token for each auxiliary task.
        pairs: what to train on.
        recipe: length and optimiser.
        name: of the training.

    Returns:
        a row per epoch: ``loss``, ``exact`` (share of pairs of which every pixel is right) and
        ``lr``; see `Trainer.fit`.
    """
    parts = [part for part, _ in network.named_children()]
    task = Task(name, parts, pair_terms, {}, recipe)
    return trainer.fit(network, pairs, task)


def pair_terms(
    network: nn.Module, batch: dict[str, Any], _generator: torch.Generator
) -> dict[str, Tensor]:
    """Compute loss and share of exact answers of a batch.

    Several ranks weight their losses by their numbers of pairs; the loss is a mean over pixels.
    """
    logits = network(Tokens(*(batch[name] for name in Tokens._fields)))
    targets = batch["targets"]
    right = (logits.argmax(-1) == targets) | (targets == UNASKED)
    exact = right.flatten(1).all(1).float().mean()
    return {"loss": pixel_loss(logits, targets) * batch["share_of_pixels"], "exact": exact}
