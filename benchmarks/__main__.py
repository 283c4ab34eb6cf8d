"""Ours, the floor and the peers' way, side by side: ``outputs/benchmarks.json``, a figure, and a table on the screen."""

import argparse
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks import data, memory, scaling, torch_ttt_engines
from benchmarks.amount import FULL, SMOKE, Amount
from benchmarks.cases import Case, list_cases, statistics_for
from benchmarks.figure import draw
from benchmarks.sides import bandwidth, floor, interleaved, ours, peer, state_bytes
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.group_size import GroupSize

TRAFFIC = 6  # times that a step moves an image's weights or gradients: forward, backward, written; read, read, written by SGD
COLUMNS = ["ours_seconds", "floor_seconds", "peer_seconds", "ours_over_floor", "peer_over_ours"]


def main() -> None:
    """Run all benchmarks that the device bears."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", default="", help="measure the rows whose name contains this, and write nothing"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="next to nothing of all, to see that it works; into outputs/smoke",
    )
    arguments = parser.parse_args()
    amount = SMOKE if arguments.smoke else FULL
    device, began = torch.device(arguments.device), time.perf_counter()
    keep_freed_memory()  # for all sides alike, as every stage of the pipeline does
    report = {
        "machine": machine(device),
        "rows": [],
        "memory": [],
        "torch_ttt": [],
        "scaling": [],
        "data": [],
    }
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    speed = bandwidth(device)
    for precision in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        for case in list_cases(device):
            if arguments.only in case.name:
                report["rows"].append(
                    measure(case.within(amount), device, speed, precision, amount.repeats)
                )
                print(line(report["rows"][-1]), flush=True)
    if not arguments.only:
        report["memory"] = measure_memory(device, report["rows"])
        report["torch_ttt"] = measure_torch_ttt(device, amount)
        report["scaling"] = scaling.sweep(device, amount)
        report["data"] = data.profile(device, min(os.cpu_count() or 1, 16), amount)
        report["machine"]["benchmark_seconds"] = round(time.perf_counter() - began)
        write(report, Path("outputs/smoke" if arguments.smoke else "outputs"))


def measure(
    case: Case, device: torch.device, speed: float, precision: str, repeats: int = FULL.repeats
) -> dict:
    """Measure one row; ratios are taken within a repeat, and their median and range over the repeats."""
    torch.manual_seed(0)  # for every row anew: it is the same whichever others are measured
    network = case.build(case.size).to(device)
    images = torch.rand(case.images, 3, case.size, case.size, device=device)
    source = statistics_for(network, case.size)
    group = GroupSize("auto")
    some = images[: case.peer_images]
    sides = {
        "ours": lambda: ours(case, network, images, source, group),
        "floor": lambda: floor(case, network, images),
        "peer": lambda: peer(case, network, some, source),
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        settle(case, network, images, source, group)
        logits = sides["ours"]()
        difference = (
            (logits[: len(some)] - peer(case, network, some, source).cpu()).abs().max().item()
        )
        sides["floor"]()
        times = interleaved(sides, repeats, device)
    traffic = case.images * state_bytes(case, network) * TRAFFIC * case.steps / speed
    times["peer"] = [value * case.images / len(some) for value in times["peer"]]
    floors = [max(value, traffic) for value in times["floor"]]
    row = {
        "name": case.name,
        "device": device.type,
        "precision": precision,
        "images": case.images,
        "views": case.views,
        "steps": case.steps,
        "images_per_step": group.size,
    }
    row |= {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    row |= {
        "floor_arithmetic_seconds": row["floor_seconds"],
        "floor_memory_seconds": traffic,
        "floor_seconds": max(row["floor_seconds"], traffic),
    }
    row |= spread("ours_over_floor", times["ours"], floors) | spread(
        "peer_over_ours", times["peer"], times["ours"]
    )
    return row | {"largest_logit_difference": difference}


def settle(case: Case, network, images: torch.Tensor, source: dict, group: GroupSize) -> None:
    """Let `auto` find its size, as it has in a sweep after the first images."""
    while group.growing:
        size = group.size
        ours(case.short, network, images, source, group)
        if size == group.size > len(images) // 2:
            return  # larger groups than there are images cannot be tried


def spread(name: str, above: list[float], below: list[float]) -> dict:
    """Give the median and the range of the ratios, repeat by repeat."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: statistics.median(ratios), f"{name}_range": [min(ratios), max(ratios)]}


