"""The contract between a self-supervised objective and the trainings."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tttlab.networks.network import Network
from tttlab.runtime.ranks import Share


class Objective:
    """A self-supervised loss together with its views and its head: a frozen value of settings.

    A subclass is a ``@dataclass(frozen=True)`` in its own file of ``tttlab/objectives``; its fields
    are its settings in params.yaml. At test time the method of the same name uses the trained head.

    Attributes:
        num_views: V, random views of each image that `loss` takes.
        jitter: whether views get colour jitter; False: they are only cropped and mirrored.
        betas: AdamW's decay rates.
        labels: whether the objective needs labels. If so, `head` also takes the number of classes,
            and `loss` the images' ``labels (N,)``.
        alone: whether one image alone can lower the loss; False: it contrasts images.
        patches: whether it needs patch tokens, and so a plain vision transformer.
        meta: whether only meta-learned fine-tuning can train it, because its own minimum is empty.
        multiples: pairs of settings, of which the first must be a multiple of the second.
    """

    num_views: ClassVar[int] = 1
    jitter: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    labels: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    patches: ClassVar[bool] = False
    meta: ClassVar[bool] = False
    multiples: ClassVar[tuple[tuple[str, str], ...]] = ()

    def head(self, encoder: nn.Module) -> nn.Module:
        """Build the head for an encoder; its attribute ``objective`` is the objective's name.

        `Network.forward` calls it by the method that it has: ``project(features)`` or
        ``project_and_predict(features)`` in every pass; ``branch_off(encoder, images)`` with
        ``branch=True``; ``reconstruct(encoder, images, keep)`` with ``keep``;
        ``features_given(encoder, images, given)`` with ``given``.

        Raises:
            UserError: the objective does not work with this encoder.
        """
        raise NotImplementedError

    def initialise(self, encoder: nn.Module) -> None:
        """Initialise a new encoder's weights in place; by default they stay as timm drew them."""

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            network: with this objective's head.
            views: ``(N, V, 3, H, W)``, RGB in [0, 1].
            generator: CPU stream for the whole batch, the same on all ranks.
            share: which part of the batch ``views`` holds; None: all of it.

        Returns:
            scalar; with several ranks either the mean over this rank's images, or the loss of the
            whole batch, the same on every rank.
        """
        raise NotImplementedError
