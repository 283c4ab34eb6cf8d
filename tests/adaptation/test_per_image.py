"""Values and gradients of every layer, against a loop over images with the ordinary layer."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tttlab.adaptation import per_image
from tttlab.adaptation.convolution import PerImageConv2d
from tttlab.adaptation.inner_loop import over_images
from tttlab.adaptation.per_image import PerImageLayers

IMAGES, VIEWS = 4, 3


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(1, (2, -1)).unflatten(-1, (2, -1)).transpose(2, 3)[:, 0]
        return F.scaled_dot_product_attention(heads, heads, heads)


class SelfAttention(nn.Module):
    """PyTorch's own, as in its transformers or with options that are left to ``vmap``."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(8, 2, batch_first=True), options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


class Residual(nn.Module):
    """In-place operations, as in timm's blocks."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y += x
        return self.act(y)


MASK = torch.arange(5.0, dtype=torch.double).expand(5, 5)
LAYERS = {
    "conv": (nn.Conv2d(8, 6, 3, padding=1), (8, 5, 5)),
    "conv stride": (nn.Conv2d(8, 6, 3, stride=2, padding=(1, 0), bias=False), (8, 6, 5)),
    "conv dilated": (nn.Conv2d(8, 6, 3, padding=2, dilation=2), (8, 5, 5)),
    "conv grouped": (nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5)),
    "conv same": (nn.Conv2d(8, 6, 3, padding="same"), (8, 5, 5)),
    "conv wide and small": (nn.Conv2d(8, 40, 3, stride=2, padding=1), (8, 3, 3)),
    "batch norm": (nn.BatchNorm2d(8), (8, 4, 4)),
    "batch norm of features": (nn.BatchNorm1d(8), (8,)),
    "batch norm without affine": (nn.BatchNorm2d(8, affine=False), (8, 4, 4)),
    "group norm": (nn.GroupNorm(4, 8), (8, 4, 4)),
    "layer norm": (nn.LayerNorm(8), (5, 8)),
    "layer norm without shift": (nn.LayerNorm(8, bias=False), (5, 8)),
    "linear": (nn.Linear(8, 6), (8,)),
    "linear on tokens": (nn.Linear(8, 6, bias=False), (5, 8)),
    "weight norm": (parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), (8, 5, 5)),
    "weight norm of all": (parametrizations.weight_norm(nn.Linear(8, 6), dim=None), (8,)),
    "average pool": (nn.AdaptiveAvgPool2d(1), (8, 4, 4)),
    "max pool": (nn.MaxPool2d(3, 2, padding=1), (8, 5, 5)),
    "attention": (Attention(), (10, 8)),
    "multi-head attention": (SelfAttention(need_weights=False), (5, 8)),
    "multi-head attention with weights": (SelfAttention(), (5, 8)),
    "multi-head attention with a mask": (SelfAttention(attn_mask=MASK), (5, 8)),
    "in place": (Residual(), (8, 4, 4)),
}


def prepared(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A layer in double precision, inputs ``(B, V, …)``, and per-image parameters ``(B, …)``."""
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    generator = torch.Generator().manual_seed(5)
    for key, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            values = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(values + 0.5 * key.endswith("var"))
    x = torch.randn(IMAGES, VIEWS, *shape, generator=generator, dtype=torch.float64)
    parameters = {}
    for key, value in layer.named_parameters():
        noise = torch.randn(IMAGES, *value.shape, generator=generator, dtype=torch.float64)
        parameters[key] = value.detach() + 0.3 * noise
    return layer, x, parameters


def values_and_gradients(call, layer, x, parameters):
    leaves = [value.clone().requires_grad_() for value in (x, *parameters.values())]
    result = call(layer, leaves[0], dict(zip(parameters, leaves[1:], strict=True)))
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
    return result, *torch.autograd.grad((result * weights).sum(), leaves)


def one_by_one(layer, x, parameters):
    results = [
        functional_call(layer, {key: value[i] for key, value in parameters.items()}, (x[i],))
        for i in range(len(x))
    ]
    return torch.stack(results)


def together(layer, x, parameters):
    call = over_images(lambda parameters, x: functional_call(layer, parameters, (x,)))
    return call(parameters, x)


