"""Meta-learned fine-tuning: training through a self-supervised step on each single image.

MT3, Bartler et al., AISTATS 2022, arXiv 2103.16201. The training contains the step that test-time
training will take, and differentiates through it. For every image alone, from the parameters θ:

    θ' = θ − α · clip(∇_θ objective(θ; views))        the inner step
    loss = cross-entropy(θ'; the image) + weight · objective(θ'; the same views)

The outer loss is the mean over images; its gradient by θ includes second derivatives. Published
settings: α 0.1, one inner step, weight 0.1, gradients clipped at 10, outer SGD with lr 0.01 and
momentum 0.9, batches of 4 inner steps.

The published objective is BYOL with (2 − 2 cos) in both directions, four times as steep as the mean
of −cos in `simsiam`. So with `simsiam` the published α and weight of 0.1 correspond to 0.4, and
clipping at 10 to clipping at 2.5.

Differences from the paper's released code: There an inner step takes 8 different images under one
common augmentation, with a pair of views each (the option ``image_repetition``, 8 pairs of one
image, is off); here it takes one image, as at test time. There the gradient of each parameter is
clipped; here an image's whole gradient, as in `InnerLoop.clip`.

The network runs as at test time, in evaluation mode: BatchNorm uses its running statistics and does
not change them (pretraining must have set them on the source domain), and dropout is off. Autocast
is off, because under ``vmap`` it reaches only some layers. Beside its activations, every image of a
batch takes the memory of about four copies of the parameters.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tttlab.data.pixels import as_images
from tttlab.data.views import random_masks
from tttlab.errors import UserError
from tttlab.networks.network import Network, evaluating
from tttlab.networks.objective import Objective
from tttlab.objectives.mae import MAE, masked_error
from tttlab.training.inner_steps import expanded, inner_parameters, inner_step, per_image
from tttlab.training.trainer import Loss


def meta_loss(
    objective: Objective,
    weight: float,
    inner_lr: float,
    inner_steps: int = 1,
    clip: float | None = 10.0,
    trainable: str = "all",
) -> Loss:
    """Make the loss of meta-learned fine-tuning; see the module's docstring.

    A batch holds ``classify (N, 1, H, W, 3)``, ``labels (N,)`` and, of each image V ``num_views``
    drawn P times, ``objective (N, P·V, H, W, 3)``; see `views_of`. An objective is the mean over
    the draws.

    Args:
        objective: the self-supervised loss; it must not need other images.
        weight: of the objective in the outer loss.
        inner_lr: α.
        inner_steps: their number, all with the same views and masks.
        clip: largest norm of one image's inner gradient; None: no clipping.
        trainable: what inner steps move: ``all`` | ``norm``; see `inner_parameters`.

    Returns:
        a loss with the terms of joint training, both measured after the inner steps.

    Raises:
        UserError: the objective contrasts images with each other.
    """
    if not objective.alone:
        raise UserError(
            "meta-learned fine-tuning: expected an objective that one image alone can lower, "
            f"found {type(objective).__name__}, which contrasts images; choose another objective"
        )

    def loss(
        network: Network, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        check_single_process(batch)
        # Fabric's wrapper renames the parameters and switches autocast on.
        network = getattr(network, "module", network)
        images, views = images_and_views(batch, objective)
        masks = draw_masks(objective, network, views, generator)
        classify = per_image(network, lambda network, image: network(image).logits[0])
        compute_objectives = per_image(network, partial(image_objective, objective, generator))
        # Fused attention has no second derivative.
        with evaluating(network), sdpa_kernel(SDPBackend.MATH):
            parameters = expanded(inner_parameters(network, trainable), len(images))
            for _ in range(inner_steps):
                objectives = compute_objectives(parameters, views, *masks)
                parameters = inner_step(objectives, parameters, inner_lr, clip)
            with torch.set_grad_enabled(weight != 0):
                self_supervised = compute_objectives(parameters, views, *masks).mean()
            supervised = F.cross_entropy(classify(parameters, images), batch["labels"])
        return {
            "loss": supervised + weight * self_supervised,
            "classification_loss": supervised,
            "objective_loss": self_supervised,
        }

    return loss


def views_of(batch: dict[str, Any]) -> Tensor:
    """Give the objective's views of a batch; if none are drawn, they are what is classified."""
    return batch["objective" if "objective" in batch else "classify"]


def images_and_views(batch: dict[str, Any], objective: Objective) -> tuple[Tensor, Tensor]:
    """Give what is classified ``(N, 1, 3, H, W)`` and the views ``(N, P, V, 3, H, W)``."""
    # Contiguous, because GroupNorm asks for the memory format, which fails under vmap.
    images, views = (
        as_images(pixels).contiguous() for pixels in (batch["classify"], views_of(batch))
    )
    return images, views.unflatten(1, (-1, objective.num_views))


def check_single_process(batch: dict[str, Any]) -> None:
    """Raise a `UserError` if several processes share a batch."""
    share = batch.get("share")
    if share and share.ranks > 1:
        raise UserError(
            f"meta-learned fine-tuning: expected one process, found {share.ranks}; "
            "set machine.devices: 1"
        )


def draw_masks(
    objective: Objective, network: Network, views: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Draw all images' masks beforehand: nothing can be drawn under ``vmap``.

    Args:
        objective: only MAE has masks.
        network: with the objective's head.
        views: ``(B, P, 1, 3, H, W)``.
        generator: CPU stream.

    Returns:
        indices of kept ``(B, P, L_keep)`` and hidden ``(B, P, L − L_keep)`` patches; empty for
        other objectives.
    """
    if not isinstance(objective, MAE):
        return ()
    masks = random_masks(
        [generator], views.shape[:2].numel(), network.head.num_patches, objective.mask_ratio
    )
    return tuple(mask[0].unflatten(0, views.shape[:2]).to(views.device) for mask in masks)


def image_objective(
    objective: Objective,
    generator: torch.Generator,
    network: Network,
    views: Tensor,
    *masks: Tensor,
) -> Tensor:
    """Compute the objective on one image.

    Args:
        objective: the objective.
        generator: for the objective's signature; drawing from it under ``vmap`` is an error.
        network: with this image's parameters.
        views: ``(P, V, 3, H, W)``.
        masks: this image's part of the masks from `draw_masks`.
    """
    if not masks:
        return objective.loss(network, views, generator)
    (keep, hidden), images = masks, views[:, 0]
    reconstruction = network(images, keep=keep).reconstruction
    return masked_error(reconstruction, images, hidden, network.head.patch_size)
