"""ActMAD on views: both sides are measured alike, by the published distance."""

import pytest
import torch

from tests.helpers import networks
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.methods.actmad_views import ViewsActMAD
from tttlab.networks.network import Bound
from tttlab.networks.taps import batch_norm_layers, record, token_layers
from tttlab.seeding import torch_generator

STILL = Augmentation(min_scale=1.0, flip=False, jitter=0.0)


def layers_of(network):
    return batch_norm_layers(network) or token_layers(network)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_sources_maps_are_means_over_images_of_moments_over_their_views(kind):
    network, _ = networks.source_statistics(kind, torch.float64)
    images, method = networks.images(5, seed=3).double(), ViewsActMAD(num_views=4)
    found = method.source_statistics(network, [images[:3], images[3:]])
    layers, sums = layers_of(network), {}
    for index, image in enumerate(images):
        stream = [torch_generator(0, "source views", index)]
        views = random_views(image[None], stream, 4, method.augmentation)[0]
        for layer in layers:
            with record(network, [layer]) as kept, torch.no_grad():
                network(views)
            values = kept[layer]
            mean = sum(values) / 4
            variance = sum((value - mean) ** 2 for value in values) / 3
            for name, value in (("mean", mean), ("variance", variance)):
                key = f"view_maps.{layer}.{name}"
                sums[key] = sums.get(key, 0) + value / 5
    assert found.keys() == sums.keys()
    for key, value in sums.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9)


def test_the_distance_is_that_of_actmad_on_batches():
    """With the same maps for the source, V views of one image are a batch of V images."""
    network, _ = networks.source_statistics("resnet", torch.float64)
    images, method = networks.images(5, seed=3).double(), ViewsActMAD(num_views=6)
    statistics = method.source_statistics(network, [images])
    as_batch = {name.removeprefix("view_"): value for name, value in statistics.items()}
    view = method.views(network, images[:1], [torch_generator(0, "views")])[0]
    net = Bound(network, {})
    loss, _ = method.loss(net, view, statistics, ())
    expected, _ = BatchActMAD().loss(net, view, as_batch, ())
    torch.testing.assert_close(loss, expected)
    assert loss > 0


def test_an_image_that_is_all_of_the_source_has_no_loss():
    """Views that all show the same have no variance, and the mean is the image's own."""
    network, _ = networks.source_statistics("resnet", torch.float64)
    image, method = networks.images(1, seed=3).double(), ViewsActMAD(3, augmentation=STILL)
    statistics = method.source_statistics(network, [image])
    view = method.views(network, image, [torch_generator(0, "views")])[0]
    loss, _ = method.loss(Bound(network, {}), view, statistics, ())
    assert loss.item() == pytest.approx(0, abs=1e-9)
    variances = [value for name, value in statistics.items() if name.endswith("variance")]
    assert max(value.abs().max() for value in variances) < 1e-18


def test_no_source_images_are_told():
    network, _ = networks.source_statistics("resnet", torch.float64)
    with pytest.raises(UserError, match="expected source images, found none"):
        ViewsActMAD().source_statistics(network, [])
