"""How a stage is started: its settings are read, and a mistake is told in one line."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.compiler import postpone_compiler
from tttlab.workflow import places

# The number of this process among those that share the stage, as torchrun, Fabric or srun tells it.
RANK = next(
    (
        int(os.environ[name])
        for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")
        if name in os.environ
    ),
    0,
)
PATIENCE = (
    10.0  # seconds; a process that fails lets the first one speak, whose end is then the end of all
)


def not_copied(message: str) -> str:
    """Say of a module that a message names that the project has it and the copy that a queued experiment runs in has not."""
    names = [name.replace(".", "/") for name in re.findall(r"'([\w.]+)'", message)]
    files = [
        Path(folder, name).with_suffix(".py")
        for name in names
        for folder in ("src/tttlab/methods", "src", "")
    ]
    left = next(
        (file for file in files if (places.ROOT / file).is_file() and not file.exists()), None
    )
    return (
        f"; {left} is not in the copy that an experiment gets, for git does not know it: git add {left}"
        if left
        else ""
    )


def main(run: Callable[..., None], description: str, *items: str) -> None:
    """Run one stage from the command line.

    Args:
        run: called as ``run(params)``, or ``run(params, <item>, …)`` for a stage that is about such items.
        description: one line for ``--help``.
        items: what the stage is about, read as positional arguments: a ``model`` and a ``seed``, by
            default the first one of params.yaml; or some of its ``runs`` or ``models``, by default
            all, which the stage is then given as an empty list.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {sys.modules['__main__'].__spec__.name}", description=description
    )
    for item in items:
        if item == "seed":
            words = "the training seed (default: the first of params.yaml)"
            parser.add_argument(item, type=int, nargs="?", help=words)
        elif item in ("runs", "models"):
            words = f"names of {item} in params.yaml (default: all)"
            parser.add_argument(item, nargs="*", help=words)
        else:
            parser.add_argument(item, help=f"the {item}'s name in params.yaml")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="settings (default: %(default)s)"
    )
    arguments = vars(parser.parse_args())
    keep_freed_memory()
    postpone_compiler()
    try:
        params = read_params(arguments.pop("params"), base=places.ROOT)
        if "seed" in arguments and arguments["seed"] is None:
            arguments["seed"] = params.seeds[0]
        run(params, *arguments.values())
    except UserError as error:
        if RANK:
            time.sleep(PATIENCE)
        print(
            f"error: {f'(process {RANK}) ' if RANK else ''}{error}{not_copied(str(error))}",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if not RANK:
            print("interrupted; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)
