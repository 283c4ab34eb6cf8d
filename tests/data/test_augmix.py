"""AugMix views: torchvision's operations on our crops, each image from its own stream."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tests.helpers import networks
from tttlab.config.inner_loop import Augmentation
from tttlab.data.augmix import augmix, draw_views
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.seeding import torch_generator

CROPS = Augmentation(min_scale=0.6, flip=True, jitter=0.1)
OPERATIONS = {
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
}


def draw(names, kind="augmix", count=4):
    images = torch.cat([networks.images(1, seed=int(name)) for name in names]).double()
    generators = [torch_generator(0, "views", name) for name in names]
    return draw_views(kind, images, generators, count, CROPS), images


def test_crops_are_the_random_views_of_every_other_method():
    found, images = draw("12", "crops")
    again = [torch_generator(0, "views", name) for name in "12"]
    expected = random_views(images, again, 4, CROPS)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-9)


def test_an_images_views_depend_on_its_own_stream_alone_and_leave_the_global_one_alone():
    state = torch.random.get_rng_state()
    together, _ = draw("123")
    assert torch.equal(torch.random.get_rng_state(), state)
    for place, name in enumerate("123"):
        alone, _ = draw(name)
        assert alone[0].numpy() == pytest.approx(together[place].numpy(), abs=1e-9)
    assert len({view.numpy().tobytes() for view in together.flatten(0, 1)}) == 12


def test_training_mixes_an_image_by_its_own_stream():
    pixels = (255 * networks.images(1, seed=1)[0]).byte().movedim(0, -1).numpy()
    kept, state = pixels.copy(), torch.random.get_rng_state()
    pixels.setflags(write=False)  # as files are mapped
    found = [augmix(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(pixels, kept)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    torch.manual_seed(int(np.random.default_rng(1).integers(2**62)))
    expected = v2.AugMix(severity=3, all_ops=False)(torch.from_numpy(kept).movedim(-1, 0))
    torch.random.set_rng_state(state)
    np.testing.assert_array_equal(found[0], expected.movedim(0, -1).numpy())


def test_a_view_is_torchvisions_augmix_of_its_crop(monkeypatch):
    """Without operations the mixture is the crop, in 256 tones; chains and kinds are counted."""
    seen = []

    def count(_self, image, name, *_, **__):
        seen.append(name)
        return image

    monkeypatch.setattr(v2.AugMix, "_apply_image_or_video_transform", count)
    found, images = draw("1234", count=25)
    again = [torch_generator(0, "views", name) for name in "1234"]
    crops = random_views(images, again, 25, CROPS).clamp(0, 1)
    # Rounded to a tone, then cut to one after mixing.
    assert (found - crops).abs().max() <= 1.51 / 255
    assert set(seen) == OPERATIONS
    # Three chains of one to three operations in each of 100 views: 600 expected, deviation 14.
    assert 530 < len(seen) < 670


def test_views_differ_from_crops_as_far_as_their_share_of_the_mixture_is_random():
    """The original's share is uniform, so that the distance to the crop spreads from nothing on."""
    found, images = draw("123456", count=40)
    again = [torch_generator(0, "views", name) for name in "123456"]
    crops = random_views(images, again, 40, CROPS).clamp(0, 1)
    distances = (found - crops).square().flatten(2).mean(-1).sqrt().flatten().numpy()
    least, median, most = np.quantile(distances, [0.05, 0.5, 0.95])
    assert least < 0.2 * most
    assert least < median < most
    assert found.min() >= 0
    assert found.max() <= 1
    assert (255 * found - (255 * found).round()).abs().max() < 1e-4


def test_images_that_are_normalised_already_are_refused():
    images = 3 * networks.images(1) - 1
    with pytest.raises(UserError, match=r"works on images in \[0, 1\], found values from -"):
        draw_views("augmix", images, [torch_generator(0, "a")], 2, CROPS)
