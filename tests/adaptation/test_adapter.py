"""The adapter's own duties; `tests/methods/test_contract.py` tests every method with it."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import contract, networks, own_methods
from tests.helpers.contract import (
    COUNT,
    SEED,
    assert_vectorised_equals_one_image_at_a_time,
    one_at_a_time,
    shifted,
    trained_on_one,
)
from tests.helpers.once import once
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.curve import diverged
from tttlab.adaptation.method import Method, entropy, first_state, first_states
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.predicting import CLASSES
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.signals import first_loss
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD
from tttlab.methods.dressed import Dressed
from tttlab.methods.mae import MAETraining
from tttlab.methods.memo import MEMO
from tttlab.methods.none import NoAdaptation
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.views import ViewAverage
from tttlab.networks.gradients import clip_gradients
from tttlab.seeding import torch_generator


def name(value: object) -> str:
    return repr(value) if isinstance(value, Method | InnerLoop) else str(value)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_mixed_precision_equals_one_image_at_a_time_up_to_its_rounding(kind):
    network, statistics = networks.source_statistics(kind, torch.float32)
    images, loop = shifted(dtype=torch.float32), InnerLoop(steps=2, lr=1e-3, clip=1.0)
    exact = adapt(network, images, ActMAD(), loop, statistics=statistics)
    with torch.autocast("cpu", torch.bfloat16):
        together = adapt(network, images, ActMAD(), loop, statistics=statistics)
        alone = [
            one_at_a_time(network, image, ActMAD(), loop, statistics, str(i))
            for i, image in enumerate(images)
        ]
    torch.testing.assert_close(
        together.logits.float(), torch.stack(alone).float(), atol=0.03, rtol=0.03
    )
    torch.testing.assert_close(together.losses.float(), exact.losses, atol=0.02, rtol=0.05)
    assert not torch.equal(together.logits.float(), exact.logits)


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        *((MEMO(num_views=4), policy) for policy in ("source", "image", "mixed", "shrink")),
        (Dressed(num_images=8), "source"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("kind", ["resnet", "groupnorm", "vit"])
def test_every_normalisation_is_close_to_single_precision_under_autocast(kind, policy, method):
    network, statistics = contract.source(kind, method, torch.float32)
    loop = InnerLoop(steps=1, lr=1e-3, clip=1.0, trainable="norm", normalisation=policy)
    images = shifted(2, dtype=torch.float32)
    exact = adapt(network, images, method, loop, statistics=statistics)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapt(network, images, method, loop, statistics=statistics)
    assert not found.fell_back.any()
    torch.testing.assert_close(found.logits.float(), exact.logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_adapts_where_its_caller_has_switched_gradients_off(mode):
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm", normalisation="shrink")

    def adapted() -> list[Tensor]:
        method = MEMO(num_views=2)
        alone = adapt(network, shifted(), method, loop, statistics=statistics)
        stream = adapt_stream(network, shifted(), method, loop, batch_size=3, statistics=statistics)
        return [alone.logits, alone.losses, stream.logits, stream.losses]

    expected = adapted()
    with mode():
        found = adapted()
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert (expected[1][:, 0] > expected[1][:, -1]).any()  # the steps were taken


def test_images_without_a_gradient_have_a_flat_curve():
    network, statistics = networks.source_statistics("resnet")
    images = torch.cat([networks.images(3, seed=7), shifted(2)])
    loop = InnerLoop(steps=2, lr=1e-2, clip=1.0)
    still = adapt(
        network, images, ActMAD(tolerance=1e9), loop, statistics=statistics, record=(0, 1, 2)
    )
    assert torch.equal(still.logits_at, still.source_logits[:, None].expand(-1, 3, -1))
    some = adapt(network, images, ActMAD(tolerance=1.5), loop, statistics=statistics, record=(0, 2))
    moved = (some.logits_at[:, 1] != some.logits_at[:, 0]).any(1)
    assert moved.any()
    torch.testing.assert_close(some.logits_at[:, 1], some.logits)


@pytest.mark.parametrize("method", [ViewAverage(), NoAdaptation()], ids=name)
def test_without_training_every_step_of_the_curve_is_the_prediction(method):
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=0, normalisation="shrink")
    result = adapt(network, shifted(), method, loop, statistics=statistics, record=(0, 2))
    for position in (0, 1):
        assert torch.equal(result.logits_at[:, position], result.logits)


def test_an_image_that_diverges_on_the_way_falls_back_from_there_on():
    class Exploding(ActMAD):
        def init_state(self):
            return torch.zeros(())

        def loss(self, net, views, statistics, state):
            loss, _ = super().loss(net, views, statistics, ())
            return loss + torch.where(state > 0.5, 1e6, 0.0), state + 1

    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-3, clip=1.0)
    result = adapt(network, shifted(), Exploding(), loop, statistics=statistics, record=(0, 1, 2))
    assert result.fell_back.all()
    assert torch.equal(result.logits_at[:, 2], result.source_logits)


def test_the_same_seed_gives_the_same_views_and_another_seed_others():
    network, statistics = networks.source_statistics("resnet")
    method, loop = SimCLRTraining(num_views=3), InnerLoop(lr=0.1)
    first, again, other_seed = (
        adapt(network, shifted(), method, loop, statistics=statistics, seed=seed).logits
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other_seed, atol=1e-5)


def test_a_diverging_image_falls_back_alone():
    class Poisoned(ActMAD):
        def loss(self, net, views, statistics, state):
            loss, state = super().loss(net, views, statistics, state)
            return loss * torch.where(views.mean() > 0.99, float("nan"), 1.0), state

    network, statistics = networks.source_statistics("resnet")
    images = shifted()
    images[2] = 1.0
    loop = InnerLoop(steps=2, lr=1e-2, clip=1.0)
    result = adapt(network, images, Poisoned(), loop, statistics=statistics)
    healthy = adapt(network, images, ActMAD(), loop, statistics=statistics)
    assert result.fell_back.tolist() == [False, False, True, False, False]
    assert torch.equal(result.logits[2], result.source_logits[2])
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(result.logits[rest], healthy.logits[rest], atol=1e-6, rtol=1e-6)


def test_divergence_is_a_loss_that_is_not_finite_or_has_exploded():
    nan, inf = float("nan"), float("inf")
    losses = torch.tensor(
        [[1.0, 0.5], [1.0, nan], [0.0, 9.0], [0.0, 11.0], [-2.0, 17.0], [-2.0, 19.0], [1.0, inf]]
    )
    assert diverged(losses).tolist() == [False, True, False, True, False, True, True]


def test_clipping_bounds_each_image_on_its_own():
    generator = torch.Generator().manual_seed(3)
    gradients = {
        "a": torch.randn(3, 2, generator=generator),
        "b": torch.randn(3, 2, 2, generator=generator),
    }
    for part in gradients.values():
        part[1] *= 1e-3
    clipped = clip_gradients(gradients, 0.5)
    for image in (0, 2):
        whole = torch.cat([part[image].flatten() for part in clipped.values()])
        assert whole.norm() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(clipped["b"][1], gradients["b"][1])  # short enough, so not changed


def test_a_gradient_that_is_not_finite_costs_its_image_the_adaptation():
    class Steep(ActMAD):
        def loss(self, net, views, statistics, state):
            loss, state = super().loss(net, views, statistics, state)
            # √ has an infinite slope at 0, and 0 · ∞ is NaN.
            poison = torch.where(views.mean() > 0.99, 0.0, 1.0)
            return loss + (net(views).logits.sum() * 0 + poison).sqrt() * 0, state

    network, statistics = networks.source_statistics("resnet")
    images = shifted()
    images[2] = 1.0
    for clip in (None, 1.0):
        loop = InnerLoop(steps=1, lr=1e-5, clip=clip)
        result = adapt(network, images, Steep(), loop, statistics=statistics)
        assert result.losses[:, 0].isfinite().all()
        assert result.fell_back.tolist() == [False, False, True, False, False]
        assert torch.equal(result.logits[2], result.source_logits[2])


def test_which_parameters_move():
    network, _ = networks.source_statistics("resnet")
    names = {name for name, _ in network.named_parameters()}
    assert set(select_parameters(network, "all")) == names
    encoder = {name for name in names if name.startswith("encoder.")}
    assert set(select_parameters(network, "encoder")) == encoder
    norm = select_parameters(network, "norm")
    affine = [module for module in network.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norm) == 2 * len(affine)
    assert all(value.ndim == 1 for value in norm.values())
    assert "classifier.bias" in select_parameters(network, ["encoder.layer1", "classifier.bias"])
    assert select_parameters(network, "none") == {}
    with pytest.raises(UserError, match=r"'layer9' matches no parameter.*encoder\.layer1"):
        select_parameters(network, "layer9")


def test_a_loss_that_no_trainable_parameter_moves_is_refused():
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(trainable="classifier")
    message = "none of the 2 trainable parameters influences the loss of ActMAD"
    with pytest.raises(UserError, match=message):
        adapt(network, shifted(), ActMAD(), loop, statistics=statistics)


def test_no_gradient_reaches_a_frozen_parameter():
    network, statistics = networks.source_statistics("vit")
    bound = {}

    class Spy(ActMAD):
        def loss(self, net, views, statistics, state):
            bound.update(net._values)
            return super().loss(net, views, statistics, state)

    adapt(network, shifted(), Spy(), InnerLoop(steps=1, trainable="norm"), statistics=statistics)
    moving = {key for key, value in bound.items() if torch._C._functorch.is_batchedtensor(value)}
    assert moving == set(select_parameters(network, "norm"))
    assert not any(value.requires_grad for key, value in bound.items() if key not in moving)
    assert set(bound) == {key for key, _ in network.named_parameters()}


def anchored(method: own_methods.Anchored) -> Tensor:
    """Find how much a penalty adds to the loss after one step."""
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm")
    free = adapt(network, shifted(), own_methods.Anchored(strength=0.0), loop)
    held = adapt(network, shifted(), method, loop)
    # At the source weights the penalty is zero.
    torch.testing.assert_close(held.losses[:, 0], free.losses[:, 0])
    return held.losses[:, 1] - free.losses[:, 1]


def test_a_penalty_is_the_distance_from_the_source_weights():
    """After one step the distance is lr · |gradient|."""
    network, _ = networks.source_statistics("resnet")
    parameters, expected = list(select_parameters(network, "norm").values()), []
    for image in shifted():
        slopes = torch.autograd.grad(entropy(network(image[None]).logits).mean(), parameters)
        expected.append(50 * 1e-4 * sum(slope.square().sum() for slope in slopes))
    penalties = anchored(own_methods.Anchored(strength=50.0))
    torch.testing.assert_close(penalties, torch.stack(expected), rtol=1e-8, atol=0)
    assert min(expected) > 1e-6
    for wrong in (own_methods.AnchoredToItself, own_methods.AnchoredToNothing):
        assert not anchored(wrong(strength=50.0)).any()


@dataclass(frozen=True)
class HowFar(ActMAD):
    """Adds the distance from the source weights to its logits."""

    def predict(self, net, image, views, statistics):
        assert set(net.trained) == set(select_parameters(net.module, "norm"))
        return super().predict(net, image, views, statistics) + own_methods.Anchored().distance(net)


def test_what_is_trained_is_known_to_the_prediction_whether_an_image_moved_or_not():
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm")
    plain = adapt(network, shifted(), parting(), loop, statistics=statistics, record=(0,))
    how_far = HowFar(tolerance=parting().tolerance)
    result = adapt(network, shifted(), how_far, loop, statistics=statistics, record=(0,))
    distances, moved = result.logits - plain.logits, plain.losses[:, 0] > 0
    assert torch.equal(distances > 0, moved[:, None].expand(-1, networks.CLASSES))
    assert torch.equal(result.logits_at, plain.logits_at)


@pytest.mark.parametrize(
    "wrong", [own_methods.AnchoredToNothing(), own_methods.AverageOfTheGroup()], ids=name
)
def test_the_contract_finds_what_breaks_it(wrong):
    with pytest.raises(AssertionError, match="not close"):
        assert_vectorised_equals_one_image_at_a_time("resnet", wrong, InnerLoop(steps=2, lr=1e-2))


def test_adam_on_stacked_images_is_adam_on_each():
    network, statistics = networks.source_statistics("resnet")
    method, loop = ActMAD(form="l1"), InnerLoop(steps=3, lr=1e-3, optimizer="adam")
    together = adapt(network, shifted(), method, loop, statistics=statistics)
    alone = adapt(network, shifted(), method, loop, statistics=statistics, images_per_step=1)
    torch.testing.assert_close(together.logits, alone.logits, atol=1e-6, rtol=1e-6)


def test_any_timm_classifier_and_tensor_batch():
    import timm

    torch.manual_seed(0)
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = timm.create_model("resnet18", num_classes=3, **options).eval()
    images = networks.images(4) - 0.5
    method, loop = ActMAD(), InnerLoop(steps=2, lr=1e-2, clip=1.0)
    statistics = method.source_statistics(model, [networks.images(16, seed=9) - 0.5])
    result = adapt(model, images, method, loop, statistics=statistics)
    torch.testing.assert_close(result.source_logits, model(images).detach(), atol=1e-5, rtol=1e-5)
    assert (result.losses[:, -1] < result.losses[:, 0]).any()
    assert (result.logits != result.source_logits).any()


@pytest.mark.parametrize("policy", ["shrink", "mixed"])
def test_missing_statistics_are_named(policy):
    network, _ = networks.source_statistics("vit")
    loop = InnerLoop(normalisation=policy)
    message = rf"'{policy}' needs source statistics of 3 layers that have none, such as encoder"
    with pytest.raises(UserError, match=message):
        adapt(network, shifted(), NoAdaptation(), loop)


def test_methods_refuse_networks_without_their_head():
    resnet, _ = networks.source_statistics("resnet")
    vit, _ = networks.source_statistics("vit")
    with pytest.raises(UserError, match="needs a network with the head of objective mae"):
        adapt(resnet, shifted(), MAETraining())
    with pytest.raises(UserError, match="needs a network with the head of objective simclr"):
        adapt(vit, shifted(), SimCLRTraining())
    with pytest.raises(UserError, match="needs BatchNorm in the backbone"):
        adapt(vit, shifted(), ActMAD(layers="norm"))


def test_backbones_that_depend_on_batch_mates_are_refused():
    network = copy.deepcopy(networks.source_statistics("resnet")[0])
    network.encoder.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(UserError, match=r"encoder\.bn1 has no running statistics"):
        adapt(network, shifted(), NoAdaptation())

    class BatchMean(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values - values.mean(0)

    network.encoder.bn1 = BatchMean()
    with pytest.raises(UserError, match="depend on the other images of a batch"):
        adapt(network, shifted(), NoAdaptation())


def test_progress_counts_every_image_once():
    network, _ = networks.source_statistics("resnet")
    done = []
    adapt(network, shifted(), NoAdaptation(), InnerLoop(), images_per_step=2, on_images=done.append)
    assert done == [2, 2, 1]


def test_losses_and_times_have_a_place_for_every_image_and_step():
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=4, lr=1e-2, clip=1.0)
    result = adapt(network, shifted(), ActMAD(), loop, statistics=statistics)
    assert result.losses.shape == (COUNT, 5)
    assert (result.milliseconds > 0).all()


def test_images_without_a_gradient_are_done_after_the_first_step():
    network, statistics = networks.source_statistics("resnet")
    images, flops = shifted(), {}
    method = ActMAD(tolerance=1e9)
    for steps in (2, 8):
        loop = InnerLoop(steps=steps, lr=0.1)
        with FlopCounterMode(display=False) as counter:
            result = adapt(network, images, method, loop, statistics=statistics)
        flops[steps] = counter.get_total_flops()
        assert result.losses.shape == (COUNT, steps + 1)
        assert not result.losses.any()
        torch.testing.assert_close(result.logits, result.source_logits, atol=1e-10, rtol=1e-10)
    assert flops[2] == flops[8]


@once
def parting() -> ActMAD:
    """ActMAD with a tolerance, one for all layers and moments, that leaves some images alone."""
    network, statistics = networks.source_statistics("resnet")
    generators = [torch.Generator()] * COUNT

    def losses(tolerance):
        task = Task(network, ActMAD(tolerance=tolerance), statistics=statistics)
        return first_loss(task, shifted(), generators)

    for tolerance in torch.linspace(0, float(losses(0.0).max()), 40).tolist():
        if 0 < (losses(tolerance) == 0).sum() < COUNT:
            return ActMAD(tolerance=tolerance)
    pytest.fail("no tolerance parts these images")


@pytest.mark.parametrize(
    "loop",
    [
        InnerLoop(steps=3, lr=1e-2, clip=1.0),
        InnerLoop(steps=3, lr=1e-2, momentum=0.9, trainable="all", clip=1.0),
        InnerLoop(steps=3, lr=1e-3, optimizer="adam"),
        InnerLoop(steps=3, lr=1e-2, sharpness=0.05, clip=1.0),
    ],
    ids=name,
)
def test_a_group_of_images_with_and_without_a_gradient(loop):
    """An image without a gradient ends after its first step: nothing would ever move it."""
    network, statistics = networks.source_statistics("resnet")
    images, method = shifted(), parting()
    result = adapt(network, images, method, loop, statistics=statistics, seed=SEED)
    still = (result.losses[:, 0] == 0).tolist()
    assert 0 < sum(still) < COUNT
    torch.testing.assert_close(
        result.logits[still], result.source_logits[still], atol=1e-10, rtol=1e-10
    )
    for number, image in enumerate(images):
        alone = one_at_a_time(network, image, method, loop, statistics, str(number))
        torch.testing.assert_close(result.logits[number], alone, atol=1e-6, rtol=1e-6)


@dataclass(frozen=True)
class UntilNear(Method):
    """The prediction's first logit falls, and the loss ends at a bound that each image has."""

    def loss(self, net, views, statistics, state):
        logit = net(views).logits[0, 0]
        return (logit - statistics["bound"]).clamp_min(0), state


