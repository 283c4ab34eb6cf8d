"""Dressed: source images are made to look like the test image, and the network learns from them.

What is strange about the one test image, beyond the natural variation of source images, is
estimated from its spectrum and colours and done to a small bank of source images
(`tttlab.data.dressing`). Of them one knows everything. So (a) what dressing did to their
activations is undone in the test image's (`tttlab.adaptation.moment_matching`); and (b) steps can
be taken along a loss whose gradient agrees with the task by construction: the network should say of
a dressed image what the source network says of the same image undressed.

``steps: 0`` is (a) alone. On a clean image there is mostly nothing strange, and nothing changes.

Our own; no paper. Relatives: Fourier domain adaptation (Yang and Soatto, CVPR 2020), AdaBN (Li et
al., 2017, arXiv 1603.04779), whose statistics are those of many target images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State, divergence
from tttlab.adaptation.moment_matching import matching_layers, moments_matched, observe, together
from tttlab.config.inner_loop import Augmentation
from tttlab.data.deteriorating import white_noise
from tttlab.data.dressing import Appearance, appearance, dressed, strangeness
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Spread, Statistics, indexed_images, shuffled_parts
from tttlab.networks.taps import Moments


@dataclass(frozen=True)
class Dressed(Method):
    """Undo what dressing does to source images' activations, and train on them.

    Attributes:
        num_images: dressed images, in the prediction and at every step.
        bank: source images to choose from; what is natural is measured on all source images.
        tolerance: squared distance from the mean source image, in units of natural variation, that
            still counts as natural.
        num_views: random views that the prediction is averaged over, beside the image itself.
    """

    needs = ("dressing",)
    normalises = True
    num_images: Annotated[int, Ge(2)] = 16
    bank: Annotated[int, Ge(2)] = 256
    tolerance: Annotated[float, Ge(0)] = 2.0
    num_views: Annotated[int, Ge(0)] = 0
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def averaged_views(self) -> int:
        """Tell how many views the prediction averages over."""
        return self.num_views

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the natural appearance of source images ``(N, 3, H, W)``, and keep the bank.

        Returns:
            ``dressing.<log_power | mean>_<center | scale>``; of the bank, ``dressing.images``, the
            source network's ``dressing.probabilities`` and, at every layer where moments are
            matched, ``dressing.<layer>.<mean | log_variance>``, each ``(bank, C)``;
            ``dressing.range``, the lowest and highest value of its pixels.
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
        measured = self._look_at(as_network(network), bank)
        for name, spread in spreads.items():
            measured[f"{name}_center"] = spread.mean.to(bank)
            measured[f"{name}_scale"] = spread.variance().sqrt().clamp_min(1e-6).to(bank)
        measured |= {"images": bank, "range": torch.stack(bank.aminmax())}
        return {f"dressing.{name}": value for name, value in measured.items()}

    @torch.no_grad()
    def _look_at(self, network: nn.Module, bank: Tensor) -> Statistics:
        """Give the source network's probabilities of the bank, and its activations' moments."""

        def look(images: Tensor) -> Statistics:
            outputs, moments = observe(network, images)
            found = {
                f"{layer}.{name}": value
                for layer, each in moments.items()
                for name, value in each._asdict().items()
            }
            return {"probabilities": outputs.logits.softmax(-1), **found}

        with evaluating(network):
            looks = [look(images) for images in bank.split(self.num_images)]
        return {name: torch.cat([found[name] for found in looks]) for name in looks[0]}

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
        images, chosen = self.dress(views, statistics)
        with moments_matched(net.module, undressed(net.module, statistics, chosen)):
            logits = net(images).logits
        return divergence(statistics["dressing.probabilities"][chosen], logits).mean(), state

    def predict(
        self, net: Bound, image: Tensor, views: dict[str, Tensor], statistics: Statistics
    ) -> Tensor:
        """Classify the image and its views, moments matched: logits ``(K,)``."""
        images, chosen = self.dress(views, statistics)
        wanted = undressed(net.module, statistics, chosen)
        with moments_matched(net.module, wanted) as found:
            net(images)
        with moments_matched(net.module, wanted, found):
            logits = net(views["looks"]).logits
        return log_mean_probabilities(logits) if self.num_views else logits[0]

    def dress(self, views: dict[str, Tensor], statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Dress the bank's images from ``start`` on as the image.

        Returns:
            images ``(n, 3, H, W)`` and their places in the bank ``(n,)``.
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
        return images.clamp(lowest, highest), chosen


def undressed(network: nn.Module, statistics: Statistics, chosen: Tensor) -> dict[str, Moments]:
    """Give the moments of some of the bank's images, as they are, at every layer."""

    def each(layer: str) -> Moments:
        names = [f"dressing.{layer}.{name}" for name in Moments._fields]
        return Moments(*(statistics[name][chosen] for name in names))

    return {layer: together(each(layer)) for layer in matching_layers(network)}
