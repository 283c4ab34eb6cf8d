"""Meta-learned fine-tuning: train a network so that a self-supervised step on an image alone helps to classify it.

MT3, Bartler et al., AISTATS 2022, arXiv 2103.16201. The step that test-time training will take is part of the training, and
is differentiated through. For every image on its own, from the network's parameters θ:

    θ' = θ − α · clip(∇_θ objective(θ; its views))      the inner step, taken by every trainable parameter
    loss = cross-entropy(θ'; the image) + weight · objective(θ'; the same views)

and the outer loss, the mean over images, is differentiated by θ, second derivatives included. Published settings: α 0.1, one
inner step, weight 0.1, gradients clipped at 10, SGD of lr 0.01 and momentum 0.9 outside, batches of 4 inner steps.

Those numbers are of its own objective, BYOL with (2 − 2 cos) both ways, which is four times as steep as `simsiam`'s mean of
−cos: with that one, α and weight of 0.1 there are 0.4 here, and clipping at 10 there is at 2.5.

What differs from the paper's released code: there an inner step is taken on 8 different images under one common augmentation,
a pair of views each (its option ``image_repetition``, for 8 pairs of one image, is off); here always on one image, as at test
time. There the gradient of each parameter is clipped; here an image's whole gradient, as by `InnerLoop.clip`.

The network works as it will at test time: in evaluation mode, so that BatchNorm normalises with its running statistics and
leaves them as they are (they must be of the source domain already, from pretraining) and nothing is dropped out; and without
autocast, which under ``vmap`` reaches some layers and misses others. Beside its activations, every image of a batch takes the
memory of about four copies of the parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tttlab.data.pixels import as_images
from tttlab.data.views import random_masks
from tttlab.errors import UserError
from tttlab.networks.gradients import clip_gradients
from tttlab.networks.network import Network, evaluating, places
from tttlab.networks.objective import Objective
from tttlab.objectives.mae import MAE, masked_error
from tttlab.objectives.simclr import SimCLR
from tttlab.training.trainer import Loss

Parameters = dict[str, Tensor]


def meta_loss(
    objective: Objective,
    weight: float,
    inner_lr: float,
    inner_steps: int = 1,
    clip: float | None = 10.0,
) -> Loss:
    """Make the loss of meta-learned fine-tuning; see the module.

    Its batches hold ``classify (N, 1, H, W, 3)``, ``labels (N,)`` and ``objective (N, P·V, H, W, 3)``: P times the objective's
    V ``num_views`` of each image, which are the little batch that the objective is a mean over.

    Args:
        objective: the self-supervised loss; a single image must be able to lower it.
        weight: of the objective in the outer loss.
        inner_lr: α.
        inner_steps: inner steps, all with the same views and masks.
        clip: largest norm of one image's inner gradient; None: no clipping.

    Returns:
        a loss with the terms of joint training, both of them after the inner steps.

    Raises:
        UserError: the objective contrasts images with each other.
    """
    if isinstance(objective, SimCLR):
        raise UserError(
            "meta-learned fine-tuning: expected an objective that one image alone can lower, found simclr, whose "
            "negatives are other images; choose another objective"
        )

    def loss(
        network: Network, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        share = batch.get("share")
        if share and share.ranks > 1:
            raise UserError(
                f"meta-learned fine-tuning: expected one process, found {share.ranks}; set machine.devices: 1"
            )
        network = getattr(
            network, "module", network
        )  # Fabric's wrapper has other names, and brings autocast
        # Contiguous, for under vmap GroupNorm asks what else they are, and gets no answer.
        images, views = (as_images(batch[name]).contiguous() for name in ("classify", "objective"))
        views = views.unflatten(1, (-1, objective.num_views))
        masks = draw_masks(objective, network, views, generator)
        classify = per_image(network, lambda network, image: network(image).logits[0])
        objectives_of = per_image(
            network,
            lambda network, views, *masks: image_objective(
                objective, network, views, masks, generator
            ),
        )
        with (
            evaluating(network),
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused attention has no second derivative
            parameters = expanded(network, len(images))
            for _ in range(inner_steps):
                parameters = inner_step(
                    objectives_of(parameters, views, *masks), parameters, inner_lr, clip
                )
            ours = objectives_of(parameters, views, *masks).mean()
            supervised = F.cross_entropy(classify(parameters, images), batch["labels"])
        return {
            "loss": supervised + weight * ours,
            "classification_loss": supervised,
            "objective_loss": ours,
        }

    return loss


def expanded(network: nn.Module, count: int) -> Parameters:
    """Give each of ``count`` images the trainable parameters, as one and the same memory: name → ``(count, *shape)``."""
    trainable = {
        name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    return {
        name: parameter.expand(count, *parameter.shape) for name, parameter in trainable.items()
    }


def inner_step(
    objectives: Tensor, parameters: Parameters, lr: float, clip: float | None
) -> Parameters:
    """Step every image's parameters down the gradient of its own objective, in a way that can be differentiated.

    Args:
        objectives: ``(B,)``, at ``parameters``.
        parameters: name → ``(B, *shape)``.
        lr: α.
        clip: largest norm of one image's gradient; None: no clipping.

    Returns:
        the parameters that influence the objective; the others stay the network's own.

    Raises:
        UserError: none does.
    """
    found = (None,) * len(parameters)
    if objectives.requires_grad:
        found = torch.autograd.grad(
            objectives.sum(), list(parameters.values()), create_graph=True, allow_unused=True
        )
    gradients = {
        name: gradient
        for name, gradient in zip(parameters, found, strict=True)
        if gradient is not None
    }
    if not gradients:
        raise UserError(
            "meta-learned fine-tuning: expected parameters that influence the objective, found none among the "
            f"{len(parameters)} trainable ones; train the encoder"
        )
    if clip is not None:
        gradients = clip_gradients(gradients, clip)
    return {name: parameters[name] - lr * gradient for name, gradient in gradients.items()}


class PerImage(nn.Module):
    """A function of a network, as a module: `functional_call` then replaces the parameters in all that the function does.

    A `Bound` network would do so in its forward pass alone, and an objective may use its head beside that.
    """

    def __init__(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *data: Tensor) -> Tensor:
        """Call the function with the network and ``data``."""
        return self.function(self.network, *data)


def per_image(network: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Vectorise ``function(network, *data of one image)`` over images to a function of stacked (parameters, data).

    With plain ``vmap``: `PerImageLayers` are made for first derivatives, and some of their second ones are wrong.
    """
    whole, found = PerImage(network, function), places(network)

    def call(parameters: Parameters, *data: Tensor) -> Tensor:
        values = {
            f"network.{place}": parameters[name]
            for place, name in found.items()
            if name in parameters
        }
        return functional_call(whole, values, data, tie_weights=False)

    return vmap(call, randomness="error")


