"""A server under load: ``python -m benchmarks.serving --folder outputs/served/<model>``.

Clients on this machine ask over HTTP, each for one image at a time. Every answer is compared with
that to the same image asked for alone. Half of the images are as the source's, half have little
contrast, so that a gate has something to decide.
"""

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tabulate import tabulate

from benchmarks.amount import FULL, SMOKE, Amount
from tttlab.data.image_sets import ImageSet
from tttlab.errors import one_line

TOLERANCE = 1e-5  # of probabilities in float32: what is worked on together is rounded differently
SETTLED = 0.1  # share of the requests after which memory is to stay as it is
CONTRASTS = (1.0, 0.2)  # of every other image


@dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
        name: in words.
        clients: that ask at the same time.
        run: asked for; None: the best one.
        gate: False: adapt to every image.
        together: most images that the server adapts to at once.
    """

    name: str
    clients: int = 32
    run: str | None = None
    gate: bool = True
    together: int = 64


CASES = (
    Case("one client", clients=1),
    Case("32 clients, each image alone", together=1),
    Case("32 clients, batches"),
    Case("32 clients, batches, every image", gate=False),
    Case("32 clients, batches, run none", run="none"),
)


@one_line()
def main() -> None:
    """Measure all loads, print them and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="as outputs/served/<model>")
    parser.add_argument("--smoke", action="store_true", help="a few requests; into outputs/smoke")
    parser.add_argument("--only", default="", help="loads whose name contains this")
    arguments = parser.parse_args()
    amount = SMOKE if arguments.smoke else FULL
    bodies = make_images(arguments.folder, amount)
    cases, rows = [case for case in CASES if arguments.only in case.name], []
    for case in cases:
        rows.append(measure(case, arguments.folder, bodies, amount))
        print(line(rows[-1]), flush=True)
    folder = Path("outputs/smoke" if arguments.smoke else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=2) + "\n"
    (folder / "serving.json").write_text(text, encoding="utf-8")
    print(table(rows))


