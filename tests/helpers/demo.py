"""The demo as a process of its own, on small models and images that nobody trained."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.helpers import served
from tools.stage_code import ROOT
from tttlab.data.image_sets import ImageSet
from tttlab.serving import adaptive_model

WATCH = """
import socket

look = socket.getaddrinfo

def note(host, *arguments, **options):
    if host not in (None, "", "localhost", "127.0.0.1"):
        with open({log!r}, "a") as file:
            print(host, file=file)
    return look(host, *arguments, **options)

socket.getaddrinfo = note
"""  # every host that the process asks for is noted
MODELS = ("simclr_convnet", "mae_vit")  # as params.yaml calls its own


def project(root: Path) -> ImageSet:
    """Write what the demo reads into a folder; → the test images."""
    shutil.copy(ROOT / "params.yaml", root)
    outputs = root / "outputs"
    for name in MODELS:
        model, network = served.model(root / "networks" / name)
        adaptive_model.save(model, outputs / "served" / name, network)
    generator = np.random.default_rng(1)
    for name in ("test", "labeled_validation"):
        pixels = generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        names = tuple(f"{name}/{number}" for number in range(12))
        images = ImageSet(pixels, np.arange(12) % 4, names, tuple(served.CLASSES))
        images.save(outputs / "data" / name)
    return ImageSet.load(outputs / "data" / "test")


@contextmanager
def running(
    root: Path, port: int, end: signal.Signals = signal.SIGINT
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serve the demo of a folder; → its address, and the process, which a signal ends."""
    command = [sys.executable, "-m", "tttlab.workflow.cli", "demo", "--port", str(port)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In TMPDIR stands what it leaves behind, and Python imports sitecustomize when it starts.
    surroundings = {key: v for key, v in os.environ.items() if not key.startswith("NO_ALBUM")}
    paths = os.pathsep.join((str(root / "watch"), str(ROOT)))
    surroundings |= {"TMPDIR": str(root / "tmp"), "PYTHONPATH": paths}
    for name in ("tmp", "watch"):
        (root / name).mkdir(exist_ok=True)
    watch = WATCH.format(log=str(root / "asked"))
    (root / "watch" / "sitecustomize.py").write_text(watch, encoding="utf-8")
    with subprocess.Popen(command, cwd=root, env=surroundings, **options) as process:
        try:
            yield _address(process), process
        finally:
            process.send_signal(end)
            process.communicate(timeout=60)


def _address(process: subprocess.Popen) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            _wait_for(found[0])
            return found[0]
    raise AssertionError("".join(lines))


def _wait_for(address: str) -> None:
    """Wait until something answers there."""
    from urllib.error import URLError
    from urllib.request import urlopen

    for _ in range(600):
        try:
            urlopen(address).close()
            return
        except URLError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {address}")
