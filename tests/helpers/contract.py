"""What the tests of the contract try: every method on small networks, and the slow reference.

The slow reference takes one image after the other, or one batch after the other, with ordinary
autograd and torch's own optimiser.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers import networks
from tests.helpers.once import once
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.method import Method, State
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import complete_statistics
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.method_settings import method_names
from tttlab.errors import UserError
from tttlab.networks.network import Network, Outputs
from tttlab.networks.source_statistics import Statistics
from tttlab.seeding import torch_generator

SETTINGS = {
    "actmad_views": {"num_views": 3},
    "cotta": {"num_views": 4},
    "deyo": {"margin": 2.0, "plpd_threshold": -1.0},
    "dressed": {"num_images": 8, "bank": 8},
    "eata": {"margin": 2.0, "epsilon": 2.0},
    "mae": {"num_views": 3},
    "memo": {"num_views": 3},
    "rotation": {"num_views": 3},
    "sar": {"margin": 2.0},  # an untrained network is never sure enough
    "simclr": {"num_views": 3},
    "simsiam": {"num_views": 3},
    "spa": {"selective": False},  # an untrained network is as sure of nearly any view
    "symmetries": {"permutations": 3},  # an untrained transformer hardly tells left from right
}
# Further settings, which take other branches of a method's code.
VARIANTS = {
    "actmad": ({"form": "l1"}, {"layers": "stages"}),
    "clust3": ({"num_views": 2},),
    "it3": ({"second": "adapted"},),
    "memo": ({"num_views": 4, "keep": 0.5}, {"num_views": 3, "kind": "augmix"}),
    "simsiam": ({"target": "source", "num_views": 3},),
    "views": ({"num_views": 4, "keep": 0.6}, {"num_views": 4, "keep": 0.6, "vote": True}),
}
# Learning rates that lower the loss of untrained networks, where the usual one is too large: an
# untrained transformer's tokens are small, and with moments matched they are as steep as after a
# norm.
RATES = {"Dressed": 1e-3}
COUNT = 5  # images
SEED = 3  # of the slow reference: a seed that is dropped on the way is not 0


def rate(method: Method) -> float:
    """Give a learning rate that lowers a method's loss."""
    return RATES.get(type(method).__name__, 1e-2)


def names() -> tuple[str, ...]:
    """List the package's methods."""
    return method_names()


def load(name: str) -> Method:
    """Create a method by its file's name or its module's dotted path, with the settings above."""
    return load_method(name, SETTINGS.get(name, {}))


@once
def source(
    kind: str, method: Method, dtype: torch.dtype = torch.float64
) -> tuple[Network, Statistics]:
    """Give the network of a kind (see `networks`) with all the statistics that a method needs."""
    network, statistics = networks.source_statistics(kind, dtype)
    images = networks.images(64, seed=7).to(dtype)
    return network, complete_statistics(statistics, method, network, lambda: [images])


@once
def cases(name: str) -> tuple[tuple[str, Method], ...]:
    """List pairs of a network's kind and the method to try on it.

    The networks are those with the method's head, or one of each sort if it needs none. Variants
    of the method are tried on the first of them.

    Raises:
        UserError: the method accepts none of them.
    """
    method = load(name)
    kinds = ["resnet", "groupnorm", "vit"]
    if method.head:
        kinds = [kind for kind in networks.KINDS if networks.HEADS[kind] == method.head]
    refusal = UserError(
        f"method {name}: the tests have no network with the head of objective {method.head}"
    )
    accepted = []
    for kind in kinds:
        try:
            method.check(networks.source_statistics(kind)[0])
            accepted.append(kind)
        except UserError as error:
            refusal = error
    if not accepted:
        raise refusal
    variants = [load_method(name, settings) for settings in VARIANTS.get(name, ())]
    pairs = [(kind, method) for kind in accepted]
    return (*pairs, *((accepted[0], variant) for variant in variants))


