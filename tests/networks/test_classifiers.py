"""Other networks: timm's families, torchvision's, and users' modules; the reference is a loop."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.helpers import networks
from tests.helpers.once import once
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.checks import check_forward
from tttlab.adaptation.engine import Engine
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD
from tttlab.methods.actmad_batch import BatchActMAD
from tttlab.methods.eata import EATA
from tttlab.methods.lame import LAME
from tttlab.methods.memo import MEMO
from tttlab.methods.none import NoAdaptation
from tttlab.methods.t3a import T3A
from tttlab.methods.tent import TENT
from tttlab.methods.ttt_plus_plus import TTTPlusPlus
from tttlab.methods.views import ViewAverage
from tttlab.networks.classifiers import Classifier, as_network, linear_classifier
from tttlab.networks.network import Network
from tttlab.networks.source_statistics import layer_statistics, projection_bank
from tttlab.seeding import torch_generator

CLASSES, METHOD, LOOP = 4, MEMO(num_views=2), InnerLoop(steps=2, lr=1e-2)
STAGES, HEADS = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, {"num_heads": (1, 1, 1, 1)}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 32}
LEVIT = {
    "embed_dim": (16, 16, 16),
    "num_heads": (1, 1, 1),
    "depth": (1, 1, 1),
    "key_dim": 8,
    "img_size": 64,
}
HIERA = {
    "embed_dim": 16,
    "stages": (1, 1),
    "img_size": (32, 32),
    "q_pool": 1,
    "mask_unit_size": (4, 4),
}
FAMILIES = {  # small versions: options, side of the images
    "resnet18": ({"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 12]}, 32),
    "densenet121": ({"growth_rate": 4, "block_config": (1, 1)}, 32),
    # Its classifier is a convolution.
    "resnetv2_50x1_bit": ({"channels": (128, 128, 128, 128)}, 64),
    "res2net50_14w_8s": ({"layers": (1, 1, 1, 1)}, 32),
    "skresnet18": ({"layers": (1, 1, 1, 1)}, 32),
    "tresnet_m": ({"layers": (1, 1, 1, 1), "width_factor": 0.25}, 64),
    "test_nfnet": ({}, 32),  # has scalar parameters, and standardises its weights
    "test_byobnet": ({}, 32),
    "test_efficientnet": ({}, 32),
    "mobilenetv2_035": ({}, 32),
    "ese_vovnet19b_slim_dw": ({}, 32),
    "edgenext_xx_small": (STAGES, 64),
    "convnextv2_atto": (STAGES, 32),
    "mambaout_femto": (STAGES, 32),
    "repvit_m0_9": ({"embed_dim": (16, 16, 16, 16), "depth": (1, 1, 1, 1)}, 32),
    "levit_128s": (LEVIT, 64),  # has two classifiers, each after a BatchNorm
    "deit_tiny_distilled_patch16_224": (VIT, 32),  # has two classifiers of different tokens
    "xcit_nano_12_p16_224": ({**VIT, "cls_attn_layers": 1}, 32),
    "cait_xxs24_224": ({**VIT, "depth_token_only": 1}, 32),
    "convit_tiny": (VIT, 32),
    # It uses the same layer under several names.
    "coat_lite_tiny": (
        {"embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1), "img_size": 64},
        64,
    ),
    "visformer_tiny": ({"embed_dim": 16, "depth": (1, 1, 1), "num_heads": 2, "img_size": 64}, 64),
    "twins_pcpvt_small": (
        {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), **HEADS, "img_size": 64},
        64,
    ),
    "hiera_tiny_224": (HIERA, 32),
    "eva02_tiny_patch14_224": ({**VIT, "img_size": 28}, 28),
    "naflexvit_base_patch16_gap": ({"embed_dim": 24, "depth": 1, "num_heads": 2}, 32),
    "swin_tiny_patch4_window7_224": (SWIN, 32),
    "swinv2_tiny_window8_256": (SWIN, 32),
}


class Small(nn.Module):
    """A user's network of a few layers, the classifier last; ``wrap`` wraps some of the layers."""

    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.stem, self.norm = wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)
        self.mix, self.fc = wrap(nn.Linear(8, 8)), wrap(nn.Linear(8, CLASSES))

    def features(self, images: Tensor) -> Tensor:
        return self.mix(self.norm(self.stem(images)).relu().mean((2, 3))).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))


