"""What the tests of the contract try: every method on small networks, and the slow way that they are held against.

The slow way is plain: one image after the other, or one batch, by ordinary autograd and torch's own optimiser.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import InnerLoop, select_parameters
from tttlab.adaptation.method import Method, State
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import complete_statistics
from tttlab.config.method_settings import method_names
from tttlab.errors import UserError
from tttlab.networks.network import Network, Outputs
from tttlab.networks.source_statistics import Statistics
from tttlab.seeding import torch_generator

SETTINGS = {
    "cotta": {"num_views": 4},
    "deyo": {"margin": 2.0, "plpd_threshold": -1.0},
    "eata": {"margin": 2.0, "epsilon": 2.0},
    "mae": {"num_views": 3},
    "memo": {"num_views": 3},
    "rotation": {"num_views": 3},
    "sar": {"margin": 2.0},  # an untrained network is never sure enough
    "simclr": {"num_views": 3},
    "simsiam": {"num_views": 3},
    "symmetries": {"permutations": 3},  # an untrained transformer hardly tells left from right
}
VARIANTS = {  # further settings that take other ways through a method
    "actmad": ({"form": "l1"}, {"layers": "stages"}),
    "clust3": ({"num_views": 2},),
    "it3": ({"second": "adapted"},),
    "simsiam": ({"target": "source", "num_views": 3},),
}
COUNT = 5  # images


def names() -> tuple[str, ...]:
    """List the package's methods."""
    return method_names()


def load(name: str) -> Method:
    """Create a method by its file's name or its module's dotted path, with the settings above."""
    return load_method(name, SETTINGS.get(name, {}))


@cache
def source(
    kind: str, method: Method, dtype: torch.dtype = torch.float64
) -> tuple[Network, Statistics]:
    """Give the network of a kind, see `networks.source_statistics`, with all the statistics that a method needs."""
    network, statistics = networks.source_statistics(kind, dtype)
    return network, complete_statistics(
        statistics, method, network, lambda: [networks.images(64, seed=7).to(dtype)]
    )


@cache
def cases(name: str) -> tuple[tuple[str, Method], ...]:
    """List the networks to try a method on, each with the method: those with its head, or one of each sort if it needs none.

    Raises:
        UserError: the method accepts none of them.
    """
    method, kinds = load(name), []
    refusal = UserError(
        f"method {name}: the tests have no network with the head of objective {method.head}"
    )
    headed = [kind for kind in networks.KINDS if networks.HEADS[kind] == method.head]
    for kind in headed if method.head else ("resnet", "groupnorm", "vit"):
        try:
            method.check(networks.source_statistics(kind)[0])
            kinds.append(kind)
        except UserError as error:
            refusal = error
    if not kinds:
        raise refusal
    variants = [load_method(name, settings) for settings in VARIANTS.get(name, ())]
    return (*((kind, method) for kind in kinds), *((kinds[0], variant) for variant in variants))


def shifted(count: int = COUNT, dtype: torch.dtype = torch.float64) -> Tensor:
    """Bright images of little contrast."""
    return (networks.images(count, seed=50) * 0.4 + 0.6).to(dtype)


