"""What images are adapted by: network, method, settings, source statistics and seed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tttlab.adaptation.method import Method
from tttlab.adaptation.predicting import CLASSES, Readout
from tttlab.adaptation.trainable import with_trainable
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.source_statistics import Statistics, available_statistics


@dataclass(frozen=True)
class Task:
    """What images are adapted by, the same for all of them.

    Attributes:
        network: the source network: a `Network`, or any module from images to logits.
        method: the test-time method.
        loop: settings of the steps.
        statistics: source statistics that the method and the normalisation policy need.
        seed: of all random streams.
        readout: what a prediction is.
    """

    network: nn.Module
    method: Method
    loop: InnerLoop = InnerLoop()
    statistics: Statistics = field(default_factory=dict)
    seed: int = 0
    readout: Readout = CLASSES

    def ready(self, device: torch.device) -> "Task":
        """Return the task for images on this device, its network callable like a `Network`.

        Raises:
            UserError: the network has no layer that the loop would train an update of.
        """
        statistics = {name: value.to(device) for name, value in self.statistics.items()}
        network = with_trainable(self.readout.network(self.network), self.loop, self.seed)
        return replace(self, network=network, statistics=statistics)


def complete_statistics(
    statistics: Statistics,
    method: Method,
    network: nn.Module,
    open_batches: Callable[[], Iterable[Tensor]],
) -> Statistics:
    """Add the source statistics that a method must measure itself, if it needs any.

    Args:
        statistics: the standard source statistics.
        method: the method.
        network: the source network.
        open_batches: opens the source images ``(N, 3, H, W)``; called only if a kind is missing.
    """
    missing = set(method.needs) - available_statistics(statistics)
    return statistics | (method.source_statistics(network, open_batches()) if missing else {})