class Tied(Small):
    """Two layers share a weight, and one layer has two names."""

    def __init__(self):
        super().__init__()
        self.twice, self.fc = self.mix, nn.Linear(8, 8)
        self.fc.weight = self.mix.weight

    def features(self, images: Tensor) -> Tensor:
        return self.twice(super().features(images))


class HeadFirst(nn.Module):
    """Defines its last layer first."""

    def __init__(self):
        super().__init__()
        self.head, self.stem, self.mix = nn.Linear(8, CLASSES), nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(images).mean((2, 3))).relu())


def partly_compiled() -> nn.Module:
    model = Small()
    model.stem = torch.compile(model.stem, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = Small()
    model.compile(backend="eager")
    return model


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=CLASSES, **FAMILIES["resnet18"][0])


OTHERS = {
    "torchvision resnet18": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES
    ),
    "torchvision vit": vision_transformer,
    "a user's": Small,
    "tied weights": Tied,
    "weight norm": lambda: Small(parametrizations.weight_norm),
    "a compiled resnet": lambda: torch.compile(timm_resnet(), backend="eager"),
    "compiled in part": partly_compiled,
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(Small()),
}


@once
def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model in double precision with randomly perturbed parameters, and three images.

    The perturbation moves branches that are initialised to zero.
    """
    torch.manual_seed(0)
    options, size = FAMILIES.get(name, ({}, 32))
    from_timm = partial(timm.create_model, name, num_classes=CLASSES, **options)
    model = OTHERS.get(name, from_timm)().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(1)
    return model, torch.rand(3, 3, size, size, dtype=torch.float64, generator=generator)


def last_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make the logits."""
    plain = getattr(model, "_orig_mod", getattr(model, "module", model))
    if hasattr(plain, "get_classifier"):
        classifier = plain.get_classifier()
    else:
        classifier = getattr(plain, "heads", getattr(plain, "fc", None))
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def classifier_parameters(model: nn.Module) -> set[int]:
    return {id(parameter) for layer in last_layers(model) for parameter in layer.parameters()}


