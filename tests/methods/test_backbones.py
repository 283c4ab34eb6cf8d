"""Which method runs on which kind of timm backbone: the table of docs/methods.md, tried."""

from pathlib import Path

import pytest
import timm
import torch

from tests.helpers.once import once
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.registry import load_method
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.building import build_encoder, native_size
from tttlab.networks.network import Network
from tttlab.networks.source_statistics import layer_statistics, projection_bank
from tttlab.objectives.simclr import SimCLR

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 12]}
GROUPNORM_RESNET = {"layers": [1, 1, 1, 1], "channels": [32] * 4, "norm_layer": "groupnorm"}
SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
# Small versions of each family. Name in the table: timm's name, options, side of the images.
BACKBONES = {
    "ResNet": ("resnet18", SMALL_RESNET, 64),
    "ResNet with GroupNorm": ("resnet18", GROUPNORM_RESNET, 64),
    "RegNet": ("regnetx_002", {}, 64),
    "DenseNet": ("densenet121", {"growth_rate": 4, "block_config": (1, 1)}, 64),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 64),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)}, 64),
    "ViT": ("vit_tiny_patch16_224", SMALL_VIT, 32),
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", SMALL_VIT, 28),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", SMALL_VIT, 32),
    "CLIP": ("vit_base_patch16_clip_224.openai", SMALL_VIT, 32),
    "BEiT": ("beit_base_patch16_224", SMALL_VIT, 32),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL_VIT, 28),
    "Swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN, 32),
    "MLP-Mixer": ("mixer_s32_224", {}, 64),
}
METHODS = {
    "views": ("views", {"num_views": 2}, {}),
    "bn": ("none", {}, {"normalisation": "mixed", "prior": 0.3}),
    "shrink": ("none", {}, {"normalisation": "shrink", "threshold": 0.1}),
    "memo": ("memo", {"num_views": 3}, {}),
    "actmad": ("actmad", {"tolerance": 0.0}, {}),
    "tent": ("tent", {}, {}),
    "ssl after SimCLR": ("simclr", {"num_views": 2}, {}),
}


@once
def source(family: str):
    """A network in double precision without degenerate layers, and its statistics.

    Fresh residual branches are often zero.
    """
    name, options, size = BACKBONES[family]
    torch.manual_seed(0)
    encoder = build_encoder(name, size, stem="original", options=options)
    network = Network(encoder, 4, SimCLR(hidden_dim=8, projection_dim=4).head(encoder)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    network.train()
    images = torch.rand(16, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(10):
            network(images)
    network.eval()
    return network, layer_statistics(network, [images]) | projection_bank(network, [images], 8)


def random_images(family: str, count: int, seed: int) -> torch.Tensor:
    size, generator = BACKBONES[family][2], torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", BACKBONES)
def test_every_method_moves_every_backbone_and_sees_one_image_at_a_time(family, method):
    network, statistics = source(family)
    name, settings, normalisation = METHODS[method]
    images = random_images(family, 3, seed=5) ** 2
    loop = InnerLoop(steps=1, lr=1e-3, trainable="norm", clip=1.0, **normalisation)

    def run(part, image_ids):
        tried = load_method(name, settings)
        return adapt(network, part, tried, loop, statistics=statistics, image_ids=image_ids, seed=0)

    together = run(images, ["a", "b", "c"])
    assert torch.isfinite(together.logits).all()
    assert not together.fell_back.any()
    assert (together.logits != together.source_logits).any(1).all()
    torch.testing.assert_close(
        run(images[1:2], ["b"]).logits, together.logits[1:2], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    ("name", "settings"), [("tent", {}), ("sar", {"margin": 2.0}), ("t3a", {}), ("lame", {})]
)
@pytest.mark.parametrize("family", BACKBONES)
def test_every_stream_method_moves_every_backbone_and_knows_no_future(family, name, settings):
    network, statistics = source(family)
    images = random_images(family, 6, seed=5) ** 2
    loop = InnerLoop(steps=1, lr=1e-2, trainable="norm", clip=1.0)

    def run(part):
        method = load_method(name, settings)
        return adapt_stream(network, part, method, loop, batch_size=3, statistics=statistics)

    whole = run(images)
    assert torch.isfinite(whole.logits).all()
    assert not whole.fell_back.any()
    assert (whole.logits != whole.source_logits).any(1).all()
    torch.testing.assert_close(run(images[:3]).logits, whole.logits[:3], rtol=1e-6, atol=1e-8)


def test_the_table_in_the_docs_lists_what_is_tried_here():
    rows = [
        line.split("|")[1].strip()
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert set(BACKBONES) <= {name.strip() for row in rows for name in row.split(",")}


@pytest.mark.parametrize(
    ("backbone", "mean", "size"),
    [
        ("vit_base_patch16_clip_224.openai", (0.48145466, 0.4578275, 0.40821073), 224),
        ("vit_small_patch16_224.dino", (0.485, 0.456, 0.406), 224),
        ("vit_small_patch14_dinov2.lvd142m", (0.485, 0.456, 0.406), 518),
        ("vit_base_patch16_224.mae", (0.485, 0.456, 0.406), 224),
        ("vit_base_patch16_224.augreg_in21k", (0.5, 0.5, 0.5), 224),
    ],
)
def test_mean_deviation_and_input_size_are_those_of_the_weights(backbone, mean, size):
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    side = 28 if "14" in backbone else 32
    encoder = build_encoder(backbone, side, stem="original", options=options)
    network = Network(encoder, 2)
    assert network.mean.flatten().tolist() == pytest.approx(mean)
    assert network.std.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(backbone).std)
    assert native_size(backbone) == size


@pytest.mark.parametrize("family", ["BEiT", "Swin"])
def test_each_images_own_table_of_relative_positions_is_its_own(family):
    """These networks add a trained table to the attention; training the encoder changes it."""
    network, statistics = source(family)
    images, method = random_images(family, 3, seed=6), load_method("memo", {"num_views": 3})
    loop = InnerLoop(steps=2, lr=0.05, trainable="encoder")
    options = {"statistics": statistics, "seed": 0}
    together = adapt(network, images, method, loop, image_ids=["a", "b", "c"], **options)
    for image, name, logits in zip(images, "abc", together.logits, strict=True):
        alone = adapt(
            network, image[None], method, loop, image_ids=[name], images_per_step=1, **options
        )
        torch.testing.assert_close(alone.logits[0], logits, rtol=1e-6, atol=1e-8)
        assert (alone.logits != alone.source_logits).all()
