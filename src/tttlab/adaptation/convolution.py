"""A convolution whose kernels are each image's own, with its gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

Pair = tuple[int, int]


class PerImageConv2d(Function):
    """Convolution with each of B images' own weights, in the way that is fast for the shapes.

    It is a grouped convolution over ``(V, B·C, H, W)``, with two exceptions. Where a layer has many
    channels and few positions, the weights' gradient is one matrix product per image: libraries are
    slow at this gradient of a grouped convolution. Where all images share the weights' memory
    (``expand``), an ordinary convolution is used.
    """

    # A separate `setup_context` costs a quarter of a millisecond per call.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        """Convolve.

        Args:
            ctx: autograd's.
            x: ``(V, B, C, H, W)``.
            weight: ``(B, O, C / groups, kh, kw)``.
            stride: as for `torch.nn.functional.conv2d`.
            padding: likewise.
            dilation: likewise.
            groups: likewise, of one image.

        Returns:
            ``(V, B, O, H', W')``.
        """
        ctx.dtypes = x.dtype, weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, groups
        weight = _cast(weight, x.dtype)
        if _shared(weight):
            batch = x.flatten(0, 1)
            result = F.conv2d(batch, weight[0], None, stride, padding, dilation, groups)
            return result.unflatten(0, x.shape[:2])
        size = len(weight)
        folded = x.flatten(1, 2), weight.flatten(0, 1)
        result = F.conv2d(*folded, None, stride, padding, dilation, groups * size)
        return result.unflatten(1, (size, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by the activation and the weights, where autograd needs it."""
        x, weight = ctx.saved_tensors
        gradient, weight = gradient.to(x.dtype), _cast(weight, x.dtype)
        x_dtype, weight_dtype = ctx.dtypes
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _gradient_by_input(x, weight, gradient, *ctx.options).to(x_dtype)
        if ctx.needs_input_grad[1]:
            by_weight = _gradient_by_weight(x, weight, gradient, *ctx.options).to(weight_dtype)
        return by_x, by_weight, None, None, None, None


def _gradient_by_input(x, weight, gradient, stride, padding, dilation, groups):
    if _shared(weight):
        batch = x.flatten(0, 1).shape, weight[0], gradient.flatten(0, 1)
        return conv2d_input(*batch, stride, padding, dilation, groups).view(x.shape)
    folded = x.flatten(1, 2).shape, weight.flatten(0, 1), gradient.flatten(1, 2)
    return conv2d_input(*folded, stride, padding, dilation, groups * len(weight)).view(x.shape)


def _gradient_by_weight(x, weight, gradient, stride, padding, dilation, groups):
    size, outputs, _, *kernel = weight.shape
    positions = gradient[:, 0, 0].numel()
    if groups == 1 and 2 * positions <= outputs:
        # With P positions: rows (B, O, V·P) times columns (B, V·P, C·kh·kw).
        columns = F.unfold(x.transpose(0, 1).flatten(0, 1), kernel, dilation, padding, stride)
        columns = columns.unflatten(0, (size, -1)).transpose(2, 3).flatten(1, 2)
        rows = gradient.permute(1, 2, 0, 3, 4).flatten(2)
        return torch.bmm(rows, columns).view(weight.shape)
    shape = (size * outputs, *weight.shape[2:])
    folded = x.flatten(1, 2), shape, gradient.flatten(1, 2)
    return conv2d_weight(*folded, stride, padding, dilation, groups * size).view(weight.shape)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert weights as autocast does; shared memory stays shared."""
    return weight[:1].to(dtype).expand_as(weight) if _shared(weight) else weight.to(dtype)


def _shared(weight: Tensor) -> bool:
    """Tell whether all images' weights share their memory."""
    return weight.stride(0) == 0 and len(weight) > 1