def by_hand(model: nn.Module, image: Tensor, name: str) -> Tensor:
    """MEMO's steps on a copy of the model, by torch alone: logits ``(K,)``."""
    plain = copy.deepcopy(getattr(model, "_orig_mod", getattr(model, "module", model)))
    for part in plain.modules():
        part._compiled_call_impl = None
    fixed = classifier_parameters(plain)
    trained = [value for value in plain.parameters() if id(value) not in fixed]
    optimizer = torch.optim.SGD(trained, lr=LOOP.lr)
    for step in range(LOOP.steps):
        generator = torch_generator(0, "views", name, step)
        views = random_views(image[None], [generator], METHOD.num_views, Augmentation())[0]
        mean = plain(views).softmax(-1).mean(0)
        optimizer.zero_grad()
        (-(mean * mean.log()).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return plain(image[None])[0]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_all_images_at_once_are_adapted_as_copies_of_the_model_would_be(name):
    model, images = built(name)
    before = {key: (id(value), value.detach().clone()) for key, value in model.named_parameters()}
    result = adapt(model, images, METHOD, LOOP)
    with torch.no_grad():
        torch.testing.assert_close(result.source_logits, model(images), rtol=1e-9, atol=1e-9)
    expected = torch.stack(
        [by_hand(model, image, str(number)) for number, image in enumerate(images)]
    )
    torch.testing.assert_close(result.logits, expected, rtol=1e-6, atol=1e-8)
    assert ((result.logits - result.source_logits).abs().amax(1) > 1e-6).all()
    assert not result.fell_back.any()
    for key, value in model.named_parameters():
        assert id(value) == before[key][0], key
        assert torch.equal(value, before[key][1]), key


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_encoder_is_all_but_the_classifier(name):
    model, _ = built(name)
    classifier_ids = classifier_parameters(model)
    encoder_ids = {id(value) for value in model.parameters()} - classifier_ids
    encoder = select_parameters(as_network(model), "encoder")
    assert {id(value) for value in encoder.values()} == encoder_ids
    classifier = select_parameters(as_network(model), "classifier")
    assert {id(value) for value in classifier.values()} == classifier_ids
    assert all(key.startswith("encoder.") for key in encoder)


@pytest.mark.parametrize(
    "name", ["resnetv2_50x1_bit", "torchvision resnet18", "torchvision vit", "a user's"]
)
def test_features_are_what_the_classifier_reads(name):
    model, images = built(name)
    with torch.no_grad():
        outputs = as_network(model)(images)
        (last,) = last_layers(model)
        shape = (len(images), -1, 1, 1) if isinstance(last, nn.Conv2d) else (len(images), -1)
        torch.testing.assert_close(
            last(outputs.features.view(shape)).flatten(1), outputs.logits, rtol=1e-9, atol=1e-9
        )
    assert outputs.features.ndim == 2


def test_features_may_be_named():
    model, images = built("a user's")
    torch.manual_seed(3)
    odd = HeadFirst().double().eval()
    with torch.no_grad():
        expected = odd.mix(odd.stem(images).mean((2, 3)))
        by_output = Classifier(odd, None, features="mix")(images)
        by_input = Classifier(odd, features="head.input", classifier="head")(images)
        torch.testing.assert_close(by_output.features, expected)
        torch.testing.assert_close(by_input.features, expected.relu())
        torch.testing.assert_close(Classifier(odd, "head")(images).features, expected.relu())
        assert Classifier(odd, None)(images).features is None
        assert Classifier(model, features="stem")(images).features is None  # it gives a map
    assert set(select_parameters(Classifier(odd, None), "encoder")) == {
        f"encoder.{key}" for key, _ in odd.named_parameters()
    }


def test_methods_that_look_at_features_or_activations_run_on_a_users_module():
    torch.manual_seed(4)
    model = HeadFirst().double().eval()
    images = torch.rand(
        6, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    network = Classifier(model, "head", stages=["stem", "mix"])
    for method in (T3A(), LAME(num_neighbors=2)):
        result = adapt_stream(network, images, method, batch_size=3)
        assert ((result.logits - result.source_logits).abs().amax(1) > 1e-6).all()
    method = ActMAD(tolerance=0.0)
    statistics = method.source_statistics(network, [images + 0.1])
    with torch.no_grad():
        means = model.stem(images + 0.1).mean((2, 3))
    torch.testing.assert_close(statistics["encoder.stem.mean_center"], means.mean(0))
    loop = InnerLoop(steps=3, lr=1e-3, clip=1.0)
    result = adapt(network, images, method, loop, statistics=statistics)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()
    shrunk = adapt(
        network,
        images,
        NoAdaptation(),
        InnerLoop(normalisation="shrink"),
        statistics=layer_statistics(network, [images + 0.1]),
    )
    assert shrunk.logits.isfinite().all()


def test_batch_norm_is_found_in_any_module():
    """With BatchNorm no layer needs to be named for a policy or for ActMAD."""
    model, images = built("a user's")
    network = as_network(model)
    statistics = layer_statistics(network, [images])
    assert {key.rpartition(".")[0] for key in statistics} == {"encoder.norm", "encoder.norm.input"}
    loop = InnerLoop(normalisation="image")
    logits = adapt(model, images, NoAdaptation(), loop).logits
    slow = copy.deepcopy(model)
    slow.norm.train()
    with torch.no_grad():
        expected = torch.cat([slow(image[None]) for image in images])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert (adapt(model, images + 1, ActMAD(), LOOP, statistics=statistics).losses[:, 0] > 0).all()


def test_what_a_module_does_not_say_is_asked_for_in_one_line():
    (model, images), odd = built("a user's"), HeadFirst().double().eval()
    with pytest.raises(
        UserError,
        match=r"the last layer of this HeadFirst, mix, does not make its logits; name the one that",
    ):
        adapt(odd, images, METHOD)
    nameless = Classifier(odd, None)
    with pytest.raises(
        UserError,
        match=r"LAME.* looks at features \(N, D\), and none are known of this HeadFirst; name the ",
    ):
        adapt_stream(nameless, images, LAME())
    with pytest.raises(
        UserError,
        match="expected a linear layer that makes the logits of this HeadFirst, found none; "
        "name it",
    ):
        adapt_stream(nameless, images, T3A())
    with pytest.raises(UserError, match="found Conv2d"):
        linear_classifier(as_network(built("resnetv2_50x1_bit")[0]))
    for refused in (
        lambda: adapt(nameless, images, ActMAD()),
        lambda: ActMAD().source_statistics(nameless, [images]),
        lambda: adapt(nameless, images, METHOD, InnerLoop(normalisation="shrink")),
    ):
        with pytest.raises(
            UserError,
            match="the outputs of stages are asked for, and none are known of this HeadFirst; "
            "name ",
        ):
            refused()
    with pytest.raises(
        UserError, match=r"expected a layer of this Small, found 'fcc'; did you mean 'fc'\?"
    ):
        Classifier(model, "fcc")
    with pytest.raises(UserError, match="expected a layer of this Small, found 'stm'"):
        Classifier(model, stages=["stm"])
    headless = timm.create_model("resnet18", num_classes=0, **FAMILIES["resnet18"][0]).double()
    with pytest.raises(UserError, match=r"this ResNet has no classifier \(num_classes=0\)"):
        adapt(headless, images, METHOD)
    with pytest.raises(UserError, match=r"^expected a torch\.nn\.Module, found function"):
        adapt(lambda images: images, images, METHOD)


class Giving(Small):
    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def forward(self, images: Tensor) -> Tensor:
        return self.gives(super().forward(images), images)


def test_logits_may_be_an_attribute_of_what_a_module_returns():
    images = built("a user's")[1]
    wrapped = Giving(lambda logits, _images: SimpleNamespace(logits=logits)).double().eval()
    with torch.no_grad():
        expected = wrapped(images).logits
    torch.testing.assert_close(adapt(wrapped, images, METHOD, LOOP).source_logits, expected)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (
            lambda logits, _images: (logits,),
            r"expected logits \(N, K\) from this Giving, found tuple for 2 images; wrap it in",
        ),
        (lambda logits, _images: logits[..., None], r"found \(2, 4, 1\) for 2 images"),
        (
            lambda logits, images: logits if images.mean() > 0 else -logits,
            r"cannot be called for many images at once.*control",
        ),
        (
            lambda logits, images: logits * images.mean().item(),
            r"cannot be called for many images at once.*\.item\(\)",
        ),
        (
            lambda logits, _images: logits + 0 * torch.rand_like(logits),
            r"this Giving cannot be.*random.*; its forward must not",
        ),
        (
            lambda logits, _images: logits - logits.mean(0),
            "the predictions of this Giving depend on the other images of a batch",
        ),
        (
            lambda logits, _images: 1e-6 * (logits - logits.mean(0)),
            "the predictions of this Giving depend on the other images of a batch",
        ),
    ],
)
def test_a_module_that_cannot_be_adapted_is_told_so_in_one_line(gives, message):
    images, model = built("a user's")[1], Giving(gives).double().eval()
    for network in (model, Classifier(model, "fc")):
        with pytest.raises(UserError, match=message) as caught:
            adapt(network, images, METHOD)
        assert "\n" not in str(caught.value)


