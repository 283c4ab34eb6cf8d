"""The cases that are measured: a network and a method with views, steps and parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.amount import Amount
from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import InnerLoop
from tttlab.methods.actmad import ActMAD
from tttlab.methods.mae import MAETraining
from tttlab.methods.memo import MEMO
from tttlab.methods.simclr import SimCLRTraining
from tttlab.networks.building import build_encoder
from tttlab.networks.network import Network
from tttlab.networks.source_statistics import layer_statistics, projection_bank
from tttlab.objectives.mae import MAE, masked_error
from tttlab.objectives.simclr import SimCLR

CLASSES = 10
STEPS = 10
SMALL_RESNET = {
    "layers": [1, 1, 1, 1],
    "channels": [16, 32, 64, 128],
    "stem_type": "deep",
    "stem_width": 8,
}
SMALL_VIT = {"embed_dim": 96, "depth": 3, "num_heads": 3, "global_pool": "avg", "fc_norm": False}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: a name such as ``resnet/views8/all``.
        build: makes the source network for images of ``size`` pixels.
        method: the method of ours and of the peers' way.
        trainable: the parameters that are trained.
        images: number of images, N.
        size: side of the images, pixels.
        steps: steps per image, S.
        lr: learning rate, so small that no image's loss explodes: only ours would fall back to the
            source prediction.
        peer_images: images that the peers' way is timed on; its time is linear in their number.
    """

    name: str
    build: Callable[[int], Network]
    method: Method
    trainable: str | tuple[str, ...]
    images: int
    size: int = 32
    steps: int = STEPS
    lr: float = 1e-4
    peer_images: int = 4

    @property
    def views(self) -> int:
        """Views per image, V; 1 for a method that draws none."""
        return getattr(self.method, "num_views", 1)

    def within(self, amount: Amount) -> "Case":
        """The case with no more images and steps than ``amount``."""
        images, steps = min(self.images, amount.images), min(self.steps, amount.steps)
        return replace(self, images=images, steps=steps, peer_images=min(self.peer_images, images))

    @property
    def short(self) -> "Case":
        """The case with at most two steps, enough to find the best group size."""
        return replace(self, steps=min(self.steps, 2))

    @property
    def loop(self) -> InnerLoop:
        """The settings of the steps."""
        return InnerLoop(steps=self.steps, lr=self.lr, trainable=self.trainable)


def resnet(size: int, **options) -> Network:
    """The convolutional network of params.yaml, or a wider one."""
    encoder = build_encoder("resnet18", size, options=SMALL_RESNET | options)
    return Network(encoder, CLASSES, SimCLR().head(encoder)).eval()


def resnet18(size: int) -> Network:
    """ResNet-18, with the small stem for images below 64 pixels."""
    encoder = build_encoder("resnet18", size, stem="small" if size < 64 else "original")
    return Network(encoder, CLASSES, SimCLR().head(encoder)).eval()


def vit(size: int) -> Network:
    """The ViT of params.yaml."""
    encoder = build_encoder("vit_tiny_patch16_224", size, options=SMALL_VIT)
    return Network(encoder, CLASSES, MAE().head(encoder)).eval()


def vit_small(size: int) -> Network:
    """ViT-S, with patches of 4 pixels for images below 64 pixels, else of 16."""
    stem = "small" if size < 64 else "original"
    encoder = build_encoder("vit_small_patch16_224", size, stem=stem)
    return Network(encoder, CLASSES, MAE().head(encoder)).eval()


def list_cases(device: torch.device) -> list[Case]:
    """List the cases of a device."""
    if device.type == "cuda":
        method = MEMO()
        return [
            Case(f"{name}@{size}/views8/{trainable}", build, method, trainable, images, size)
            for name, build in (("resnet18", resnet18), ("vit_small", vit_small))
            for size, images in ((32, 256), (224, 64))
            for trainable in ("all", "norm")
        ]
    entropy = [
        Case(
            f"{name}/views{views}/{trainable}",
            build,
            MEMO(views),
            trainable,
            images=64 if views == 1 else 32,
        )
        for name, build in (("resnet", resnet), ("vit", vit))
        for views in (1, 8)
        for trainable in ("all", "norm")
    ]
    methods = [
        Case("resnet/simclr8/encoder", resnet, SimCLRTraining(), "encoder", images=32),
        Case("resnet/actmad/encoder", resnet, ActMAD(tolerance=0), "encoder", images=64, lr=1e-5),
        Case("vit/mae8/encoder", vit, MAETraining(), "encoder", images=32),
        Case("vit/actmad/encoder", vit, ActMAD(tolerance=0), "encoder", images=64, lr=1e-5),
    ]
    return entropy + methods


def statistics_for(network: Network, size: int) -> dict[str, Tensor]:
    """Measure the source statistics that the methods need, on noise: only time and memory count."""
    batches = [torch.rand(64, 3, size, size, device=network.mean.device)]
    bank = projection_bank(network, batches, 64) if hasattr(network.head, "project") else {}
    return layer_statistics(network, batches) | bank


def ordinary_loss(network: Network, method: Method, views) -> Tensor:
    """Compute the loss of an ordinary training step on all images' views with shared weights.

    It is MAE's own loss for MAE and cross-entropy for all others.
    """
    if isinstance(method, MAETraining):
        keep, hidden = views["keep"].flatten(0, 1), views["hidden"].flatten(0, 1)
        images = views["image"].expand(-1, method.num_views, -1, -1, -1).flatten(0, 1)
        reconstruction = network(images, keep=keep).reconstruction
        return masked_error(reconstruction, images, hidden, network.head.patch_size)
    logits = network(views.flatten(0, 1)).logits
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)
