"""What every method must keep: the package's, the tests' own, or a user's.

A user's method is named by ``pytest --method my_package.my_method``. The slow reference, image by
image and batch by batch, is that of `contract`.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.helpers import contract, networks, own_methods
from tests.helpers.contract import (
    SEED,
    assert_vectorised_equals_one_image_at_a_time,
    one_at_a_time,
    shifted,
)
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import adapt_stream, learning
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError

POLICIES = [
    "source",
    "image",
    "mixed",
    "shrink",
]
LOOPS = [
    InnerLoop(steps=3, lr=1e-2, clip=1.0),
    InnerLoop(steps=2, lr=1e-2, trainable="norm", momentum=0.9, clip=0.5),
    InnerLoop(steps=2, lr=1e-2, trainable="all", clip=1.0, normalisation="shrink"),
]
COUNT = 3  # images
BATCH, BATCHES = 3, [slice(0, 3), slice(3, 5), slice(5, 7)]  # of 7 images


def pytest_generate_tests(metafunc):
    """Give every test its methods, each with a network."""
    users = metafunc.config.getoption("method")
    try:
        cases = [case for name in users or contract.names() for case in contract.cases(name)]
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    episodic = [case for case in cases if "episodic" in case[1].protocols]
    tried = episodic if users else [*episodic, *own_methods.CASES]
    arguments = {
        "episodic": episodic,
        "tried": tried,
        "training": [case for case in tried if case[1].trains],
        "descending": [case for case in episodic if case[1].trains],
        "online": [case for case in cases if "online" in case[1].protocols],
    }
    for argument in arguments.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(argument, arguments[argument], ids=lambda case: f"{case[0]}-{case[1]}")


def name(value: object) -> str:
    return repr(value)


def but_the_first_slow(values):
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


def skip_another_policy(method, policy):
    if method.normalises and policy != "source":
        pytest.skip("it normalises by statistics of its own")


@pytest.mark.parametrize("loop", but_the_first_slow(LOOPS), ids=name)
def test_vectorised_equals_one_image_at_a_time(tried, loop):
    skip_another_policy(tried[1], loop.normalisation)
    assert_vectorised_equals_one_image_at_a_time(*tried, loop, COUNT)


def test_vectorised_equals_one_image_at_a_time_in_single_precision(episodic):
    kind, method = episodic
    network, statistics = contract.source(kind, method, torch.float32)
    images, loop = shifted(COUNT, torch.float32), InnerLoop(steps=2, lr=1e-3, clip=1.0)
    together = adapt(network, images, method, loop, statistics=statistics, seed=SEED)
    alone = [
        one_at_a_time(network, image, method, loop, statistics, str(i))
        for i, image in enumerate(images)
    ]
    torch.testing.assert_close(together.logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", but_the_first_slow(POLICIES), ids=name)
def test_results_depend_on_the_image_alone(episodic, policy):
    kind, method = episodic
    skip_another_policy(method, policy)
    network, statistics = contract.source(kind, method)
    images, names = shifted(COUNT), [f"image-{i}" for i in range(COUNT)]
    loop = InnerLoop(steps=2, lr=1e-2, clip=1.0, normalisation=policy)

    def run(order, group_size):
        return adapt(
            network,
            images[order],
            method,
            loop,
            statistics=statistics,
            image_ids=[names[index] for index in order],
            images_per_step=group_size,
        )

    whole = run(list(range(COUNT)), COUNT)
    order = [2, 0, 1]  # in groups of two and of one, so that every image has other group mates
    parts = run(order, 2)
    torch.testing.assert_close(parts.logits, whole.logits[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        parts.losses, whole.losses[order], atol=1e-6, rtol=1e-6, equal_nan=True
    )


def test_no_steps_is_the_source_prediction(training):
    kind, method = training
    if type(method).predict is not Method.predict:
        pytest.skip("it predicts in its own way, without a step too")
    network, statistics = contract.source(kind, method)
    loop = InnerLoop(steps=0)
    result = adapt(
        network, shifted(COUNT), method, loop, statistics=statistics, images_per_step=COUNT
    )
    with torch.no_grad():
        expected = network(shifted(COUNT)).logits
    for logits in (result.logits, result.source_logits):
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert not result.fell_back.any()


@pytest.mark.parametrize("policy", but_the_first_slow(["source", "shrink"]), ids=name)
def test_a_curve_along_the_steps_is_what_shorter_adaptations_give(training, policy):
    kind, method = training
    skip_another_policy(method, policy)
    network, statistics = contract.source(kind, method)
    loop = InnerLoop(steps=2, lr=1e-2, clip=1.0, momentum=0.5, normalisation=policy)

    def run(loop, **options):
        return adapt(network, shifted(COUNT), method, loop, statistics=statistics, **options)

    whole = run(loop, record=(0, 1, 2), images_per_step=2)
    for steps in (0, 1, 2):
        shorter = run(replace(loop, steps=steps), images_per_step=COUNT)
        torch.testing.assert_close(whole.logits_at[:, steps], shorter.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(whole.logits, shorter.logits, atol=1e-9, rtol=1e-9)
    assert (whole.milliseconds_at > 0).all()
    assert shorter.logits_at.shape == (COUNT, 0, networks.CLASSES)


def test_the_network_is_left_as_it_was(tried):
    kind, method = tried
    network, statistics = contract.source(kind, method)
    before = copy.deepcopy(network.state_dict())
    network.train()
    network.encoder.eval()
    attentions = [module for module in network.modules() if hasattr(module, "fused_attn")]
    fused, loop = [module.fused_attn for module in attentions], InnerLoop(steps=2, lr=0.1)
    try:
        adapt(network, shifted(COUNT), method, loop, statistics=statistics, images_per_step=COUNT)
        assert network.training
        assert not network.encoder.training
    finally:
        network.eval()
    assert fused == [module.fused_attn for module in attentions]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("trainable", ["encoder", "norm"])
def test_the_first_step_moves_every_image(descending, trainable):
    kind, method = descending
    network, statistics = contract.source(kind, method)
    # Adam's first step has the same length for small and for large gradients.
    loop = InnerLoop(steps=1, lr=1e-3, trainable=trainable, optimizer="adam")
    result = adapt(
        network, shifted(COUNT), method, loop, statistics=statistics, images_per_step=COUNT
    )
    assert ((result.logits - result.source_logits).abs().amax(1) > 1e-6).all()


def test_training_lowers_the_loss(descending):
    kind, method = descending
    network, statistics = contract.source(kind, method)
    loop = InnerLoop(steps=10, lr=contract.rate(method), clip=1.0)
    result = adapt(
        network, shifted(COUNT), method, loop, statistics=statistics, images_per_step=COUNT
    )
    assert result.losses[:, -1].mean() < result.losses[:, 0].mean()


def test_a_stream_equals_one_batch_after_the_other(online):
    kind, method = online
    network, statistics = contract.source(kind, method)
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm", clip=1.0, normalisation="image")
    result = adapt_stream(
        network, shifted(7), method, loop, batch_size=BATCH, statistics=statistics, seed=SEED
    )
    slow = contract.batch_by_batch(network, shifted(7), method, loop, statistics, BATCHES)
    assert not result.fell_back.any()
    torch.testing.assert_close(result.logits, slow, atol=1e-8, rtol=1e-8)


def test_a_stream_depends_on_its_past_alone_and_leaves_the_network_as_it_was(online):
    """Past images change later predictions, future ones change none, and a second run is equal."""
    kind, method = online
    network, statistics = contract.source(kind, method)
    before = copy.deepcopy(network.state_dict())
    loop = InnerLoop(steps=1, lr=1e-2, trainable="norm", clip=1.0)

    def run(images):
        return adapt_stream(network, images, method, loop, batch_size=BATCH, statistics=statistics)

    first, again = run(shifted(7)), run(shifted(7))
    assert torch.equal(first.logits, again.logits)
    assert not first.fell_back.any()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    future, past = shifted(7), shifted(7)
    future[5:], past[0] = 0.1, 0.1
    torch.testing.assert_close(run(future).logits[:5], first.logits[:5], rtol=0, atol=0)
    with learning(Task(network, method, loop, statistics), shifted(BATCH)) as learner:
        learner.adapt(shifted(BATCH), "abc")
        remembers = method.trains or bool(tree_leaves(learner.state))
    assert remembers != torch.equal(run(past).logits[5:], first.logits[5:])
