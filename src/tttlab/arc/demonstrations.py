"""Training on a task's demonstrations: the test-time method for ARC.

A task is an image set, and its demonstrations are its views. It comes as one array of padded grids
``(A, P, 2, G, G)``: A auxiliary tasks, P places for pairs of input and output. The last places
belong to questions, whose outputs are empty: no answer is ever there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.canvas import UNASKED, Canvas, Tokens, sizes
from tttlab.arc.tasks import EMPTY, ArcTask, padded
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


def as_array(
    task: ArcTask, auxiliaries: Sequence[Auxiliary], demonstrations: int, questions: int, side: int
) -> np.ndarray:
    """Put a task's grids into one array ``(A, demonstrations + questions, 2, side, side)``.

    Args:
        task: the task.
        auxiliaries: A auxiliary tasks.
        demonstrations: places for demonstrations.
        questions: places for questions.
        side: cells along a side.
    """
    array = np.full((len(auxiliaries), demonstrations + questions, 2, side, side), EMPTY, np.int8)
    for number, auxiliary in enumerate(auxiliaries):
        for place, pair in enumerate(task.demonstrations):
            array[number, place] = padded([auxiliary.apply(grid) for grid in pair], side)
        for place, grid in enumerate(task.questions, start=demonstrations):
            array[number, place, :1] = padded([auxiliary.apply(grid)], side)
    return array


@dataclass(frozen=True)
class Demonstrations(Method):
    """Cross-entropy of the outputs' pixels, on demonstrations at random places and scales.

    Reference:
        Hu et al. 2025, arXiv 2511.14761, section on test-time training.

    Attributes:
        canvas: what they are drawn on.
        pairs: demonstrations in a step.
        questions: last places of a task's array, which are not trained on.
    """

    canvas: Canvas
    pairs: int
    questions: int

    def views(
        self, network: nn.Module, tasks: Tensor, generators: Sequence[torch.Generator]
    ) -> Any:
        """Draw demonstrations of ``tasks (B, A, P, 2, G, G)``: tokens and targets ``(B, V, …)``."""
        count, auxiliaries, places = tasks.shape[:3]
        draws = torch.stack([torch.rand(self.pairs, 5, generator=g) for g in generators])
        draws = draws.to(tasks.device)
        demonstrations = (tasks[:, 0, : places - self.questions, 0, 0, 0] != EMPTY).sum(1)
        auxiliary = (draws[..., 0] * auxiliaries).long()
        pair = (draws[..., 1] * demonstrations[:, None]).long()
        number = torch.arange(count, device=tasks.device)[:, None]
        grids = tasks[number, auxiliary, pair].flatten(0, 1)  # (B·V, 2, G, G)
        tokens, targets = draw_pairs(self.canvas, grids, auxiliary.flatten(), draws.flatten(0, 1))
        tokens = Tokens(*(part.unflatten(0, (count, -1)) for part in tokens))
        return {"tokens": tokens, "targets": targets.unflatten(0, (count, -1))}

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Average the cross-entropy over all asked pixels of the step's demonstrations."""
        return pixel_loss(net(Tokens(*views["tokens"])), views["targets"]), state


def draw_pairs(
    canvas: Canvas, grids: Tensor, auxiliary: Tensor, draws: Tensor
) -> tuple[Tokens, Tensor]:
    """Draw pairs at random places and scales.

    Args:
        canvas: what to draw on.
        grids: inputs and outputs ``(N, 2, G, G)``.
        auxiliary: number of the auxiliary task ``(N,)``.
        draws: uniform in [0, 1), ``(N, …)``; the last three are used.

    Returns:
        tokens of the inputs, and targets ``(N, L, p²)``.
    """
    heights, widths = sizes(grids)
    placement = canvas.draw_placement(heights.amax(1), widths.amax(1), draws[:, -3:])
    inputs = canvas.draw_inputs(grids[:, 0], placement)
    return canvas.tokenise(inputs, auxiliary, canvas.draw_targets(grids[:, 1], placement))


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the cross-entropy of ``logits (…, symbols)`` over the targets that are asked for."""
    asked = targets != UNASKED
    # bf16 is too coarse for a sum over symbols.
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = logits.log_softmax(-1, dtype=wide)
    index = torch.where(asked, targets, 0).unsqueeze(-1)
    losses = -log_probabilities.gather(-1, index).squeeze(-1)
    return (losses * asked).sum() / asked.sum()
