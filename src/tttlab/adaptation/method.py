"""The contract between a test-time method and the adapter."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics

State = Any  # a pytree of tensors


def entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of the class probabilities of ``logits (N, K)``: ``(N,)``."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of predictions from a target, in nats: ``(N,)``.

    Args:
        target: class probabilities ``(N, K)``, or ``(1, K)`` for all.
        logits: ``(N, K)``, of the predictions.
    """
    # F.kl_div warns under vmap that it takes its mean over other dimensions than it says.
    return (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)


def surest(logits: Tensor, share: float) -> Tensor:
    """Keep the views of lowest entropy: ``(V, K)`` → ``(max(1, round(share · V)), K)``."""
    kept = max(1, round(share * len(logits)))
    return logits[entropy(logits.detach()).topk(kept, largest=False).indices]


def first_state(method: "Method", device: torch.device) -> State:
    """Give a method's state before the first step, on a device."""
    return tree_map(lambda value: value.to(device), method.init_state())


def first_states(method: "Method", images: Tensor) -> State:
    """Give every image's state before the first step, ``(B, …)``, on the images' device."""
    state = first_state(method, images.device)
    return tree_map(lambda value: value.expand(len(images), *value.shape), state)


def overrides(method: "Method", hook: str) -> bool:
    """Tell whether a method brings a hook of its own, such as ``predict``."""
    return getattr(type(method), hook) is not getattr(Method, hook)


class Method:
    """A test-time method: its settings, frozen, and the `loss` that is minimised for every image.

    A subclass is a ``@dataclass(frozen=True)`` in its own file of ``tttlab/methods``; its fields
    are its settings in params.yaml. A method that trains must define `loss`; all else is optional.
    `views` sees B images at once. `loss` and `predict` are written for one image, and the adapter
    vectorises them; with `whole_batch`, and in `predict_batch`, they see a batch of a stream.

    Attributes:
        protocols: the protocols under which the method is defined.
        whole_batch: True: on a stream the loss sees all images of a batch, ``(N·V, 3, H, W)``.
            False: it sees one image.
        smallest_batch: the fewest images in a batch of a stream that the method can work on.
        trains: False for methods that only change the prediction; they take no steps.
        head: the objective (``simclr``, ``mae``, …) whose head it needs; None: any network will do.
        features: whether it needs the network's features, which not every classifier gives.
        normalises: whether it says itself whose statistics normalise an image, so that
            ``normalisation`` must be ``source``.
        needs: the kinds of source statistics that it reads: ``layers``, ``bank``, or a kind of its
            own, which its `source_statistics` gives as ``<kind>`` or ``<kind>.<…>``.
    """

    protocols: ClassVar[tuple[str, ...]] = ("episodic",)
    whole_batch: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 1
    trains: ClassVar[bool] = True
    head: ClassVar[str | None] = None
    features: ClassVar[bool] = False
    normalises: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def averaged_views(self) -> int:
        """Tell how many views the method's own prediction averages over."""
        return 0

    def check(self, network: nn.Module) -> None:
        """Refuse a network on which the method cannot work.

        Raises:
            UserError: by default, the network lacks the `head` that the method needs.
        """
        if self.head and getattr(getattr(network, "head", None), "objective", None) != self.head:
            raise UserError(
                f"{self} needs a network with the head of objective {self.head}; pretrain or "
                "fine-tune it with that objective, or choose another method"
            )

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the method's own kinds of statistics, where the standard ones are not enough.

        ``batches`` are source images ``(N, 3, H, W)``.
        """
        return {}

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Any:
        """Draw the input of the loss; called before every step, outside the differentiated code.

        Args:
            network: the source network, for its structure.
            images: ``(B, C, H, W)``.
            generators: B streams, one per image; all randomness comes from them.

        Returns:
            a pytree of tensors with leading dimension B; by default each image as its only view.
        """
        return images.unsqueeze(1)

    def init_state(self) -> State:
        """Give the state before the first step; `loss` passes it on from step to step."""
        return ()

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Compute one image's loss.

        Args:
            net: the network with this image's parameters. ``net.trained`` are the current values of
                the trained ones, and ``net.source`` the source network's values of all. Do not look
                at ``requires_grad``: under ``vmap`` it tells nothing.
            views: this image's part of the result of `views`; by default ``(1, 3, H, W)``.
            statistics: source statistics, shared by all images.
            state: the state that the last step returned.

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
            source: the source network's values of them; returning these very tensors also resets
                the optimiser.
            state: the state that `loss` returned.
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
        """Classify a batch of a stream after adaptation.

        Args:
            net: the network with the stream's current parameters.
            images: ``(N, 3, H, W)``.
            statistics: source statistics.
            state: the current state.

        Returns:
            logits ``(N, K)`` and the next state.
        """
        return net(images).logits, state