def test_rounding_is_no_dependence_on_other_images():
    """Logits that a batch of two and one image round differently, in bfloat16 by one unit."""
    images = built("a user's")[1]

    def rounded(logits, images):
        return logits * (1 + (len(images) - 1) * torch.finfo(torch.bfloat16).eps)

    coarse = as_network(Giving(rounded).bfloat16().eval())
    check_forward(coarse, images[:2].bfloat16(), METHOD, LOOP, "episodic")
    model = Giving(lambda *given: rounded(*given).float()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        check_forward(as_network(model), images[:2].float(), METHOD, LOOP, "episodic")
    with pytest.raises(UserError, match="depend on the other images"):
        check_forward(as_network(model), images[:2].float(), METHOD, LOOP, "episodic")


def test_a_module_that_branches_on_values_still_learns_whole_batches_along_a_stream():
    images = built("a user's")[1]
    model = Giving(lambda logits, images: logits if images.mean() > 0 else -logits).double().eval()
    assert (adapt_stream(model, images, TENT(), LOOP).losses > 0).all()
    with pytest.raises(UserError, match="cannot be called for many images at once"):
        adapt_stream(model, images, METHOD, LOOP)


def test_frozen_parameters_stay_and_a_frozen_model_is_told():
    images, model = built("a user's")[1], Small().double().eval()
    model.stem.requires_grad_(False)
    trainable = {f"encoder.{key}" for key in ("norm.weight", "norm.bias", "mix.weight", "mix.bias")}
    assert set(select_parameters(as_network(model), "encoder")) == trainable
    with pytest.raises(
        UserError,
        match=r"trainable: 'encoder\.stem' matches frozen parameters alone "
        r"\(requires_grad=False\), su",
    ):
        adapt(model, images, METHOD, InnerLoop(trainable=("encoder.norm", "encoder.stem")))
    model.requires_grad_(False)
    for trainable in ("encoder", "norm", "all"):
        with pytest.raises(
            UserError,
            match=r"frozen.*call requires_grad_\(True\) on them.* the network stays as it is",
        ):
            adapt(model, images, METHOD, InnerLoop(trainable=trainable))
    with torch.no_grad():
        torch.testing.assert_close(adapt(model, images, NoAdaptation()).logits, model(images))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_and_is_not_trained(kind):
    """Small steps are rounded away: the weights have 8 or 11 significant bits."""
    torch.manual_seed(5)
    model, images = Small().to(kind).eval(), torch.rand(3, 3, 12, 12).to(kind)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(
        adapt(model, images, NoAdaptation()).logits, expected, rtol=0.02, atol=0.02
    )
    assert adapt(model, images, ViewAverage(2)).logits.isfinite().all()
    for run in (adapt, adapt_stream):
        with pytest.raises(
            UserError,
            match=f"parameters to be trained are {kind}, "
            "in which small steps are rounded away; make",
        ):
            run(model, images, METHOD)
    single = adapt(model.float(), images.float(), METHOD, LOOP).logits
    with torch.autocast("cpu", torch.bfloat16):  # as the message advises
        mixed = adapt(model, images.float(), METHOD, LOOP).logits.float()
    torch.testing.assert_close(mixed, single, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 9, 9), torch.zeros(2, 3, 9, 9, dtype=torch.uint8)],
    ids=["single", "bytes"],
)
def test_images_of_another_dtype_are_told(images):
    with pytest.raises(
        UserError,
        match=r"expected images of torch\.float64, as the .*, "
        rf"found {images.dtype}; convert one of",
    ):
        adapt(Small().double().eval(), images, METHOD)