@pytest.mark.parametrize(
    "loop",
    [
        InnerLoop(steps=6, lr=2e-2, momentum=0.9, trainable="all"),
        InnerLoop(steps=6, lr=5e-3, optimizer="adam", trainable="all"),
    ],
    ids=name,
)
def test_what_an_optimiser_remembers_does_not_move_an_image_whose_loss_has_ended(loop):
    network, _ = networks.source_statistics("groupnorm")
    with torch.no_grad():
        first = network(shifted()).logits[:, 0]
    statistics = {"bound": first.min() - 0.02}
    settings = {"statistics": statistics, "record": range(loop.steps + 1)}
    found = adapt(network, shifted(), UntilNear(), loop, **settings)
    ended = (found.losses[:, :-1] == 0).nonzero()
    assert 3 < len(ended) < found.losses[:, :-1].numel()
    for image, step in ended.tolist():
        torch.testing.assert_close(
            found.logits_at[image, step + 1], found.logits_at[image, step], rtol=0, atol=1e-9
        )


def test_a_prediction_from_views_uses_the_same_ones_after_every_number_of_steps():
    """Else what the steps change would be partly what another draw changes."""
    network = networks.source_statistics("resnet")[0]
    method = Dressed(num_images=4, bank=16, num_views=2)
    statistics = method.source_statistics(network, [networks.images(32, seed=7).double()])
    loop = InnerLoop(steps=3, lr=1e-15, trainable="norm")
    settings = {"statistics": statistics, "record": range(4)}
    found = adapt(network, shifted(), method, loop, **settings)
    assert (found.losses[:, 1] - found.losses[:, 0]).abs().max() > 1e-6  # steps draw anew
    for step in range(1, 4):
        torch.testing.assert_close(
            found.logits_at[:, step], found.logits_at[:, 0], rtol=0, atol=1e-9
        )


