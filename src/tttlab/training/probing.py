"""Quality of a network on labeled images that it is not trained on."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.networks.network import Network
from tttlab.runtime.group_size import FORWARD_LARGEST, Wish, as_sizes, in_groups

NEIGHBOURS = 20


class Encoded(NamedTuple):
    """``features (N, D)``, ``logits (N, K)`` and ``labels (N,)`` of an image set, on the CPU.

    Where a network's features are unknown, D is 0.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


@torch.no_grad()
def encode(network: Network, images: ImageSet, images_per_step: Wish = "auto") -> Encoded:
    """Run the network on all images without augmentation; leaves it in evaluation mode.

    Args:
        network: runs on the device that it is on.
        images: the images.
        images_per_step: images per forward pass; changes only time and memory.
    """
    network.eval()
    device = next(network.parameters()).device

    def look(part: slice) -> tuple[Tensor, Tensor]:
        outputs = network(as_images(torch.from_numpy(images.pixels[part].copy()).to(device)))
        features, logits = outputs.features, outputs.logits.float().cpu()
        return logits[:, :0] if features is None else features.float().cpu(), logits

    sizes = as_sizes(images_per_step, largest=FORWARD_LARGEST, timed=False)
    features, logits = zip(*in_groups(look, len(images), device, sizes), strict=True)
    return Encoded(torch.cat(features), torch.cat(logits), torch.from_numpy(images.labels.copy()))


def classification(encoded: Encoded) -> dict[str, float]:
    """Measure cross-entropy and accuracy of the logits."""
    loss = F.cross_entropy(encoded.logits, encoded.labels)
    correct = encoded.logits.argmax(-1) == encoded.labels
    return {"validation_loss": loss.item(), "validation_accuracy": correct.float().mean().item()}


def knn_accuracy(
    train: Encoded, test: Encoded, neighbours: int = NEIGHBOURS, temperature: float = 0.1
) -> float:
    """Classify images by their nearest neighbours, weighted by e^{cosine similarity / temperature}.

    Args:
        train: labeled neighbours.
        test: images to classify.
        neighbours: k; limited to the number of training images.
        temperature: the lower, the more weight the nearest neighbours have.

    Returns:
        accuracy on ``test``.

    Reference:
        Wu et al., CVPR 2018, arXiv 1805.01978, section 3.4 (there k = 200, temperature 0.07).
    """
    bank = F.normalize(train.features, dim=-1)
    classes = int(train.labels.max()) + 1
    correct = 0
    for features, labels in zip(test.features.split(1024), test.labels.split(1024), strict=True):
        similarities = F.normalize(features, dim=-1) @ bank.T
        nearest, indices = similarities.topk(min(neighbours, len(bank)), dim=-1)
        weights = (nearest / temperature).exp().unsqueeze(-1)
        votes = weights * F.one_hot(train.labels[indices], classes)
        correct += int((votes.sum(1).argmax(-1) == labels).sum())
    return correct / len(test.labels)
