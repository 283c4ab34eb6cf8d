"""The layers that `PerImageLayers` replaces.

Where a function has them, ``ordinary`` is the layer as PyTorch computes it, and ``rule`` computes
it for all images at once, given parameters per image ``(B, …)``. A function returns the
result, or a rule followed by its tensors; see `tttlab.adaptation.beneath_vmap.choose`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair

from tttlab.adaptation.beneath_vmap import choose, is_per_image, over_channels
from tttlab.adaptation.convolution import PerImageConv2d


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    def ordinary(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def rule(_size, dims, x, weight, bias=None):
        x = x.movedim(dims[0], 1)
        options = pair(stride), pair(padding), pair(dilation), groups
        result = PerImageConv2d.apply(x, weight, *options)
        return result if bias is None else result + bias.to(result.dtype)[..., None, None], 1

    if isinstance(padding, str):
        return ordinary(x, weight, bias)
    return choose(ordinary, rule, x, weight, bias, views=4)


def _batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    def ordinary(x, weight, bias, mean=running_mean, var=running_var):
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)

    def rule(size, dims, x, weight, bias=None):
        parameters = _flat(weight), _flat(bias), running_mean.repeat(size), running_var.repeat(size)
        return over_channels(lambda x: ordinary(x, *parameters), size, dims[0], x)

    if training or running_mean is None:
        return ordinary(x, weight, bias)
    return choose(ordinary, rule, x, weight, bias, views=2)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    def ordinary(x, weight, bias, num_groups=num_groups):
        return F.group_norm(x, num_groups, weight, bias, eps)

    def rule(size, dims, x, weight, bias=None):
        parameters = _flat(weight), _flat(bias), size * num_groups
        return over_channels(lambda x: ordinary(x, *parameters), size, dims[0], x)

    return choose(ordinary, rule, x, weight, bias, views=4)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    def ordinary(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    def rule(_size, dims, x, weight, bias=None):
        x = x.movedim(dims[0], 0)
        shape = (len(x), *[1] * (x.ndim - weight.ndim), *normalized_shape)
        gain, shift = weight.view(shape), None if bias is None else bias.view(shape)
        return PerImageLayerNorm.apply(x, gain, shift, normalized_shape, eps), 0

    return choose(ordinary, rule, x, weight, bias, views=2)


class PerImageLayerNorm(Function):
    """Layer norm with each image's own gain and shift; the backward pass needs only its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        normalized_shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        """Normalise ``x (B, …, *normalized_shape)``.

        ``gain`` and ``shift`` are ``(B, 1, …, *normalized_shape)``.
        """
        ctx.normalized_shape, ctx.input_dtype = normalized_shape, x.dtype
        x = x.to(gain.dtype)  # bf16 is too coarse for sums; autocast's layer norm avoids it too
        normalised, mean, reciprocal = torch.native_layer_norm(x, normalized_shape, None, None, eps)
        ctx.save_for_backward(x, gain, shift, mean, reciprocal)
        return normalised * gain if shift is None else torch.addcmul(shift, normalised, gain)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by the activation, the gain and the shift."""
        x, gain, shift, mean, reciprocal = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        by_x = None
        if ctx.needs_input_grad[0]:
            options = ctx.normalized_shape, mean, reciprocal, None, None, [True, False, False]
            by_x = torch.ops.aten.native_layer_norm_backward(gradient * gain, x, *options)[0]
            by_x = by_x.to(ctx.input_dtype)
        by_gain = ((x - mean).mul_(reciprocal).mul_(gradient)).sum_to_size(gain.shape)
        by_shift = None if shift is None else gradient.sum_to_size(shift.shape)
        return by_x, by_gain, by_shift, None, None


def _weight_norm(v, g, dim=0):
    """Scale a weight ``v`` to length ``g`` along all axes but ``dim`` (−1: along all).

    PyTorch's fused operation has no rule for ``vmap``.
    """
    if not (is_per_image(v) or is_per_image(g)):
        return torch._weight_norm(v, g, dim)
    axes = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


def _linear(x, weight, bias=None):
    def rule(_size, dims, x, weight, bias=None):
        x = x.movedim(dims[0], 0)
        shape, rows, weight = x.shape[1:-1], x.flatten(1, -2), weight.transpose(1, 2)
        if bias is None:
            return torch.bmm(rows, weight).unflatten(1, shape), 0
        return torch.baddbmm(bias.unsqueeze(1), rows, weight).unflatten(1, shape), 0

    return choose(F.linear, rule, x, weight, bias, views=2)


def _adaptive_avg_pool2d(x, output_size):
    def ordinary(x):
        return F.adaptive_avg_pool2d(x, output_size)

    return choose(ordinary, None, x, views=4, fold=over_channels)


def _max_pool2d(x, *args, **kwargs):
    def ordinary(x):
        return F.max_pool2d(x, *args, **kwargs)

    return choose(ordinary, None, x, views=4, fold=over_channels)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    def ordinary(query, key, value, mask=attn_mask):
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, **options
        )

    def rule(_size, dims, *tensors):
        tensors = [tensor.movedim(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]
        shape = tensors[0].shape[:2]
        tensors[3:] = [mask.expand(*shape, *mask.shape[2:]) for mask in tensors[3:]]
        return ordinary(*(tensor.flatten(0, 1) for tensor in tensors)).unflatten(0, shape), 0

    tensors = (query, key, value)
    if not all(map(is_per_image, tensors)) or query.ndim != 4:
        return ordinary(*tensors)
    if attn_mask is None:
        return rule, *tensors
    if is_per_image(attn_mask):  # as from a trained table of relative positions
        return (rule, *tensors, attn_mask) if attn_mask.ndim == 4 else ordinary(*tensors)
    # A shared mask that is the same for all views holds for all images too.
    same_for_all_views = attn_mask.ndim < 4 or len(attn_mask) == 1
    return (rule, *tensors) if same_for_all_views else ordinary(*tensors)


def self_attention(
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
    """Compute `torch.nn.MultiheadAttention` of a sequence ``(L, V, D)`` by its layers.

    Takes the arguments of `torch.nn.functional.multi_head_attention_forward`. Returns None where
    they ask for anything else, such as a mask.
    """
    names = ("key_padding_mask", "attn_mask", "q_proj_weight", "static_k", "static_v")
    extras = (bias_k, bias_v, *map(options.get, names))
    if add_zero_attn or need_weights or (training and dropout_p):
        return None
    if any(extra is not None for extra in extras):
        return None
    if not (query is key is value) or query.ndim != 3:
        return None
    projected = F.linear(query, in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1))
    heads = projected.permute(2, 1, 3, 0, 4)  # (3, V, heads, L, D / heads)
    mixed = F.scaled_dot_product_attention(*heads)
    return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None


LAYERS: dict[Callable, Callable] = {
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
