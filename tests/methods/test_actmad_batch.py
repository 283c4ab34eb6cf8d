"""ActMAD on batches, against loops in NumPy and plain autograd on one network."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.task import complete_statistics
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import shuffled_parts
from tttlab.networks.taps import batch_norm_layers, record, token_layers

METHOD = BatchActMAD()
BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]  # of 7 images, in batches of at most 3


def stream(count=7):
    return shifted(count)


def source_images(count=300):
    return networks.images(count, seed=7).double()


def layers_of(network):
    return batch_norm_layers(network) or token_layers(network)


def activations(network, images):
    with record(network, layers_of(network)) as recorded, torch.no_grad():
        network.eval()(images)
    return {layer: value.numpy() for layer, value in recorded.items()}


def mean_map(values):
    return sum(values) / len(values)


def variance_map(values):
    return sum((value - mean_map(values)) ** 2 for value in values) / (len(values) - 1)


def loss(network, images, statistics):
    return METHOD.loss(Bound(network, {}), images, statistics, ())[0].item()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_loss_is_half_the_sum_over_layers_of_mean_absolute_differences(kind):
    """As the published code for CIFAR defines it, in loops over layers and images."""
    network, _ = networks.source_statistics(kind)
    statistics = METHOD.source_statistics(network, [source_images()])
    parts = [activations(network, part) for part in shuffled_parts(source_images(), 3)]
    assert len(parts) == 3  # of 100 images each
    total = 0.0
    for layer, values in activations(network, stream(5)).items():
        for name, moment in (("mean", mean_map), ("variance", variance_map)):
            source = np.mean([moment(part[layer]) for part in parts], axis=0)
            assert source.shape == values.shape[1:]
            found = statistics[f"maps.{layer}.{name}"].numpy()
            np.testing.assert_allclose(found, source, rtol=1e-9, atol=1e-12)
            total += np.abs(moment(values) - source).mean()
    assert loss(network, stream(5), statistics) == pytest.approx(total / 2, rel=1e-9)


def test_three_batches_are_those_of_plain_autograd_and_sgd():
    network, _ = networks.source_statistics("resnet")
    statistics = METHOD.source_statistics(network, [source_images(64)])
    loop = InnerLoop(steps=2, lr=1e-3, momentum=0.9, trainable="all")
    result = adapt_stream(network, stream(), METHOD, loop, batch_size=3, statistics=statistics)
    slow, logits, losses = copy.deepcopy(network).eval(), [], []
    optimizer = torch.optim.SGD(slow.parameters(), lr=1e-3, momentum=0.9)
    outputs = {}

    def keep(_module, _inputs, output, name):
        outputs[name] = output.clone()

    for name, module in slow.named_modules():
        if name in layers_of(slow):
            module.register_forward_hook(partial(keep, name=name))
    for part in BATCHES:
        for _ in range(2):
            slow(stream()[part])
            total = 0
            for name, output in outputs.items():
                total = total + F.l1_loss(output.mean(0), statistics[f"maps.{name}.mean"])
                total = total + F.l1_loss(output.var(0), statistics[f"maps.{name}.variance"])
            losses.append(0.5 * total.item())
            optimizer.zero_grad()
            (0.5 * total).backward()
            optimizer.step()
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-7, rtol=1e-7)
    assert result.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-7)
    assert losses[1] < losses[0]
    assert (result.logits - result.source_logits).abs().max() > 1e-3


def test_a_batch_that_is_the_source_has_no_loss_and_a_shifted_one_has():
    network, _ = networks.source_statistics("resnet")
    images = source_images(20)
    statistics = METHOD.source_statistics(network, [images])
    assert loss(network, images, statistics) == pytest.approx(0, abs=1e-12)
    assert loss(network, images * 0.4 + 0.6, statistics) > 0.1
    # Moved pixels hardly change the moments of whole channels, but they change the maps.
    assert loss(network, images.roll(8, -1), statistics) > 0.01


def test_how_source_images_are_delivered_is_no_matter():
    network, _ = networks.source_statistics("resnet")
    whole = METHOD.source_statistics(network, [source_images(130)])
    batches = source_images(130).split(43)  # the last has a single image
    pieces = METHOD.source_statistics(network, iter(batches))
    assert all(torch.allclose(whole[name], pieces[name], rtol=1e-9, atol=1e-12) for name in whole)
    assert (
        complete_statistics({}, METHOD, network, lambda: [source_images(130)]).keys()
        == whole.keys()
    )


def test_source_batches_mix_what_came_in_order():
    """Images may come class by class; the variance within a class is not that of the domain."""
    parts = shuffled_parts(torch.arange(1000), 8)
    assert sorted(torch.cat(parts).tolist()) == list(range(1000))
    assert {len(part) for part in parts} == {125}
    assert all(part.min() < 250 and part.max() >= 750 for part in parts)
    # No part has a single image, which has no variance.
    assert [len(part) for part in shuffled_parts(torch.arange(129), 2)] == [65, 64]


def test_one_source_image_has_no_variance_over_a_batch():
    network, _ = networks.source_statistics("resnet")
    with pytest.raises(UserError, match="expected at least two source images, found 1"):
        METHOD.source_statistics(network, [source_images(1)])


@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (3, 2)])
def test_a_batch_of_one_image_is_refused(count, batch_size):
    network, _ = networks.source_statistics("resnet")
    statistics = METHOD.source_statistics(network, [source_images(20)])
    images, loop = stream(count), InnerLoop(lr=1e-3)
    message = r"BatchActMAD.*needs batches of 2 images or more, found one of 1;"
    with pytest.raises(UserError, match=message):
        adapt_stream(network, images, METHOD, loop, batch_size=batch_size, statistics=statistics)
