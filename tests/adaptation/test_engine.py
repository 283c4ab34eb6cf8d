"""torch-ttt's calling form of the adapter: the same numbers, and gradients for joint training."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from tests.helpers import networks
from tests.helpers.contract import Unbound, shifted
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.engine import Engine
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD
from tttlab.methods.mae import MAETraining
from tttlab.methods.memo import MEMO
from tttlab.methods.sar import SAR
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.tent import TENT
from tttlab.methods.views import ViewAverage
from tttlab.networks.source_statistics import projection_bank
from tttlab.seeding import torch_generator

LOOP = InnerLoop(steps=2, lr=1e-2, trainable="norm", clip=1.0)


def images(count=3):
    return shifted(count)


def own(kind):
    """A network that the test may train, and its source statistics."""
    network, statistics = networks.source_statistics(kind)
    return copy.deepcopy(network), statistics


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("resnet", TENT()),
        ("resnet", SimCLRTraining(num_views=3)),
        ("vit", MAETraining(num_views=2)),
        ("vit", ActMAD()),
    ],
    ids=repr,
)
def test_evaluation_is_the_adapter_and_leaves_the_network_as_it_was(kind, method):
    network, statistics = own(kind)
    before = copy.deepcopy(network.state_dict())
    engine = Engine(network, method, LOOP, statistics=statistics, seed=4)
    engine.eval()
    logits, loss = engine(images())
    expected = adapt(network, images(), method, LOOP, statistics=statistics, seed=4)
    torch.testing.assert_close(logits, expected.logits, atol=1e-9, rtol=1e-9)
    assert loss.shape == ()
    before_second_step = expected.losses[:, 1].mean().item()
    assert loss.item() == pytest.approx(before_second_step, rel=1e-9)
    assert (logits - expected.source_logits).abs().max() > 1e-6  # it did adapt
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_image_is_not_touched_by_the_others_of_its_batch():
    """In torch-ttt it is: there one step is taken on the mean over the batch."""
    network, statistics = own("resnet")
    engine = Engine(network, TENT(), LOOP, statistics=statistics).eval()
    alone = torch.cat([engine(image[None])[0] for image in images()])
    torch.testing.assert_close(engine(images())[0], alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_adapts_where_gradients_are_switched_off(mode):
    network, statistics = own("vit")
    expected = Engine(network, ActMAD(), LOOP, statistics=statistics).eval()(images())
    with mode():
        result = Engine(network, ActMAD(), LOOP, statistics=statistics).eval()(images())
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(result, expected)


def test_random_views_are_fresh_for_every_image_and_the_same_for_the_same_seed():
    network, _ = own("resnet")
    engine = Engine(network, MEMO(num_views=2), LOOP, seed=1).eval()
    first, second = engine(images())[0], engine(images())[0]
    assert not torch.equal(first, second)
    again = Engine(network, MEMO(num_views=2), LOOP, seed=1).eval()
    # The same numbers in batches of another size.
    parts = torch.cat([again(part)[0] for part in images().split(2) * 2])
    torch.testing.assert_close(parts, torch.cat([first, second]), atol=1e-9, rtol=1e-9)
    named = [engine(images(), image_ids=["a", "b", "c"])[0] for _ in range(2)]
    torch.testing.assert_close(*named, atol=0, rtol=0)
    other_seed = Engine(network, MEMO(num_views=2), LOOP, seed=2).eval()(images())[0]
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize(
    ("kind", "method"), [("resnet", SimCLRTraining(num_views=3)), ("vit", MAETraining(num_views=2))]
)
def test_training_gives_the_gradient_of_plain_autograd(kind, method):
    """Of the supervised plus the self-supervised loss, against a copy called image by image."""
    network, statistics = own(kind)
    slow, labels = copy.deepcopy(network), torch.tensor([0, 1, 3])
    logits, loss = Engine(network, method, LOOP, statistics=statistics, seed=4).train()(images())
    (F.cross_entropy(logits, labels) + loss).backward()

    slow.train()
    expected = slow(images()).logits
    slow.eval()
    losses = []
    for number, image in enumerate(images()):
        views = method.views(slow, image[None], [torch_generator(4, "training", str(number))])
        views = tree_map(lambda value: value[0], views)
        net = Unbound(slow, dict(slow.named_parameters()))
        losses.append(method.loss(net, views, statistics, ())[0])
    (F.cross_entropy(expected, labels) + torch.stack(losses).mean()).backward()

    torch.testing.assert_close(logits, expected)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    parameters = zip(network.named_parameters(), slow.parameters(), strict=True)
    for (name, parameter), slow_parameter in parameters:
        assert (parameter.grad is None) == (slow_parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, slow_parameter.grad, atol=1e-9, rtol=1e-6)
    state = slow.state_dict()  # with BatchNorm's updated running statistics
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_training_knows_the_updates_of_low_rank_that_test_time_will_train():
    """They start at zero, so the loss is that of the network itself."""
    network, statistics = own("vit")
    losses = []
    for trainable in ("lora", "norm"):
        loop = replace(LOOP, trainable=trainable)
        engine = Engine(network, MEMO(num_views=2), loop, statistics=statistics, seed=4).train()
        network.zero_grad()
        engine(images())[1].backward()
        gradients = [value.grad.clone() for value in network.parameters() if value.grad is not None]
        losses.append((engine.train()(images(), image_ids=range(3))[1].detach(), gradients))
    torch.testing.assert_close(*losses, atol=1e-10, rtol=1e-8)
    assert losses[0][1]


def test_joint_training_lowers_both_losses():
    network, statistics = own("vit")
    engine = Engine(network, MAETraining(num_views=4), statistics=statistics).train()
    labels, curve = torch.tensor([0, 1, 3]), []
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-2)
    for _ in range(40):
        logits, loss = engine(images())
        supervised = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        (supervised + loss).backward()
        optimizer.step()
        curve.append((supervised.item(), loss.item()))
    for first, last in zip(curve[0], curve[-1], strict=True):
        assert last < 0.7 * first


def test_the_state_is_the_networks_alone_however_often_it_adapted():
    """torch-ttt keeps the last optimiser on the engine, and copies it with the next image."""
    network, statistics = own("resnet")
    loop = InnerLoop(steps=2, optimizer="adam", lr=1e-3)
    engine = Engine(network, ActMAD(), loop, statistics=statistics).eval()
    attributes = set(vars(engine))
    engine(images())
    assert set(engine.state_dict()) == {f"network.{name}" for name in network.state_dict()}
    assert set(vars(engine)) == attributes
    assert not any(isinstance(value, torch.optim.Optimizer) for value in vars(engine).values())


def test_source_statistics_are_measured_where_they_are_missing():
    source = [networks.images(64, seed=7).double()]
    network, statistics = own("resnet")
    for method, loop in (
        (ActMAD(), LOOP),
        (SimCLRTraining(num_views=2), LOOP),
        (TENT(), InnerLoop(lr=1e-3, normalisation="shrink")),
    ):
        engine = Engine(network, method, loop).eval()
        with pytest.raises(UserError, match="needs source statistics"):
            engine(images())
        result = engine.measure(source, bank_size=64)(images(), image_ids="abc")
        bank = projection_bank(network, source, 64)
        ready = Engine(network, method, loop, statistics=statistics | bank).eval()
        expected = ready(images(), image_ids="abc")
        torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)
    with pytest.raises(UserError, match=r"ActMAD.* of the kind layers; call engine\.measure"):
        Engine(network, ActMAD()).train()(images())


def test_the_bank_is_of_all_source_images_though_they_come_class_by_class():
    network, _ = own("resnet")
    classes = [networks.images(1, seed=seed).double().expand(40, -1, -1, -1) for seed in (1, 2)]
    engine = Engine(network, SimCLRTraining(num_views=2)).measure(classes, bank_size=32)
    projections = [projection_bank(network, [images], 1)["bank"][0] for images in classes]
    of_first = (engine.statistics["bank"] - projections[0]).norm(dim=1) < 1e-6
    of_second = (engine.statistics["bank"] - projections[1]).norm(dim=1) < 1e-6
    assert (of_first ^ of_second).all()
    assert 8 < of_first.sum() < 24


def test_what_cannot_be_is_told():
    network, statistics = own("resnet")
    message = r"is defined for online, found episodic; use tttlab\.adaptation\.online\.adapt_stream"
    with pytest.raises(UserError, match=message):
        Engine(network, SAR(), statistics=statistics).eval()(images())
    with pytest.raises(UserError, match="has no loss to train with"):
        Engine(network, ViewAverage()).train()(images())
    logits, loss = Engine(network, ViewAverage()).eval()(images())
    assert logits.isfinite().all()
    assert loss.isnan()


def test_any_timm_classifier_and_a_methods_name_will_do():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    engine = Engine(model, "tent", LOOP)
    assert engine.method == TENT()
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(2, 3, 64, 64, generator=generator)
    logits, loss = engine.eval()(batch)
    torch.testing.assert_close(logits, adapt(model, batch, TENT(), LOOP).logits)
    logits, loss = engine.train()(batch)
    (logits.sum() + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
