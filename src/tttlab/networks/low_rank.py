"""Linear layers with a low-rank update (LoRA): W x + B (A x), of which A and B alone are trained.

With B = 0, as it starts, a layer computes what it did without. A layer of width D in and out and
rank r has 2 D r trained numbers in place of D², so that an image's own copy takes little memory;
and W, which all images share, multiplies them in one product.

Reference:
    Hu et al., ICLR 2022, arXiv 2106.09685. There the update is scaled by α/r and put into the
    attention's queries and values; here α = r, and every linear layer of the encoder has one.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import UserError
from tttlab.seeding import torch_generator


class LowRankLinear(nn.Linear):
    """A linear layer with an update of low rank.

    Attributes:
        lora_a: ``(r, D_in)``, uniform in ±1/√D_in, as PyTorch starts a linear layer.
        lora_b: ``(D_out, r)``, zero.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        """Take over the weights of a layer, the tensors themselves."""
        bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, bias, device="meta")
        self.weight, self.bias, self.training = layer.weight, layer.bias, layer.training
        start = 2 * torch.rand(rank, layer.in_features, generator=generator) - 1
        self.lora_a = nn.Parameter(start.to(layer.weight) / layer.in_features**0.5)
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``x (…, D_in)`` into ``(…, D_out)``."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def with_low_rank(network: nn.Module, rank: int, seed: int) -> nn.Module:
    """Copy a network, with an update of low rank in every linear layer of its encoder.

    The copy shares all tensors with the network, which is not changed. A network that has updates
    is returned as it is.

    Args:
        network: its encoder is the module ``encoder``, and its ``classifier`` keeps its layers.
        rank: r.
        seed: of the random matrices A.

    Raises:
        UserError: the encoder has no linear layer.
    """
    if low_rank_parameters(network):
        return network
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    extended = copy.deepcopy(network, tensors)
    classifier = extended.classifier
    kept = set(classifier.modules()) if isinstance(classifier, nn.Module) else set()
    updated: dict[nn.Module, LowRankLinear] = {}
    for name, module in list(extended.encoder.named_modules(remove_duplicate=False)):
        # Subclasses may compute something else, and attention of torch reads the weights alone.
        if type(module) is not nn.Linear or module in kept:
            continue
        if module not in updated:
            generator = torch_generator(seed, "low rank", name)
            updated[module] = LowRankLinear(module, rank, generator)
        extended.encoder.set_submodule(name, updated[module])
    if not updated:
        kind = type(network.encoder).__name__
        raise UserError(
            f"trainable: expected linear layers for 'lora', found none in the encoder, a {kind}; "
            "take norm, encoder or names of modules"
        )
    return extended


def low_rank_parameters(network: nn.Module) -> list[str]:
    """Name the parameters of the updates."""
    return [
        f"{layer}.{name}"
        for layer, module in network.named_modules()
        if isinstance(module, LowRankLinear)
        for name in ("lora_a", "lora_b")
    ]
