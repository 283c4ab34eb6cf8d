"""The contract between a test-time method and the adapter."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics

State = Any  # a pytree of tensors


def entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of the class probabilities of ``logits (N, K)``: ``(N,)``."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


class Method:
    """A test-time method: a frozen value of settings whose `loss` is minimised for every image on its own.

    A subclass is a ``@dataclass(frozen=True)`` in its own file of ``tttlab/methods``; its fields are its settings in
    params.yaml. Only `loss` is required of a method that trains. Every hook but `views` sees a single image, whatever number
    the adapter works on at once: write for one, the adapter vectorises.

    Attributes:
        protocols: the protocols under which the method is defined.
        whole_batch: on a stream the loss sees the images of a batch together, ``(N·V, 3, H, W)``; False: each on its own.
        smallest_batch: the fewest images of a stream's batch that it can work on.
        trains: False for methods that only change the prediction; they take no steps.
        head: the objective (``simclr``, ``mae``, …) whose head it needs; None: any network will do.
        features: whether it looks at the network's features, which are not known of every module from images to logits.
        needs: what it reads of the source statistics: ``layers``, ``bank``, or a kind of its own, of which its
            `source_statistics` gives ``<kind>`` or ``<kind>.<…>``.
    """

    protocols: ClassVar[tuple[str, ...]] = ("episodic",)
    whole_batch: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 1
    trains: ClassVar[bool] = True
    head: ClassVar[str | None] = None
    features: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, network: nn.Module) -> None:
        """Raise a `UserError` if the method cannot work on this network: by default, if the `head` it needs is not there."""
        if self.head and getattr(getattr(network, "head", None), "objective", None) != self.head:
            raise UserError(
                f"{self} needs a network with the head of objective {self.head}; pretrain or fine-tune it with "
                "that objective, or choose another method"
            )

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure on source images ``(N, 3, H, W)`` what the method needs; asked when the standard statistics lack it."""
        return {}

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Any:
        """Draw what the loss looks at; called before every step, outside the differentiated code.

        Args:
            network: the source network, for its structure.
            images: ``(B, C, H, W)``.
            generators: B streams, one per image; all randomness comes from them.

        Returns:
            a pytree of tensors with leading dimension B; by default the images themselves as single views.
        """
        return images.unsqueeze(1)

    def init_state(self) -> State:
        """Give the state that `loss` passes on from step to step."""
        return ()

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Compute one image's loss.

        Args:
            net: the network with this image's parameters. ``net.trained`` are those that are trained, as they are now, and
                ``net.source`` all of them as they are in the source network: whether a tensor requires a gradient tells
                nothing here.
            views: this image's part of what `views` drew; by default ``(1, 3, H, W)``.
            statistics: source statistics, shared by all images.
            state: what the last step returned.

        Returns:
            scalar loss and the next state.
        """
        raise NotImplementedError

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Change the weights of a stream after a step.

        Args:
            parameters: the trainable ones, name → ``(*shape)``.
            source: the same of the source network; returned as they are, they also start the optimiser anew.
            state: what `loss` returned.
            generator: this step's stream, on the CPU; all randomness comes from it.

        Returns:
            the parameters to go on with, and the state.
        """
        return parameters, state

    def predict(self, net: Bound, image: Tensor, views: Any, statistics: Statistics) -> Tensor:
        """Classify the image after adaptation: ``image (3, H, W)`` → logits ``(K,)``."""
        return net(image.unsqueeze(0)).logits[0]

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify a batch of a stream after adaptation: ``images (N, 3, H, W)`` → logits ``(N, K)`` and the next state."""
        return net(images).logits, state
