"""ActMAD on views: many views of one image stand for the batch that the published maps need.

Mirza et al., CVPR 2023, arXiv 2211.12870, match mean and variance over a *batch*, at every position
of the activations, to the source domain's (`tttlab.methods.actmad_batch`). Here the batch is V
random views of the one image, and the distance is the published one: half the sum over layers of
the mean absolute differences of both maps. The source's maps are means over source images, each
with V views of its own: views of one image vary less than images do, and both sides must be
measured alike.

It needs source images for these maps. With one view there is no variance, and `actmad` is the
variant.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.actmad_batch import discrepancy, map_names, matched_layers, moments
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics, indexed_images
from tttlab.networks.taps import record
from tttlab.seeding import torch_generator


@dataclass(frozen=True)
class ViewsActMAD(Method):
    """Match the moments of activations over an image's views, at every position, to the source.

    Attributes:
        num_views: V, of the test image at every step and of every source image.
    """

    needs = ("view_maps",)
    num_views: Annotated[int, Ge(2)] = 16
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def check(self, network: nn.Module) -> None:
        """Refuse a network without the layers to match."""
        matched_layers(network)

    @torch.no_grad()
    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Average both maps over source images: ``view_maps.<layer>.mean`` and ``.variance``."""
        network = as_network(network)
        layers = matched_layers(network)
        count, look = indexed_images(batches)
        if not count:
            raise UserError("expected source images, found none")
        sums: Statistics = {}
        with evaluating(network), record(network, layers) as activations:
            for index in range(count):
                stream = [torch_generator(0, "source views", index)]
                image = look(torch.tensor([index]))
                network(random_views(image, stream, self.num_views, self.augmentation)[0])
                for layer in layers:
                    maps = moments(activations[layer].double())
                    for name, value in zip(map_names(layer, "view_maps"), maps, strict=True):
                        sums[name] = sums.get(name, 0) + value
        dtype = next(network.parameters()).dtype
        return {name: (value / count).to(dtype) for name, value in sums.items()}

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw ``(B, V, 3, H, W)`` fresh views."""
        return random_views(images, generators, self.num_views, self.augmentation)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Discrepancy of ``views (V, 3, H, W)``, half the sum over the matched layers."""
        return discrepancy(net, views, statistics, "view_maps"), state
