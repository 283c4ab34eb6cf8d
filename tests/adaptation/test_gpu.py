"""Every method gives the same float32 numbers on a GPU as on the CPU; skipped without a GPU."""

import contextlib

import pytest
import torch

from tests.helpers import contract, networks
from tttlab.adaptation import signals
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.runtime.devices import choose_device

WITH_VIEWS = ("cotta", "memo", "rotation", "simclr", "simsiam", "views", "mae")
FEW = {name: {"num_views": 4} for name in WITH_VIEWS}


def accepted():
    """Every method with the first network that it accepts, and with every transformer of these."""
    for name in contract.names():
        kinds = []
        for kind in networks.KINDS:
            with contextlib.suppress(UserError):
                load_method(name).check(networks.source_statistics(kind, torch.float32)[0])
                kinds.append(kind)
        first, *more = kinds
        yield first, name
        yield from ((kind, name) for kind in more if kind.startswith("vit"))


@pytest.fixture(scope="module")
def device():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: that it computes the same is not tried")
    return choose_device("cuda", "32")


@pytest.mark.parametrize("signal", ["confidence", "distance", "loss"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_signals_are_the_same_numbers_too(device, kind, signal):
    """The source statistics stay on the CPU."""
    network, statistics = networks.source_statistics(kind, torch.float32)
    images = networks.images(6, seed=9) ** 2

    def measure(where):
        task = Task(network.to(where), load_method("actmad"), statistics=statistics, seed=2)
        return signals.measure_signal(signal, task, images.to(where), "abcdef")[1].cpu()

    on_cpu, on_gpu = measure("cpu"), measure(device)
    network.to("cpu")
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["source", "shrink"])
@pytest.mark.parametrize("protocol", ["episodic", "online"])
@pytest.mark.parametrize(("kind", "name"), list(accepted()))
def test_adapting_gives_the_same_numbers_as_on_the_cpu(device, kind, name, protocol, policy):
    method = load_method(name, contract.SETTINGS.get(name, {}) | FEW.get(name, {}))
    if protocol not in method.protocols:
        pytest.skip(f"{name} is not defined for {protocol}")
    network, statistics = contract.source(kind, method, torch.float32)
    images = networks.images(6, seed=9) ** 2
    loop = InnerLoop(steps=2, lr=1e-3, trainable="norm", clip=1.0, normalisation=policy)
    settings = {"statistics": statistics, "image_ids": [f"i{n}" for n in range(6)], "seed": 2}

    def run(where):
        if protocol == "online":
            return adapt_stream(
                network.to(where), images.to(where), method, loop, batch_size=3, **settings
            )
        return adapt(network.to(where), images.to(where), method, loop, **settings)

    on_cpu, on_gpu = run("cpu"), run(device)
    network.to("cpu")
    assert not on_gpu.fell_back.any()
    torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        on_gpu.losses.cpu(), on_cpu.losses, rtol=1e-3, atol=1e-4, equal_nan=True
    )
    assert torch.equal(on_gpu.logits.argmax(-1).cpu(), on_cpu.logits.argmax(-1))
