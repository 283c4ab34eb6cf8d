"""Symmetries: one class for the image, mirrored, turned, and with its colours exchanged.

In the spirit of VARC's test-time training (Hu et al., 2025, arXiv 2511.14761). VARC trains on the
labeled demonstrations of one puzzle, as they are, turned by 90°, 180° and 270°, or mirrored along
either axis, each under ten permutations of the colours, and votes over such views. Here there is
one image and no label. The views are the image under flips or turns and permutations of the colour
channels, and the loss is the mean over views of the Kullback–Leibler divergence from the views'
mean prediction,

    (1/V) Σᵥ KL(pᵥ ‖ p̄) = H(p̄) − (1/V) Σᵥ H(pᵥ),    p̄ = (1/V) Σᵥ pᵥ.

This is their Jensen–Shannon divergence, between 0, where they agree, and log V. Unlike MEMO's
entropy of p̄ it does not reward being sure, but a constant prediction minimises it too: take few
steps, above all on streams.

The symmetry must hold for the classes: a mirrored or turned digit is no digit, a turned photograph
is unusual, and exchanged channels change classes defined by their colour. The default is the
mildest symmetry. A network that already ignores a symmetry, as one trained on flipped images nearly
does, learns little from it. Nothing is needed of the source domain. The prediction is that of the
image as it is. lr, steps and trainable are the adapter's; VARC's (Adam, 3e-4, 100 epochs, all) suit
its own networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.data.views import log_mean_probabilities
from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics

# The first three orders form a group, and so do all six: a view has the same views as its image.
CHANNEL_ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))


@dataclass(frozen=True)
class Symmetries(Method):
    """Minimise the disagreement of the predictions under symmetries of the image.

    Attributes:
        geometry: ``flips``: the image and its mirror image | ``dihedral``: its four turns by 90°,
            each mirrored and not.
        permutations: orders of the colour channels: 1: as they are | 3: the cyclic ones | 6: all;
            the views are all pairs of a geometry and an order.
        num_views: V, views drawn without repetition for every image and step; None: all.
    """

    protocols = ("episodic", "online")
    geometry: Literal["flips", "dihedral"] = "flips"
    permutations: Literal[1, 3, 6] = 1
    num_views: Annotated[int, Ge(2)] | None = None

    def check(self, network: nn.Module) -> None:
        """Refuse to draw more views than there are."""
        count = (2 if self.geometry == "flips" else 8) * self.permutations
        if self.num_views and self.num_views > count:
            raise UserError(
                f"method symmetries: geometry {self.geometry!r} and permutations "
                f"{self.permutations} make {count} views, found num_views {self.num_views}; "
                "lower it, or set null for all"
            )

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Transform ``images (B, C, H, W)`` to ``(B, V, C, H, W)``.

        Where all views are taken, the image itself is the first.

        Raises:
            UserError: colours are to be exchanged, and there are not three.
        """
        pixels = pixel_orders(*images.shape[-2:], self.geometry).to(images.device)
        depth = images.shape[1]
        if self.permutations > 1 and depth != 3:
            raise UserError(
                f"method symmetries: permutations {self.permutations} exchanges three colours, "
                f"found images of {depth} channels; set permutations: 1"
            )
        of_channels = CHANNEL_ORDERS[: self.permutations] if depth == 3 else [range(depth)]
        channels = torch.tensor([[*order] for order in of_channels], device=images.device)
        count = len(pixels) * len(channels)
        if self.num_views:
            orders = [torch.randperm(count, generator=generator) for generator in generators]
            numbers = torch.stack(orders)[:, : self.num_views]
        else:
            numbers = torch.arange(count).expand(len(images), -1)
        numbers = numbers.to(images.device)
        return reordered(images, channels[numbers // len(pixels)], pixels[numbers % len(pixels)])

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Jensen–Shannon divergence, in nats, of the predictions for ``views (V, 3, H, W)``."""
        return disagreement(net(views).logits), state


def disagreement(logits: Tensor) -> Tensor:
    """Mean divergence KL(pᵥ ‖ p̄) of the views' class probabilities, from ``logits (V, K)``."""
    log_p, log_mean = logits.log_softmax(-1), log_mean_probabilities(logits)
    return (log_p.exp() * (log_p - log_mean)).sum(-1).mean()


def pixel_orders(height: int, width: int, geometry: str) -> Tensor:
    """Give for every geometry the numbers of the pixels in their new order.

    Returns:
        ``(G, H·W)``, the identity first.

    Raises:
        UserError: a turn would change the shape of the images.
    """
    if geometry == "dihedral" and height != width:
        raise UserError(
            "method symmetries: geometry 'dihedral' needs square images, "
            f"found {height}×{width}; set flips"
        )
    numbers = torch.arange(height * width).view(height, width)
    turned = [numbers.rot90(turns) for turns in range(4 if geometry == "dihedral" else 1)]
    return torch.stack([view.flatten() for turn in turned for view in (turn, turn.flip(-1))])


def reordered(images: Tensor, channels: Tensor, pixels: Tensor) -> Tensor:
    """Reorder the images' channels and pixels.

    Args:
        images: ``(B, C, H, W)``.
        channels: ``(B, V, C)``, for every view the channels' numbers.
        pixels: ``(B, V, H·W)``, for every view the pixels' numbers.

    Returns:
        ``(B, V, C, H, W)``.
    """
    rows = torch.arange(len(images), device=images.device)[:, None, None, None]
    views = images.flatten(2)[rows, channels[..., None], pixels[..., None, :]]
    return views.unflatten(-1, images.shape[-2:])
