"""An encoder cut after a stage gives the activations of timm's whole forward pass."""

import pytest
import torch

from tests.helpers import networks
from tests.methods.test_backbones import BACKBONES
from tttlab.errors import UserError
from tttlab.networks.building import build_encoder
from tttlab.networks.network import pooled_features
from tttlab.networks.stages import (
    Remainder,
    find_stage_indices,
    shared_part,
    stage_maps,
    stage_widths,
)

STAGES = {
    "DenseNet": 2,
    "ViT": 2,
    "DINOv2": 2,
    "DINOv3": 2,
    "CLIP": 2,
    "BEiT": 2,
    "EVA-02": 2,
    "Swin": 2,
    "MLP-Mixer": 8,
}
CHAINS = ("ResNet", "ResNet with GroupNorm", "RegNet", "ConvNeXt", "ViT", "DINOv2", "CLIP")


def build(family: str) -> tuple:
    name, options, size = BACKBONES[family]
    torch.manual_seed(0)
    encoder = build_encoder(name, size, stem="original", options=options).double().eval()
    images = torch.rand(
        2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return encoder, images


@pytest.mark.parametrize("family", BACKBONES)
def test_maps_are_what_the_stages_give_in_a_whole_pass(family):
    encoder, images = build(family)
    names = [encoder.feature_info[index]["module"] for index in find_stage_indices(encoder)]
    outputs = {}
    for name in names:
        encoder.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
    assert len(names) == STAGES.get(family, 4)  # of the small versions, without the stem
    with torch.no_grad():
        encoder.forward_features(images)
        maps = stage_maps(encoder, images, range(1, len(names) + 1))
    assert [stage_map.shape[1] for stage_map in maps] == stage_widths(encoder)
    for stage_map, output in zip(maps, outputs.values(), strict=True):
        if output.ndim == 3:
            tokens = stage_map.flatten(2).mT
            torch.testing.assert_close(tokens, output[:, -tokens.shape[1] :])
        elif getattr(encoder, "output_fmt", "NCHW") == "NHWC":
            torch.testing.assert_close(stage_map, output.movedim(-1, 1))
        else:
            torch.testing.assert_close(stage_map, output)


@pytest.mark.parametrize("family", CHAINS)
def test_shared_part_and_remainder_are_the_encoder_at_every_cut(family):
    encoder, images = build(family)
    for stage in range(1, len(find_stage_indices(encoder)) + 1):
        branch = Remainder(encoder, stage)
        with torch.no_grad():
            features = branch(shared_part(encoder, images, stage))
            expected = pooled_features(encoder, images)
        torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)


def test_the_remainder_holds_the_later_stages_alone_and_shares_no_weight():
    encoder = networks.resnet().encoder
    branch = Remainder(encoder, 2)
    later = [*encoder.layer3.parameters(), *encoder.layer4.parameters()]
    assert [value.shape for value in branch.parameters()] == [value.shape for value in later]
    memory = {value.data_ptr() for value in encoder.parameters()}
    assert not any(value.data_ptr() in memory for value in branch.parameters())


def test_class_tokens_are_no_places_of_a_map():
    encoder, images = build("DINOv2")
    assert stage_maps(encoder, images, [1])[0].shape == (2, 24, 2, 2)
    assert shared_part(encoder, images, 1).shape == (2, 4 + encoder.num_prefix_tokens, 24)


@pytest.mark.parametrize("family", sorted({*BACKBONES} - {*CHAINS}))
def test_other_families_are_refused_with_what_will_do(family):
    with pytest.raises(
        UserError,
        match=r"can be cut behind a stage \(ConvNeXt, RegNet, ResNet, VisionTransformer\), found",
    ):
        Remainder(build(family)[0], 1)
