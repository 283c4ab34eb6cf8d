"""Several processes (ranks) that share one stage: how they start, how they end, how they divide a batch.

The engine is Lightning Fabric. It recognises processes that torchrun or SLURM started, and else starts one per device itself.
"""

import logging
import os
import threading
import warnings
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from tttlab.errors import UserError
from tttlab.runtime.devices import choose_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# A rank may wait long for another: while the first one measures, or for the last block of a sweep. Of ranks that die the
# launcher hears at once.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Share:
    """One rank's part of a whole batch: consecutive images, on no rank more than one fewer than on another.

    Attributes:
        whole: N, images of the batch on all ranks together.
        rank: number of this process.
        ranks: how many there are.
    """

    whole: int
    rank: int = 0
    ranks: int = 1

    @property
    def sizes(self) -> list[int]:
        """Images on every rank."""
        return [
            self.whole // self.ranks + (rank < self.whole % self.ranks)
            for rank in range(self.ranks)
        ]

    @property
    def own(self) -> slice:
        """Where in the whole batch this rank's images are."""
        ends = list(accumulate(self.sizes, initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    @property
    def weight(self) -> float:
        """Factor of a mean over this rank's images in the mean over ranks, which is then the mean over all images."""
        return self.sizes[self.rank] * self.ranks / self.whole


@dataclass(frozen=True)
class Alone:
    """A single process, for work that trains nothing: what Fabric would say, without importing it.

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


def open_processes(
    device: str = "auto",
    precision: str = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
) -> "Alone | Fabric":
    """Start or meet the processes that share work without training, in which there is nothing to synchronise.

    Args:
        device: as for `open_fabric`, and so are the others.
        precision: ``32`` forbids TF32; the work itself is in float32 whatever it says.
        devices: processes on this machine.
        nodes: machines.
    """
    chosen = choose_device(device, precision)
    return (
        Alone(chosen)
        if _count(chosen, devices) * nodes == 1
        else open_fabric(device, precision, devices, nodes)
    )


def open_fabric(
    device: str = "auto",
    precision: str = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
) -> "Fabric":
    """Choose where and how precisely to compute, and start the other processes or meet them.

    Args:
        device: ``auto`` (GPUs if there are any), ``cpu``, ``cuda`` or ``cuda:<number>``.
        precision: ``32``, ``bf16`` (mixed), or ``auto``: bf16 on a GPU that has it.
        devices: processes on this machine; ``auto``: one per GPU, or one on the CPU.
        nodes: machines, each with as many processes.

    Raises:
        UserError: the devices are not there.
    """
    from lightning_fabric import (
        Fabric,
    )  # here, for its import takes a second that not every user of this module needs
    from lightning_fabric.plugins.environments import LightningEnvironment

    chosen = choose_device(device, precision)
    here = _count(chosen, devices)
    mixed = precision == "bf16" or (
        precision == "auto" and chosen.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on devices that were not asked for
        fabric = Fabric(
            accelerator=chosen.type,
            devices=here if chosen.index is None else [chosen.index],
            num_nodes=nodes,
            precision="bf16-mixed" if mixed else "32-true",
            strategy=_replicas() if here * nodes > 1 else "auto",
        )
        fabric.launch()
    if fabric.local_rank and isinstance(fabric.strategy.cluster_environment, LightningEnvironment):
        # Fabric's launcher watches the processes that it starts, but they do not watch it.
        threading.Thread(
            target=_end_with, args=(psutil.Process(os.getppid()),), daemon=True
        ).start()
    return fabric


def _end_with(process: psutil.Process) -> None:
    process.wait()
    os._exit(1)


def _replicas() -> Any:
    """Choose Fabric's strategy for several processes: the network on each, gradients averaged."""
    from lightning_fabric.strategies import DDPStrategy

    class Replicas(DDPStrategy):
        def setup_module(self, module: torch.nn.Module) -> Any:
            """Give all ranks the first one's parameters and buffers, now and not before every forward pass again.

            Nothing reads BatchNorm's buffers in training, and between the two passes of joint training they are not to be
            written: autograd may have kept them.
            """
            warnings.filterwarnings(
                "ignore", "Grad strides do not match"
            )  # of 1×1 kernels, for which both are the same
            wrapped = super().setup_module(module)
            wrapped.broadcast_buffers = False
            return wrapped

    # A task uses the same parameters in every step, some of them never (MAE has no use for a network's last norm) and some
    # in two forward passes: static_graph takes both.
    return Replicas(static_graph=True, timeout=_PATIENCE)


def _count(device: torch.device, devices: int | Literal["auto"]) -> int:
    """Find the number of processes on this machine."""
    there = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if devices == "auto":
        return there
    if device.type == "cuda" and devices > there:
        raise UserError(
            f"machine.devices: expected at most {there} processes, one for each GPU of machine.device "
            f"{str(device)!r}, found {devices}; lower it or set auto"
        )
    return devices
