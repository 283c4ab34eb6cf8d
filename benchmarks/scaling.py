"""How cost grows with the number of images, views, steps and adapted parameters."""

from dataclasses import replace
from functools import partial

import torch

from benchmarks.amount import FULL, Amount
from benchmarks.cases import Case, resnet
from benchmarks.sides import ours, seconds
from tttlab.adaptation.trainable import select_parameters
from tttlab.methods.memo import MEMO
from tttlab.networks.network import Network
from tttlab.runtime.group_size import GroupSize

AT_ONCE = 128  # views
BASE = Case("base", resnet, MEMO(4), "norm", images=32, steps=4)
LATE = tuple(f"encoder.{part}" for part in ("conv1", "layer1", "layer2", "layer3", "layer4"))
SWEEPS: dict[str, list[Case]] = {
    "images": [
        replace(BASE, images=n, method=MEMO(1), steps=1) for n in (1, 4, 16, 64, 256, 1024, 4096)
    ],
    "views": [replace(BASE, method=MEMO(v)) for v in (1, 2, 4, 8, 16, 32)],
    "steps": [replace(BASE, steps=s) for s in (1, 2, 4, 8, 16, 32)],
    "parameters": [replace(BASE, trainable=LATE[start:]) for start in reversed(range(len(LATE)))],
}


def sweep(device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Measure all sweeps: rows of ``sweep``, ``value``, ``seconds`` (the median)."""
    torch.manual_seed(0)
    repeats = min(amount.repeats, 3)
    network = resnet(BASE.size).to(device)
    rows = []
    for name, cases in SWEEPS.items():
        for point in cases[: amount.points]:
            case = point.within(amount)
            images = torch.rand(case.images, 3, case.size, case.size, device=device)
            group = GroupSize(max(1, AT_ONCE // case.views))
            adapt = partial(ours, case, network, images, {}, group)
            times = sorted(seconds(adapt, device) for _ in range(repeats))
            row = {"sweep": name, "value": value(name, case, network)}
            rows.append(row | {"seconds": times[repeats // 2]})
    return rows


def value(sweep: str, case: Case, network: Network) -> float:
    """Give the value of the quantity that varies in a sweep; parameters in thousands."""
    if sweep == "parameters":
        parameters = select_parameters(network, case.trainable).values()
        return sum(parameter.numel() for parameter in parameters) / 1000
    return getattr(case, sweep)