def measure_memory(device: torch.device, rows: list[dict]) -> list[dict]:
    """Measure the peak of the rows with eight views, at the group size that they settled on."""
    found, cases = [], {case.name: case for case in list_cases(device)}
    for row in rows:
        if "views8" in row["name"] and row["precision"] == "float32":
            group = min(row["images_per_step"], row["images"])
            found.append(
                {"name": row["name"], "group": group}
                | memory.measure(cases[row["name"]].short, device, group)
            )
    for row in found:
        print(
            f"memory {row['name']:22}{row['group']:4} at once: peak {row['peak_mb']:6.1f} MiB, must hold "
            f"{row['model_mb']:6.1f}, ratio {row['ratio']:.2f}; shared weights {row['ordinary_mb']:6.1f}"
        )
    return found


def measure_torch_ttt(device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Measure torch-ttt's engines on single images, where they run, next to ours with one view and all parameters."""
    if not torch_ttt_engines.available():
        print("torch-ttt is not installed: left out (make bench installs it)")
        return []
    cases = [
        case.within(amount)
        for case in list_cases(torch.device("cpu"))
        if case.name.endswith("views1/all")
    ]
    found = [row for case in cases for row in engines(case, device, amount)]
    for row in found:
        times = f"{row.get('theirs_ms_per_image', 0):6.1f} ms per image, {row.get('theirs_over_ours', 0):.1f} × ours"
        print(f"torch-ttt {row['network']:8}{row['engine']:11}{row.get('why_not', times)}")
    return found


def engines(case: Case, device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Time every engine of torch-ttt that runs on one image."""
    network, images = (
        case.build(case.size).to(device),
        torch.rand(case.images, 3, case.size, case.size, device=device),
    )
    group = GroupSize("auto")
    settle(case, network, images, {}, group)
    found, some = [], images[: case.peer_images]
    built = torch_ttt_engines.engines(
        network, case.size, [(images,)], steps=case.steps, head_steps=amount.head_steps
    )
    for name, engine in built.items():
        row = {"network": case.build.__name__, "engine": name}
        if isinstance(engine, str):
            found.append(row | {"why_not": engine})
            continue
        sides = {
            "theirs": partial(torch_ttt_engines.run, network, some, engine),
            "ours": partial(ours, case, network, images, {}, group),
        }
        times = interleaved(sides, min(amount.repeats, 3), device)
        theirs = statistics.median(times["theirs"]) / len(some) * 1e3
        mine = statistics.median(times["ours"]) / len(images) * 1e3
        found.append(
            row
            | {
                "theirs_ms_per_image": theirs,
                "ours_ms_per_image": mine,
                "theirs_over_ours": theirs / mine,
            }
        )
    return found


def machine(device: torch.device) -> dict:
    """Describe what the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Name the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def line(row: dict) -> str:
    """Format a row for the screen."""
    own, floor, arithmetic, traffic, peers = (
        row[f"{side}_seconds"] * 1e3 / row["images"]
        for side in ("ours", "floor", "floor_arithmetic", "floor_memory", "peer")
    )
    return (
        f"{row['name']:26}{row['precision']:9}{row['images_per_step']:4} at once  ours {own:6.1f}  floor {floor:6.1f} ("
        f"arithmetic {arithmetic:.1f}, memory {traffic:.1f})  copies {peers:6.1f} ms per image   "
        f"ours ÷ floor {row['ours_over_floor']:.2f}   copies ÷ ours {row['peer_over_ours']:.2f}"
    )


def write(report: dict, folder: Path) -> None:
    """Write the numbers, and a figure of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figure = draw(pd.DataFrame(report["rows"]), pd.DataFrame(report["scaling"]), report["machine"])
    figure.savefig(folder / "benchmarks.png", dpi=130)
    print(f"{folder}/benchmarks.json, {report['machine']['benchmark_seconds']} s in all")


if __name__ == "__main__":
    main()
