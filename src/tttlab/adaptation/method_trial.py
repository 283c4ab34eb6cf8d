"""A trial of a method on a few random images before any work.

A mistake is reported with the hook and the line that it is in.
"""

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
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import adapt_stream
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.method_words import HOOKS
from tttlab.errors import UserError
from tttlab.networks.source_statistics import Statistics
from tttlab.seeding import torch_generator

IMAGES = 2  # the fewest that show whether a prediction depends on the other images of a batch
BATCH = 8  # images of a stream, unless the method needs more

_PER_IMAGE = "which is another one for every image"
_COMPUTE = "compute with the tensor itself"
_SELECT = "use torch.where, or multiply by zero and one"
_ADVICE = {  # words in torch's message → what is wrong and how to correct it
    "random operation": (
        "draws random numbers; draw them in `views`, from the generators that are given there"
    ),
    "data-dependent control flow": f"branches on a value, {_PER_IMAGE}; {_SELECT}",
    ".item()": f"takes a number out of a tensor, {_PER_IMAGE}; {_COMPUTE}",
    "data pointer": f"takes an array out of a tensor, {_PER_IMAGE}; {_COMPUTE}",
    "dynamic shape": f"selects a number of elements, {_PER_IMAGE}; {_SELECT}",
    "broadcast shape": "changes a tensor in place that all images share; write x = x + y",
    "inside a functorch transform": (
        "differentiates by itself; return the loss, the adapter differentiates it"
    ),
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
    """Adapt to random images once, with everything the adapter calls of a method.

    That is: views, loss, one step, prediction.

    Args:
        network: a network like the one to be adapted, trained or not; it is not changed.
        method: the method to try.
        loop: settings of the steps; one step is taken, or none if the method does not train.
        statistics: source statistics.
        image_size: side of the square images, pixels.
        protocol: ``episodic`` or ``online``.
        batch_size: the most images in a batch of a stream.

    Raises:
        UserError: a hook fails or returns a value that the adapter cannot use; the message names
            the hook, the line, and the remedy.
    """
    count = IMAGES if protocol == "episodic" else min(batch_size, max(BATCH, method.smallest_batch))
    generator = torch_generator(0, "trial")
    images = torch.rand(count, 3, image_size, image_size, generator=generator)
    images = images.to(next(network.parameters()).device)
    method, loop = watched(method), replace(loop, steps=int(method.trains))
    method.averaged_views()
    before = images.clone()
    if protocol == "online":
        result = adapt_stream(
            network, images, method, loop, batch_size=count, statistics=statistics
        )
    else:
        result = adapt(network, images, method, loop, statistics=statistics, images_per_step=1)
    if not torch.equal(images, before):  # memory that nobody may write to
        raise UserError(
            "a hook changes the images that it is given, which are classified as well; write "
            "x = x * y, not x *= y or a function whose name ends with _"
        )
    if method.trains and not result.losses.isfinite().any():
        raise UserError(
            f"loss is not finite on any of {count} random images, so that every image would keep "
            "the network's own prediction; look for a division by zero or the logarithm of zero"
        )


def watched(method: Method) -> Method:
    """Copy a method so that the hooks it defines itself raise a `UserError` for every mistake."""
    kind = type(method)
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
    watching = type(kind.__name__, (kind,), {"__slots__": (), **names})
    for hook in HOOKS:
        if getattr(kind, hook) is not getattr(Method, hook):
            setattr(watching, hook, _watched(hook, watching))
    copied = copy.copy(method)
    # Python allows this because both classes have the same slots.
    object.__setattr__(copied, "__class__", watching)
    return copied


def _watched(hook: str, watching: type[Method]) -> Callable[..., Any]:
    def call(self: Method, *arguments: Any, **named: Any) -> Any:
        try:
            result = getattr(super(watching, self), hook)(*arguments, **named)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(f"{hook}{_line(error, watching)} {_explain(error)}") from error
        if mistake := _MISTAKES[hook](result, arguments):
            raise UserError(f"{hook} {mistake}")
        return result

    return call


def _line(error: Exception, kind: type[Method]) -> str:
    """Name the last line of the method's file in an error's traceback; empty if there is none."""
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f" (line {lines[-1]})" if lines else ""


def _explain(error: Exception) -> str:
    text = str(error)
    for words, advice in _ADVICE.items():
        if words in text:
            return advice
    return f"fails with {type(error).__name__}: {(text.splitlines() or [''])[0]}"


# Each function below takes a hook's result and its arguments, and says what is wrong with the
# result, or None.


def _no_mistake(_result: Any, _arguments: tuple) -> None:
    return None


def _statistics_mistake(result: Any, _arguments: tuple) -> str | None:
    if isinstance(result, Mapping) and all(isinstance(value, Tensor) for value in result.values()):
        return None
    return f"must give tensors by name, found {_show(result)}"


def _views_mistake(result: Any, arguments: tuple) -> str | None:
    leaves, count = tree_leaves(result), len(arguments[1])
    if leaves and all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
        return None
    return (
        f"must give tensors whose first dimension counts the images, here {count}, "
        f"found {_show(result)}"
    )


def _state_mistake(result: Any, _arguments: tuple = ()) -> str | None:
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return f"must give a state of tensors, in tuples, lists and dicts, found {_show(result)}"
    return None


def _pair_mistake(result: Any, names: str) -> str | None:
    if not isinstance(result, tuple) or len(result) != 2:
        return f"must return two things, {names}, found {_show(result)}; write return {names}"
    return _state_mistake(result[1])


def _loss_mistake(result: Any, _arguments: tuple) -> str | None:
    if mistake := _pair_mistake(result, "loss, state"):
        return mistake
    loss = result[0]
    if isinstance(loss, Tensor) and not loss.dim() and loss.is_floating_point():
        return None
    return (
        f"must return a tensor of one number, without dimensions, found {_show(loss)}; "
        "take the mean over the views"
    )


def _after_step_mistake(result: Any, arguments: tuple) -> str | None:
    if mistake := _pair_mistake(result, "parameters, state"):
        return mistake
    expected = _shapes(arguments[0])
    if isinstance(result[0], Mapping) and _shapes(result[0]) == expected:
        return None
    return (
        f"must return the {len(expected)} parameters that it is given, by name and of their shapes"
    )


def _shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in tensors.items()}


