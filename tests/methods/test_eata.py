"""EATA against plain autograd, torch's SGD and numbers by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.eata import EATA, is_novel
from tttlab.networks.network import Bound, Outputs
from tttlab.networks.source_statistics import available_statistics, shuffled_parts

BATCH = 5


def stream():
    """Three batches."""
    return (networks.images(3 * BATCH, seed=50) * 0.4 + 0.6).double()


def fisher(network):
    return EATA().source_statistics(network, [networks.images(70, seed=7).double()])


def moved(network):
    """Bind the network to trainable normalisation parameters a little off the source's."""
    generator, trained = torch.Generator().manual_seed(5), {}
    for name, value in select_parameters(network, "norm").items():
        noise = torch.randn(value.shape, generator=generator)
        trained[name] = (value + 0.1 * noise).detach().requires_grad_()
    return trained, Bound(network, trained)


def test_fisher_information_from_backward_passes_over_batches_of_64():
    """Whatever the given batches and the network's mode; 170 images make three random batches."""
    network = copy.deepcopy(networks.source_statistics("resnet")[0]).train()
    images = networks.images(170, seed=7).double()
    statistics = EATA().source_statistics(network, images.split([100, 20, 50]))
    assert network.training
    assert "fisher" in available_statistics(statistics)
    slow, expected = copy.deepcopy(network).eval(), {}
    for part in shuffled_parts(images, 3):
        slow.zero_grad()
        assert len(part) in (56, 57)
        logits = slow(part).logits
        (logits.logsumexp(-1) - logits.amax(-1)).mean().backward()
        for name, value in slow.named_parameters():
            slope = torch.zeros_like(value) if value.grad is None else value.grad
            expected[f"fisher.{name}"] = expected.get(f"fisher.{name}", 0) + slope**2 / 3
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name], value, rtol=1e-9, atol=1e-15)
    assert not any(value.requires_grad for value in statistics.values())
    assert statistics["fisher.classifier.weight"].min() > 0
    # The head has no part in the logits.
    head = [value for name, value in statistics.items() if name.startswith("fisher.head.")]
    assert not any(value.any() for value in head)


def test_the_penalty_pulls_every_trained_weight_by_its_fisher_information():
    """Its gradient is 2 β F (θ − θ_source)."""
    network, _ = networks.source_statistics("resnet")
    statistics = fisher(network)
    trained, net = moved(network)

    def slopes(beta):
        method = EATA(margin=2.0, beta=beta)
        loss, _ = method.loss(net, stream(), statistics, method.init_state())
        return torch.autograd.grad(loss, list(trained.values()))

    source = dict(network.named_parameters())
    for name, free, held in zip(trained, slopes(0.0), slopes(300.0), strict=True):
        expected = 2 * 300 * statistics[f"fisher.{name}"] * (trained[name] - source[name])
        torch.testing.assert_close(held - free, expected.detach(), rtol=1e-8, atol=1e-12)
        assert expected.abs().max() > 1e-9


def cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def test_a_stream_against_autograd_and_torchs_sgd():
    network, _ = networks.source_statistics("resnet")
    statistics = fisher(network)
    threshold, epsilon, beta = 0.94 * math.log(networks.CLASSES), 0.995, 1e3
    loop = InnerLoop(steps=2, lr=0.05, momentum=0.9, trainable="norm")

    def run(beta):
        method = EATA(margin=0.94, epsilon=epsilon, beta=beta)
        return adapt_stream(
            network, stream(), method, loop, batch_size=BATCH, statistics=statistics
        )

    result, slow = run(beta), copy.deepcopy(network).eval()
    trained = select_parameters(slow, "norm")
    source = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05, momentum=0.9)
    average, logits, losses, counts = None, [], [], []
    for part in stream().split(BATCH):
        for _ in range(2):
            terms, selected, reliable = [], [], 0
            for row in slow(part).logits.softmax(-1):
                entropy, probabilities = -(row * row.log()).sum(), row.detach().numpy()
                if entropy.item() >= threshold:
                    continue
                reliable += 1
                if average is None or cosine(probabilities, average) < epsilon:
                    terms.append(math.exp(threshold - entropy.item()) * entropy)
                    selected.append(probabilities)
            counts.append((reliable, len(selected)))
            mean = np.mean(selected, axis=0)
            average = mean if average is None else 0.9 * average + 0.1 * mean
            penalty = sum(
                (statistics[f"fisher.{name}"] * (value - source[name]) ** 2).sum()
                for name, value in trained.items()
            )
            loss = sum(terms) / len(terms) + beta * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            logits.append(slow(part).logits)
    # Both filters leave out some images.
    assert min(reliable for reliable, _ in counts) < BATCH
    assert any(kept < reliable for reliable, kept in counts)
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-7, rtol=1e-7)
    assert result.losses[::BATCH].flatten().tolist() == pytest.approx(losses, rel=1e-7)
    assert (run(0.0).logits - result.logits).abs().max() > 1e-3  # so the penalty has an effect


