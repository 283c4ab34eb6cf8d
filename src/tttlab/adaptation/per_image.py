"""Layers with one set of parameters per image, at the speed of ordinary ones; active while the context is open.

``torch.func.vmap`` can run a network under every image's own parameters, but its rules for some layers shuffle memory, split
fused kernels apart, or do not exist. Inside ``with PerImageLayers():`` those layers take other ways to the same numbers. With B
images of V views each:

no parameter per image    images and views are one batch of B·V, and the ordinary layer runs once.
convolution, batch norm,  images are folded into channels, ``(V, B·C, H, W)``: the convolution becomes a grouped one, the
group norm                normalisation an ordinary one over B·C channels. A layer's result is the next one's input as it lies.
linear                    one batched matrix product, bias included.
layer norm                the fused normalisation, then one multiply-add with the image's own gain and shift.

In-place operations become ordinary ones, for autograd pays for changing what is a view with two copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair
from torch.overrides import TorchFunctionMode

from tttlab.adaptation.convolution import PerImageConv2d

IMAGES = 1  # the level of the outermost ``vmap``
Rule = Callable[
    ..., tuple[Tensor, int]
]  # (B, where B lies in each tensor, tensors) → (result, where B lies in it)


class PerImageLayers(TorchFunctionMode):
    """Context in which calls under one ``vmap`` over images go the ways described above; others are left as they are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace a call."""
        kwargs = dict(kwargs or {})
        if func is Tensor.add_:
            return _add_in_place(*args, **kwargs)
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        stack = peek_interpreter_stack()
        if stack is None or stack.level() != IMAGES or stack.key() != TransformType.Vmap:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # the layers that it is made of
                found = _self_attention(*args, **kwargs)
            return found or func(*args, **kwargs)
        if func not in _LAYERS:
            return func(*args, **kwargs)
        call = _LAYERS[func](*args, **kwargs)
        return _beneath(*call) if isinstance(call, tuple) else call


def _beneath(rule: Rule, *tensors: Tensor) -> Tensor:
    """Apply a rule to what lies beneath ``vmap``'s tensors.

    This is what an ``autograd.Function`` with a rule for ``vmap`` does, without its 0.3 ms per call.
    """
    values, dims = zip(*(_unwrap_batched(tensor, IMAGES) for tensor in tensors), strict=True)
    with temporarily_pop_interpreter_stack():
        value, dim = rule(values[0].shape[dims[0]], dims, *values)
    return _add_batch_dim(value, dim, IMAGES)


def _add_in_place(x: Tensor, other: Tensor, **options: Any) -> Tensor:
    """Give the object ``x`` (``x += y`` in a residual block) the sum's memory; the old one, a view, is not written to."""
    if not (isinstance(other, Tensor) and _per_image(x)):
        return x.add_(other, **options)
    try:
        torch.utils.swap_tensors(x, torch.add(x, other, **options))
    except (
        RuntimeError
    ):  # somebody, such as PyTorch's profiler, holds a weak reference to the object
        x.add_(other, **options)
    return x


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    def plain(x, weight, bias, groups=groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def own(_size, dims, x, weight, bias=None):
        result = PerImageConv2d.apply(
            x.movedim(dims[0], 1), weight, pair(stride), pair(padding), pair(dilation), groups
        )
        return result if bias is None else result + bias.to(result.dtype)[..., None, None], 1

    if isinstance(padding, str):
        return plain(x, weight, bias)
    return _choose(plain, own, x, weight, bias, views=4)


def _batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    def plain(x, weight, bias, running_mean=running_mean, running_var=running_var):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    def own(size, dims, x, weight, bias=None):
        source = running_mean.repeat(size), running_var.repeat(size)
        return _over_channels(
            lambda x: plain(x, _flat(weight), _flat(bias), *source), size, dims[0], x
        )

    if training or running_mean is None:
        return plain(x, weight, bias)
    return _choose(plain, own, x, weight, bias, views=2)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    def plain(x, weight, bias, num_groups=num_groups):
        return F.group_norm(x, num_groups, weight, bias, eps)

    def own(size, dims, x, weight, bias=None):
        return _over_channels(
            lambda x: plain(x, _flat(weight), _flat(bias), size * num_groups), size, dims[0], x
        )

    return _choose(plain, own, x, weight, bias, views=4)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    def plain(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    def own(_size, dims, x, weight, bias=None):
        x = x.movedim(dims[0], 0)
        shape = (len(x), *[1] * (x.ndim - weight.ndim), *normalized_shape)
        return PerImageLayerNorm.apply(
            x, weight.view(shape), None if bias is None else bias.view(shape), normalized_shape, eps
        ), 0

    return _choose(plain, own, x, weight, bias, views=2)


class PerImageLayerNorm(Function):
    """Layer norm with a gain and a shift of their own for each image; keeps its input alone for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        normalized_shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        """Normalise ``x (B, …, *normalized_shape)`` with ``gain`` and ``shift (B, 1, …, *normalized_shape)``."""
        kind, x = (
            x.dtype,
            x.to(gain.dtype),
        )  # bf16 does not do for sums, nor for autocast's own layer norm
        normalised, mean, reciprocal = torch.native_layer_norm(x, normalized_shape, None, None, eps)
        ctx.save_for_backward(x, gain, shift, mean, reciprocal)
        ctx.normalized_shape, ctx.kind = normalized_shape, kind
        return normalised * gain if shift is None else torch.addcmul(shift, normalised, gain)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by the activation, the gain and the shift."""
        x, gain, shift, mean, reciprocal = ctx.saved_tensors
        options = ctx.normalized_shape, mean, reciprocal, None, None, [True, False, False]
        gradient = gradient.to(x.dtype)
        by_x = (
            torch.ops.aten.native_layer_norm_backward(gradient * gain, x, *options)[0]
            if ctx.needs_input_grad[0]
            else None
        )
        by_gain = ((x - mean).mul_(reciprocal).mul_(gradient)).sum_to_size(gain.shape)
        by_shift = None if shift is None else gradient.sum_to_size(shift.shape)
        return None if by_x is None else by_x.to(ctx.kind), by_gain, by_shift, None, None


def _weight_norm(v, g, dim=0):
    """Scale a weight ``v`` to length ``g`` along all axes but one (−1: all); as one operation it has no rule for ``vmap``."""
    if not (_per_image(v) or _per_image(g)):
        return torch._weight_norm(v, g, dim)
    return v * (
        g
        / torch.linalg.vector_norm(
            v, dim=[axis for axis in range(v.ndim) if axis != dim], keepdim=True
        )
    )


def _linear(x, weight, bias=None):
    def own(_size, dims, x, weight, bias=None):
        x = x.movedim(dims[0], 0)
        rows = x.flatten(1, -2)
        weight = weight.transpose(1, 2)
        result = (
            torch.bmm(rows, weight)
            if bias is None
            else torch.baddbmm(bias.unsqueeze(1), rows, weight)
        )
        return result.unflatten(1, x.shape[1:-1]), 0

    return _choose(F.linear, own, x, weight, bias, views=2)


def _adaptive_avg_pool2d(x, output_size):
    return _choose(
        lambda x: F.adaptive_avg_pool2d(x, output_size), None, x, views=4, over=_over_channels
    )


def _max_pool2d(x, *args, **kwargs):
    return _choose(
        lambda x: F.max_pool2d(x, *args, **kwargs), None, x, views=4, over=_over_channels
    )


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    def plain(query, key, value, mask=attn_mask):
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, **options
        )

    def folded(_size, dims, *tensors):
        tensors = [tensor.movedim(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]
        shape = tensors[0].shape[:2]
        tensors[3:] = [mask.expand(*shape, *mask.shape[2:]) for mask in tensors[3:]]
        return plain(*(tensor.flatten(0, 1) for tensor in tensors)).unflatten(0, shape), 0

    tensors = (query, key, value)
    if not all(map(_per_image, tensors)) or query.ndim != 4:
        return plain(*tensors)
    if attn_mask is None or (
        not _per_image(attn_mask) and (attn_mask.ndim < 4 or len(attn_mask) == 1)
    ):
        return folded, *tensors
    # Each image's own mask, as from a trained table of relative positions.
    return (
        (folded, *tensors, attn_mask)
        if _per_image(attn_mask) and attn_mask.ndim == 4
        else plain(*tensors)
    )


def _self_attention(
    query,
    key,
    value,
    _width,
    num_heads,
    in_proj_weight,
    in_proj_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_proj_weight,
    out_proj_bias,
    training=True,
    need_weights=True,
    **options,
):
    """Attend by the parts of `torch.nn.MultiheadAttention`, to a sequence ``(L, V, D)`` by itself; None: more is asked for."""
    more = (
        bias_k,
        bias_v,
        *map(
            options.get, ("key_padding_mask", "attn_mask", "q_proj_weight", "static_k", "static_v")
        ),
    )
    if (
        add_zero_attn
        or need_weights
        or (training and dropout_p)
        or any(one is not None for one in more)
    ):
        return None
    if not (query is key is value) or query.ndim != 3:
        return None
    split = F.linear(query, in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1))
    mixed = F.scaled_dot_product_attention(
        *split.permute(2, 1, 3, 0, 4)
    )  # (V, heads, L, D / heads)
    return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None


def _choose(
    plain: Callable[..., Tensor],
    own: Rule | None,
    x: Tensor,
    *parameters: Tensor | None,
    views: int,
    over=None,
):
    """Find the way for one call: a rule and the tensors it is about, or else the result itself.

    Args:
        plain: the ordinary layer, from ``x`` and its parameters.
        own: the rule if all parameters are each image's own.
        x: the activation.
        parameters: of the layer; None where it has none.
        views: dimensions of ``x`` if it holds an image's views; fewer leave the call to ``vmap``.
        over: the rule's form without parameters; by default images and views become one batch.
    """
    given = [parameter for parameter in parameters if parameter is not None]
    batched = [_per_image(parameter) for parameter in given]
    if not _per_image(x) or x.ndim < views or len(set(batched)) > 1:
        return plain(x, *parameters)
    if any(batched):
        return own, x, *given
    over = over or _over_batch
    return lambda size, dims, x: over(lambda x: plain(x, *parameters), size, dims[0], x), x


def _over_batch(
    layer: Callable[[Tensor], Tensor], _size: int, dim: int, x: Tensor
) -> tuple[Tensor, int]:
    """Apply a layer to ``(B·V, …)`` or ``(V·B, …)``, whichever is how ``x`` lies in memory."""
    x, dim = (x, dim) if dim <= 1 else (x.movedim(dim, 0), 0)
    if x.stride(0) < x.stride(1):
        x, dim = x.transpose(0, 1), 1 - dim
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]), dim


def _over_channels(
    layer: Callable[[Tensor], Tensor], size: int, dim: int, x: Tensor
) -> tuple[Tensor, int]:
    """Apply a layer to ``(V, B·C, H, W)``."""
    return layer(x.movedim(dim, 1).flatten(1, 2)).unflatten(1, (size, -1)), 1


def _per_image(tensor: Tensor) -> bool:
    return _unwrap_batched(tensor, IMAGES)[1] is not None


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


_LAYERS: dict[Callable, Callable] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    torch._weight_norm: _weight_norm,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.max_pool2d: _max_pool2d,
    F.scaled_dot_product_attention: _attention,
}
