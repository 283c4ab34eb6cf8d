"""EATA: be sure of the test images that are reliable and novel, and stay near the source weights.

Niu et al., ICML 2022, arXiv 2204.02610: images are left out if their entropy exceeds a share of the
largest possible one, or if their class probabilities are similar to the moving average over the
images learnt from so far. The others weigh the more, the surer their prediction. A penalty,
β Σ F (θ − θ_source)², holds the weights that matter on the source domain. F is the Fisher
information of the network's own predictions, measured on unlabeled source images (2,000 in the
paper).

In params.yaml the rest is the adapter's: ``trainable: norm``, ``normalisation: image``. For
ImageNet the published code takes SGD with momentum 0.9, ``lr: 2.5e-4``, batches of 64,
``epsilon: 0.05``, ``beta: 2000``. Our defaults are the values for CIFAR-10.

What differs: the published code measures F with batch statistics, ours in evaluation mode; it
returns the predictions before the step, ours are made after it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State, entropy
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics, indexed_images, shuffled_parts
from tttlab.runtime.group_size import GroupSize, in_groups

# The scale of β depends on this size: the gradients of different images partly cancel in a batch's
# mean, so that its square is smaller for larger batches.
FISHER_BATCH = 64


@dataclass(frozen=True)
class EATA(Method):
    """Minimise the weighted entropy of reliable and novel predictions, near the source.

    Attributes:
        margin: share of log K, the largest entropy, beyond which an image is left out.
        epsilon: cosine similarity to the average probabilities from which an image is left out.
            Sure predictions of K equally frequent classes have similarity 1/√K, so that a smaller
            value leaves all of them out. Published: 0.4 for 10 classes, 0.05 for 1000.
        memory: share of the old average in the new one.
        beta: β, weight of the penalty; 1 for CIFAR, 2000 for ImageNet; 0, no penalty, is the
            paper's ETA.
    """

    protocols = ("online",)
    whole_batch = True
    needs = ("fisher",)
    margin: Annotated[float, Gt(0)] = 0.4
    epsilon: Annotated[float, Gt(0)] = 0.4
    memory: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta: Annotated[float, Ge(0)] = 1.0

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the Fisher information on source images ``(N, 3, H, W)``.

        Returns:
            ``fisher.<parameter>``, of the parameter's shape.
        """
        network = as_network(network)
        count, look = indexed_images(batches)
        parts = shuffled_parts(torch.arange(count), math.ceil(count / FISHER_BATCH))
        with evaluating(network):
            information = fisher_information(network, map(look, parts))
        return {f"fisher.{name}": value for name, value in information.items()}

    def init_state(self) -> State:
        """Give the average probabilities: at first zero, to which nothing is similar."""
        return torch.zeros(1)

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Weighted entropy, in nats, mean over the selected images, plus the penalty.

        The images are ``views (N, 3, H, W)``; the loss is 0 if none is selected.
        """
        logits = net(views).logits
        entropies, probabilities = entropy(logits), logits.detach().softmax(-1)
        threshold = self.margin * math.log(logits.shape[-1])
        selected = (entropies < threshold) & is_novel(probabilities, state, self.epsilon)
        weights = (threshold - entropies.detach()).exp() * selected
        loss = (weights * entropies).sum() / selected.sum().clamp_min(1)
        if self.beta:
            loss = loss + self.beta * selected.any() * fisher_penalty(net, statistics)
        return loss, moving_average(state, probabilities, selected, self.memory)


def is_novel(probabilities: Tensor, average: Tensor, epsilon: float) -> Tensor:
    """Tell which probabilities ``(N, K)`` are unlike the average ``(K,)`` so far: ``(N,)``."""
    average = average.expand(probabilities.shape[-1])
    return F.cosine_similarity(probabilities, average, dim=-1).abs() < epsilon


def moving_average(
    average: Tensor, probabilities: Tensor, selected: Tensor, memory: float
) -> Tensor:
    """Update the average by the mean of the selected probabilities.

    Args:
        average: ``(K,)``, or zero at first.
        probabilities: ``(N, K)``.
        selected: ``(N,)``.
        memory: share of the old average in the new one.
    """
    mean = (probabilities * selected[:, None]).sum(0) / selected.sum().clamp_min(1)
    updated = torch.where(average.any(), memory * average + (1 - memory) * mean, mean)
    return torch.where(selected.any(), updated, average)


def fisher_penalty(net: Bound, statistics: Statistics) -> Tensor:
    """Sum of the weights' squared distances from the source weights times Fisher information.

    Raises:
        UserError: a trained parameter is none of the source network's.
    """
    if any(f"fisher.{name}" not in statistics for name in net.trained):
        raise UserError(
            "beta: the penalty weighs the source network's parameters by their Fisher information, "
            "and trainable: lora trains others; expected trainable: norm, or beta: 0"
        )
    return sum(
        (statistics[f"fisher.{name}"] * (value - net.source[name]).square()).sum()
        for name, value in net.trained.items()
    )


def fisher_information(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean over batches ``(N, 3, H, W)`` of the squared gradient of a batch's mean loss.

    The loss is the cross-entropy with the class that the network predicts.

    Returns:
        by parameter.
    """
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    sums = [torch.zeros_like(value) for value in parameters.values()]
    count = 0
    sizes = GroupSize(largest=FISHER_BATCH, timed=False)
    for images in batches:
        gradients = mean_gradient(network, list(parameters.values()), images, sizes)
        sums = [total + slope.square() for total, slope in zip(sums, gradients, strict=True)]
        count += 1
    return {name: (total / count).detach() for name, total in zip(parameters, sums, strict=True)}


def mean_gradient(
    network: nn.Module, parameters: list[nn.Parameter], images: Tensor, sizes: GroupSize
) -> list[Tensor]:
    """Differentiate the mean loss of a batch ``(N, 3, H, W)``, group by group."""

    def group_gradient(group: slice) -> tuple[Tensor, ...]:
        logits = network(images[group]).logits
        loss = F.cross_entropy(logits, logits.argmax(-1), reduction="sum") / len(images)
        # A self-supervised head has no part in the logits; its gradient is zero.
        return torch.autograd.grad(loss, parameters, materialize_grads=True)

    gradient = [torch.zeros_like(value) for value in parameters]
    for group in in_groups(group_gradient, len(images), images.device, sizes):
        gradient = [total + slope for total, slope in zip(gradient, group, strict=True)]
    return gradient
