"""The surest views vote: against votes counted by hand and entropies from SciPy."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from tests.helpers import networks
from tttlab.adaptation.method import surest
from tttlab.data.views import random_views
from tttlab.methods.memo import MEMO
from tttlab.methods.views import ViewAverage
from tttlab.networks.network import Outputs
from tttlab.seeding import torch_generator

# Probabilities of five views for three classes, by falling certainty.
VIEWS = [
    [0.98, 0.01, 0.01],
    [0.03, 0.94, 0.03],
    [0.06, 0.88, 0.06],
    [0.20, 0.15, 0.65],
    [0.30, 0.34, 0.36],
]


def net_of(probabilities):
    """Stand for a network that answers with these probabilities, whatever it is shown."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    return lambda _views: Outputs(logits, None)


def predict(method, probabilities) -> np.ndarray:
    image = torch.zeros(3, 4, 4)
    views = torch.zeros(len(probabilities), 3, 4, 4)
    return method.predict(net_of(probabilities), image, views, {}).exp().numpy()


@pytest.mark.parametrize(
    ("keep", "votes"),
    [(1.0, [1, 2, 2]), (0.6, [1, 2, 0]), (0.2, [1, 0, 0]), (1e-9, [1, 0, 0])],
)
def test_votes_of_the_surest_views_are_counted_and_their_mean_is_one_voter_more(keep, votes):
    shuffled = [VIEWS[place] for place in (3, 0, 4, 2, 1)]
    found = predict(ViewAverage(num_views=4, keep=keep, vote=True), shuffled)
    count = sum(votes)
    expected = (np.array(votes) + np.mean(VIEWS[:count], axis=0)) / (count + 1)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_equal_votes_are_decided_by_the_mean_probability_and_unequal_ones_never_are():
    method = ViewAverage(num_views=3, keep=1.0, vote=True)
    assert predict(method, [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]]).argmax() == 0
    assert predict(method, [[0.7, 0.3], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9]]).argmax() == 1
    barely = [0.5 + 1e-9, 0.5 - 1e-9]
    assert (
        predict(ViewAverage(num_views=2, keep=1.0, vote=True), [barely, barely, [0, 1]]).argmax()
        == 0
    )


def test_classes_that_a_very_sure_network_rules_out_still_have_a_share():
    """A probability of exp(-400) is zero as a number in single precision."""
    logits = torch.tensor([[0.0, -400.0], [0.0, -410.0]])
    method, image, views = ViewAverage(vote=True), torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4)
    found = method.predict(lambda _views: Outputs(logits, None), image, views, {})
    expected = -400 + np.log((1 + np.exp(-10)) / 2) - np.log(3)
    assert found[0].item() == pytest.approx(0.0, abs=1e-6)
    assert found[1].item() == pytest.approx(expected, rel=1e-6)


def test_without_votes_the_probabilities_of_the_surest_views_average():
    for keep, count in ((1.0, 5), (0.6, 3)):
        found = predict(ViewAverage(num_views=4, keep=keep), VIEWS)
        assert found == pytest.approx(np.mean(VIEWS[:count], axis=0), rel=1e-12)


@pytest.mark.parametrize(("share", "count"), [(1.0, 20), (0.5, 10), (0.1, 2), (0.01, 1)])
def test_the_surest_are_those_of_lowest_entropy(share, count):
    logits = 3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
    order = entropy(logits.softmax(-1).numpy(), axis=-1).argsort()
    assert surest(logits, share).numpy() == pytest.approx(logits.numpy()[order[:count]])


def test_memo_on_the_surest_views_has_their_gradient_alone():
    """Views that are not kept have no influence; without `keep` they have."""
    for keep, kept in ((0.5, 2), (1.0, 4)):
        logits = torch.tensor(VIEWS[:4], dtype=torch.float64).log().requires_grad_()
        method = MEMO(num_views=4, keep=keep)
        loss, _ = method.loss(lambda _views, all=logits: Outputs(all, None), None, {}, ())
        assert loss.item() == pytest.approx(entropy(np.mean(VIEWS[:kept], axis=0)), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient.abs().sum(-1) > 0).tolist() == [True] * kept + [False] * (4 - kept)


def test_the_image_itself_is_the_first_view():
    images = networks.images(2, seed=3)
    method = ViewAverage(num_views=3)
    generators = [torch_generator(0, "views", name, 0) for name in "ab"]
    views = method.views(nn.Identity(), images, generators)
    again = [torch_generator(0, "views", name, 0) for name in "ab"]
    drawn = random_views(images, again, 3, method.augmentation)
    expected = torch.cat([images[:, None], drawn], dim=1)
    assert views.numpy() == pytest.approx(expected.numpy(), abs=1e-6)