def draw_masks(
    objective: Objective, network: Network, views: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Draw all images' masks, for under ``vmap`` nothing can be drawn.

    Args:
        objective: only MAE has masks.
        network: with its head.
        views: ``(B, P, 1, 3, H, W)``.
        generator: CPU stream.

    Returns:
        kept ``(B, P, L_keep)`` and hidden ``(B, P, L − L_keep)`` patch numbers; nothing for other objectives.
    """
    if not isinstance(objective, MAE):
        return ()
    masks = random_masks(
        [generator], views.shape[:2].numel(), network.head.num_patches, objective.mask_ratio
    )
    return tuple(mask[0].unflatten(0, views.shape[:2]).to(views.device) for mask in masks)


def image_objective(
    objective: Objective,
    network: Network,
    views: Tensor,
    masks: tuple[Tensor, ...],
    generator: torch.Generator,
) -> Tensor:
    """Compute the objective on one image.

    Args:
        objective: which one.
        network: with this image's parameters.
        views: ``(P, V, 3, H, W)``, a little batch.
        masks: this image's part of what `draw_masks` drew.
        generator: for the objective's signature; to draw from it here is an error.
    """
    if not masks:
        return objective.loss(network, views, generator)
    (keep, hidden), images = masks, views[:, 0]
    return masked_error(
        network(images, keep=keep).reconstruction, images, hidden, network.head.patch_size
    )
