"""Grids on a canvas, at a free place and integer scale, as the tokens of a transformer.

A canvas has S × S pixels, in patches of p × p. The input is drawn on background; the output, at the
same place, has a border beneath and at its right, by which its size is read. What lies outside both
is neither looked at nor asked for, so that its tokens are left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tttlab.arc.tasks import COLOURS, EMPTY

BACKGROUND, BORDER = COLOURS, COLOURS + 1
SYMBOLS = COLOURS + 2
UNASKED = -100  # the target of a pixel that the loss leaves out


class Tokens(NamedTuple):
    """The tokens of N canvases, padded to a common length L.

    Attributes:
        symbols: ``(N, L, p²)``, of the input.
        positions: ``(N, L)``, number of the patch on the canvas, row by row.
        visible: ``(N, L)``, whether the input lies there: other tokens are not attended to.
        auxiliary: ``(N,)``, number of the auxiliary task.
    """

    symbols: Tensor
    positions: Tensor
    visible: Tensor
    auxiliary: Tensor


class Placement(NamedTuple):
    """Where N pairs are drawn, ``(N,)``: pixels along a cell, and the top left corner's place."""

    scale: Tensor
    top: Tensor
    left: Tensor


@dataclass(frozen=True)
class Canvas:
    """A square canvas.

    Attributes:
        side: S, in pixels.
        patch: p; divides S.
        largest_scale: most pixels along a cell.
    """

    side: int
    patch: int
    largest_scale: int

    @property
    def tokens(self) -> int:
        """Count the patches of the canvas."""
        return (self.side // self.patch) ** 2

    def draw_placement(self, height: Tensor, width: Tensor, draws: Tensor) -> Placement:
        """Draw scale and place such that grids and their border fit.

        Args:
            height: cells to make room for, without border, ``(…)``.
            width: the same.
            draws: uniform in [0, 1), ``(…, 3)``.
        """
        most = (self.side // (torch.maximum(height, width) + 1)).clamp(1, self.largest_scale)
        scale = 1 + (draws[..., 0] * most).long()

        def corner(cells: Tensor, draw: Tensor) -> Tensor:
            free = (self.side - scale * (cells + 1)).clamp_min(0)
            return (draw * (free + 1)).long()

        return Placement(scale, corner(height, draws[..., 1]), corner(width, draws[..., 2]))

    def cells(self, placement: Placement) -> tuple[Tensor, Tensor]:
        """Find the cells' row and column ``(N, S)`` that each pixel shows; may be negative."""
        pixels = torch.arange(self.side, device=placement.scale.device)
        scale = placement.scale[:, None]
        rows = torch.div(pixels - placement.top[:, None], scale, rounding_mode="floor")
        columns = torch.div(pixels - placement.left[:, None], scale, rounding_mode="floor")
        return rows, columns

    def draw_inputs(self, grids: Tensor, placement: Placement) -> Tensor:
        """Draw grids ``(N, G, G)``, `EMPTY` outside, on canvases of symbols ``(N, S, S)``."""
        symbols = self._draw(grids, placement)
        return torch.where(symbols == EMPTY, BACKGROUND, symbols)

    def draw_targets(self, grids: Tensor, placement: Placement) -> Tensor:
        """Draw outputs ``(N, G, G)`` with their border; all other pixels are `UNASKED`."""
        rows, columns = self.cells(placement)
        height, width = sizes(grids)
        row, column = rows[:, :, None], columns[:, None, :]
        height, width = height[:, None, None], width[:, None, None]
        along = (row >= 0) & (row <= height) & (column >= 0) & (column <= width)
        border = along & ((row == height) | (column == width))
        symbols = self._draw(grids, placement)
        return torch.where(border, BORDER, torch.where(symbols == EMPTY, UNASKED, symbols))

    def _draw(self, grids: Tensor, placement: Placement) -> Tensor:
        """Enlarge and move grids; pixels outside are `EMPTY`."""
        side = grids.shape[-1]
        rows, columns = self.cells(placement)
        inside = ((rows >= 0) & (rows < side))[:, :, None]
        inside = inside & ((columns >= 0) & (columns < side))[:, None, :]
        index = rows.clamp(0, side - 1)[:, :, None] * side + columns.clamp(0, side - 1)[:, None, :]
        symbols = grids.flatten(1).long().gather(1, index.flatten(1)).view_as(index)
        return torch.where(inside, symbols, EMPTY)

    def patches(self, pixels: Tensor) -> Tensor:
        """Cut canvases ``(N, S, S)`` into patches ``(N, L, p²)``."""
        count, number, patch = len(pixels), self.side // self.patch, self.patch
        parts = pixels.view(count, number, patch, number, patch).transpose(2, 3)
        return parts.reshape(count, number * number, patch * patch)

    def pixels(self, patches: Tensor) -> Tensor:
        """Put patches ``(N, L, p², …)`` together to canvases ``(N, S, S, …)``."""
        count, rest, number, patch = (
            len(patches),
            patches.shape[3:],
            self.side // self.patch,
            self.patch,
        )
        parts = patches.view(count, number, number, patch, patch, *rest).transpose(2, 3)
        return parts.reshape(count, self.side, self.side, *rest)

    def tokenise(
        self, inputs: Tensor, auxiliary: Tensor, targets: Tensor | None = None
    ) -> tuple[Tokens, Tensor | None]:
        """Turn canvases into tokens.

        Args:
            inputs: symbols ``(N, S, S)``.
            auxiliary: number of the auxiliary task ``(N,)``.
            targets: symbols ``(N, S, S)``; tokens without input or target are left out, as far as
                the longest canvas allows. None: all tokens are kept.

        Returns:
            tokens, and their targets ``(N, L, p²)``.
        """
        symbols = self.patches(inputs)
        visible = (symbols != BACKGROUND).any(-1)
        positions = torch.arange(self.tokens, device=inputs.device).expand(len(inputs), -1)
        if targets is None:
            return Tokens(symbols, positions, visible, auxiliary), None
        asked = self.patches(targets)
        used = visible | (asked != UNASKED).any(-1)
        order = used.int().argsort(dim=1, descending=True, stable=True)[:, : int(used.sum(1).max())]

        def kept(values: Tensor) -> Tensor:
            return values.gather(1, order if values.ndim == 2 else _like(order, values))

        tokens = Tokens(kept(symbols), kept(positions), kept(visible), auxiliary)
        return tokens, kept(asked)

    def read(self, probabilities: Tensor, placement: Placement, side: int) -> Tensor:
        """Average a canvas's probabilities over the pixels of each cell.

        Args:
            probabilities: ``(N, S, S, K)``.
            placement: of the N canvases.
            side: G, cells along a side to read, the border included.

        Returns:
            ``(N, G, G, K)``; zero beyond the canvas.
        """
        rows, columns = self.cells(placement)
        cells = torch.arange(side, device=rows.device)[None, :, None]
        by_row = (rows[:, None, :] == cells).to(probabilities)  # (N, G, S)
        by_column = (columns[:, None, :] == cells).to(probabilities)
        total = torch.einsum("nas,nbt,nstk->nabk", by_row, by_column, probabilities)
        return total / placement.scale.to(total).square()[:, None, None, None]


def sizes(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return height and width of padded grids ``(…, G, G)``, in cells."""
    filled = grids != EMPTY
    return filled.any(-1).sum(-1), filled.any(-2).sum(-1)


def _like(order: Tensor, values: Tensor) -> Tensor:
    return order.view(*order.shape, *[1] * (values.ndim - 2)).expand(
        *order.shape, *values.shape[2:]
    )