class TestFilters:
    DOUBTFUL = (0.25, 0.25, 0.25, 0.25)
    FIRST, SECOND = (0.94, 0.02, 0.02, 0.02), (0.02, 0.94, 0.02, 0.02)
    ENTROPY = -(0.94 * math.log(0.94) + 0.06 * math.log(0.02))
    WEIGHT = math.exp(0.4 * math.log(4) - ENTROPY)

    def look(self, *probabilities, state=None):
        """Compute the loss, its slope by the logits, and the next average."""
        logits = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
        method = EATA(beta=0.0)
        state = method.init_state() if state is None else torch.tensor(state, dtype=torch.float64)
        loss, state = method.loss(lambda _views: Outputs(logits, None), None, {}, state)
        return loss.item(), torch.autograd.grad(loss, logits)[0], state

    def test_at_first_the_reliable_ones_count_and_make_the_average(self):
        loss, slope, average = self.look(self.DOUBTFUL, self.FIRST, self.SECOND)
        assert loss == pytest.approx(self.WEIGHT * self.ENTROPY)  # mean over the two selected
        assert slope.any(1).tolist() == [False, True, True]
        assert average.tolist() == pytest.approx([0.48, 0.48, 0.02, 0.02])

    def test_then_those_that_resemble_the_average_before_this_batch_are_left_out(self):
        """The second image would be left out if the average included its own batch."""
        loss, slope, average = self.look(self.FIRST, self.SECOND, self.DOUBTFUL, state=self.FIRST)
        assert loss == pytest.approx(self.WEIGHT * self.ENTROPY)
        assert slope.any(1).tolist() == [False, True, False]
        expected = [0.9 * 0.94 + 0.1 * 0.02, 0.9 * 0.02 + 0.1 * 0.94, 0.02, 0.02]
        assert average.tolist() == pytest.approx(expected)

    def test_the_weight_has_no_slope(self):
        """d entropy / d logits is −p (log p + H)."""
        p = np.array(self.FIRST)
        _, slope, _ = self.look(self.FIRST)
        expected = -self.WEIGHT * p * (np.log(p) + self.ENTROPY)
        assert slope[0].tolist() == pytest.approx(expected.tolist())

    @pytest.mark.parametrize("rejected", [DOUBTFUL, FIRST])
    def test_the_average_stays_where_nothing_is_selected(self, rejected):
        loss, slope, average = self.look(rejected, state=self.FIRST)
        assert loss == 0
        assert not slope.any()
        assert average.tolist() == pytest.approx(self.FIRST)
        assert not self.look(self.DOUBTFUL)[2].any()


def test_where_nothing_is_selected_nothing_moves_not_even_back_to_the_source():
    """An untrained network is never sure enough for the default margin."""
    network, _ = networks.source_statistics("resnet")
    statistics, loop = fisher(network), InnerLoop(steps=1, lr=1.0, trainable="norm")
    result = adapt_stream(network, stream(), EATA(), loop, batch_size=BATCH, statistics=statistics)
    torch.testing.assert_close(result.logits, result.source_logits)
    assert not result.losses.any()
    assert not result.fell_back.any()
    trained, net = moved(network)
    loss, _ = EATA(beta=1e6).loss(net, stream(), statistics, EATA().init_state())
    assert loss.item() == 0
    assert not any(part.any() for part in torch.autograd.grad(loss, list(trained.values())))


@pytest.mark.parametrize(
    ("classes", "epsilon", "novel"), [(10, 0.4, True), (1000, 0.05, True), (10, 0.05, False)]
)
def test_sure_predictions_of_every_class_are_novel_under_the_published_epsilon(
    classes, epsilon, novel
):
    """They have 1/√K with their average; ImageNet's value would leave out all of ten classes."""
    sure, average = torch.eye(classes), torch.full((classes,), 1 / classes)
    assert is_novel(sure, average, epsilon).tolist() == [novel] * classes


def test_parameters_that_the_source_network_does_not_have_are_told_with_a_remedy():
    network, statistics = networks.source_statistics("vit")
    fisher = EATA().source_statistics(network, [networks.images(8, seed=3).double()])
    images, lora = networks.images(4, seed=4).double(), InnerLoop(steps=1, trainable="lora")
    with pytest.raises(UserError, match="trainable: lora trains others; expected trainable: norm"):
        adapt_stream(network, images, EATA(margin=2.0), lora, statistics=statistics | fisher)
    free = EATA(margin=2.0, epsilon=2.0, beta=0.0)
    result = adapt_stream(network, images, free, lora, statistics=statistics | fisher)
    assert not result.fell_back.any()
