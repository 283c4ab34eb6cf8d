"""A convolution whose kernels are each image's own, with its gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

Pair = tuple[int, int]


class PerImageConv2d(Function):
    """Convolution with weights of their own for each of B images, by whichever way is fast for the shapes.

    As a grouped convolution over ``(V, B·C, H, W)``. The gradient of a layer with many channels and few positions is one
    matrix product per image: libraries are slow at a grouped convolution whose weights outweigh its activations. Weights that
    are one and the same memory for all images (``expand``) are convolved with as the shared ones that they are.
    """

    @staticmethod
    def forward(  # with its context, for a separate `setup_context` costs a quarter of a millisecond per call
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
        ctx.kinds = x.dtype, weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, groups
        weight = _as(weight, x.dtype)
        if _shared(weight):
            return F.conv2d(
                x.flatten(0, 1), weight[0], None, stride, padding, dilation, groups
            ).unflatten(0, x.shape[:2])
        size = len(weight)
        result = F.conv2d(
            x.flatten(1, 2), weight.flatten(0, 1), None, stride, padding, dilation, groups * size
        )
        return result.unflatten(1, (size, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by the activation and by the weights, as far as they are asked for."""
        x, weight = ctx.saved_tensors
        gradient, weight = gradient.to(x.dtype), _as(weight, x.dtype)
        by_x = (
            _gradient_by_input(x, weight, gradient, *ctx.options).to(ctx.kinds[0])
            if ctx.needs_input_grad[0]
            else None
        )
        by_weight = (
            _gradient_by_weight(x, weight, gradient, *ctx.options).to(ctx.kinds[1])
            if ctx.needs_input_grad[1]
            else None
        )
        return by_x, by_weight, None, None, None, None


def _gradient_by_input(x, weight, gradient, stride, padding, dilation, groups):
    if _shared(weight):
        flat = x.flatten(0, 1).shape, weight[0], gradient.flatten(0, 1)
        return conv2d_input(*flat, stride, padding, dilation, groups).view(x.shape)
    flat = x.flatten(1, 2).shape, weight.flatten(0, 1), gradient.flatten(1, 2)
    return conv2d_input(*flat, stride, padding, dilation, groups * len(weight)).view(x.shape)


def _gradient_by_weight(x, weight, gradient, stride, padding, dilation, groups):
    size, outputs, _, *kernel = weight.shape
    positions = gradient[:, 0, 0].numel()
    if groups == 1 and 2 * positions <= outputs:
        columns = F.unfold(
            x.transpose(0, 1).flatten(0, 1), kernel, dilation, padding, stride
        ).unflatten(0, (size, -1))
        columns = columns.transpose(2, 3).flatten(1, 2)  # (B, V·P, C·kh·kw)
        rows = gradient.permute(1, 2, 0, 3, 4).flatten(2)  # (B, O, V·P)
        return torch.bmm(rows, columns).view(weight.shape)
    shape = (size * outputs, *weight.shape[2:])
    flat = x.flatten(1, 2), shape, gradient.flatten(1, 2)
    return conv2d_weight(*flat, stride, padding, dilation, groups * size).view(weight.shape)


def _as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert weights, as autocast does; shared ones stay shared."""
    return weight[:1].to(dtype).expand_as(weight) if _shared(weight) else weight.to(dtype)


def _shared(weight: Tensor) -> bool:
    """Tell whether all images' weights are the same memory."""
    return weight.stride(0) == 0 and len(weight) > 1
