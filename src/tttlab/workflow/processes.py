"""The processes that share one stage.

torchrun or SLURM's srun has started them, or the stage starts one per device of this machine.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tttlab.config.params import Params
from tttlab.errors import UserError
from tttlab.runtime import ranks
from tttlab.runtime.devices import choose_device, count_gpus
from tttlab.runtime.machine import Machine
from tttlab.runtime.resuming import Work
from tttlab.workflow.leftovers import find_work

if TYPE_CHECKING:
    from tttlab.runtime.ranks import Processes


def open_fabric(params: Params, on_cpu: int = 1) -> "Processes":
    """Connect to the other processes of this stage, or start them, as ``machine`` says.

    Args:
        params: of the stage.
        on_cpu: processes on a CPU where ``machine.devices`` is auto.
    """
    devices, nodes = started(os.environ) or (params.machine.devices, 1)
    device = choose_device(params.machine.device, params.machine.precision)
    if devices == "auto" and device.type == "cpu":
        devices = on_cpu
    return ranks.open_fabric(params.machine.device, params.machine.precision, devices, nodes)


def fits_one_process(params: Params) -> bool:
    """Tell whether one process on a CPU does all the work of a stage that trains."""
    device = choose_device(params.machine.device, params.machine.precision)
    alone = params.machine.devices in ("auto", 1) and not started(os.environ)
    return alone and device.type == "cpu"


def check_processes(params: Params) -> None:
    """Refuse several processes where a training needs a single one, before any work.

    Raises:
        UserError: the settings, or a launcher, ask for several.
    """
    meta = [name for name, model in params.models.items() if model.finetune.mode == "meta"]
    if not meta:
        return
    devices, machines = started(os.environ) or (params.machine.devices, 1)
    if devices == "auto":
        device = choose_device(params.machine.device, params.machine.precision)
        devices = count_gpus() if device.type == "cuda" else 1
    if devices * machines > 1:
        raise UserError(
            f"machine.devices: meta-learned fine-tuning (models.{meta[0]}) runs in one process, "
            f"found {devices * machines}; set machine.devices: 1, or leave these models out"
        )


def open_processes(params: Params) -> "Processes":
    """Do the same for a stage that does not train."""
    devices, nodes = started(os.environ) or (params.machine.devices, 1)
    return ranks.open_processes(params.machine.device, params.machine.precision, devices, nodes)


def started(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Read from the environment how a launcher started this stage.

    Fabric recognises the same launchers, in the same order, but does not know these two numbers.

    Returns:
        processes per machine, and machines; None if no launcher started the stage.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        per_machine = int(environment["LOCAL_WORLD_SIZE"])
        return per_machine, int(environment["WORLD_SIZE"]) // per_machine
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environment and not interactive:
        per_machine = int(environment.get("SLURM_NTASKS_PER_NODE", 1))
        return per_machine, int(environment.get("SLURM_NNODES", 1))
    return None


def machine_of(params: Params, fabric: "Processes") -> Machine:
    """Describe where this process computes its part of a stage that does not train."""
    per_machine, _ = started(os.environ) or (fabric.world_size, 1)
    return Machine(
        device=fabric.device,
        workers=params.machine.workers if fabric.device.type == "cpu" else 0,
        images_per_step=params.machine.images_per_step,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
        neighbours=per_machine,
        barrier=fabric.barrier,
    )


@contextmanager
def open_shared(fabric: "Processes", title: str, key: str) -> Iterator[Work]:
    """Open unfinished work for all processes; the first one locks it and deletes it at the end.

    Args:
        fabric: the processes.
        title: what the work is, for people.
        key: hash of what its result depends on, the same on all processes.
    """
    with find_work(key, title, owner=fabric.is_global_zero) as work:
        fabric.barrier()  # nobody reads before the lock is taken
        yield work
        fabric.barrier()  # nor after the folder is deleted