def shifted(count: int = COUNT, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw bright images of low contrast."""
    return (networks.images(count, seed=50) * 0.4 + 0.6).to(dtype)


class Unbound:
    """Stands for a `Bound` network in the slow reference: one image's parameters in the network."""

    def __init__(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        self.module, self.trained = module, dict(trained)
        self.source = {name: value.detach().clone() for name, value in module.named_parameters()}
        self._values = {**self.source, **trained}

    def __call__(self, *args, **kwargs) -> Outputs:
        return functional_call(self.module, self._values, args, kwargs)

    def rebound(self, parameters: Mapping[str, Tensor]) -> "Unbound":
        trained = {name: parameters.get(name, value) for name, value in self.trained.items()}
        rebound = Unbound(self.module, trained)
        rebound._values |= {**self._values, **parameters}
        return rebound

    def plain(self) -> nn.Module:
        """Give a copy of the network that holds these parameters."""
        network = copy.deepcopy(self.module)
        network.load_state_dict(self._values, strict=False)
        return network


def leaves(network: nn.Module, method: Method, loop: InnerLoop) -> dict[str, nn.Parameter]:
    """Copy the parameters that are to be trained."""
    trainable = select_parameters(network, loop.trainable) if method.trains else {}
    return {name: nn.Parameter(value.detach().clone()) for name, value in trainable.items()}


def step(
    loss_of: Callable[[], tuple[Tensor, State]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loop: InnerLoop,
) -> State:
    """Take one step; return the next state, detached and copied."""
    optimizer.zero_grad()
    loss, state = loss_of()
    loss.backward()
    if loop.sharpness:
        climbing = [value for value in parameters.values() if value.grad is not None]
        start = [value.detach().clone() for value in climbing]
        norm = nn.utils.get_total_norm([value.grad for value in climbing])
        with torch.no_grad():
            for value in climbing:
                value += loop.sharpness * value.grad / norm.clamp_min(1e-12)
        optimizer.zero_grad()
        loss, state = loss_of()
        loss.backward()
        with torch.no_grad():
            for value, before in zip(climbing, start, strict=True):
                value.copy_(before)
    state = tree_map(lambda part: part.detach().clone(), state)
    if loop.clip:  # by hand: torch's function adds 1e-6 to the norm
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        factor = min(1.0, loop.clip / max(nn.utils.get_total_norm(gradients).item(), 1e-12))
        for gradient in gradients:
            gradient *= factor
    wanted = any(value.grad is not None and value.grad.any() for value in parameters.values())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer.step()
    if not wanted:  # what the optimiser remembers must not move the weights
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
    return state


def optimiser(
    parameters: Mapping[str, nn.Parameter], loop: InnerLoop
) -> torch.optim.Optimizer | None:
    if not parameters:
        return None
    if loop.optimizer == "adam":
        return torch.optim.Adam(parameters.values(), lr=loop.lr)
    return torch.optim.SGD(parameters.values(), lr=loop.lr, momentum=loop.momentum)


def trained_on_one(
    network, image: Tensor, method: Method, loop: InnerLoop, statistics, image_id: str
) -> tuple[Unbound, list[Any]]:
    """Adapt to one image: give the network bound to its parameters, and every step's views."""
    parameters = leaves(network, method, loop)
    optimizer = optimiser(parameters, loop)
    net, state, drawn = Unbound(network, parameters), method.init_state(), []
    with normalised(network, loop, statistics):
        for number in range(max(loop.steps, 1) if parameters else 1):
            generator = torch_generator(SEED, "views", image_id, number)
            views = method.views(network, image[None], [generator])
            views = tree_map(lambda part: part[0], views)
            drawn.append(views)
            if parameters and loop.steps:
                loss_of = partial(method.loss, net, views, statistics, state)
                for group in optimizer.param_groups:
                    group["lr"] = loop.rate(number + 1)
                state = step(loss_of, parameters, optimizer, loop)
    return net, drawn


@torch.no_grad()
def one_at_a_time(
    network, image: Tensor, method: Method, loop: InnerLoop, statistics, image_id: str
) -> Tensor:
    """Adapt to one image and classify it: ``(K,)``."""
    with torch.enable_grad():
        net, drawn = trained_on_one(network, image, method, loop, statistics, image_id)
    if type(method).predict is not Method.predict:
        with normalised(network, loop, statistics):
            return method.predict(net, image, drawn[0], statistics)
    adapted = net.plain()
    with normalised(adapted, loop, statistics):
        return adapted(image[None]).logits[0]


def assert_vectorised_equals_one_image_at_a_time(
    kind: str, method: Method, loop: InnerLoop, count: int = COUNT
) -> None:
    """Compare `adapt` to the slow reference."""
    network, statistics = source(kind, method)
    images, image_ids = shifted(count), [f"image-{i}" for i in range(count)]
    together = adapt(
        network, images, method, loop, statistics=statistics, image_ids=image_ids, seed=SEED
    )
    alone = [
        one_at_a_time(network, image, method, loop, statistics, image_id)
        for image, image_id in zip(images, image_ids, strict=True)
    ]
    assert not together.fell_back.any()
    torch.testing.assert_close(together.logits, torch.stack(alone), atol=1e-8, rtol=1e-8)
    if method.trains:
        assert (together.logits - together.source_logits).abs().max() > 1e-6


def batch_by_batch(
    network, images: Tensor, method: Method, loop: InnerLoop, statistics, batches: Sequence[slice]
) -> Tensor:
    """Classify a stream: ``(N, K)``."""
    return torch.cat(list(along(network, images, method, loop, statistics, batches)))


def batch_loss(
    method: Method, net: Unbound, views: Any, statistics, state: State
) -> tuple[Tensor, State]:
    """Give a method's loss of a batch, or the mean of its losses of the batch's images."""
    if method.whole_batch:
        return method.loss(net, tree_map(lambda part: part.flatten(0, 1), views), statistics, state)
    losses = [
        method.loss(net, views_of(views, row), statistics, ())[0]
        for row in range(len(tree_leaves(views)[0]))
    ]
    return torch.stack(losses).mean(), state


def views_of(views: Any, row: int) -> Any:
    """Give one image's part of a batch's views."""
    return tree_map(lambda part: part[row], views)


def along(
    network, images: Tensor, method: Method, loop: InnerLoop, statistics, batches: Sequence[slice]
) -> Iterator[Tensor]:
    """Adapt to one batch after the other, and classify each after its steps."""
    parameters = leaves(network, method, loop)
    optimizer = optimiser(parameters, loop)
    net, state, steps_taken = Unbound(network, parameters), method.init_state(), 0
    source = {name: value.detach().clone() for name, value in parameters.items()}
    for part in batches:
        batch, drawn = images[part], []
        for number in range(loop.steps):
            image_ids = map(str, range(len(images))[part])
            generators = [torch_generator(SEED, "views", name, number) for name in image_ids]
            with normalised(network, loop, statistics, batch_size=len(batch)):
                drawn.append(method.views(network, batch, generators))
        for views in drawn if parameters else ():
            loss_of = partial(batch_loss, method, net, views, statistics, state)
            with normalised(
                network, loop, statistics, batch_size=len(batch) if method.whole_batch else 1
            ):
                state = step(loss_of, parameters, optimizer, loop)
            with torch.no_grad():
                generator = torch_generator(SEED, "after_step", steps_taken)
                values = {name: value.detach() for name, value in parameters.items()}
                changed, state = method.after_step(values, source, state, generator)
                steps_taken += 1
                for name, value in parameters.items():
                    value.copy_(changed[name])
                if all(changed[name] is source[name] for name in parameters):
                    optimizer = optimiser(parameters, loop)
        alone = type(method).predict is not Method.predict
        whole = not alone or type(method).predict_batch is not Method.predict_batch
        with (
            torch.no_grad(),
            normalised(network, loop, statistics, batch_size=len(batch) if whole else 1),
        ):
            if type(method).predict_batch is not Method.predict_batch:
                logits, state = method.predict_batch(net, batch, statistics, state)
            elif alone:
                predictions = [
                    method.predict(net, image, views_of(drawn[0], row), statistics)
                    for row, image in enumerate(batch)
                ]
                logits = torch.stack(predictions)
            else:
                logits = net(batch).logits
        yield logits
