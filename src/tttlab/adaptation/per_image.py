"""Layers with one set of parameters per image, at the speed of ordinary ones.

``torch.func.vmap`` can run a network with every image's own parameters, but its rules for some
layers copy memory or split fused kernels, and some layers have no rule. Inside
``with PerImageLayers():`` these layers compute the same numbers in another way. With B images of V
views each:

no parameter per image    Images and views are one batch of B·V, and the ordinary layer runs once.
convolution, batch norm,  Images are folded into channels, ``(V, B·C, H, W)``: the convolution is a
group norm                grouped one, the normalisation an ordinary one over B·C channels. The next
                          layer takes the result in this layout.
linear                    One batched matrix product, bias included.
layer norm                The fused normalisation, then one multiply-add with the image's own gain
                          and shift.

In-place operations become ordinary ones: autograd would make two copies for each change of a view.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tttlab.adaptation.beneath_vmap import IMAGES, apply_beneath, is_per_image
from tttlab.adaptation.layers import LAYERS, self_attention


class PerImageLayers(TorchFunctionMode):
    """Context that replaces layers under one ``vmap`` over images and no other calls."""

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
            with self:  # so that the layers that it consists of are replaced
                result = self_attention(*args, **kwargs)
            return result or func(*args, **kwargs)
        if func not in LAYERS:
            return func(*args, **kwargs)
        call = LAYERS[func](*args, **kwargs)
        return apply_beneath(*call) if isinstance(call, tuple) else call


def _add_in_place(x: Tensor, addend: Tensor, **options: Any) -> Tensor:
    """Compute ``x += addend``, as in a residual block, without writing to the memory of ``x``.

    The object ``x`` gets the sum's memory, because its old memory is a view.
    """
    if not (isinstance(addend, Tensor) and is_per_image(x)):
        return x.add_(addend, **options)
    try:
        torch.utils.swap_tensors(x, torch.add(x, addend, **options))
    except RuntimeError:  # something holds a weak reference to the object, as PyTorch's profiler
        x.add_(addend, **options)
    return x
