"""The engines of torch-ttt 0.0.2 in one calling form: adapt to ONE image, and classify it.

An engine adapts the trainable parameters of a deep copy of its model, with Adam, to the batch of
one call. For an engine that cannot do so with one image, `engines` gives the reason. torch-ttt is
optional, and so is einops, which it needs but does not declare.
"""

import io
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.taps import record, stage_layers

Predict = Callable[[Tensor], Tensor]  # one image (1, 3, H, W) → its logits (1, K)
NO_BATCH_NORM = "adapts BatchNorm layers only: ValueError (no parameters) on a network without"


def available() -> bool:
    """Tell whether torch-ttt can be imported."""
    return find_spec("torch_ttt") is not None and find_spec("einops") is not None


class Logits(nn.Module):
    """A network in torch-ttt's form: images → logits, with the pooled ``features`` as a layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.classifier = network.classifier
        self.features = nn.Identity()
        self.network = network
        self.network.head = None  # no engine uses tttlab's self-supervised head

    def forward(self, images: Tensor) -> Tensor:
        """Classify ``images (N, 3, H, W)``."""
        return self.classifier(self.features(self.network(images).features))


@dataclass(frozen=True)
class Setup:
    """What the builders share: the source network, facts about it, and the arguments of `engines`.

    Attributes:
        network: the source network; it is not changed.
        layer: the layer for TTT's head.
        classes: K.
        batch_norm: whether the network has BatchNorm layers.
        batches: source images, first in each batch.
        options: Adam's settings.
        head_steps: batches that train TTT's head.
    """

    network: nn.Module
    layer: str
    classes: int
    batch_norm: bool
    batches: Sequence[Sequence[Tensor]]
    options: dict[str, float]
    head_steps: int

    def engine(self, name: str, *arguments: str, **settings: float) -> nn.Module:
        """Construct an engine around a copy of the network, because some constructors change it."""
        from torch_ttt.engine_registry import EngineRegistry

        model = Logits(deepcopy(self.network))
        return EngineRegistry.get_engine(name)(
            model, *arguments, optimization_parameters=self.options, **settings
        )


def predictor(engine: nn.Module) -> Predict:
    """Make one call per image of an engine, without what it prints."""
    engine.eval()

    def predict(image: Tensor) -> Tensor:
        with torch.enable_grad(), redirect_stdout(io.StringIO()):
            return engine(image)[0].detach()

    return predict


def ttt(setup: Setup) -> Predict:
    """Rotation prediction, with a head trained after the network, not together with it."""
    engine = setup.engine("ttt", setup.layer)
    engine.train()
    engine.model.eval()
    optimiser = None
    for images, *_ in islice(cycle(setup.batches), setup.head_steps):
        _, loss = engine.ttt_forward(images)  # the first call builds the head
        parameters = list(engine.angle_head.parameters())
        optimiser = optimiser or torch.optim.Adam(parameters, lr=1e-3)
        optimiser.zero_grad()
        loss.backward(inputs=parameters)
        optimiser.step()
    return predictor(engine)


def ittt(setup: Setup) -> Predict:
    """IT3, for its cost alone: the network was not trained with injected labels."""
    return predictor(setup.engine("ittt", setup.layer))


def tent(setup: Setup) -> Predict | str:
    """TENT as documented, with the source statistics in BatchNorm layers."""
    return predictor(setup.engine("tent")) if setup.batch_norm else NO_BATCH_NORM


def eata(setup: Setup) -> Predict | str:
    """EATA with the paper's margin for K classes.

    There are no Fisher weights, because ``compute_fishers`` raises an error.
    ``d_margin`` turns the redundancy filter off, which would compare the image with itself from the
    second step on.
    """
    if not setup.batch_norm:
        return NO_BATCH_NORM
    margin = 0.4 * math.log(setup.classes)
    return predictor(setup.engine("eata", e_margin=margin, d_margin=2.0))


def deyo(setup: Setup) -> Predict:
    """DeYO with the paper's margins for K classes; BatchNorm uses the image's statistics."""
    unit = math.log(setup.classes)
    return predictor(setup.engine("deyo", e_margin=0.5 * unit, ent_norm=0.4 * unit))


def memo(setup: Setup) -> Predict | str:
    """MEMO with its own augmentations."""
    if setup.batch_norm:
        return "gives BatchNorm layers an unbound forward: TypeError on a network with any"
    return predictor(setup.engine("memo"))


BUILDERS = (ttt, ittt, tent, eata, deyo, memo)
IMPOSSIBLE = {
    "ttt_pp": "takes the covariance of a batch: ValueError on one image",
    "actmad": "takes the variance over a batch: loss, weights and logits become NaN on one image",
    "masked_ttt": "masks the token ids of a text: IndexError on an image",
}


def engines(
    model: nn.Module,
    size: int,
    source_batches: Sequence[Sequence[Tensor]],
    *,
    steps: int = 5,
    lr: float = 1e-3,
    head_steps: int = 100,
) -> dict[str, Predict | str]:
    """Build every engine for one network.

    Args:
        model: a tttlab network or a timm model; it is not changed.
        size: side of the images, pixels.
        source_batches: batches whose first entry is source images ``(N, 3, H, W)`` on the model's
            device; for TTT's head.
        steps: Adam steps per image.
        lr: Adam's learning rate.
        head_steps: batches that train TTT's head.

    Returns:
        torch-ttt's name of an engine → a callable for one image, or the reason why there is none.

    Raises:
        UserError: torch-ttt or einops is not installed.
    """
    if not available():
        raise UserError(
            "benchmarks: torch-ttt or einops is not installed; "
            "install both or leave this comparison out"
        )
    network = deepcopy(as_network(model)).eval()
    image = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    with torch.no_grad(), record(network, stage_layers(network)) as stages:
        classes = network(image).logits.shape[1]
    # TTT's head is two 3×3 convolutions without padding, for feature maps; for tokens it has none.
    maps = [
        f"network.{name}"
        for name, output in stages.items()
        if output.ndim == 4 and min(output.shape[2:]) >= 5
    ]
    layer = maps[len(maps) // 2] if maps else "features"
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    options = {"num_steps": steps, "lr": lr}
    setup = Setup(network, layer, classes, batch_norm, source_batches, options, head_steps)
    return {build.__name__: build(setup) for build in BUILDERS} | IMPOSSIBLE


def run(
    model: nn.Module, images: Tensor, engine: Predict, seed: int = 0
) -> tuple[Tensor, list[float]]:
    """Adapt to every image of ``images (N, 3, H, W)`` on its own, on the model's device.

    Returns:
        logits ``(N, K)``, and the milliseconds of each image.
    """
    device = next(model.parameters()).device
    logits, milliseconds = [], []
    for number, image in enumerate(images):
        random.seed(seed + number)
        torch.manual_seed(seed + number)
        start = time.perf_counter()
        logits.append(engine(image[None].to(device)).cpu())
        milliseconds.append(1000 * (time.perf_counter() - start))
    return torch.cat(logits), milliseconds