def _predict_mistake(result: Any, arguments: tuple) -> str | None:
    net, image = arguments[:2]
    return _logits_mistake(result, net(image.unsqueeze(0)).logits.shape[1:])


def _predict_batch_mistake(result: Any, arguments: tuple) -> str | None:
    net, images = arguments[:2]
    if mistake := _pair_mistake(result, "logits, state"):
        return mistake
    return _logits_mistake(result[0], net(images).logits.shape)


def _logits_mistake(result: Any, shape: torch.Size) -> str | None:
    if not isinstance(result, Tensor) or result.shape != shape:
        return f"must return logits of shape {tuple(shape)}, found {_show(result)}"
    return None


def _show(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_show, result))})"
    return "None" if result is None else f"something of type {type(result).__name__}"


def _count_mistake(result: Any, _arguments: tuple) -> str | None:
    if isinstance(result, int) and result >= 0:
        return None
    return f"must give a whole number from 0 on, found {_show(result)}"


_MISTAKES: dict[str, Callable[[Any, tuple], str | None]] = {
    "check": _no_mistake,
    "source_statistics": _statistics_mistake,
    "views": _views_mistake,
    "init_state": _state_mistake,
    "loss": _loss_mistake,
    "after_step": _after_step_mistake,
    "predict": _predict_mistake,
    "predict_batch": _predict_batch_mistake,
    "averaged_views": _count_mistake,
}
