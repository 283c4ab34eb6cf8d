"""Masked autoencoding at test time: reconstruct the image from a quarter of it, under many masks.

Gandelsman et al., NeurIPS 2022, arXiv 2209.07522: the encoder is trained, the decoder is frozen,
and identical centre crops are seen under different random masks. Pixels are in [0, 1]; the
published loss normalises those of each patch. Needs nothing from the source domain but the decoder
of pretraining and fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.data.views import random_masks
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.mae import masked_error


@dataclass(frozen=True)
class MAETraining(Method):
    """Reconstruct the hidden patches of one image.

    Attributes:
        num_views: V, masks drawn at every step.
        mask_ratio: share of patches hidden.
    """

    protocols = ("episodic", "online")
    head = "mae"
    num_views: Annotated[int, Ge(1)] = 8
    mask_ratio: Annotated[float, Gt(0), Lt(1)] = 0.75

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Draw fresh masks over the L patches.

        Returns:
            ``image (B, 1, 3, H, W)``, ``keep (B, V, L_keep)`` and ``hidden (B, V, L − L_keep)``.
        """
        patches = network.head.num_patches
        keep, hidden = random_masks(generators, self.num_views, patches, self.mask_ratio)
        return {
            "image": images.unsqueeze(1),
            "keep": keep.to(images.device),
            "hidden": hidden.to(images.device),
        }

    def loss(
        self, net: Bound, views: dict[str, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Mean squared error on the hidden patches, mean over the masks."""
        images = views["image"].expand(len(views["keep"]), -1, -1, -1)
        reconstruction = net(images, keep=views["keep"]).reconstruction
        patch_size = net.module.head.patch_size
        return masked_error(reconstruction, images, views["hidden"], patch_size), state
