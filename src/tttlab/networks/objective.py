"""The contract between a self-supervised objective and the trainings."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tttlab.networks.network import Network
from tttlab.runtime.ranks import Share


class Objective:
    """A self-supervised loss together with its views and its head: a frozen value of settings.

    A subclass is a ``@dataclass(frozen=True)`` in its own file of ``tttlab/objectives``; its fields are its settings in
    params.yaml. At test time it is the method of the same name that takes the network's head further.

    Attributes:
        num_views: V, random views of each image that `loss` looks at.
        jitter: whether these differ in brightness and contrast too; False: they are cropped and mirrored only.
        betas: AdamW's decay rates.
        labels: whether it is about the classes: `head` is then also given their number, and `loss` the images' ``labels (N,)``.
    """

    num_views: ClassVar[int] = 1
    jitter: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    labels: ClassVar[bool] = False

    def head(self, encoder: nn.Module) -> nn.Module:
        """Build the head for an encoder; its attribute ``objective`` tells methods that it is this one's.

        Raises:
            UserError: they do not fit.
        """
        raise NotImplementedError

    def initialise(self, encoder: nn.Module) -> None:
        """Draw the weights of a fresh encoder as the objective wants them, in place; by default they are as timm drew them."""

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
            share: the part of the batch that ``views`` are; None: all of it.

        Returns:
            scalar; with several ranks the mean over this rank's images, or on every rank the loss of the whole batch.
        """
        raise NotImplementedError
