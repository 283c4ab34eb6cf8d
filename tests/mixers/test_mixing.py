"""Mixers inside timm's transformers: built, kept, refused, and what else of the network changes."""

import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.helpers import networks, trainings
from tttlab.config.mixers import MIXERS
from tttlab.errors import UserError
from tttlab.mixers.mixing import inner_losses, mix, mixer_layers
from tttlab.networks.building import build_encoder
from tttlab.networks.checkpoints import build_network, load, save

AVERAGE = {"global_pool": "avg", "fc_norm": False}
SETTINGS = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": networks.VIT | AVERAGE,
    "objective": {"name": "none"},
}
OTHERS = [name for name in MIXERS if name != "attention"]
TTT = [name for name in OTHERS if name.startswith("ttt")]


def build(name: str | None, changes: dict | None = None, **mixer):
    settings = SETTINGS | ({"mixer": {"name": name} | mixer} if name else {}) | (changes or {})
    return build_network(settings, networks.CLASSES, networks.SIZE, seed=3)[0]


def encoder(**options):
    given = networks.VIT | AVERAGE | options
    return build_encoder("vit_tiny_patch16_224", networks.SIZE, options=given)


def test_attention_is_timms_own():
    ours, timms = build("attention"), build(None)
    assert not mixer_layers(ours.encoder)
    images = networks.images(3)
    assert torch.equal(ours(images).logits, timms(images).logits)


@pytest.mark.parametrize("name", OTHERS)
def test_all_but_the_mixers_is_as_without_them(name):
    mixed, timms = build(name), build(None)
    assert list(mixer_layers(mixed.encoder)) == ["blocks.0.attn", "blocks.1.attn"]
    own = {key: value for key, value in mixed.state_dict().items() if ".attn." not in key}
    theirs = {key: value for key, value in timms.state_dict().items() if ".attn." not in key}
    assert own.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    # With its attention back, the network is what it was.
    for block, other in zip(mixed.encoder.blocks, timms.encoder.blocks, strict=True):
        block.attn = other.attn
    images = networks.images(3)
    assert torch.equal(mixed(images).logits, timms(images).logits)


@pytest.mark.parametrize("name", OTHERS)
def test_a_mixer_answers_by_its_rule_between_its_maps(name):
    """Written out for a token, head by head, with everything in the order of the formula."""
    mixer = mixer_layers(build(name, heads=4).encoder)["blocks.0.attn"]
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    skipped = 1 if name == "ttt_conv" else 0
    weights, biases = mixer.maps.weight.detach(), mixer.maps.bias.detach()
    parts = []
    for number in range(3):  # ψ, φ, g
        rows = slice(24 * number, 24 * (number + 1))
        mapped = x[:, skipped:] @ weights[rows].T + biases[rows]
        parts.append(torch.stack(mapped.split(6, dim=-1), dim=1))
    queries, keys, targets = parts
    answers = torch.cat(mixer.rule(keys, targets, queries).unbind(1), dim=-1)
    answers = torch.cat([torch.zeros(2, skipped, 24), answers], dim=1)
    expected = answers @ mixer.output.weight.T + mixer.output.bias
    torch.testing.assert_close(mixer(x), expected)


def test_heads_are_the_backbones_unless_they_are_set():
    heads = {mixer.heads for mixer in mixer_layers(build("ttt_mlp").encoder).values()}
    assert heads == {networks.VIT["num_heads"]}
    assert mixer_layers(build("ttt_mlp", heads=3).encoder)["blocks.1.attn"].heads == 3


def test_tokens_are_mapped_to_a_variance_of_one():
    mixer = mixer_layers(build("ttt_linear", {"backbone_options": {"embed_dim": 96}}).encoder)
    x = torch.randn(64, 17, 96, generator=torch.Generator().manual_seed(0))
    for part in mixer["blocks.0.attn"].split(x):
        assert part.var().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_is_refused(name):
    blocks = build(name).encoder.blocks
    with pytest.raises(UserError, match="knows no mask"):
        blocks[0](torch.rand(1, 17, 24), is_causal=True)
    with pytest.raises(UserError, match="knows no mask"):
        blocks[0](torch.rand(1, 17, 24), attn_mask=torch.zeros(17, 17))


@pytest.mark.parametrize("name", ["linear_attention", "ttt_linear", "ttt_mlp"])
def test_tokens_may_be_dropped(name):
    """Of 17 tokens any five are mixed as if there were no others."""
    mixer = mixer_layers(build(name).encoder)["blocks.0.attn"]
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    keep = [0, 3, 7, 8, 15]
    few = mixer(x[:, keep])
    assert few.shape == (2, 5, 24)
    assert (few - mixer(x)[:, keep]).abs().max() > 1e-3
    queries, keys, targets = (part[:, :, keep] for part in mixer.split(x))
    expected = mixer.output(mixer.rule(keys, targets, queries).transpose(1, 2).flatten(2))
    torch.testing.assert_close(few, expected)


def test_a_convolution_passes_the_class_token_around():
    mixer = mixer_layers(build("ttt_conv").double().encoder)["blocks.0.attn"]
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0)).double()
    changed = x.clone()
    changed[:, 0] += 1
    torch.testing.assert_close(mixer(x)[:, 0], mixer.output.bias.expand(2, 24))
    torch.testing.assert_close(mixer(x)[:, 1:], mixer(changed)[:, 1:])


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_comes_back_bit_for_bit(name, tmp_path):
    settings = SETTINGS | {"mixer": {"name": name, "heads": 3}}
    network, _ = build_network(settings, 3, networks.SIZE, seed=1)
    about = save(network, tmp_path, settings=settings, classes="abc", image_size=networks.SIZE)
    assert about["mixer"] == {"name": name, "heads": 3}
    loaded, _ = load(tmp_path)
    images = networks.images(2)
    assert torch.equal(loaded(images).logits, network(images).logits)
    again, _ = build_network(settings | {"weights": str(tmp_path)}, 3, networks.SIZE, seed=9)
    assert torch.equal(again(images).logits, network(images).logits)


