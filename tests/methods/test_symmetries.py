"""Symmetries: the views against NumPy's turns and flips, the loss against closed forms, a loop."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.method_settings import declared
from tttlab.errors import UserError
from tttlab.methods.memo import MEMO
from tttlab.methods.none import NoAdaptation
from tttlab.methods.symmetries import Symmetries
from tttlab.networks.network import Outputs
from tttlab.seeding import torch_generator

CYCLIC = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
ORDERS = {1: CYCLIC[:1], 3: CYCLIC, 6: list(itertools.permutations(range(3)))}
EVERY = [("flips", 1), ("flips", 3), ("dihedral", 1), ("dihedral", 6)]


def streams(count, step=0):
    return [torch_generator(0, "views", str(index), step) for index in range(count)]


def by_numpy(image, geometry, permutations):
    """All views of ``image (3, H, W)``, in some order."""
    turned = [
        np.rot90(image, turns, axes=(1, 2)) for turns in range(4 if geometry == "dihedral" else 1)
    ]
    mirrored = [view[:, :, ::-1] for view in turned]
    return [
        np.stack([view[channel] for channel in order])
        for view in turned + mirrored
        for order in ORDERS[permutations]
    ]


def as_set(views):
    return {np.ascontiguousarray(view).tobytes() for view in views}


def same_logits(logits):
    return lambda _views: Outputs(logits, None)


def entropy(p):
    return -(p * np.log(p)).sum()


def loss_of(logits):
    return Symmetries().loss(same_logits(logits), None, {}, ())[0]


class TestViews:
    @pytest.mark.parametrize(("geometry", "permutations"), EVERY)
    def test_they_are_the_images_turns_mirrors_and_exchanged_colours(self, geometry, permutations):
        images = networks.images(2, seed=3)
        views = Symmetries(geometry, permutations).views(None, images, streams(2))
        expected = [by_numpy(image, geometry, permutations) for image in images.numpy()]
        assert views.shape == (2, len(expected[0]), *images.shape[1:])
        assert len(as_set(expected[0])) == len(expected[0])  # all are distinct
        for index in range(2):
            assert as_set(views[index].numpy()) == as_set(expected[index])
            assert torch.equal(views[index, 0], images[index])

    @pytest.mark.parametrize(("geometry", "permutations"), EVERY)
    def test_they_form_a_group(self, geometry, permutations):
        """Every view of a view is a view of the image, so that all have the same loss."""
        method, image = Symmetries(geometry, permutations), networks.images(1, seed=3)
        views = method.views(None, image, streams(1))[0]
        for again in method.views(None, views, streams(len(views))):
            assert as_set(again.numpy()) == as_set(views.numpy())

    def test_a_few_are_drawn_without_repetition_for_every_image_and_step(self):
        method, images = Symmetries("dihedral", 3, num_views=5), networks.images(4, seed=3)
        drawn = [method.views(None, images, streams(4, step)) for step in range(20)]
        seen = set()
        for step in drawn:
            assert step.shape == (4, 5, *images.shape[1:])
            for views, image in zip(step.numpy(), images.numpy(), strict=True):
                assert len(as_set(views)) == 5
                assert as_set(views) <= as_set(by_numpy(image, "dihedral", 3))
            seen |= as_set(step[0].numpy())
        assert len(seen) == 24  # in 100 draws none is left out
        assert as_set(drawn[0][0].numpy()) != as_set(drawn[1][0].numpy())
        alone = method.views(None, images[2:3], streams(4)[2:3])
        assert torch.equal(alone[0], drawn[0][2])  # whoever else is in the group

    def test_what_does_not_fit_is_refused(self):
        message = "geometry 'flips' and permutations 2 make 4 views, found num_views 5"
        with pytest.raises(UserError, match=message):
            adapt(networks.resnet(), networks.images(2), Symmetries("flips", 2, num_views=5))
        wide = torch.rand(1, 3, 4, 6)
        with pytest.raises(UserError, match="needs square images, found 4×6; set flips"):
            Symmetries("dihedral").views(None, wide, streams(1))
        assert torch.equal(Symmetries().views(None, wide, streams(1))[0, 1], wide[0].flip(-1))
        settings = declared("symmetries").settings
        assert settings(num_views=None).num_views is None
        for wrong in ({"num_views": 1}, {"permutations": 2}, {"geometry": "turns"}):
            with pytest.raises(ValidationError):
                settings(**wrong)


class TestLoss:
    def test_agreement_costs_nothing_however_unsure(self):
        """The loss has no gradient either; MEMO has one, towards certainty."""
        logits = torch.tensor([[0.4, 0.1, -0.3]] * 4, dtype=torch.float64, requires_grad=True)
        slopes = {}
        for method in (Symmetries(), MEMO()):
            loss, _ = method.loss(same_logits(logits), None, {}, ())
            (slopes[method],) = torch.autograd.grad(loss, logits)
        assert loss_of(logits).item() == pytest.approx(0, abs=1e-12)
        assert slopes[Symmetries()].abs().max() < 1e-12
        assert slopes[MEMO()].abs().max() > 1e-2

    @pytest.mark.parametrize("count", [2, 5])
    def test_views_that_are_sure_of_different_classes_cost_the_logarithm_of_their_number(
        self, count
    ):
        loss = loss_of(1e3 * torch.eye(count, dtype=torch.float64))
        assert loss.item() == pytest.approx(np.log(count))

    def test_a_coin_against_certainty(self):
        """p̄ = (3/4, 1/4): H(p̄) − log(2)/2."""
        logits = torch.tensor([[0.0, 0.0], [1e3, 0.0]], dtype=torch.float64)
        expected = 0.75 * np.log(4 / 3) + 0.25 * np.log(4) - np.log(2) / 2
        assert loss_of(logits).item() == pytest.approx(expected)

    @pytest.mark.parametrize("kind", ["resnet", "vit"])
    def test_on_a_network_it_is_the_entropy_of_the_mean_less_the_mean_entropy(self, kind):
        network, _ = networks.source_statistics(kind)
        images, loop = networks.images(3, seed=50).double(), InnerLoop(steps=1, lr=0.0)
        losses = adapt(network, images, Symmetries("dihedral", 3), loop).losses[:, 0]
        for image, loss in zip(images.numpy(), losses.tolist(), strict=True):
            probabilities = []
            for view in by_numpy(image, "dihedral", 3):
                with torch.no_grad():
                    logits = network(torch.tensor(view)[None]).logits[0].numpy()
                probabilities.append(np.exp(logits) / np.exp(logits).sum())
            mean_entropy = np.mean([entropy(p) for p in probabilities])
            expected = entropy(np.mean(probabilities, 0)) - mean_entropy
            assert loss == pytest.approx(expected, rel=1e-8, abs=1e-12)
            assert loss > 1e-6

    def test_an_invariant_network_has_nothing_to_learn(self):
        """A network becomes invariant by averaging its logits over the group.

        One that is invariant to mirror images alone has something to learn from turns.
        """
        network, _ = networks.source_statistics("resnet")
        image = networks.images(1, seed=50).double()

        def averaged(geometry, permutations):
            def logits_of(image):
                group = torch.tensor(np.stack(by_numpy(image, geometry, permutations)))
                return network(group).logits.mean(0)

            def net(views):
                return Outputs(torch.stack([logits_of(view) for view in views.numpy()]), None)

            return net

        def loss(method, net):
            views = method.views(network, image, streams(1))[0]
            with torch.no_grad():
                return method.loss(net, views, {}, ())[0].item()

        whole, some = Symmetries("dihedral", 6), Symmetries("dihedral", 6, num_views=7)
        assert loss(whole, averaged("dihedral", 6)) == pytest.approx(0, abs=1e-12)
        assert loss(some, averaged("dihedral", 6)) == pytest.approx(0, abs=1e-12)
        assert loss(Symmetries(), averaged("flips", 1)) == pytest.approx(0, abs=1e-12)
        assert loss(whole, averaged("flips", 1)) > 1e-6


def test_the_prediction_is_the_images_own_and_may_be_averaged_over_other_views():
    network, _ = networks.source_statistics("resnet")
    images = networks.images(3, seed=50).double()
    for average in (0, 2):
        loop = InnerLoop(steps=1, lr=0.0, average=average)
        result = adapt(network, images, Symmetries("dihedral", 3), loop)
        control = adapt(network, images, NoAdaptation(), loop)
        torch.testing.assert_close(result.logits, control.logits)


def test_images_without_three_colours_are_turned_and_mirrored_alone():
    grey = torch.rand(2, 1, 4, 4)
    views = Symmetries("dihedral").views(None, grey, streams(2))
    assert views.shape == (2, 8, 1, 4, 4)
    torch.testing.assert_close(views[:, 0], grey)
    torch.testing.assert_close(views.sum((2, 3, 4)), grey.sum((1, 2, 3))[:, None].expand(2, 8))
    with pytest.raises(
        UserError, match="permutations 3 exchanges three colours, found images of 1"
    ):
        Symmetries(permutations=3).views(None, grey, streams(2))
