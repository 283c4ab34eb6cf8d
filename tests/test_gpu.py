"""The same numbers on a GPU as on the CPU, in float32; skipped where there is none."""

import networks
import pytest
import torch

from tttlab.adapter import adapt
from tttlab.devices import choose_device
from tttlab.inner_loop import InnerLoop
from tttlab.normalisation import Normalisation
from tttlab.registry import load_method

METHODS = {
    "resnet": ["none", "views", "actmad", "memo", "tent", "simclr"],
    "vit": ["none", "views", "actmad", "memo", "tent", "mae"],
}


@pytest.fixture(scope="module")
def device():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: that it computes the same is not tried")
    return choose_device("cuda", "32")


@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind, methods in METHODS.items() for method in methods])
@pytest.mark.parametrize("policy", ["source", "shrink"])
def test_adapting_gives_the_same_numbers_as_on_the_cpu(device, kind, method, policy):
    network, statistics = networks.source_statistics(kind, torch.float32)
    images = networks.images(6, seed=9) ** 2
    loop = InnerLoop(steps=3, lr=1e-2, trainable="norm", clip=1.0, normalisation=Normalisation(policy))

    def run(where):
        own = {name: value.to(where) for name, value in statistics.items()}
        return adapt(network.to(where), images.to(where), load_method(method), loop, statistics=own,
                     image_ids=[f"i{n}" for n in range(6)], seed=2)  # fmt: skip

    on_cpu = run("cpu")
    on_gpu = run(device)
    network.to("cpu")
    torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(on_gpu.losses.cpu(), on_cpu.losses, rtol=1e-3, atol=1e-4)
    assert torch.equal(on_gpu.logits.argmax(-1).cpu(), on_cpu.logits.argmax(-1))
