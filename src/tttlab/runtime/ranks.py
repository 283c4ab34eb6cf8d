"""Several processes (ranks) that share one stage: how they start, end and divide a batch.

The engine is Lightning Fabric. It recognises processes that torchrun or SLURM started; otherwise it
starts one per device itself. A single process on a CPU does without it, for its import takes two
seconds.
"""

import logging
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from tttlab.errors import UserError
from tttlab.runtime.devices import choose_device

if TYPE_CHECKING:
    import psutil
    from lightning_fabric import Fabric

    Processes: TypeAlias = "Alone | Fabric"

# A rank may wait long for another: while the first one measures, or for the last block of a sweep.
# If a rank dies, the launcher notices at once.
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Share:
    """One rank's part of a batch: consecutive images; the parts differ by at most one image.

    Attributes:
        whole: N, images of the batch on all ranks together.
        rank: number of this process.
        ranks: number of processes.
    """

    whole: int
    rank: int = 0
    ranks: int = 1

    @property
    def sizes(self) -> list[int]:
        """Images on every rank."""
        least, remainder = divmod(self.whole, self.ranks)
        return [least + (rank < remainder) for rank in range(self.ranks)]

    @property
    def own(self) -> slice:
        """Positions of this rank's images in the batch."""
        ends = list(accumulate(self.sizes, initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    @property
    def weight(self) -> float:
        """Weight of this rank's mean: the mean over ranks is then the mean over all images."""
        return self.sizes[self.rank] * self.ranks / self.whole


@dataclass(frozen=True)
class Alone:
    """A single process in float32, with the part of Fabric's interface that this project needs.

    Fabric itself is not imported.

    Attributes:
        device: where to compute.
    """

    device: torch.device
    global_rank: int = 0
    world_size: int = 1
    is_global_zero: bool = True

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Wait for nobody."""

    def all_reduce(self, value: torch.Tensor, reduce_op: str = "mean") -> torch.Tensor:
        """Return the value: it is its own mean and sum."""
        return value

    def setup(
        self, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return both, for there is nothing to share or to cast."""
        return network, optimizer

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move the tensors of a batch to the device."""
        return {name: values.to(self.device) for name, values in batch.items()}

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of its parameters."""
        loss.backward()

    def clip_gradients(
        self, network: nn.Module, _optimizer: torch.optim.Optimizer, max_norm: float
    ) -> None:
        """Shorten the gradient of all parameters together, if it is longer than ``max_norm``."""
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)


def open_processes(
    device: str = "auto",
    precision: str = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
) -> "Processes":
    """Start or join the processes that share work without training; they synchronise nothing.

    Args:
        device: as for `open_fabric`.
        precision: ``32`` forbids TF32; the work is in float32 in any case.
        devices: as for `open_fabric`.
        nodes: as for `open_fabric`.

    Raises:
        UserError: the devices are not there.
    """
    torch_device = choose_device(device, precision)
    if _count(torch_device, devices) * nodes == 1:
        return Alone(torch_device)
    return open_fabric(device, precision, devices, nodes)


def open_fabric(
    device: str = "auto",
    precision: str = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
) -> "Processes":
    """Choose device and precision, and start or join the other processes.

    Args:
        device: ``auto`` (GPUs if there are any), ``cpu``, ``cuda`` or ``cuda:<number>``.
        precision: ``32``, ``bf16`` (mixed), or ``auto``: bf16 on a GPU that has it.
        devices: processes on this machine; ``auto``: one per GPU, or one on the CPU.
        nodes: number of machines, each with as many processes.

    Raises:
        UserError: the devices are not there.
    """
    torch_device = choose_device(device, precision)
    count = _count(torch_device, devices)
    mixed = precision == "bf16" or (
        precision == "auto" and torch_device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    if torch_device.type == "cpu" and count * nodes == 1 and not mixed:
        return Alone(torch_device)
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on devices that were not asked for
        fabric = Fabric(
            accelerator=torch_device.type,
            devices=count if torch_device.index is None else [torch_device.index],
            num_nodes=nodes,
            precision="bf16-mixed" if mixed else "32-true",
            strategy=_replicas() if count * nodes > 1 else "auto",
        )
        fabric.launch()
    if fabric.local_rank and isinstance(fabric.strategy.cluster_environment, LightningEnvironment):
        # Fabric's launcher watches the processes that it starts, but they do not watch it.
        import psutil

        launcher = psutil.Process(os.getppid())
        threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    return fabric


def _end_with(process: "psutil.Process") -> None:
    process.wait()
    os._exit(1)


def _replicas() -> Any:
    """Choose Fabric's strategy for several processes: the network on each, gradients averaged."""
    from lightning_fabric.strategies import DDPStrategy

    class Replicas(DDPStrategy):
        def setup_module(self, module: torch.nn.Module) -> Any:
            """Give all ranks the first one's parameters and buffers, once and not at every pass.

            Nothing reads BatchNorm's buffers in training. Between the two passes of joint training
            they must not be written, because autograd may have kept them.
            """
            # It is about 1×1 kernels, for which both layouts are the same.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            wrapped = super().setup_module(module)
            wrapped.broadcast_buffers = False
            return wrapped

    # A task uses the same parameters in every step. Some are never used (MAE does not need a
    # network's last norm), some in two forward passes: static_graph allows both.
    return Replicas(static_graph=True, timeout=_TIMEOUT)


def _count(device: torch.device, devices: int | Literal["auto"]) -> int:
    """Find the number of processes on this machine."""
    available = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if devices == "auto":
        return available
    if device.type == "cuda" and devices > available:
        raise UserError(
            f"machine.devices: expected at most {available} processes, "
            f"one for each GPU of machine.device {str(device)!r}, "
            f"found {devices}; lower it or set auto"
        )
    return devices
