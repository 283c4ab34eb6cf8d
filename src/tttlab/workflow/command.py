"""The command line of a stage: it reads the settings and reports a mistake in one line."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tttlab.config.params import read_params
from tttlab.errors import INTERRUPTED, one_line
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.compiler import postpone_compiler
from tttlab.runtime.garbage import collect_only_young
from tttlab.runtime.process_identity import find_driver
from tttlab.workflow import places
from tttlab.workflow.order import SHARES, position

# The number of this process among those that share the stage; torchrun, Fabric or srun sets it.
_RANKS = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
RANK = int(_RANKS[0]) if _RANKS else 0
# Seconds that other processes wait when they fail. The end of one process ends all, so the first
# one must have printed its message by then.
PATIENCE = 10.0


def not_copied(message: str) -> str:
    """Give a hint if a message names a module that only the copy for a queued experiment lacks."""
    names = [name.replace(".", "/") for name in re.findall(r"'([\w.]+)'", message)]
    for name in names:
        for folder in ("src/tttlab/methods", "src", ""):
            file = Path(folder, name).with_suffix(".py")
            if (places.ROOT / file).is_file() and not file.exists():
                return (
                    f"; {file} is not in the copy that an experiment gets, "
                    f"for git does not know it: git add {file}"
                )
    return ""


def as_told(message: str) -> str:
    """Say which process failed, when the first one has had its word, and what may be missing."""
    if RANK:
        time.sleep(PATIENCE)
    process = f"(process {RANK}) " if RANK else ""
    return f"{process}{message}{not_copied(message)}"


def main(
    run: Callable[..., None],
    description: str,
    *items: str,
    read: Callable[..., Any] = read_params,
    shares: Mapping[str, int] = SHARES,
) -> None:
    """Run one stage from the command line.

    Args:
        run: called as ``run(params)``, or ``run(params, <item>, …)`` if there are items.
        description: one line for ``--help``.
        items: positional arguments of the stage: ``model`` and ``seed``, by default the first
            seed of params.yaml; or ``runs`` or ``models``, any number of them, by default none,
            which the stage takes for all.
        read: reads params.yaml.
        shares: the pipeline's stages, in order, and their shares of its time.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {sys.modules['__main__'].__spec__.name}", description=description
    )
    for item in items:
        if item == "seed":
            text = "the training seed (default: the first of params.yaml)"
            parser.add_argument(item, type=int, nargs="?", help=text)
        elif item in ("runs", "models"):
            text = f"names of {item} in params.yaml (default: all)"
            parser.add_argument(item, nargs="*", help=text)
        else:
            parser.add_argument(item, help=f"the {item}'s name in params.yaml")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="settings (default: %(default)s)"
    )
    arguments = vars(parser.parse_args())
    stage = sys.modules["__main__"].__spec__.name.rpartition(".")[2]
    if not RANK and stage in shares and find_driver(psutil.Process()):
        print(position(stage, shares), flush=True)
    keep_freed_memory()
    collect_only_young()
    postpone_compiler()
    try:
        with one_line(as_told):
            params = read(arguments.pop("params"), base=places.ROOT)
            if "seed" in arguments and arguments["seed"] is None:
                arguments["seed"] = params.seeds[0]
            run(params, *arguments.values())
    except KeyboardInterrupt:
        if not RANK:
            print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
