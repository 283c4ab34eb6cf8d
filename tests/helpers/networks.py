"""Small real networks, one of each kind that the adapter must serve; shared by the tests."""

import torch
from torch import Tensor, nn

from tests.helpers.once import once
from tttlab.mixers.mixing import mix
from tttlab.networks.building import build_encoder
from tttlab.networks.network import Network, add_probe
from tttlab.networks.objective import Objective
from tttlab.networks.source_statistics import Statistics, layer_statistics, projection_bank
from tttlab.objectives.clust3 import ClusT3
from tttlab.objectives.it3 import IT3
from tttlab.objectives.learned import Learned
from tttlab.objectives.mae import MAE
from tttlab.objectives.rotation import Rotation
from tttlab.objectives.simclr import SimCLR
from tttlab.objectives.simsiam import SimSiam

SIZE, CLASSES = 16, 4
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 12], "stem_type": "deep", "stem_width": 4}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}

PROJECTOR, DECODER = SimCLR(hidden_dim=16, projection_dim=8), MAE(decoder_dim=16)
SIMSIAM = SimSiam(hidden_dim=16, projection_dim=16, prediction_dim=8)


def images(count: int, seed: int = 0) -> Tensor:
    """Draw smooth random images ``(N, 3, 16, 16)`` in [0, 1].

    White noise would have no structure that a shift could change.
    """
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=SIZE, mode="bilinear")


def with_head(encoder: nn.Module, objective: Objective) -> Network:
    arguments = (encoder, CLASSES) if objective.labels else (encoder,)
    return settle(Network(encoder, CLASSES, objective.head(*arguments)))


def resnet(norm_layer: str | None = None, objective: Objective = PROJECTOR) -> Network:
    """Build a four-stage ResNet with BatchNorm or another norm, and a SimCLR or another head."""
    torch.manual_seed(1)
    options = RESNET | ({"norm_layer": norm_layer} if norm_layer else {})
    encoder = build_encoder("resnet18", SIZE, stem="small", options=options)
    return with_head(encoder, objective)


def vit(objective: Objective = DECODER) -> Network:
    """Build a two-block ViT with an MAE decoder or another head."""
    torch.manual_seed(2)
    encoder = build_encoder("vit_tiny_patch16_224", SIZE, options=VIT)
    return with_head(encoder, objective)


def mixed(network: Network, name: str, **settings) -> Network:
    """Put another mixer in the place of a ViT's attention."""
    mix(network.encoder, name, seed=0, **settings)
    return network


def decided(network: Network, factor: float) -> Network:
    """Scale up cluster heads, so that they are decided as after training.

    Fresh ones give all clusters nearly the same probability, and hardly any gradient.
    """
    with torch.no_grad():
        for layer in network.head.layers:
            layer.weight *= factor
    return network


def decoding(network: Network) -> Network:
    """Give a learned task a decoder, as after training: a fresh one is zero and moves nothing."""
    torch.manual_seed(3)
    torch.nn.init.normal_(network.head.decoder.weight, std=0.3)
    return network


def probed(network: Network) -> Network:
    """Put a probe between encoder and classifier."""
    add_probe(network, depth=1, heads=2, seed=0)
    return network


KINDS = {
    "resnet": resnet,
    "groupnorm": lambda: resnet("groupnorm1"),
    "vit": vit,
    "rotation": lambda: resnet(objective=Rotation()),
    "rotation_vit": lambda: vit(Rotation()),
    "simsiam": lambda: resnet(objective=SIMSIAM),
    "clust3": lambda: decided(resnet(objective=ClusT3(heads=2, clusters=4)), 10),
    "clust3_vit": lambda: decided(vit(ClusT3(heads=2, clusters=4)), 30),
    "it3": lambda: resnet(objective=IT3()),
    "it3_vit": lambda: vit(IT3()),
    "learned": lambda: decoding(resnet(objective=Learned(stage=3, dim=6))),
    "learned_vit": lambda: decoding(vit(Learned(stage=2, dim=6))),
    "probe": lambda: probed(vit()),
}
# The objective whose head each kind has.
HEADS = {
    "resnet": "simclr",
    "groupnorm": "simclr",
    "vit": "mae",
    "rotation": "rotation",
    "rotation_vit": "rotation",
    "simsiam": "simsiam",
    "clust3": "clust3",
    "clust3_vit": "clust3",
    "it3": "it3",
    "it3_vit": "it3",
    "learned": "learned",
    "learned_vit": "learned",
    "probe": "mae",
}


def sure(logits: Tensor) -> Tensor:
    """Tell which predictions no processor's rounding can change: ``(…, K)`` to ``(…)``."""
    largest = logits.topk(2).values
    return largest[..., 0] - largest[..., 1] > 1e-2


def settle(network: Network) -> Network:
    """Give BatchNorm plausible running statistics by passes over source images."""
    network.train()
    with torch.no_grad():
        for step in range(20):
            network(images(32, seed=100 + step))
            if hasattr(network.head, "branch_off"):
                network(images(32, seed=100 + step), branch=True)
    return network.eval()


@once
def source_statistics(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Network, Statistics]:
    """Give a network (a key of `KINDS`) with the standard source statistics.

    The default is double precision, in which two computations of the same number agree to many
    digits even where steps in between amplify rounding.
    """
    network = KINDS[kind]().to(dtype)
    batches = [images(64, seed=7).to(dtype)]
    statistics = layer_statistics(network, batches)
    if hasattr(network.head, "project"):
        statistics |= projection_bank(network, batches, 32)
    return network, statistics