def make_images(folder: Path, amount: Amount) -> list[str]:
    """Make different images in base64: of the test images beside the model, or else its example."""
    data, random = folder.resolve().parents[1] / "data" / "test", np.random.default_rng(0)
    if data.is_dir():
        pixels = ImageSet.load(data).pixels[: amount.served_images]
    else:
        with Image.open(folder / "example.png") as example:
            pixels = np.asarray(example.convert("RGB"))[None]
    images = []
    for number in range(amount.served_images):
        image = pixels[number % len(pixels)]
        faded = 128 + CONTRASTS[number % 2] * (image.astype(float) - 128)
        # Some noise, for images that are all different.
        noisy = np.clip(faded + random.integers(-8, 9, image.shape), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, "PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    return images


@contextmanager
def server(folder: Path, together: int) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a model in a process of its own; → its port, and the process."""
    words = ("serve", "--folder", str(folder), "--together", str(together), "--no-record")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tttlab.workflow.cli", *words, "--port", "5400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        port = int(re.search(r":(\d+) ", process.stdout.readline())[1])
        for _ in range(600):
            time.sleep(0.1)
            try:
                ask(http.client.HTTPConnection("127.0.0.1", port), None, "/ping")
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("the server ended before it began") from None
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def ask(connection: http.client.HTTPConnection, body: str | None, path: str = "/invocations"):
    """Ask once; → the status and the text of the answer."""
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request("POST" if body else "GET", path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def measure(case: Case, folder: Path, images: list[str], amount: Amount) -> dict[str, Any]:
    """Measure one load; → a row with counts, times and memory."""
    params = {"run": case.run, "gate": case.gate}
    bodies = [json.dumps({"instances": [{"image": one}], "params": params}) for one in images]
    with server(folder, case.together) as (port, process):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        ask(connection, bodies[0])  # pays for warming up
        started = time.perf_counter()
        alone = [probabilities(*ask(connection, body)) for body in bodies]
        one_by_one = len(bodies) / (time.perf_counter() - started)
        answers, seconds, memory, took = load(case.clients, port, process, bodies, amount.requests)
    settled = memory[int(SETTLED * len(memory)) :]
    p50, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99)) * 1e3
    return asdict(case) | {
        "requests": amount.requests,
        "adapted": float(
            np.mean([bool(np.ptp(one.reshape(2, -1), axis=0).any()) for one in alone])
        ),
        **compare(answers, alone, amount.requests),
        "one_by_one_per_second": one_by_one,
        "images_per_second": amount.requests / took,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "memory_mb": settled[0] / 1e6,
        "memory_change": max(settled) / settled[0] - 1,
    }


def load(
    clients: int, port: int, process: psutil.Process, bodies: list[str], requests: int
) -> tuple[dict[int, np.ndarray | None], list[float], list[int], float]:
    """Send requests from several threads.

    Returns:
        by number of the request what came back (None: nothing of use); the seconds of each; the
        server's memory in bytes after each; and the seconds of all.
    """
    numbers, lock = count(), threading.Lock()
    answers: dict[int, np.ndarray | None] = {}
    seconds, memory = [], []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while (number := next(numbers)) < requests:
            started = time.perf_counter()
            try:
                found = probabilities(*ask(connection, bodies[number % len(bodies)]))
            except (OSError, http.client.HTTPException):
                found, connection = None, http.client.HTTPConnection("127.0.0.1", port)
            with lock:
                answers[number] = found
                seconds.append(time.perf_counter() - started)
                memory.append(process.memory_info().rss)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, seconds, memory, time.perf_counter() - started


def probabilities(status: int, content: bytes) -> np.ndarray | None:
    """Give the probabilities without and with adaptation of one image; None: there are none."""
    if status != 200:
        return None
    (row,) = json.loads(content)["predictions"]
    return np.array([*row["source_probabilities"].values(), *row["probabilities"].values()], float)


def compare(
    answers: dict[int, np.ndarray | None], alone: list[np.ndarray], requests: int
) -> dict[str, Any]:
    """Compare answers with those to the same images alone; request n was for image n modulo N."""
    differences = [
        float(np.abs(found - alone[number % len(alone)]).max())
        for number, found in answers.items()
        if found is not None
    ]
    return {
        "lost": requests - len(differences),
        "mixed_up": sum(difference > TOLERANCE for difference in differences),
        "largest_difference": max(differences, default=float("nan")),
        "closest_images": closest(alone),
    }


def closest(answers: list[np.ndarray]) -> float:
    """Give the smallest difference between two images' answers: a mix-up changes so much."""
    table = np.stack(answers)
    apart = [
        np.abs(table[:number] - one).max(1).min() for number, one in enumerate(table) if number
    ]
    return float(min(apart))


def line(row: dict[str, Any]) -> str:
    """Say in one line what a load gave."""
    return (
        f"{row['name']:32}{row['images_per_second']:7.1f} images/s, lost {row['lost']}, "
        f"mixed up {row['mixed_up']} (within {row['largest_difference']:.0e}; the closest images "
        f"differ by {row['closest_images']:.0e}), memory {row['memory_change']:+.1%}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Write the table of docs/serving.md."""
    shown = [
        {
            "load": row["name"],
            "one by one, images/s": f"{row['one_by_one_per_second']:.0f}",
            "images/s": f"{row['images_per_second']:.0f}",
            "p50": f"{row['p50_ms']:.0f} ms",
            "p95": f"{row['p95_ms']:.0f} ms",
            "p99": f"{row['p99_ms']:.0f} ms",
            "adapted": f"{row['adapted']:.0%}",
            "lost": row["lost"],
            "mixed up": row["mixed_up"],
            "memory": f"{row['memory_mb']:.0f} MB, {row['memory_change']:+.1%}",
        }
        for row in rows
    ]
    return tabulate(shown, headers="keys", tablefmt="github")


if __name__ == "__main__":
    main()
