"""What is predicted for a task: a grid for every question, auxiliary task and placement."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tttlab.adaptation.method import Method
from tttlab.adaptation.predicting import Readout
from tttlab.arc.canvas import BACKGROUND, BORDER, Canvas, Placement, Tokens, sizes
from tttlab.arc.tasks import COLOURS, EMPTY
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class GridReadout(Readout):
    """Draws every question under every auxiliary task, and reads the grids off the canvases.

    Attributes:
        canvas: what questions are drawn on.
        questions: last places of a task's array.
        side: G, most cells along a side of a grid.
        placements: how often each question is drawn under each auxiliary task.
        together: canvases in one forward pass.
    """

    classifies: ClassVar[bool] = False

    canvas: Canvas
    questions: int
    side: int
    placements: int = 1
    together: int = 128

    def network(self, model: nn.Module) -> nn.Module:
        """Return the network as it is."""
        return model

    def looks(self, tasks: Tensor, loop: InnerLoop, generators: Sequence[torch.Generator]) -> Any:
        """Draw the questions of ``tasks (B, A, P, 2, G, G)``: V = questions · A · placements views.

        Returns:
            tokens and placement, ``(B, V, …)``.
        """
        count, auxiliaries, _, _, side, _ = tasks.shape
        shape = (self.questions, auxiliaries, self.placements)
        draws = torch.stack([torch.rand(*shape, 3, generator=g) for g in generators])
        height, width = room_for_answers(tasks, self.questions)  # (B, A, Q)

        def spread(values: Tensor) -> Tensor:
            return values.transpose(1, 2).unsqueeze(3).expand(count, *shape).flatten()

        placement = self.canvas.draw_placement(
            spread(height), spread(width), draws.to(tasks.device).flatten(0, -2)
        )
        grids = tasks[:, :, -self.questions :, 0].transpose(1, 2).unsqueeze(3)
        grids = grids.expand(count, *shape, side, side).flatten(0, 3)
        inputs = self.canvas.draw_inputs(grids, placement)
        auxiliary = torch.arange(auxiliaries, device=tasks.device)[:, None]
        auxiliary = auxiliary.expand(count, *shape).flatten()
        tokens, _ = self.canvas.tokenise(inputs, auxiliary)
        views = (Tokens(*tokens), Placement(*placement))
        return tuple(type(part)(*(v.unflatten(0, (count, -1)) for v in part)) for part in views)

    def read(
        self, net: Bound, looks: Any, method: Method, views: Any, statistics: Statistics
    ) -> Tensor:
        """Predict one task's grids ``(V, G, G)`` as its views show them, `EMPTY` outside.

        NaN where the network's outputs are not finite.
        """
        tokens, placement = looks
        parts = zip(*(part.split(self.together) for part in (*tokens, *placement)), strict=True)
        grids = []
        for part in parts:
            logits = net(Tokens(*part[:4]))
            probabilities = self.canvas.pixels(
                logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            )
            cells = self.canvas.read(probabilities, Placement(*part[4:]), self.side + 1)
            grids.append(read_grids(cells))
        return torch.cat(grids)


def read_grids(probabilities: Tensor) -> Tensor:
    """Read grids off the probabilities of cells ``(N, G + 1, G + 1, symbols)``.

    The first cell of the first row that shows the border ends the columns, and the same of the
    first column ends the rows.

    Returns:
        ``(N, G, G)`` of colours, `EMPTY` outside; NaN where a probability is not finite.
    """
    shown = torch.cat([probabilities[..., :BACKGROUND], probabilities[..., BORDER:]], dim=-1)
    border = shown.argmax(-1) == COLOURS
    columns = (border[:, 0].cumsum(-1) == 0)[:, None, :-1]
    rows = (border[:, :, 0].cumsum(-1) == 0)[:, :-1, None]
    colours = probabilities[:, :-1, :-1, :COLOURS].argmax(-1)
    grids = torch.where(rows & columns, colours, EMPTY).to(probabilities.dtype)
    bad = ~probabilities.isfinite().flatten(1).all(1)
    return torch.where(bad[:, None, None], float("nan"), grids)


def room_for_answers(tasks: Tensor, questions: int) -> tuple[Tensor, Tensor]:
    """Estimate from demonstrations and questions how many cells the answers may need.

    Where all outputs have one size, that; where outputs and inputs have one ratio, the question's
    size times that; else whichever is larger. And at least the question itself.

    Args:
        tasks: ``(B, A, P, 2, G, G)``.
        questions: last places.

    Returns:
        height and width ``(B, A, questions)``.
    """
    side = tasks.shape[-1]
    results = []
    for lengths in sizes(tasks):  # (B, A, P, 2)
        demonstrations, question = lengths[:, :, :-questions], lengths[:, :, -questions:, 0]
        given, output = demonstrations.unbind(-1)
        there = given > 0
        largest = output.amax(2, keepdim=True)
        smallest = torch.where(there, output, side).amin(2, keepdim=True)
        ratio = torch.where(there, output / given.clamp_min(1), 0).amax(2, keepdim=True)
        least_ratio = torch.where(there, output / given.clamp_min(1), side).amin(2, keepdim=True)
        scaled = (question * ratio).ceil().long()
        either = torch.maximum(largest.expand_as(scaled), scaled)
        room = torch.where(ratio == least_ratio, scaled, either)
        room = torch.where(largest == smallest, largest.expand_as(room), room)
        results.append(torch.maximum(room, question).clamp(1, side))
    return results[0], results[1]
