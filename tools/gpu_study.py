"""Measures on a GPU what cannot be measured without one, piece by piece, in order of value.

Every piece is a process of its own, is stopped after five minutes, and leaves a JSON file in
`--out`. A piece whose file is there is not measured again: so a GPU that is lent for minutes is
enough, and called again the study goes on. With `--smoke` all pieces measure next to nothing, to
see that they work, also on a CPU. At the end the rows are printed that docs/speed.md waits for.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import __main__ as benchmarks
from benchmarks import scaling
from benchmarks.amount import FULL, SMOKE, Amount
from benchmarks.cases import list_cases
from benchmarks.sides import bandwidth
from tttlab.errors import one_line
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.devices import choose_device

LIMIT = 300  # seconds of a piece
TESTS = "tests/adaptation/test_gpu.py"
# Dear to miss first: bf16 at 224 pixels is what people adapt with.
PRECISIONS = ("bfloat16", "float32")


class Piece(NamedTuple):
    """One measurement.

    Attributes:
        kind: ``tests``, ``row`` or ``scaling``.
        case: of a row, the name of a case of `benchmarks.cases`.
        precision: of a row.
    """

    kind: str
    case: str = ""
    precision: str = ""

    @property
    def file(self) -> str:
        """Name the file of its result."""
        return "_".join(filter(None, self)).replace("/", "-") + ".json"


def list_pieces(device: torch.device) -> Iterator[Piece]:
    """List all pieces, the most valuable first."""
    yield Piece("tests")
    precisions = PRECISIONS if device.type == "cuda" else ("float32",)
    cases = sorted(list_cases(device), key=lambda case: -case.size)
    yield from (Piece("row", case.name, name) for name in precisions for case in cases)
    yield Piece("scaling")


def measure(piece: Piece, device: torch.device, amount: Amount) -> dict | list:
    """Measure one piece, in this process."""
    if piece.kind == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "--all", TESTS]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        return {"returncode": process.returncode, "output": process.stdout[-2000:]}
    keep_freed_memory()  # as every stage of the pipeline does
    if piece.kind == "scaling":
        return scaling.sweep(device, amount)
    (case,) = [case for case in list_cases(device) if case.name == piece.case]
    speed, precision = bandwidth(device), piece.precision
    row = benchmarks.measure(case.within(amount), device, speed, precision, amount.repeats)
    return row | {"machine": benchmarks.machine(device)}


def study(out: Path, device: torch.device, smoke: bool, minutes: float) -> None:
    """Measure every piece that is missing, each in a process of its own, until time is over."""
    ends = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(list_pieces(device)):
        if (out / piece.file).exists():
            continue
        if (left := ends - time.monotonic()) < 10:
            print("time is over; the same command goes on")
            return
        command = [sys.executable, "-m", "tools.gpu_study", "--piece", str(number)]
        command += ["--device", str(device), "--out", str(out), *(["--smoke"] if smoke else [])]
        began = time.monotonic()
        try:
            subprocess.run(command, timeout=min(LIMIT, left), check=True)
            print(f"{piece.file}: {time.monotonic() - began:.0f} s", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{piece.file}: stopped after {time.monotonic() - began:.0f} s", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{piece.file}: failed with exit code {error.returncode}", flush=True)


def show(out: Path) -> None:
    """Print every row that was measured, as `make bench` does, and what the tests said."""
    for file in sorted(out.glob("row_*.json")):
        print(benchmarks.line(json.loads(file.read_text(encoding="utf-8"))))
    tests = out / Piece("tests").file
    if tests.exists():
        print(json.loads(tests.read_text(encoding="utf-8"))["output"].strip().splitlines()[-1])


@one_line()
def main() -> None:
    """Run the study, or one piece of it."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_study"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop")
    parser.add_argument("--smoke", action="store_true", help="next to nothing of everything")
    parser.add_argument("--piece", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = choose_device(arguments.device, key="--device")
    if device.type == "cpu" and not arguments.smoke:
        parser.error("expected a GPU, found none; add --smoke to try the pieces on this CPU")
    if arguments.piece is None:
        study(arguments.out, device, arguments.smoke, arguments.minutes)
        show(arguments.out)
        return
    piece = list(list_pieces(device))[arguments.piece]
    result = measure(piece, device, SMOKE if arguments.smoke else FULL)
    partial = arguments.out / f"{piece.file}.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.rename(arguments.out / piece.file)


if __name__ == "__main__":
    main()