def test_a_scripted_module_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(27, 2)))
    with pytest.raises(
        UserError,
        match="found RecursiveScriptModule; of a scripted or traced one give the module in Python",
    ):
        adapt(scripted, torch.rand(2, 3, 3, 3), METHOD)


def test_a_network_of_the_package_goes_through_as_it_is():
    network = Network(timm.create_model("resnet18", num_classes=0, **FAMILIES["resnet18"][0]), 2)
    wrapped = Classifier(Small())
    assert as_network(network) is network
    assert as_network(torch.compile(network, backend="eager")) is network
    assert as_network(wrapped) is wrapped


def test_an_engine_takes_any_module():
    model, images = built("torchvision resnet18")
    model = copy.deepcopy(model)
    engine = Engine(model, METHOD, LOOP)
    torch.testing.assert_close(engine.eval()(images)[0], adapt(model, images, METHOD, LOOP).logits)
    logits, loss = engine.train()(images)
    (F.cross_entropy(logits, torch.tensor([0, 1, 2])) + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_statistics_of_no_images_are_refused():
    network, _ = networks.source_statistics("resnet", torch.float32)
    simclr, _ = networks.source_statistics("resnet", torch.float32)
    for measure in (
        lambda: layer_statistics(network, []),
        lambda: projection_bank(simclr, [], 8),
        lambda: EATA().source_statistics(network, []),
        lambda: BatchActMAD().source_statistics(network, []),
        lambda: TTTPlusPlus().source_statistics(simclr, []),
    ):
        with pytest.raises(UserError, match="expected source images, found none"):
            measure()
