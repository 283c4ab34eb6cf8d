"""The trial of a method: ours pass it, and mistakes are reported."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers import contract, networks
from tttlab.adaptation.method import Method, entropy
from tttlab.adaptation.method_trial import try_method, watched
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.method_settings import HOOKS, declared, method_names
from tttlab.errors import UserError

KINDS = {None: "resnet", "simclr": "resnet", "mae": "vit"}
BY_PROTOCOL = [(name, protocol) for name in method_names() for protocol in declared(name).protocols]


@pytest.mark.parametrize(("name", "protocol"), BY_PROTOCOL)
def test_our_methods_pass_and_the_network_stays_as_it_was(name, protocol):
    method = contract.load(name)
    kind = KINDS.get(method.head, method.head)
    network, statistics = contract.source(kind, method, torch.float32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try_method(network, method, InnerLoop(steps=4, lr=0.1), statistics, networks.SIZE, protocol)
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not network.training
    assert all(value.grad is None for value in network.parameters())


@dataclass(frozen=True, slots=True)
class Tried(Method):
    """Entropy."""

    protocols = ("episodic", "online")
    hooks: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def loss(self, net, views, statistics, state):
        return entropy(net(views).logits).mean(), state


def with_hook(hook, function):
    """The method with a function in place of a hook, called with the hook's arguments."""
    return type("Tried", (Tried,), {hook: lambda _self, *arguments: function(*arguments)})()


NET, PLAIN = "a tensor of shape (1, 4)", "something of type int"
MISTAKES = [
    (
        "loss",
        lambda net, *_: net(_[0]).logits.mean(),
        "must return two things, loss, state, found a tensor of shape (); write",
    ),
    (
        "loss",
        lambda net, views, *_: (net(views).logits[:, 0], ()),
        "must return a tensor of one number, without dimensions",
    ),
    (
        "loss",
        lambda net, views, *_: (net(views).logits.argmax(), ()),
        "must return a tensor of one number",
    ),
    (
        "loss",
        lambda net, views, *_: (1.0, ()),
        "must return a tensor of one number, without dimensions, found something of",
    ),
    (
        "loss",
        lambda net, views, *_: (net(views).logits.mean(), None),
        "must give a state of tensors, in tuples, lists",
    ),
    (
        "views",
        lambda _network, images, _streams: images[:0],
        "must give tensors whose first dimension counts the images, here",
    ),
    (
        "views",
        lambda network, images, generators: (),
        "must give tensors whose first dimension counts the images",
    ),
    (
        "init_state",
        lambda: 1,
        f"must give a state of tensors, in tuples, lists and dicts, found {PLAIN}",
    ),
    (
        "predict",
        lambda net, image, *_: net(image[None]).logits,
        f"must return logits of shape (4,), found {NET}",
    ),
    (
        "predict",
        lambda net, image, *_: net(image[None]).logits[0, :3],
        "must return logits of shape (4,), found a tensor",
    ),
    (
        "predict_batch",
        lambda net, images, *_: net(images).logits,
        "must return two things, logits, state, found a tensor",
    ),
    (
        "predict_batch",
        lambda net, images, *_: (net(images).logits[:2], ()),
        "must return logits of shape (8, 4), found a",
    ),
    (
        "after_step",
        lambda parameters, *_: parameters,
        "must return two things, parameters, state, found something of",
    ),
    (
        "after_step",
        lambda parameters, *_: ({}, ()),
        "must return the 42 parameters that it is given",
    ),
    (
        "source_statistics",
        lambda network, batches: [1],
        "must give tensors by name, found something of type list",
    ),
    (
        "averaged_views",
        lambda: "eight",
        "must give a whole number from 0 on, found something of type str",
    ),
]
IN_WORDS = [
    (lambda value: value if value > 0 else -value, "branches on a value"),
    (lambda value: value * max(value, 0), "branches on a value"),
    (lambda value: value * float(value.detach()), "takes a number out of a tensor"),
    (lambda value: value * value.detach().numpy(), "takes an array out of a tensor"),
    (lambda value: value[None][value[None] > 0].sum(), "selects a number of elements"),
    (lambda value: value + torch.randn_like(value), "draws random numbers; draw them in `views`"),
    (lambda value: value * torch.rand(()), "draws random numbers; draw them in `views`"),
    (
        lambda value: torch.nn.functional.dropout(value, 0.5),
        "draws random numbers; draw them in `views`",
    ),
    (
        lambda value: torch.zeros(3).add_(value[None]).sum(),
        "changes a tensor in place that all images share",
    ),
    (lambda value: value.backward(), "differentiates by itself"),
    (lambda value: {}["key"], "fails with KeyError: 'key'"),
]


