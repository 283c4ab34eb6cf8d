"""The environment of every test: no update checks over the network, and few idle threads."""

import gc
import os
import sys
from pathlib import Path

import pytest

from tttlab.runtime.garbage import collect_only_young

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The networks are so small that a second thread makes the tests twice as slow, and so narrow that
# with two oneDNN can crash (docs/design.md, fact 18).
os.environ["OMP_NUM_THREADS"] = "1"
# While libraries are imported and tests collected there is no garbage worth looking for.
_THRESHOLDS = gc.get_threshold()
collect_only_young()


CONTRACT = Path(__file__).parent / "methods" / "test_contract.py"
# These modules import torch, but test processes, memory, time or text, or pass on what others have
# computed.
NOT_NUMERICAL = {
    "benchmarks",
    "check",
    "demo",
    "docs",
    "group_size",
    "memory",
    "parallel",
    "pixels",
    "ray_app",
    "resuming",
    "trainer",
}

# The fixtures of these modules run pipelines, train, or start servers, for minutes, so they begin
# first. (`make test` keeps every module in one process, which does that once.)
DEAR = {
    "arc_benchmark",
    "arc_ranks",
    "arc_stages",
    "benchmarks",
    "check",
    "demo",
    "page",
    "pipeline",
    "ray_app",
    "report",
    "tested",
    "tracking",
    "whole",
}


def pytest_addoption(parser):
    parser.addoption(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="run nothing but the contract that every method must keep, for this method alone: "
        "a name in src/tttlab/methods, or the dotted path of a module of your own "
        "(my_package.my_method); may be given more than once",
    )
    parser.addoption(
        "--all", action="store_true", help="run the slow tests, too; a test named by :: always runs"
    )


def pytest_ignore_collect(collection_path, config):
    """With ``--method``, collect the tests of the contract alone."""
    ignored = collection_path.suffix == ".py" and collection_path != CONTRACT
    return True if config.getoption("method") and ignored else None


@pytest.fixture(autouse=True)
def global_stream():
    """Begin PyTorch's global random stream anew: no test draws what those before it left over."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond or more
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)


def pytest_collection_finish():
    """Collect garbage as usual from here on, but leave alone what has been imported."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark as numerical the tests of all modules that compute with PyTorch; drop the slow ones.

    On another processor PyTorch rounds differently.
    """
    for item in items:
        name = item.path.stem.removeprefix("test_")
        if "torch" in vars(item.module) and name not in NOT_NUMERICAL:
            item.add_marker("numerical")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in DEAR)
    named = config.getoption("method") or any("::" in argument for argument in config.args)
    if named or config.getoption("all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
