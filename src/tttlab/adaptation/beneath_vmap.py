"""Computing beneath ``vmap``: a layer sees the tensors of all B images and where B lies in them."""

from collections.abc import Callable

from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

IMAGES = 1  # the level of the outermost ``vmap``

# (B, the dimension of B in each tensor, *tensors) → (result, the dimension of B in it)
Rule = Callable[..., tuple[Tensor, int]]
Layer = Callable[..., Tensor]


def is_per_image(tensor: Tensor) -> bool:
    """Tell whether ``vmap`` over images holds a value of this tensor for each image."""
    return _unwrap_batched(tensor, IMAGES)[1] is not None


def apply_beneath(rule: Rule, *tensors: Tensor) -> Tensor:
    """Apply a rule to the tensors that ``vmap`` wraps.

    An ``autograd.Function`` with a rule for ``vmap`` does the same, but costs 0.3 ms per call.
    """
    values, dims = zip(*(_unwrap_batched(tensor, IMAGES) for tensor in tensors), strict=True)
    with temporarily_pop_interpreter_stack():
        value, dim = rule(values[0].shape[dims[0]], dims, *values)
    return _add_batch_dim(value, dim, IMAGES)


def over_batch(layer: Layer, _size: int, dim: int, x: Tensor) -> tuple[Tensor, int]:
    """Apply a layer to ``(B·V, …)`` or ``(V·B, …)``, in the order in which ``x`` lies in memory."""
    x, dim = (x, dim) if dim <= 1 else (x.movedim(dim, 0), 0)
    if x.stride(0) < x.stride(1):
        x, dim = x.transpose(0, 1), 1 - dim
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]), dim


def over_channels(layer: Layer, size: int, dim: int, x: Tensor) -> tuple[Tensor, int]:
    """Apply a layer to ``(V, B·C, H, W)``."""
    return layer(x.movedim(dim, 1).flatten(1, 2)).unflatten(1, (size, -1)), 1


def choose(
    layer: Layer,
    rule: Rule | None,
    x: Tensor,
    *parameters: Tensor | None,
    views: int,
    fold: Rule = over_batch,
) -> Tensor | tuple:
    """Choose how to compute a layer: give a rule followed by its tensors, or the result itself.

    Args:
        layer: the ordinary layer, a function of ``x`` and the parameters.
        rule: computes the layer where every image has its own parameters.
        x: the activation.
        parameters: of the layer; None for those it lacks.
        views: dimensions of ``x`` if it holds an image's views; fewer leave the call to ``vmap``.
        fold: `over_batch` or `over_channels`, for a layer without parameters per image.
    """
    present = [parameter for parameter in parameters if parameter is not None]
    per_image = {is_per_image(parameter) for parameter in present}
    if not is_per_image(x) or x.ndim < views or len(per_image) > 1:
        return layer(x, *parameters)
    if True in per_image:
        return rule, x, *present
    return lambda size, dims, x: fold(lambda x: layer(x, *parameters), size, dims[0], x), x
