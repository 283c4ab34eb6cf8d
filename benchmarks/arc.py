"""Times test-time training on ARC's tasks beside a loop over tasks; counts operations of a size.

Speed: ``outputs/benchmarks_arc.json`` and printed rows. Operations: `benchmarks.arc_operations`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import arc_operations
from benchmarks.__main__ import machine, spread
from benchmarks.amount import FULL, SMOKE, Amount
from benchmarks.arc_sides import Case, make_case, one_by_one, ours
from benchmarks.sides import interleaved
from tttlab.arc.settings import Settings, read_settings
from tttlab.arc.solving import TOGETHER, Job, list_jobs
from tttlab.arc.tasks import ArcTask, load
from tttlab.errors import one_line
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.devices import choose_device
from tttlab.runtime.group_size import Groups
from tttlab.workflow.arc.preparing import fitting

STEPS = 16
EVERY = {"cpu": 5, "cuda": 1}  # which of the pipeline's jobs, in order of size, are measured
SIDES = {
    "ours": "ours",
    "whole": "loop, whole canvas",
    "left_out": "loop, tokens left out",
}


@one_line()
def main() -> None:
    """Measure speed, or count operations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arc", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("arc/params.yaml"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--operations", action="store_true", help="count, and time nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="next to nothing of all, into outputs/smoke"
    )
    arguments = parser.parse_args()
    settings = read_settings(arguments.params)
    folder = Path("outputs/smoke" if arguments.smoke else "outputs")
    amount = SMOKE if arguments.smoke else FULL
    if arguments.operations:
        write(arc_operations.report(settings, amount), folder / "operations_arc.json")
        return
    device = choose_device(arguments.device, settings.machine.precision, "--device")
    keep_freed_memory()  # as every stage of the pipeline does
    report: dict[str, Any] = {"machine": machine(device), "params": str(arguments.params)}
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    write(report | measure(settings, device, amount), folder / "benchmarks_arc.json")


def measure(settings: Settings, device: torch.device, amount: Amount = FULL) -> dict[str, Any]:
    """Time all sides in turn.

    Returns:
        the amount of work; ``rows``, for every side the medians; and the ratios to ours, within a
        repeat, with their range.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 0
    jobs = choose_jobs(settings, device, amount)
    tasks = [task for job in jobs for task in job.tasks]
    case = make_case(settings, jobs, min(STEPS, amount.steps), device)
    groups = Groups("auto", max(workers, 1))
    difference = settle(case.short, groups)
    sides = {
        "ours": partial(ours, case, groups, workers),
        "whole": partial(one_by_one, case, True),
        "left_out": partial(one_by_one, case, False),
    }
    times = interleaved(sides, amount.repeats, device)
    steps, pairs = case.loop.steps, case.pairs
    rows = []
    for side, values in times.items():
        seconds = statistics.median(values)
        per_task = seconds / len(tasks)
        rows.append(
            {
                "side": side,
                "seconds": seconds,
                "ms_per_task": per_task * 1e3,
                "ms_per_pair": per_task * 1e3 / steps / pairs,
            }
        )
    work = {"tasks": len(tasks), "steps": steps, "pairs": pairs, "workers": workers}
    found = {"rows": rows, "largest_loss_difference": difference}
    for side in ("whole", "left_out"):
        found |= spread(f"{side}_over_ours", times[side], times["ours"])
    found |= spread("whole_over_left_out", times["whole"], times["left_out"])
    print_rows(work, found)
    return work | found


def choose_jobs(settings: Settings, device: torch.device, amount: Amount = FULL) -> Sequence[Job]:
    """Choose jobs of evaluation tasks, of every size, that stand for all of them."""
    tasks = version_tasks(settings)[: amount.images]
    return list_jobs(tasks, TOGETHER[device.type])[:: EVERY[device.type]]


def version_tasks(settings: Settings) -> list[ArcTask]:
    """List all evaluation tasks of the settings' version that fit."""
    chosen = settings.tasks
    return list(fitting(load(chosen.evaluation, "evaluation"), chosen.largest).tasks)


def settle(case: Case, groups: Groups) -> float:
    """Let ``auto`` find its group sizes and warm all sides up.

    Returns:
        the largest difference between losses of ours and of both loops.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    mine = ours(case, groups, 0)
    torch.set_num_threads(threads)
    return max(
        (mine[name][:-1].double() - losses.double()).abs().max().item()
        for whole in (True, False)
        for name, losses in one_by_one(case, whole).items()
    )


def print_rows(work: dict[str, Any], found: dict[str, Any]) -> None:
    """Print times and ratios."""
    print(
        f"{work['tasks']} tasks, {work['steps']} steps of {work['pairs']} pairs; ours in "
        f"{work['workers'] or 1} processes; losses differ by {found['largest_loss_difference']:.0e}"
    )
    for row in found["rows"]:
        text = f"{row['ms_per_task']:9.1f} ms per task  {row['ms_per_pair']:7.3f} ms per pair"
        name = row["side"]
        if name != "ours":
            low, high = found[f"{name}_over_ours_range"]
            text += f"   {found[f'{name}_over_ours']:.2f} × ours ({low:.2f}–{high:.2f})"
        print(f"{SIDES[name]:24}{text}", flush=True)


def write(report: dict[str, Any], file: Path) -> None:
    """Write the numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
