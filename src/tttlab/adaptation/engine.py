"""The adapter as a module in the calling form of torch-ttt's engines: images → logits and a loss.

    engine = Engine(network, "tent", InnerLoop(lr=1e-3, trainable="norm"))
    engine.train()
    logits, loss = engine(images)  # train on the supervised loss of the logits, plus this one
    engine.eval()
    logits, loss = engine(images)  # adapt to every image on its own; the network does not change

The ``state_dict`` holds the network alone. Between calls the engine keeps only the number of images
seen, which keys the random views.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.checks import check
from tttlab.adaptation.inner_loop import over_images
from tttlab.adaptation.method import Method, first_states
from tttlab.adaptation.normalisation import normalised, normalised_layers
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import complete_statistics
from tttlab.adaptation.trainable import with_trainable
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import (
    Statistics,
    available_statistics,
    layer_statistics,
    projection_bank,
    shuffled_parts,
)
from tttlab.runtime.group_size import GroupSize
from tttlab.seeding import torch_generator


class Engine(nn.Module):
    """A network that is adapted to every image it classifies.

    Args:
        network: a `Network`, or any module from images to logits; see
            `tttlab.networks.classifiers`.
        method: a method that is defined for single images, or its name for its default settings.
        loop: settings of the steps.
        statistics: source statistics; `measure` adds the missing ones.
        seed: of all random streams.
        images_per_step: images adapted at once, a machine setting.
    """

    def __init__(
        self,
        network: nn.Module,
        method: Method | str,
        loop: InnerLoop = InnerLoop(),
        *,
        statistics: Statistics | None = None,
        seed: int = 0,
        images_per_step: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.network = network
        self.method = load_method(method) if isinstance(method, str) else method
        self.loop, self.statistics, self.seed = loop, dict(statistics or {}), seed
        self._group, self._seen = GroupSize(images_per_step), 0

    def measure(self, batches: Iterable[Tensor], bank_size: int = 256) -> "Engine":
        """Measure the source statistics that the method and the normalisation need.

        Args:
            batches: source images ``(N, 3, H, W)``.
            bank_size: rows of the projection bank.

        Returns:
            the engine itself.
        """
        network, batches = as_network(self.network), list(batches)
        needed = set(self.method.needs)
        if "layers" in needed or normalised_layers(network, self.loop):
            self.statistics |= layer_statistics(network, batches)
        if "bank" in needed and hasattr(getattr(network, "head", None), "project"):
            # The bank's images are the first ones, and a folder comes class by class.
            mixed = shuffled_parts(torch.cat(batches), len(batches))
            self.statistics |= projection_bank(network, mixed, bank_size)
        self.statistics = complete_statistics(
            self.statistics, self.method, network, lambda: batches
        )
        return self

    def forward(
        self, images: Tensor, image_ids: Sequence[str | int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify images and compute the method's loss.

        Args:
            images: ``(N, 3, H, W)``: in [0, 1] for a `Network`, preprocessed for any other module.
            image_ids: names of the images, which key their random views; by default the images are
                numbered in the order in which they arrive.

        Returns:
            logits ``(N, K)`` and a scalar, the mean loss of the images. In training mode the
            network's own logits and the loss at its weights, both differentiable. In evaluation
            mode the logits after adaptation and the loss before the last step, NaN without a step.

        Raises:
            UserError: source statistics are missing, or the network or the images do not fit.
        """
        if image_ids is None:
            image_ids = range(self._seen, self._seen + len(images))
            self._seen += len(images)
        names = [str(name) for name in image_ids]
        if missing := set(self.method.needs) - available_statistics(self.statistics):
            raise UserError(
                f"{self.method} needs source statistics of the kind {', '.join(sorted(missing))}; "
                "call engine.measure(batches of source images) first"
            )
        if self.training:
            # The order matters: this pass updates BatchNorm's running statistics, which the loss's
            # pass saves for its backward pass.
            logits = as_network(self.network)(images).logits
            return logits, self._loss(images, names)
        adapted = adapt(
            self.network,
            images,
            self.method,
            self.loop,
            statistics=self.statistics,
            image_ids=names,
            seed=self.seed,
            images_per_step=self._group,
        )
        losses = adapted.losses[:, -2 if adapted.losses.shape[1] > 1 else -1]
        return adapted.logits.to(images.device), losses.mean().to(images.device)

    def _loss(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Average the images' losses at the network's own parameters, computed as at test time."""
        network, method = as_network(self.network), self.method
        if not method.trains:
            raise UserError(f"{method} has no loss to train with; use it in evaluation mode")
        statistics = {name: value.to(images.device) for name, value in self.statistics.items()}
        with evaluating(network), normalised(network, self.loop, statistics):
            # As it will be at test time, where updates of low rank are added to the network.
            prepared = with_trainable(network, self.loop, self.seed)
            check(prepared, images[:0], method, self.loop, statistics)
            generators = [torch_generator(self.seed, "training", name) for name in names]
            views = method.views(network, images, generators)
            state = first_states(method, images)
            net = Bound(network, dict(network.named_parameters()))
            loss = over_images(lambda views, state: method.loss(net, views, statistics, state)[0])
            return loss(views, state).mean()
