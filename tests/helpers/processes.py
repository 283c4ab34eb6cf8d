"""Real processes that communicate by gloo, forked from the test's so that none imports again."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tttlab.runtime.ranks import open_fabric


def start(function: Callable, folder: Path, *arguments: Any, ranks: int = 2) -> list[int]:
    """Call ``function(fabric, *arguments)`` on every rank, and return the exit codes.

    What the function returns is saved in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run, args=(function, folder, rank, ranks, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def on_ranks(function: Callable, folder: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """Call ``function(fabric, *arguments)`` on every rank, and return its result on each."""
    assert start(function, folder, *arguments, ranks=ranks) == [0] * ranks
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(ranks)]


def _run(function: Callable, folder: Path, rank: int, ranks: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    os.environ["LOCAL_RANK"] = str(rank)  # as Fabric's launcher sets it
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = function(open_fabric("cpu", "32", ranks), *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    torch.save(result, folder / f"{rank}.result")
    os._exit(0)