def test_a_network_without_a_mixer_is_kept_as_before(tmp_path):
    about = save(build(None), tmp_path, settings=SETTINGS, classes="abcd", image_size=16)
    assert "mixer" not in about


@pytest.mark.parametrize("kind", ["timm's file", "our folder"])
def test_weights_of_attention_do_not_fit_another_mixer(kind, tmp_path):
    path = tmp_path
    if kind == "our folder":
        save(build(None), path, settings=SETTINGS, classes="abcd", image_size=16)
    else:
        path = tmp_path / "vit.safetensors"
        save_file(encoder().state_dict(), path)
    message = (
        r"the weights do not fit this network's mixer: expected those of another mixer, found "
        r"those of attention \(.*blocks\.0\.attn\.qkv\.weight\); set the mixer"
    )
    with pytest.raises(UserError, match=message):
        build("linear_attention", {"weights": str(path)})


def test_weights_of_a_mixer_do_not_fit_attention(tmp_path):
    settings = SETTINGS | {"mixer": {"name": "ttt_mlp"}}
    save(build("ttt_mlp"), tmp_path, settings=settings, classes="abcd", image_size=16)
    with pytest.raises(UserError, match=r"expected those of attention, found those of a mixer"):
        build(None, {"weights": str(tmp_path)})
    # Of the same kind, what is missing or too much is told as of any other layer.
    with pytest.raises(UserError, match=r"rule\.initial\.weight .*found no such entry; .* mixer,"):
        build("ttt_linear", {"weights": str(tmp_path)})


REFUSED = {
    "another network": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0),
        "ttt_linear",
        r"^mixer: expected a plain timm vision transformer .* found SwinTransformer; choose",
    ),
    "another block": (
        lambda: encoder(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        "ttt_linear",
        r"Attention in every block, found NoneType in a ParallelScalingBlock; choose another",
    ),
    "norms of queries": (
        lambda: encoder(qk_norm=True),
        "ttt_linear",
        r"^mixer: ttt_linear has neither attention weights to drop nor norms .* leave qk_norm",
    ),
    "dropped weights": (
        lambda: encoder(attn_drop_rate=0.1),
        "ttt_mlp",
        r"^mixer: ttt_mlp has neither attention weights to drop .* attn_drop_rate out of",
    ),
    "dropped patches": (
        lambda: encoder(patch_drop_rate=0.5),
        "ttt_conv",
        r"^mixer: ttt_conv needs the whole grid of patches; leave patch_drop_rate",
    ),
    "a class token that is read": (
        lambda: encoder(global_pool="token"),
        "ttt_conv",
        r"never see the image, and this classifier reads them \(global_pool 'token'\); set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_encoder_without_a_place_for_the_mixer_is_refused_in_a_line(case):
    make, name, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        mix(make(), name, seed=0)
    assert "\n" not in str(caught.value)


def test_names_and_heads_that_do_not_fit_are_told():
    with pytest.raises(UserError, match="unknown mixer 'ttt_liner'; did you mean 'ttt_linear'"):
        mix(encoder(), "ttt_liner", seed=0)
    with pytest.raises(UserError, match=r"divisor of the backbone's width 24, found 5$"):
        mix(encoder(), "ttt_linear", seed=0, heads=5)


def test_mae_refuses_a_convolution_before_any_work():
    with pytest.raises(UserError, match=r"objective mae drops tokens, and mixer ttt_conv needs"):
        build("ttt_conv", {"objective": trainings.MAE["objective"]})


@pytest.mark.parametrize("name", OTHERS)
def test_bf16_autocast_is_close_to_float32(name):
    network, images = build(name), networks.images(8)
    exact = network(images).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images).logits
    assert rounded.dtype == torch.bfloat16
    spread = exact.std().item()
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * spread + 0.02


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_wholly_in_bf16_is_close_to_float32(name):
    network, images = build(name), networks.images(8)
    exact = network(images).logits
    rounded = copy.deepcopy(network).bfloat16()(images.bfloat16()).logits
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.std().item() + 0.02


@pytest.mark.parametrize("name", TTT)
def test_under_autocast_the_inner_steps_are_in_single_precision(name):
    mixer = mixer_layers(build(name).encoder)["blocks.0.attn"]
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    seen = []
    mixer.rule.register_forward_hook(lambda _rule, inputs, output: seen.append((inputs, output)))
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x)
    ((inputs, output),) = seen
    assert output.dtype == torch.float32
    assert torch.equal(output, mixer.rule(*inputs))  # as without autocast


@pytest.mark.parametrize("name", TTT)
def test_every_layer_of_a_trained_network_lowers_its_inner_loss(name):
    network, images = build(name), networks.images(32)
    labels = torch.arange(32) % networks.CLASSES
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    fresh = networks.images(16, seed=1)
    with torch.no_grad():
        layers = inner_losses(network.encoder, lambda: network(fresh), steps=4)
    assert list(layers) == ["blocks.0.attn", "blocks.1.attn"]
    for along in layers.values():
        assert along.shape == (5, 16, networks.VIT["num_heads"])
        start, one, two, four = along.mean((1, 2))[[0, 1, 2, 4]].tolist()
        assert start > one > two > four


def test_inner_losses_need_layers_that_have_one():
    network = build("linear_attention")
    with pytest.raises(UserError, match=r"expected an encoder with mixer ttt_linear, ttt_mlp"):
        inner_losses(network.encoder, lambda: network(networks.images(1)), steps=1)