@pytest.mark.parametrize("order", ["images first", "views first"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_a_loop_over_images(name, own, order):
    layer, x, parameters = prepared(name)
    if order == "views first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    parameters = parameters if own else {}
    results = values_and_gradients(together, layer, x, parameters)
    expected = values_and_gradients(one_by_one, layer, x, parameters)
    torch.testing.assert_close(results, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "name", [name for name, (layer, _) in LAYERS.items() if any(True for _ in layer.parameters())]
)
def test_weights_that_all_images_still_share_have_gradients_of_their_own(name):
    layer, x, _ = prepared(name)
    source = {key: value.detach() for key, value in layer.named_parameters()}
    leaves = {
        key: value.expand(IMAGES, *value.shape).requires_grad_() for key, value in source.items()
    }
    loss = together(layer, x, leaves).square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for image in range(IMAGES):
        copies = {key: value.clone().requires_grad_() for key, value in source.items()}
        loss = functional_call(layer, copies, (x[image],)).square().sum()
        expected = torch.autograd.grad(loss, list(copies.values()))
        of_image = tuple(gradient[image] for gradient in gradients)
        torch.testing.assert_close(of_image, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("outputs", "side"), [(6, 7), (64, 2)], ids=["grouped", "matrix product"])
def test_the_gradient_of_a_convolution_against_finite_differences(outputs, side):
    options = {"generator": torch.Generator().manual_seed(8), "dtype": torch.float64}
    x = torch.randn(2, 3, 2, side, side, requires_grad=True, **options)
    weight = torch.randn(3, outputs, 2, 2, 2, requires_grad=True, **options)

    def convolve(x, weight):
        return PerImageConv2d.apply(x, weight, (1, 1), (1, 1), (1, 1), 1)

    assert torch.autograd.gradcheck(convolve, (x, weight), fast_mode=True)


def test_only_some_parameters_of_a_layer_may_be_an_images_own():
    layer, x, parameters = prepared("conv")
    bias = {"bias": parameters["bias"]}
    expected = one_by_one(layer, x, bias)
    torch.testing.assert_close(together(layer, x, bias), expected, atol=1e-10, rtol=1e-10)


def test_gradients_taken_inside_the_loss_and_maps_inside_the_map_are_left_to_torch():
    layer, x, parameters = prepared("conv")

    def slope(parameters, x):
        return grad(lambda x: functional_call(layer, parameters, (x,)).square().sum())(x)

    def each_view(parameters, x):
        return vmap(lambda view: functional_call(layer, parameters, (view[None],))[0])(x)

    torch.testing.assert_close(over_images(slope)(parameters, x), vmap(slope)(parameters, x))
    expected = one_by_one(layer, x, parameters)
    torch.testing.assert_close(over_images(each_view)(parameters, x), expected)


def test_outside_of_vmap_nothing_changes():
    layer, x, _ = prepared("conv")
    with PerImageLayers():
        inside = layer(x[0])
    assert torch.equal(inside, layer(x[0]))


def test_a_layer_that_fails_leaves_no_trace():
    layer, x, parameters = prepared("linear")
    with contextlib.suppress(RuntimeError):
        together(layer, x[..., :-1], parameters)
    torch.testing.assert_close(together(layer, x, parameters), one_by_one(layer, x, parameters))


@pytest.mark.parametrize(
    "name", ["average pool", "max pool", "batch norm without affine", "conv", "linear", "attention"]
)
def test_a_layer_without_parameters_of_an_images_own_goes_beneath_vmap_too(name, monkeypatch):
    layer, x, _ = prepared(name)
    beneath, calls = per_image.apply_beneath, []
    monkeypatch.setattr(
        per_image, "apply_beneath", lambda *call: calls.append(call) or beneath(*call)
    )
    over_images(layer)(x)
    assert len(calls) == 1


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_multi_head_attention_goes_beneath_vmap_by_its_parts(own, monkeypatch):
    """Its fused attention has no rule for ``vmap``, which would compute images one by one."""
    layer, x, parameters = prepared("multi-head attention")
    beneath, calls = per_image.apply_beneath, []
    monkeypatch.setattr(
        per_image, "apply_beneath", lambda *call: calls.append(call) or beneath(*call)
    )
    together(layer, x, parameters if own else {})
    assert len(calls) == 3
