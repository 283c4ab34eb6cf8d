"""Dressed: source images are made to look like the test image, and the network learns from them.

What is strange about the one test image, beyond the natural variation of source images, is
estimated from its spectrum and colours and done to a small bank of source images
(`tttlab.data.dressing`). Of them one knows what they show. So (a) BatchNorm's statistics are taken
from the dressed images, of which there are many, instead of from the one test image, of which there
is one; and (b) steps can be taken along a loss whose gradient agrees with the task by construction:
the network should say of a dressed image what the source network says of the same image undressed.

``steps: 0`` is (a) alone. A network without BatchNorm has no statistics to take, and only the steps
can help it. On a clean image there is mostly nothing strange, and nothing changes.

Our own; no paper. Relatives: Fourier domain adaptation (Yang and Soatto, CVPR 2020), AdaBN (Li et
al., 2017, arXiv 1603.04779), whose statistics are those of many target images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State, divergence
from tttlab.adaptation.normalisation import normalised_by
from tttlab.config.inner_loop import Augmentation
from tttlab.data.deteriorating import white_noise
from tttlab.data.dressing import Appearance, appearance, dressed, strangeness
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Spread, Statistics, indexed_images, shuffled_parts


@dataclass(frozen=True)
class Dressed(Method):
    """Normalise by source images dressed as the test image, and train on them.

    Attributes:
        num_images: dressed images at every step, and for the statistics.
        bank: source images to choose from; what is natural is measured on all source images.
        tolerance: squared distance from the mean source image, in units of natural variation, that
            still counts as natural.
        share: of the test image's own statistics among those that normalise it.
        num_views: random views that the prediction is averaged over, beside the image itself.
    """

    needs = ("dressing",)
    normalises = True
    num_images: Annotated[int, Ge(2)] = 32
    bank: Annotated[int, Ge(2)] = 256
    tolerance: Annotated[float, Ge(0)] = 2.0
    share: Annotated[float, Ge(0), Le(1)] = 0.0
    num_views: Annotated[int, Ge(0)] = 0
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the natural appearance of source images ``(N, 3, H, W)``, and keep the bank.

        Returns:
            ``dressing.<log_power | mean>_<center | scale>``; ``dressing.images`` and
            ``dressing.probabilities``, the source network's, of the bank; ``dressing.range``, the
            lowest and highest value of its pixels.
        """
        count, look = indexed_images(batches)
        if count < 2:
            raise UserError(f"expected at least two source images, found {count}")
        parts = shuffled_parts(torch.arange(count), -(-count // self.num_images))
        spreads = {name: Spread() for name in Appearance._fields}
        bank = look(torch.cat(parts)[: self.bank])
        for part in parts:
            for name, values in appearance(look(part))._asdict().items():
                spreads[name].add(Spread.of(values))
        network = as_network(network)
        with evaluating(network), torch.no_grad():
            logits = torch.cat([network(part).logits for part in bank.split(self.num_images)])
        measured = {}
        for name, spread in spreads.items():
            measured[f"{name}_center"] = spread.mean.to(bank)
            measured[f"{name}_scale"] = spread.variance().sqrt().clamp_min(1e-6).to(bank)
        found = {
            "images": bank,
            "probabilities": logits.softmax(-1),
            "range": torch.stack(bank.aminmax()),
        }
        return {f"dressing.{name}": value for name, value in {**measured, **found}.items()}

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Draw what is dressed, and what predictions look at.

        Returns:
            ``start (B, 1)`` in [0, 1), where to begin in the bank; white ``noise (B, n, 3, H, W)``;
            ``looks (B, 1 + V, 3, H, W)``.
        """
        draws = [torch.rand(1, generator=generator) for generator in generators]
        shown = images.unsqueeze(1).expand(-1, self.num_images, -1, -1, -1)
        streams = [generator for generator in generators for _ in range(self.num_images)]
        noise = white_noise(shown.flatten(0, 1), streams).unflatten(0, shown.shape[:2])
        looks = images.unsqueeze(1)
        if self.num_views:
            views = random_views(images, generators, self.num_views, self.augmentation)
            looks = torch.cat([looks, views], dim=1)
        return {"start": torch.stack(draws).to(images), "noise": noise, "looks": looks}

    def loss(
        self, net: Bound, views: dict[str, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Divergence, in nats, from what the source network says of the images undressed."""
        images, targets = self.dress(views, statistics)
        with normalised_by(net.module, len(images)):
            logits = net(images).logits
        return divergence(targets, logits).mean(), state

    def predict(
        self, net: Bound, image: Tensor, views: dict[str, Tensor], statistics: Statistics
    ) -> Tensor:
        """Classify the image and its views, normalised by the dressed images: logits ``(K,)``."""
        images, _ = self.dress(views, statistics)
        with normalised_by(net.module, len(images), self.share):
            logits = net(torch.cat([views["looks"], images])).logits[: -len(images)]
        return log_mean_probabilities(logits) if self.num_views else logits[0]

    def dress(self, views: dict[str, Tensor], statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Dress the bank's images from ``start`` on as the image.

        Returns:
            images ``(n, 3, H, W)`` and their probabilities ``(n, K)``.
        """

        def measured(of: str) -> Appearance:
            return Appearance(*(statistics[f"dressing.{name}_{of}"] for name in Appearance._fields))

        center = measured("center")
        image = appearance(views["looks"][0])
        difference = strangeness(image, center, measured("scale"), self.tolerance)
        bank, count = statistics["dressing.images"], torch.arange(self.num_images)
        start = (views["start"] * len(bank)).long()
        chosen = (start + count.to(start.device)) % len(bank)
        images = dressed(bank[chosen], views["noise"], difference, center)
        lowest, highest = statistics["dressing.range"]
        return images.clamp(lowest, highest), statistics["dressing.probabilities"][chosen]
