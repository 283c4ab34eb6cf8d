"""Small tasks, canvases and networks for the tests of ARC."""

import numpy as np
import torch

from tttlab.arc.auxiliary import SYMMETRIES, draw_auxiliaries
from tttlab.arc.canvas import Canvas
from tttlab.arc.network import Architecture, CanvasTransformer
from tttlab.arc.tasks import ArcTask, Pair

SIDE = 4  # cells
CANVAS = Canvas(side=10, patch=2, largest_scale=2)


def grid(*rows: str) -> np.ndarray:
    """Make a grid of its rows, each a string of digits."""
    return np.array([list(map(int, row)) for row in rows], np.int8)


def random_task(seed: int, demonstrations: int = 3, questions: int = 1) -> ArcTask:
    """Make a task of random grids, whose outputs are the inputs mirrored."""
    generator = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return generator.integers(0, 10, generator.integers(2, SIDE + 1, 2)).astype(np.int8)

    inputs = [draw() for _ in range(demonstrations)]
    pairs = tuple(Pair(cells, cells[:, ::-1].copy()) for cells in inputs)
    return ArcTask(f"task{seed}", pairs, tuple(draw() for _ in range(questions)))


def auxiliaries(seed: int = 0, colour_maps: int = 1):
    """Draw the task itself and two symmetries."""
    return draw_auxiliaries(np.random.default_rng(seed), SYMMETRIES[1:3], colour_maps)


def network(
    auxiliary_tasks: int, canvas: Canvas = CANVAS, seed: int = 0, **architecture
) -> CanvasTransformer:
    """Make a random network in double precision, in evaluation mode."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp": 24} | architecture
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CanvasTransformer(canvas, Architecture(**sizes), auxiliary_tasks).double().eval()
        for values in made.parameters():  # embeddings of 0.02 would hardly differ
            if values.ndim > 1:
                torch.nn.init.normal_(values, std=0.3)
    return made
