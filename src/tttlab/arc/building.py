"""Networks for ARC, new and from disk, and their auxiliary tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tttlab.arc.auxiliary import Auxiliary, draw_auxiliaries
from tttlab.arc.canvas import Canvas
from tttlab.arc.network import Architecture, CanvasTransformer
from tttlab.arc.settings import Settings
from tttlab.arc.tasks import ArcTask
from tttlab.networks.files import fill, read_weights
from tttlab.seeding import global_stream, numpy_generator, stream_seed

WEIGHTS, ABOUT = "weights.safetensors", "network.json"


def canvas_of(settings: Settings) -> Canvas:
    """Make the canvas that the settings describe."""
    section = settings.network
    return Canvas(section.canvas, section.patch, section.largest_scale)


def build(settings: Settings, auxiliary_tasks: int) -> CanvasTransformer:
    """Make a network with random weights, in evaluation mode."""
    section = settings.network
    sizes = section.model_dump(exclude={"canvas", "patch", "largest_scale"})
    architecture = Architecture(**sizes)
    with global_stream(stream_seed(settings.seed, "weights")):
        return CanvasTransformer(canvas_of(settings), architecture, auxiliary_tasks).eval()


def draw(settings: Settings, tasks: Sequence[ArcTask], colour_maps: int) -> list[list[Auxiliary]]:
    """Draw every task's auxiliary tasks; they depend on the seed and the task's name alone."""
    kinds = settings.auxiliary.kinds
    return [
        list(
            draw_auxiliaries(
                numpy_generator(settings.seed, "auxiliary", task.name), kinds, colour_maps
            )
        )
        for task in tasks
    ]


def save(network: CanvasTransformer, folder: Path, about: dict[str, Any]) -> None:
    """Write a network's weights, and beside them what is known of its training."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(settings: Settings, folder: Path) -> CanvasTransformer:
    """Read a network that `save` wrote.

    Raises:
        UserError: it is not there, or does not fit the settings.
    """
    state = read_weights(folder / WEIGHTS)
    network = build(settings, len(state["auxiliary.weight"]))
    fill(network, state, folder / WEIGHTS)
    return network


def with_tokens(
    settings: Settings, network: CanvasTransformer, tokens: Tensor
) -> CanvasTransformer:
    """Copy a network with other tokens ``(A, D)`` for auxiliary tasks."""
    copy = build(settings, len(tokens)).to(tokens.device)
    state = network.state_dict() | {"auxiliary.weight": tokens}
    copy.load_state_dict(state)
    return copy


def for_new_task(settings: Settings, network: CanvasTransformer, count: int) -> CanvasTransformer:
    """Copy a network for a task that it has never seen, with ``count`` auxiliary tasks.

    Each of their tokens starts as the mean of those that the network was trained with.
    """
    mean = network.auxiliary.weight.detach().mean(0, keepdim=True)
    return with_tokens(settings, network, mean.repeat(count, 1))
