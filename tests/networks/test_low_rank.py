"""Updates of low rank: what they leave alone, and their steps beside explicit weights W + B A."""

import copy

import pytest
import timm
import torch
from torch import nn

from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.config.run_settings import RunSettings
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.memo import MEMO
from tttlab.networks.classifiers import Classifier, as_network
from tttlab.networks.low_rank import LowRankLinear, low_rank_parameters, with_low_rank
from tttlab.seeding import torch_generator

METHOD = MEMO(num_views=4)
LOOP = InnerLoop(steps=3, lr=0.1, trainable="lora", rank=2)
WIDTH = 16


def transformer():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def images(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def by_hand(model, image, name):
    """MEMO's steps with explicit weights W + B A: logits ``(K,)``."""
    extended = with_low_rank(as_network(model), LOOP.rank, 0)
    pairs = {
        layer.removeprefix("encoder."): (module.lora_a.detach().clone(), module.lora_b.detach())
        for layer, module in extended.named_modules()
        if isinstance(module, LowRankLinear)
    }
    pairs = {name: [part.clone().requires_grad_() for part in pair] for name, pair in pairs.items()}

    def logits(views):
        plain = dict(model.named_parameters())
        for layer, (a, b) in pairs.items():
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"].detach() + b @ a
        return torch.func.functional_call(model, plain, views)

    for step in range(LOOP.steps):
        generators = [torch_generator(0, "views", name, step)]
        views = random_views(image[None], generators, METHOD.num_views, Augmentation())[0]
        mean = logits(views).softmax(-1).mean(0)
        parts = [part for pair in pairs.values() for part in pair]
        gradients = torch.autograd.grad(-(mean * mean.log()).sum(), parts)
        with torch.no_grad():
            for part, gradient in zip(parts, gradients, strict=True):
                part -= LOOP.lr * gradient
    with torch.no_grad():
        return logits(image[None])[0]


def test_the_steps_are_those_of_explicit_weights():
    model, pixels = transformer(), images()
    before = copy.deepcopy(model.state_dict())
    done = adapt(model, pixels, METHOD, LOOP)
    expected = [by_hand(model, image, str(number)) for number, image in enumerate(pixels)]
    torch.testing.assert_close(done.logits, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert (done.logits - done.source_logits).abs().max() > 1e-3
    assert not done.fell_back.any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # memory that nobody writes to


def test_without_a_step_the_network_is_what_it_was():
    """It shares the tensors, and every linear layer of the encoder but the classifier has one."""
    network = as_network(transformer())
    extended = with_low_rank(network, 3, 0)
    with torch.no_grad():
        torch.testing.assert_close(extended(images()).logits, network(images()).logits)
    assert with_low_rank(extended, 3, 0) is extended
    assert not low_rank_parameters(network)
    shared = dict(extended.named_parameters())
    assert all(shared[name] is value for name, value in network.named_parameters())
    trained = select_parameters(extended, "lora")
    assert list(trained) == low_rank_parameters(extended)
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in trained}
    assert layers == {"qkv", "proj", "fc1", "fc2"}
    # qkv D → 3 D, proj D → D, fc1 D → 4 D, fc2 4 D → D, of two blocks.
    assert sum(value.numel() for value in trained.values()) == 2 * 3 * (4 + 2 + 5 + 5) * WIDTH


def test_the_seed_draws_one_factor_and_the_other_is_zero():
    network = as_network(transformer())
    first, again, other = (with_low_rank(network, 2, seed) for seed in (0, 0, 1))
    for name in low_rank_parameters(first):
        one, same, changed = (net.get_parameter(name).detach() for net in (first, again, other))
        assert torch.equal(one, same)  # the very same draw, repeated
        if name.endswith("lora_b"):
            assert not one.any()
        else:
            assert (one - changed).abs().mean() > 0.1 * one.abs().mean()
            assert one.abs().max() <= one.shape[1] ** -0.5
            assert one.std() == pytest.approx((3 * one.shape[1]) ** -0.5, rel=0.4)


def test_the_seed_of_a_task_is_that_of_its_low_rank_factors():
    network = as_network(transformer())
    found = Task(network, METHOD, LOOP, seed=3).ready(torch.device("cpu")).network
    expected = with_low_rank(network, LOOP.rank, 3)
    for name in low_rank_parameters(expected):
        assert torch.equal(found.get_parameter(name), expected.get_parameter(name))


class Branches(nn.Module):
    """One layer under two names, a layer of another kind, and attention that reads weights."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Flatten()
        self.once = nn.Linear(768, 8, bias=False)
        self.again = nn.Linear(8, 8)
        self.other = self.again
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        x = self.other(self.again(self.once(self.flat(images))).relu())[:, None]
        return self.fc(self.attend(x, x, x, need_weights=False)[0][:, 0])


def test_a_users_module_keeps_shared_layers_shared_and_its_classifier():
    torch.manual_seed(0)
    model = Branches().double().eval()
    network = with_low_rank(Classifier(model, "fc"), 2, 0)
    assert network.encoder.again is network.encoder.other
    assert type(network.encoder.fc) is nn.Linear
    assert type(network.classifier) is nn.Linear
    assert {name.split(".")[1] for name in low_rank_parameters(network)} == {"once", "again"}
    answers = adapt(Classifier(model, "fc"), images(), METHOD, LOOP)
    assert ((answers.logits - answers.source_logits).abs().amax(1) > 1e-6).all()


def test_a_network_without_linear_layers_is_told_so():
    model = timm.create_model("resnet18", num_classes=4).double().eval()
    message = "expected linear layers for 'lora', found none in the encoder, a ResNet; take norm"
    with pytest.raises(UserError, match=message):
        adapt(model, images(), METHOD, LOOP)
    with pytest.raises(UserError, match=message):
        Task(model, METHOD, LOOP).ready(torch.device("cpu"))


def test_the_rank_is_a_setting_of_runs_that_train_updates():
    for trainable, shown in (("lora", True), ("norm", False)):
        run = RunSettings("memo", InnerLoop(trainable=trainable), {})
        assert ("rank" in run.in_use) == shown
