"""A method tried on a few random images before any work, and what is wrong with it told by hook and line."""

import copy
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import adapt_stream
from tttlab.config.method_settings import HOOKS
from tttlab.errors import UserError
from tttlab.networks.source_statistics import Statistics
from tttlab.seeding import torch_generator

IMAGES = 2  # each on its own: the fewest that show whether predictions depend on the other images of a batch
BATCH = 8  # of a stream, where that is enough for the method

_OTHERWISE = "which is another one for every image"
_ADVICE = {  # what torch says: what it means, and what to do
    "random operation": "draws random numbers; draw them in `views`, from the generators that are given there",
    "data-dependent control flow": f"branches on a value, {_OTHERWISE}; use torch.where, or multiply by zero and one",
    ".item()": f"takes a number out of a tensor, {_OTHERWISE}; compute with the tensor itself",
    "data pointer": f"takes an array out of a tensor, {_OTHERWISE}; compute with the tensor itself",
    "dynamic shape": f"selects a number of elements, {_OTHERWISE}; use torch.where, or multiply by zero and one",
    "broadcast shape": "changes a tensor in place that all images share; write x = x + y",
    "inside a functorch transform": "differentiates by itself; return the loss, the adapter differentiates it",
}


def try_method(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    image_size: int,
    protocol: str = "episodic",
    batch_size: int = BATCH,
) -> None:
    """Lead random images through all that the adapter does with a method: views, loss, one step, prediction.

    Args:
        network: a network of the kind that is to be adapted, trained or not; it is left exactly as it was.
        method: what to try.
        loop: how; one step is taken, if the method trains.
        statistics: source statistics.
        image_size: side of the square images, pixels.
        protocol: ``episodic`` or ``online``.
        batch_size: most images of a stream's batch.

    Raises:
        UserError: a hook fails or gives what the adapter cannot use; it names the hook, the line, and what to do.
    """
    device = next(network.parameters()).device
    count = IMAGES if protocol == "episodic" else min(batch_size, max(BATCH, method.smallest_batch))
    images = torch.rand(count, 3, image_size, image_size, generator=torch_generator(0, "trial")).to(
        device
    )
    tried, loop = watched(method), replace(loop, steps=int(method.trains))
    if protocol == "online":
        adapt_stream(network, images, tried, loop, batch_size=count, statistics=statistics)
    else:
        adapt(network, images, tried, loop, statistics=statistics, images_per_step=1)


def watched(method: Method) -> Method:
    """Copy a method such that the hooks that it has itself tell what is wrong with them as a `UserError`."""
    kind = type(method)
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
    watching = type(kind.__name__, (kind,), {"__slots__": (), **named})
    for hook in HOOKS:
        if getattr(kind, hook) is not getattr(Method, hook):
            setattr(watching, hook, _watched(hook, watching))
    copied = copy.copy(method)
    object.__setattr__(
        copied, "__class__", watching
    )  # without slots of its own it can take the other's place
    return copied


def _watched(hook: str, watching: type[Method]) -> Callable[..., Any]:
    def call(self: Method, *arguments: Any, **named: Any) -> Any:
        try:
            found = getattr(super(watching, self), hook)(*arguments, **named)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(f"{hook}{_line(error, watching)} {_told(error)}") from error
        if mistake := _MISTAKES[hook](found, arguments):
            raise UserError(f"{hook} {mistake}")
        return found

    return call


def _line(error: Exception, kind: type[Method]) -> str:
    """Name the line of the method's own file that an error comes from; nothing where it comes from its call."""
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f" (line {lines[-1]})" if lines else ""


def _told(error: Exception) -> str:
    text = str(error)
    known = next((advice for words, advice in _ADVICE.items() if words in text), None)
    return known or f"fails with {type(error).__name__}: {(text.splitlines() or [''])[0]}"


# --- what a hook must give: what is wrong with it, or nothing --------------------------------------------------------


def _no_mistake(_found: Any, _arguments: tuple) -> None:
    return None


def _statistics_mistake(found: Any, _arguments: tuple) -> str | None:
    if not isinstance(found, Mapping) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        return f"must give tensors by name, found {_show(found)}"
    return None


def _views_mistake(found: Any, arguments: tuple) -> str | None:
    leaves, count = tree_leaves(found), len(arguments[1])
    if not leaves or not all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count for leaf in leaves
    ):
        return f"must give tensors whose first dimension counts the images, here {count}, found {_show(found)}"
    return None


def _state_mistake(found: Any, _arguments: tuple = ()) -> str | None:
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
        return f"must give a state of tensors, in tuples, lists and dicts, found {_show(found)}"
    return None


def _pair_mistake(found: Any, names: str) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        return f"must return two things, {names}, found {_show(found)}; write return {names}"
    return _state_mistake(found[1])


def _loss_mistake(found: Any, _arguments: tuple) -> str | None:
    if mistake := _pair_mistake(found, "loss, state"):
        return mistake
    if not isinstance(found[0], Tensor) or found[0].dim() or not found[0].is_floating_point():
        return f"must return a tensor of one number, without dimensions, found {_show(found[0])}; take the mean over the views"
    return None


def _after_step_mistake(found: Any, arguments: tuple) -> str | None:
    if mistake := _pair_mistake(found, "parameters, state"):
        return mistake
    expected = _shapes(arguments[0])
    if not isinstance(found[0], Mapping) or _shapes(found[0]) != expected:
        return f"must return the {len(expected)} parameters that it is given, by name and of their shapes"
    return None


def _shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in tensors.items()}


def _predict_mistake(found: Any, arguments: tuple) -> str | None:
    net, image = arguments[:2]
    return _logits_mistake(found, net(image.unsqueeze(0)).logits.shape[1:])


def _predict_batch_mistake(found: Any, arguments: tuple) -> str | None:
    net, images = arguments[:2]
    return _pair_mistake(found, "logits, state") or _logits_mistake(
        found[0], net(images).logits.shape
    )


def _logits_mistake(found: Any, shape: torch.Size) -> str | None:
    if not isinstance(found, Tensor) or found.shape != shape:
        return f"must return logits of shape {tuple(shape)}, found {_show(found)}"
    return None


def _show(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, tuple):
        return f"({', '.join(map(_show, found))})"
    return "None" if found is None else f"something of type {type(found).__name__}"


_MISTAKES: dict[str, Callable[[Any, tuple], str | None]] = {
    "check": _no_mistake,
    "source_statistics": _statistics_mistake,
    "views": _views_mistake,
    "init_state": _state_mistake,
    "loss": _loss_mistake,
    "after_step": _after_step_mistake,
    "predict": _predict_mistake,
    "predict_batch": _predict_batch_mistake,
}