def test_the_first_state_lies_where_the_images_do():
    @dataclass(frozen=True)
    class Counted(Method):
        def init_state(self):
            return {"count": torch.zeros(2)}

    device = torch.device("meta")
    assert first_state(Counted(), device)["count"].device == device
    states = first_states(Counted(), torch.empty(3, 1, device=device))
    assert (states["count"].device, states["count"].shape) == (device, (3, 2))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("resnet", MEMO(num_views=3)), ("resnet", ActMAD()), ("vit", ActMAD())],
    ids=name,
)
def test_an_averaged_prediction_is_the_mean_over_the_image_and_views_under_its_own_weights(
    kind, method
):
    network, statistics = contract.source(kind, method)
    augmentation = Augmentation(0.5, True, 0.1)
    loop = InnerLoop(
        steps=2, lr=1e-2, trainable="norm", clip=1.0, average=3, augmentation=augmentation
    )
    options = {"statistics": statistics, "record": (0, 1), "seed": SEED}
    result = adapt(network, shifted(), method, loop, **options)
    for index, image in enumerate(shifted()):
        generator = torch_generator(SEED, "average", str(index))
        views = random_views(image[None], [generator], 3, augmentation)[0]
        looks = torch.cat([image[None], views])
        for step, logits in enumerate((*result.logits_at[index], result.logits[index])):
            shorter = replace(loop, steps=step)
            trained, _ = trained_on_one(network, image, method, shorter, statistics, str(index))
            model = trained.plain()
            with torch.no_grad(), normalised(model, loop, statistics):
                expected = model(looks).logits.softmax(-1).mean(0)
            torch.testing.assert_close(logits.exp(), expected, atol=1e-6, rtol=1e-6)
    # The control is not averaged.
    assert torch.equal(result.source_logits, adapt(network, shifted(), NoAdaptation()).logits)


