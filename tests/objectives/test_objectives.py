"""The self-supervised losses against loops over single numbers."""

import math

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss

from tests.helpers import networks
from tttlab.data.views import random_masks
from tttlab.errors import UserError
from tttlab.objectives.mae import MAE, encode_visible, masked_error
from tttlab.objectives.simclr import SimCLR, bank_contrast
from tttlab.seeding import torch_generator


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def test_bank_contrast_equals_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 6, generator=generator).double()
    bank = torch.randn(9, 6, generator=generator).double()
    total, tau = 0.0, 0.3
    for i in range(4):
        negatives = sum(math.exp(cosine(views[i].numpy(), row.numpy()) / tau) for row in bank)
        for j in range(4):
            if i != j:
                positive = math.exp(cosine(views[i].numpy(), views[j].numpy()) / tau)
                total -= math.log(positive / (positive + negatives))
    assert bank_contrast(views, bank, tau).item() == pytest.approx(total / 12, rel=1e-12)


def test_two_views_against_the_rest_of_the_batch_are_lightlys_loss():
    """With the other images' projections as bank, the mean over images is the batch's NT-Xent."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    views, losses = torch.stack([first, second], dim=1), []
    for image in range(5):
        bank = views[torch.arange(5) != image].flatten(0, 1)
        losses.append(bank_contrast(views[image], bank, 0.5))
    expected = NTXentLoss(0.5, memory_bank_size=0)(first, second)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_the_published_loss_has_no_gradient_on_one_image():
    views = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    NTXentLoss(0.5, memory_bank_size=0)(views[0], views[1]).backward()
    assert not views.grad.any()
    bank = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    projections = views.detach()[:, 0].clone().requires_grad_()
    bank_contrast(projections, bank, 0.5).backward()
    assert projections.grad.abs().max() > 1e-3


def test_masked_error_equals_a_loop_over_patches():
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    reconstruction = torch.rand(2, 4, 48, generator=generator)
    hidden = torch.tensor([[0, 3], [2, 1]])
    errors = []
    for n in range(2):
        for patch in hidden[n].tolist():
            row, column = divmod(patch, 2)
            for y in range(4):
                for x in range(4):
                    for c in range(3):
                        target = images[n, c, 4 * row + y, 4 * column + x]
                        predicted = reconstruction[n, patch, (y * 4 + x) * 3 + c]
                        errors.append(float(predicted - target) ** 2)
    error = masked_error(reconstruction, images, hidden, 4)
    assert error.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_hidden_pixels_never_reach_the_encoder():
    network, _ = networks.source_statistics("vit")
    images = networks.images(2, seed=6).double()
    keep, hidden = random_masks([torch_generator(0)], 2, 16, 0.75)
    changed = images.clone()
    for n in range(2):
        for patch in hidden[0, n].tolist():
            row, column = divmod(patch, 4)
            changed[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.123
    with torch.no_grad():
        before, after = (
            network(pixels, keep=keep[0]).reconstruction for pixels in (images, changed)
        )
    assert torch.equal(before, after)


def test_visible_tokens_only_is_the_whole_transformer_when_all_are_visible():
    network, _ = networks.source_statistics("vit")
    images = networks.images(2, seed=8).double()
    all_tokens = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        encoded = encode_visible(network.encoder, images, all_tokens)
        torch.testing.assert_close(encoded, network.encoder.forward_features(images))


def test_mae_names_what_it_needs():
    network, _ = networks.source_statistics("resnet")
    with pytest.raises(UserError, match=r"needs a plain timm vision transformer.*found ResNet"):
        MAE().head(network.encoder)


def test_training_losses_follow_their_definitions():
    resnet, _ = networks.source_statistics("resnet")
    views = networks.images(12, seed=3).double().view(6, 2, 3, 16, 16)
    with torch.no_grad():
        loss = SimCLR(temperature=0.7).loss(resnet, views, torch.Generator())
        projections = [resnet(views[:, v]).projections for v in range(2)]
    torch.testing.assert_close(loss, NTXentLoss(0.7, memory_bank_size=0)(*projections))
    vit, _ = networks.source_statistics("vit")
    with torch.no_grad():
        loss = MAE().loss(vit, views[:, :1], torch_generator(5))
        keep, hidden = random_masks([torch_generator(5)], 6, 16, 0.75)
        reconstruction = vit(views[:, 0], keep=keep[0]).reconstruction
        expected = masked_error(reconstruction, views[:, 0], hidden[0], 4)
    torch.testing.assert_close(loss, expected)
