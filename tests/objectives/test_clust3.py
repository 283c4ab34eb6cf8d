"""ClusT3: closed forms, a loop over positions, trained parameters, one image and a batch."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.online import adapt_stream
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.clust3 import ClusT3Training
from tttlab.networks.taps import record
from tttlab.objectives.clust3 import ClusT3, lost_information
from tttlab.seeding import torch_generator


def spread(clusters: torch.Tensor, count: int, sharpness: float) -> torch.Tensor:
    """Logits ``(N, L, 1, K)`` of positions with these clusters ``(N, L)``."""
    return sharpness * torch.nn.functional.one_hot(clusters, count).double().unsqueeze(2)


@pytest.mark.parametrize("count", [2, 10])
def test_uniform_certain_and_balanced_clusters(count):
    balanced = torch.arange(6 * count).view(2, 3 * count) % count
    for logits, expected in (
        (spread(balanced, count, 0.0), 0.0),  # uniform
        (spread(0 * balanced, count, 1e3), 0.0),  # confident, one cluster for all positions
        (spread(0 * balanced, count, 1.0), 0.0),  # not confident, one cluster for all positions
        (spread(balanced, count, 1e3), -math.log(count)),  # confident and balanced
    ):
        logits.requires_grad_()
        loss = lost_information([logits])
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert logits.grad.isfinite().all()


def loop_over_positions(assignments) -> float:
    """The same number from single probabilities, in NumPy."""
    terms = []
    for logits in assignments:
        for head in range(logits.shape[2]):
            rows = logits[:, :, head].reshape(-1, logits.shape[-1]).numpy()
            odds = np.exp(rows)
            p = odds / odds.sum(1, keepdims=True)
            marginal = p.mean(0)
            conditional_entropy = np.mean([-(row * np.log(row)).sum() for row in p])
            terms.append(conditional_entropy + (marginal * np.log(marginal)).sum())
    return float(np.mean(terms))


def test_lost_information_equals_a_loop_over_positions():
    generator = torch.Generator().manual_seed(0)
    assignments = [
        torch.randn(3, length, 2, 5, dtype=torch.float64, generator=generator) for length in (16, 4)
    ]
    loss = lost_information(assignments).item()
    assert loss == pytest.approx(loop_over_positions(assignments), rel=1e-12)
    assert -math.log(5) < loss < 0


@pytest.mark.parametrize("kind", ["clust3", "clust3_vit"])
def test_heads_read_the_stages_outputs_place_by_place(kind):
    network, _ = networks.source_statistics(kind)
    images = networks.images(2, seed=1).double()
    stages = {"clust3": ("layer1", "layer2"), "clust3_vit": ("blocks.0", "blocks.1")}[kind]
    names = [f"encoder.{stage}" for stage in stages]
    with record(network, names) as activations, torch.no_grad():
        network(images)
        logits = network(images, branch=True).branch
        loss = ClusT3().loss(network, images[:, None], torch.Generator())
    expected = []
    for name, layer in zip(names, network.head.layers, strict=True):
        activation = activations[name]
        # A transformer's first token is the class token.
        positions = activation.flatten(2).mT if kind == "clust3" else activation[:, 1:]
        stage_logits = (positions @ layer.weight.T + layer.bias).unflatten(-1, (2, 4))
        expected.append(stage_logits.detach())
    for stage_logits, by_hand in zip(logits, expected, strict=True):
        torch.testing.assert_close(stage_logits, by_hand)
    assert loss.item() == pytest.approx(loop_over_positions(expected), rel=1e-9)


def test_stages_with_heads_and_before_learn_and_nothing_else():
    network = copy.deepcopy(networks.source_statistics("clust3")[0])
    views = networks.images(4, seed=2).double()[:, None]
    ClusT3().loss(network, views, torch.Generator()).backward()
    for name, parameter in network.named_parameters():
        if name.startswith(("classifier.", "encoder.layer3", "encoder.layer4")):
            assert parameter.grad is None, name
        elif name.startswith(("encoder.conv1", "encoder.layer1", "encoder.layer2", "head.")):
            assert parameter.grad.any(), name


def test_one_image_is_its_places_and_views_and_a_batch_is_all_its_images_together():
    network, _ = networks.source_statistics("clust3")
    images, loop = networks.images(4, seed=3).double() * 0.4 + 0.6, InnerLoop(steps=1, lr=0.0)
    names = [str(number) for number in range(4)]
    for method in (ClusT3Training(), ClusT3Training(num_views=2)):
        generators = [torch_generator(0, "views", name, 0) for name in names]
        views = method.views(network, images, generators)
        assert views.shape[1] == 1 + method.num_views
        assert torch.equal(views[:, 0], images)
        with torch.no_grad():
            separate = [
                loop_over_positions(network(image_views, branch=True).branch)
                for image_views in views
            ]
            together = loop_over_positions(network(views.flatten(0, 1), branch=True).branch)
        adapted = adapt(network, images, method, loop, image_ids=names)
        assert adapted.losses[:, 0].tolist() == pytest.approx(separate, rel=1e-9)
        stream = adapt_stream(network, images, method, loop, batch_size=4, image_ids=names)
        assert stream.losses[:, 0].tolist() == pytest.approx([together] * 4, rel=1e-9)
        assert abs(together - np.mean(separate)) > 1e-4  # the clusters of different images differ


def test_adapting_informs_and_moves_the_prediction():
    network, _ = networks.source_statistics("clust3")
    images = networks.images(4, seed=4).double() * 0.4 + 0.6
    loop = InnerLoop(steps=20, lr=1e-3, optimizer="adam")
    result = adapt(network, images, ClusT3Training(), loop)
    assert (result.losses[:, -1] < result.losses[:, 0] - 0.02).all()
    assert ((result.logits - result.source_logits).abs().amax(1) > 1e-3).all()


def test_heads_sit_where_the_settings_say():
    resnet, vit = networks.resnet().encoder, networks.vit().encoder
    head = ClusT3(stages=(4, 1), heads=3, clusters=7).head(resnet)
    assert (head.stages, [layer.in_features for layer in head.layers]) == ((1, 4), [8, 12])
    assert [layer.out_features for layer in head.layers] == [21, 21]
    for encoder, wrong, count in ((resnet, [1, 5], 4), (vit, [3], 2), (resnet, [0, 1], 4)):
        with pytest.raises(
            UserError,
            match=rf"objective.stages: expected numbers from 1 to {count}, .*found \[{wrong[0]}",
        ):
            ClusT3(stages=wrong).head(encoder)


def test_a_network_without_the_heads_is_refused():
    network, _ = networks.source_statistics("rotation")
    with pytest.raises(UserError, match="needs a network with the head of objective clust3"):
        adapt(network, networks.images(1).double(), ClusT3Training())