def message(method, protocol):
    network, statistics = networks.source_statistics("resnet", torch.float32)
    with pytest.raises(UserError) as caught:
        try_method(network, method, InnerLoop(), statistics, networks.SIZE, protocol)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("hook", "function", "expected"), MISTAKES)
def test_what_a_hook_gives_and_must_not_is_told(hook, function, expected):
    method = with_hook(hook, function)
    if hook == "source_statistics":
        with pytest.raises(UserError) as caught:
            watched(method).source_statistics(None, [])
        assert str(caught.value).startswith(f"{hook} {expected}")
    else:
        protocol = "online" if hook in ("predict_batch", "after_step") else "episodic"
        assert message(method, protocol).startswith(f"{hook} {expected}")


@pytest.mark.parametrize("protocol", ["episodic", "online"])
@pytest.mark.parametrize(("function", "expected"), IN_WORDS)
def test_what_a_loss_of_one_image_cannot_do_is_told_with_what_to_do(function, expected, protocol):
    def loss(net, views, _statistics, state):
        return function(entropy(net(views).logits).mean()), state

    text = message(with_hook("loss", loss), protocol)
    assert text.startswith("loss (line ")
    assert text.partition(") ")[2].startswith(expected)


def test_a_whole_batch_may_branch_and_draw():
    def loss(net, views, _statistics, state):
        logits = net(views + 0.01 * torch.randn_like(views)).logits
        return entropy(logits[entropy(logits) > 0]).mean(), state

    method = with_hook("loss", loss)
    type(method).whole_batch = True
    network, statistics = networks.source_statistics("resnet", torch.float32)
    try_method(network, method, InnerLoop(), statistics, networks.SIZE, "online")


@pytest.mark.parametrize(
    ("smallest", "batch_size", "expected"), [(1, 64, 8), (1, 4, 4), (20, 64, 20)]
)
def test_a_streams_batch_is_as_large_as_the_method_needs(smallest, batch_size, expected):
    sizes = []

    def views(_network, images, _generators):
        sizes.append(len(images))
        return images.unsqueeze(1)

    method = with_hook("views", views)
    type(method).smallest_batch = smallest
    network, statistics = networks.source_statistics("resnet", torch.float32)
    try_method(network, method, InnerLoop(steps=3), statistics, networks.SIZE, "online", batch_size)
    assert sizes == [expected]  # one of the three steps


def test_a_hook_may_be_any_callable():
    @dataclass(frozen=True)
    class Static(Tried):
        views = staticmethod(lambda network, images, generators: images.unsqueeze(1))
        after_step = partial(lambda parameters, source, state, generator: (parameters, state))

    network, statistics = networks.source_statistics("resnet", torch.float32)
    for protocol in ("episodic", "online"):
        try_method(network, Static(), InnerLoop(), statistics, networks.SIZE, protocol)


def test_watching_changes_neither_the_method_nor_what_it_says_of_itself():
    method = Tried(hooks={"a": print})
    copied = watched(method)
    assert type(method) is Tried
    assert (repr(copied), copied.hooks) == (repr(method), method.hooks)
    assert replace(copied, hooks={}).hooks == {}
    for hook in HOOKS:  # the adapter asks whether a hook is the default
        assert (getattr(type(copied), hook) is getattr(Method, hook)) == (hook != "loss")


@pytest.mark.parametrize("protocol", ["episodic", "online"])
def test_a_method_that_spoils_the_images_or_has_no_loss_is_told(protocol):
    @dataclass(frozen=True)
    class Spoiling(Method):
        protocols = ("episodic", "online")

        def views(self, network, images, generators):
            return images.mul_(0.5).unsqueeze(1)

        def loss(self, net, views, statistics, state):
            return entropy(net(views).logits).mean(), state

    class Undefined(Spoiling):
        def views(self, network, images, generators):
            return images.unsqueeze(1)

        def loss(self, net, views, statistics, state):
            return entropy(net(views).logits).mean() * float("nan"), state

    network, statistics = networks.source_statistics("resnet", torch.float32)
    loop = InnerLoop(steps=1, lr=0.01)
    for method, expected in (
        (Spoiling(), "a hook changes the images that it is given"),
        (Undefined(), "loss is not finite on any of [28] random images"),
    ):
        with pytest.raises(UserError, match=expected):
            try_method(network, method, loop, statistics, 16, protocol)