class Unbound:
    """What stands for a `Bound` network in the slow way: the source network as it was, beside one image's own parameters."""

    def __init__(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        self.module, self.trained = module, dict(trained)
        self.source = {name: value.detach().clone() for name, value in module.named_parameters()}
        self._values = {**self.source, **trained}

    def __call__(self, *args, **kwargs) -> Outputs:
        return functional_call(self.module, self._values, args, kwargs)

    def rebound(self, parameters: Mapping[str, Tensor]) -> "Unbound":
        other = Unbound(
            self.module, {name: parameters.get(name, value) for name, value in self.trained.items()}
        )
        other._values |= {**self._values, **parameters}
        return other

    def plain(self) -> nn.Module:
        """A copy of the network with these parameters for its own."""
        copied = copy.deepcopy(self.module)
        copied.load_state_dict(self._values, strict=False)
        return copied


def leaves(network: nn.Module, method: Method, loop: InnerLoop) -> dict[str, nn.Parameter]:
    """Copies of the parameters that are to be trained."""
    chosen = select_parameters(network, loop.trainable) if method.trains else {}
    return {name: nn.Parameter(value.detach().clone()) for name, value in chosen.items()}


def step(
    loss_of: Callable[[], tuple[Tensor, State]],
    own: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loop: InnerLoop,
) -> State:
    """Go down a loss's gradient; the next state, whose memory is no weight's."""
    optimizer.zero_grad()
    loss, state = loss_of()
    loss.backward()
    if loop.sharpness:
        climbing = [value for value in own.values() if value.grad is not None]
        here, length = (
            [value.detach().clone() for value in climbing],
            nn.utils.get_total_norm([v.grad for v in climbing]),
        )
        with torch.no_grad():
            for value in climbing:
                value += loop.sharpness * value.grad / length.clamp_min(1e-12)
        optimizer.zero_grad()
        loss, state = loss_of()
        loss.backward()
        with torch.no_grad():
            for value, before in zip(climbing, here, strict=True):
                value.copy_(before)
    state = tree_map(lambda part: part.detach().clone(), state)
    if loop.clip:  # not by torch's own, which adds 1e-6 to the norm
        slopes = [value.grad for value in own.values() if value.grad is not None]
        factor = min(1.0, loop.clip / max(nn.utils.get_total_norm(slopes).item(), 1e-12))
        for slope in slopes:
            slope *= factor
    optimizer.step()
    return state


def optimiser(own: Mapping[str, nn.Parameter], loop: InnerLoop) -> torch.optim.Optimizer | None:
    if not own:
        return None
    if loop.optimizer == "adam":
        return torch.optim.Adam(own.values(), lr=loop.lr)
    return torch.optim.SGD(own.values(), lr=loop.lr, momentum=loop.momentum)


def trained_on_one(
    network, image: Tensor, method: Method, loop: InnerLoop, statistics, image_id: str
) -> tuple[Unbound, object]:
    """Adapt to one image: the network bound to its parameters, and the last views."""
    own = leaves(network, method, loop)
    net, state, optimizer = Unbound(network, own), method.init_state(), optimiser(own, loop)
    with normalised(network, loop.normalisation, statistics):
        for number in range(max(loop.steps, 1) if own else 1):
            views = method.views(
                network, image[None], [torch_generator(0, "views", image_id, number)]
            )
            views = tree_map(lambda part: part[0], views)
            if own and loop.steps:
                state = step(
                    partial(method.loss, net, views, statistics, state), own, optimizer, loop
                )
    return net, views


@torch.no_grad()
def one_at_a_time(
    network, image: Tensor, method: Method, loop: InnerLoop, statistics, image_id: str
) -> Tensor:
    """Classify one image by what was adapted to it: ``(K,)``."""
    with torch.enable_grad():
        net, views = trained_on_one(network, image, method, loop, statistics, image_id)
    if type(method).predict is not Method.predict:
        with normalised(network, loop.normalisation, statistics):
            return method.predict(net, image, views, statistics)
    copied = net.plain()
    with normalised(copied, loop.normalisation, statistics):
        return copied(image[None]).logits[0]


def assert_vectorised_equals_one_image_at_a_time(
    kind: str, method: Method, loop: InnerLoop, count: int = COUNT
) -> None:
    """Hold `adapt` against the slow way."""
    network, statistics = source(kind, method)
    images, names = shifted(count), [f"image-{i}" for i in range(count)]
    together = adapt(network, images, method, loop, statistics=statistics, image_ids=names)
    alone = [
        one_at_a_time(network, image, method, loop, statistics, image_id)
        for image, image_id in zip(images, names, strict=True)
    ]
    assert not together.fell_back.any()
    torch.testing.assert_close(together.logits, torch.stack(alone), atol=1e-8, rtol=1e-8)
    if method.trains:
        assert (
            together.logits - together.source_logits
        ).abs().max() > 1e-6  # and something did happen


def batch_by_batch(
    network, images: Tensor, method: Method, loop: InnerLoop, statistics, batches: Sequence[slice]
) -> Tensor:
    """Classify a stream: ``(N, K)``."""
    with normalised(network, loop.normalisation, statistics):
        return torch.cat(list(along(network, images, method, loop, statistics, batches)))


def batch_loss(
    method: Method, net: Unbound, views: Any, statistics, state: State
) -> tuple[Tensor, State]:
    """A method's loss of a batch, or the mean of its losses of the batch's images."""
    if method.whole_batch:
        return method.loss(net, tree_map(lambda part: part.flatten(0, 1), views), statistics, state)
    each = [
        tree_map(lambda part, row=row: part[row], views)
        for row in range(len(tree_leaves(views)[0]))
    ]
    return torch.stack([method.loss(net, one, statistics, ())[0] for one in each]).mean(), state


def along(
    network, images: Tensor, method: Method, loop: InnerLoop, statistics, batches: Sequence[slice]
) -> Iterator[Tensor]:
    """Adapt to one batch after the other, and classify each after its steps."""
    own = leaves(network, method, loop)
    net, state, optimizer, taken = (
        Unbound(network, own),
        method.init_state(),
        optimiser(own, loop),
        0,
    )
    source = {name: value.detach().clone() for name, value in own.items()}
    for part in batches:
        ids = [str(number) for number in range(len(images))[part]]
        drawn = [
            method.views(
                network, images[part], [torch_generator(0, "views", name, number) for name in ids]
            )
            for number in range(loop.steps)
        ]
        for views in drawn if own else ():
            state = step(
                partial(batch_loss, method, net, views, statistics, state), own, optimizer, loop
            )
            with torch.no_grad():
                generator = torch_generator(0, "after_step", taken)
                found, state = method.after_step(
                    {name: value.detach() for name, value in own.items()}, source, state, generator
                )
                taken += 1
                for name, value in own.items():
                    value.copy_(found[name])
                if own and all(found[name] is source[name] for name in own):
                    optimizer = optimiser(own, loop)
        with torch.no_grad():
            if type(method).predict_batch is not Method.predict_batch:
                logits, state = method.predict_batch(net, images[part], statistics, state)
                yield logits
            elif type(method).predict is not Method.predict:
                rows = [
                    tree_map(lambda part, row=row: part[row], drawn[0]) for row in range(len(ids))
                ]
                yield torch.stack(
                    [
                        method.predict(net, image, one, statistics)
                        for image, one in zip(images[part], rows, strict=True)
                    ]
                )
            else:
                yield net(images[part]).logits