def test_views_without_training_are_averaged_alike_whichever_way_they_are_asked_for():
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(average=4, normalisation="mixed")
    averaged = adapt(network, shifted(), NoAdaptation(), loop, statistics=statistics).logits
    generators = [torch_generator(0, "average", str(index)) for index in range(COUNT)]
    method, network = ViewAverage(4), network.eval()
    with normalised(network, loop, statistics), torch.no_grad():
        by_method = [
            method.predict(network, looks[0], looks, statistics)
            for looks in CLASSES.looks(shifted(), loop, generators)
        ]
    torch.testing.assert_close(averaged, torch.stack(by_method))


@pytest.mark.parametrize(
    ("kind", "method"), [("resnet", MEMO(num_views=3)), ("vit", MAETraining(num_views=2))], ids=name
)
def test_sharpness_aware_steps_are_each_images_own(kind, method):
    network, statistics = contract.source(kind, method)
    loop = InnerLoop(steps=2, lr=1e-2, sharpness=0.1)
    result = adapt(network, shifted(), method, loop, statistics=statistics, seed=SEED)
    for index, image in enumerate(shifted()):
        alone = one_at_a_time(network, image, method, loop, statistics, str(index))
        torch.testing.assert_close(result.logits[index], alone, atol=1e-6, rtol=1e-6)
    flat = replace(loop, sharpness=0.0)
    flat = adapt(network, shifted(), method, flat, statistics=statistics, seed=SEED)
    assert (result.logits - flat.logits).abs().max() > 1e-4


def test_a_method_for_streams_alone_is_refused():
    network, _ = networks.source_statistics("resnet")
    message = (
        r"SAR.* is defined for online, found episodic; "
        r"use tttlab\.adaptation\.online\.adapt_stream"
    )
    with pytest.raises(UserError, match=message):
        adapt(network, shifted(), load_method("sar"))


def test_a_method_with_its_own_prediction_refuses_to_be_averaged():
    network, _ = networks.source_statistics("resnet")
    message = r"average: 2 views cannot replace the prediction .*ViewAverage.* set it to 0"
    with pytest.raises(UserError, match=message):
        adapt(network, shifted(), ViewAverage(), InnerLoop(average=2))
