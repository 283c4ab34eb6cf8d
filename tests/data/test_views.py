"""Views and masks: what they may change; they depend on their image's stream alone."""

import pytest
import torch

from tests.helpers import networks
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import crop_transforms, jitter, random_masks, random_views
from tttlab.seeding import torch_generator


def streams(count: int) -> list[torch.Generator]:
    return [torch_generator(0, "views", index) for index in range(count)]


def test_no_augmentation_gives_the_image_back():
    images = networks.images(3)
    views = random_views(images, streams(3), 2, Augmentation(min_scale=1.0, flip=False, jitter=0.0))
    torch.testing.assert_close(views, images[:, None].expand_as(views), atol=1e-5, rtol=0)


def test_views_depend_on_their_own_stream_alone():
    images, augmentation = networks.images(4).double(), Augmentation(0.4, True, 0.5)
    together = random_views(images, streams(4), 3, augmentation)
    alone = random_views(images[2:3], streams(4)[2:3], 3, augmentation)
    torch.testing.assert_close(together[2:3], alone, atol=1e-12, rtol=0)
    assert not torch.allclose(together[0, 0], together[0, 1])


def test_a_flip_mirrors_and_crops_stay_inside():
    draws = torch.tensor([[1.0, 0.3, 0.8, 0.2], [0.0, 0.0, 1.0, 0.9], [0.5, 1.0, 1.0, 0.6]])
    transforms = crop_transforms(draws, Augmentation(min_scale=0.25, flip=True))
    mirrored = torch.tensor([[-1.0, 0, 0], [0, 1.0, 0]])  # the whole image
    torch.testing.assert_close(transforms[0], mirrored)
    quarter = torch.tensor([[0.5, 0, -0.5], [0, 0.5, 0.5]])  # in a corner
    torch.testing.assert_close(transforms[1], quarter)
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]).T
    assert (transforms @ corners).abs().max() <= 1 + 1e-6


def test_the_area_share_of_a_crop_is_uniform():
    draws = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    area = crop_transforms(draws, Augmentation(min_scale=0.3, flip=False))[:, 0, 0].square()
    assert area.min() >= 0.3
    assert area.mean() == pytest.approx(0.65, abs=0.005)


def test_jitter_by_hand():
    views = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)
    jittered = jitter(views, torch.tensor([[1.0, 0.0]]), 0.5).flatten()
    # brightness × 1.4, contrast × 0.6
    torch.testing.assert_close(jittered, torch.tensor([0.28, 0.4, 0.52]) * 1.4)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.99, 1), (0.01, 15)])
def test_masks_split_the_patches(ratio, kept):
    keep, hidden = random_masks(streams(5), 3, 16, ratio)
    assert keep.shape == (5, 3, kept)
    both = torch.cat([keep, hidden], dim=-1).sort(-1).values
    assert torch.equal(both, torch.arange(16).expand(5, 3, 16))


def test_every_patch_is_hidden_equally_often():
    _, hidden = random_masks([torch_generator(0)], 4000, 16, 0.75)
    share = torch.bincount(hidden.flatten(), minlength=16) / 4000
    assert (share - 0.75).abs().max() < 0.03
