"""How well the gradient of a task's demonstrations agrees with that of its answer.

With the answers, so analysis only: it tells why training on demonstrations helps or does not.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.demonstrations import as_array, draw_pairs, pixel_loss
from tttlab.arc.network import CanvasTransformer
from tttlab.arc.tasks import ArcTask, Pair
from tttlab.seeding import torch_generator

DRAWN = 32  # pairs in a gradient


def gradient(
    network: CanvasTransformer, pairs: Tensor, auxiliary: Tensor, generator: torch.Generator
) -> Tensor:
    """Differentiate the loss of `DRAWN` pairs by all weights but the auxiliary tasks' tokens.

    Args:
        network: the network before test-time training.
        pairs: to draw from, ``(A, P, 2, G, G)``.
        auxiliary: which auxiliary task each of the drawn pairs is shown in, ``(DRAWN,)``.
        generator: draws pairs, places and scales.

    Returns:
        one vector.
    """
    weights = [value for name, value in network.named_parameters() if name != "auxiliary.weight"]
    number = torch.randint(pairs.shape[1], (DRAWN,), generator=generator)
    draws = torch.rand(DRAWN, 3, generator=generator)
    tokens, targets = draw_pairs(network.canvas, pairs[auxiliary, number], auxiliary, draws)
    with torch.enable_grad():
        gradients = torch.autograd.grad(pixel_loss(network(tokens), targets), weights)
    return torch.cat([part.flatten() for part in gradients])


def cosines(
    network: CanvasTransformer,
    tasks: Sequence[ArcTask],
    answers: Sequence[Sequence[np.ndarray]],
    auxiliaries: Sequence[Sequence[Auxiliary]],
    side: int,
    seed: int,
) -> list[tuple[float, float]]:
    """Compare each task's gradients of demonstrations and answers.

    Returns:
        the cosine with the task's own answers, and, as a control, with those of the task before
        it: what any training on any ARC task would give.
    """
    shown, right = [], []
    for task, own_answers, auxiliary in zip(tasks, answers, auxiliaries, strict=True):
        generator = torch_generator(seed, "alignment", task.name)
        number = torch.randint(len(auxiliary), (DRAWN,), generator=generator)
        pairs = tuple(Pair(*pair) for pair in zip(task.questions, own_answers, strict=True))
        for vectors, given in ((shown, task.demonstrations), (right, pairs)):
            of_one = replace(task, demonstrations=given, questions=())
            array = torch.from_numpy(as_array(of_one, auxiliary, len(given), 0, side))
            vectors.append(gradient(network, array, number, generator))
    stacked = [torch.nn.functional.normalize(torch.stack(part), dim=1) for part in (shown, right)]
    own = (stacked[0] * stacked[1]).sum(1)
    other = (stacked[0] * stacked[1].roll(1, 0)).sum(1)
    return list(zip(own.tolist(), other.tolist(), strict=True))
