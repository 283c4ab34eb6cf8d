"""Times ours, the floor and the peers' way: ``outputs/benchmarks.json``, a figure, printed rows."""

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
from tttlab.errors import one_line
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.devices import choose_device
from tttlab.runtime.group_size import GroupSize

# How often a step moves an image's weights or gradients: weights read in the forward and in the
# backward pass, gradients written; then by SGD both read and the weights written.
TRAFFIC = 6


@one_line()
def main() -> None:
    """Run all benchmarks of the device."""
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
    device, began = choose_device(arguments.device, key="--device"), time.perf_counter()
    keep_freed_memory()  # as every stage of the pipeline does
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
                row = measure(case.within(amount), device, speed, precision, amount.repeats)
                report["rows"].append(row)
                print(line(row), flush=True)
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
    """Measure one row.

    Ratios are taken within a repeat; the row has their median and range over the repeats.
    """
    torch.manual_seed(0)  # so that a row does not depend on the rows measured before it
    network = case.build(case.size).to(device)
    images = torch.rand(case.images, 3, case.size, case.size, device=device)
    source = statistics_for(network, case.size)
    group = GroupSize("auto")
    peer_images = images[: case.peer_images]
    sides = {
        "ours": lambda: ours(case, network, images, source, group),
        "floor": lambda: floor(case, network, images),
        "peer": lambda: peer(case, network, peer_images, source),
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        settle(case, network, images, source, group)
        logits = sides["ours"]()[: len(peer_images)]
        difference = (logits - sides["peer"]().cpu()).abs().max().item()
        sides["floor"]()
        times = interleaved(sides, repeats, device)
    traffic = case.images * state_bytes(case, network) * TRAFFIC * case.steps / speed
    times["peer"] = [value * case.images / len(peer_images) for value in times["peer"]]
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
    row |= spread("ours_over_floor", times["ours"], floors)
    row |= spread("peer_over_ours", times["peer"], times["ours"])
    return row | {"largest_logit_difference": difference}


def settle(case: Case, network, images: torch.Tensor, source: dict, group: GroupSize) -> None:
    """Let ``auto`` find its size, as in a sweep after the first images."""
    while group.growing:
        size = group.size
        ours(case.short, network, images, source, group)
        if size == group.size > len(images) // 2:
            return  # there are too few images to try larger groups


def spread(name: str, above: list[float], below: list[float]) -> dict:
    """Give the median and the range of the ratios, repeat by repeat."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: statistics.median(ratios), f"{name}_range": [min(ratios), max(ratios)]}


def measure_memory(device: torch.device, rows: list[dict]) -> list[dict]:
    """Measure the peak of the rows with eight views, at the group size that they settled on."""
    peaks, cases = [], {case.name: case for case in list_cases(device)}
    for row in rows:
        if "views8" in row["name"] and row["precision"] == "float32":
            group = min(row["images_per_step"], row["images"])
            peak = memory.measure(cases[row["name"]].short, device, group)
            peaks.append({"name": row["name"], "group": group} | peak)
    for row in peaks:
        print(
            f"memory {row['name']:22}{row['group']:4} at once: peak {row['peak_mb']:6.1f} MiB, "
            f"must hold {row['model_mb']:6.1f}, ratio {row['ratio']:.2f}; "
            f"shared weights {row['ordinary_mb']:6.1f}"
        )
    return peaks


def measure_torch_ttt(device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Measure torch-ttt's engines beside ours with one view and all parameters."""
    if not torch_ttt_engines.available():
        print("torch-ttt is not installed: left out (make bench installs it)")
        return []
    cases = [
        case.within(amount)
        for case in list_cases(torch.device("cpu"))
        if case.name.endswith("views1/all")
    ]
    rows = [row for case in cases for row in engines(case, device, amount)]
    for row in rows:
        if "why_not" in row:
            text = row["why_not"]
        else:
            milliseconds, ratio = row["theirs_ms_per_image"], row["theirs_over_ours"]
            text = f"{milliseconds:6.1f} ms per image, {ratio:.1f} × ours"
        print(f"torch-ttt {row['network']:8}{row['engine']:11}{text}")
    return rows


def engines(case: Case, device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Time every engine of torch-ttt that runs on one image, and give the reason of the others."""
    network = case.build(case.size).to(device)
    images = torch.rand(case.images, 3, case.size, case.size, device=device)
    group = GroupSize("auto")
    settle(case, network, images, {}, group)
    rows, peer_images = [], images[: case.peer_images]
    built = torch_ttt_engines.engines(
        network, case.size, [(images,)], steps=case.steps, head_steps=amount.head_steps
    )
    for name, engine in built.items():
        row = {"network": case.build.__name__, "engine": name}
        rows.append(row)
        if isinstance(engine, str):
            row["why_not"] = engine
            continue
        sides = {
            "theirs": partial(torch_ttt_engines.run, network, peer_images, engine),
            "ours": partial(ours, case, network, images, {}, group),
        }
        times = interleaved(sides, min(amount.repeats, 3), device)
        row["theirs_ms_per_image"] = statistics.median(times["theirs"]) / len(peer_images) * 1e3
        row["ours_ms_per_image"] = statistics.median(times["ours"]) / len(images) * 1e3
        row["theirs_over_ours"] = row["theirs_ms_per_image"] / row["ours_ms_per_image"]
    return rows


def machine(device: torch.device) -> dict:
    """Describe the machine that the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Name the CPU, or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def line(row: dict) -> str:
    """Format a row for the screen."""
    sides = ("ours", "floor", "floor_arithmetic", "floor_memory", "peer")
    times = {side: row[f"{side}_seconds"] * 1e3 / row["images"] for side in sides}
    return (
        f"{row['name']:26}{row['precision']:9}{row['images_per_step']:4} at once  "
        f"ours {times['ours']:6.1f}  floor {times['floor']:6.1f} ("
        f"arithmetic {times['floor_arithmetic']:.1f}, memory {times['floor_memory']:.1f})  "
        f"copies {times['peer']:6.1f} ms per image   "
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
