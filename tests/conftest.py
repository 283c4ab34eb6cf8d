"""Surroundings of every test: no look at the network, and threads that leave the processor to others."""

import os
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # these networks are tiny: a second thread makes the tests twice as slow


CONTRACT = Path(__file__).parent / "methods" / "test_contract.py"
# Of these the subject is processes, memory, time or text, whatever the arithmetic.
NOT_NUMERICAL = {
    "benchmarks",
    "docs",
    "group_size",
    "memory",
    "parallel",
    "pixels",
    "resuming",
    "trainer",
}


def pytest_addoption(parser):
    parser.addoption(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="run nothing but the contract that every method must keep, for this method alone: a name in "
        "src/tttlab/methods, or the dotted path of a module of your own (my_package.my_method); "
        "may be given more than once",
    )


def pytest_ignore_collect(collection_path, config):
    """With ``--method``, look at no other file of tests."""
    others = collection_path.suffix == ".py" and collection_path != CONTRACT
    return True if config.getoption("method") and others else None


def pytest_collection_modifyitems(items):
    """Mark as numerical what another arithmetic of PyTorch can change: all tests of a module that uses it for numbers."""
    for item in items:
        if (
            "torch" in vars(item.module)
            and item.path.stem.removeprefix("test_") not in NOT_NUMERICAL
        ):
            item.add_marker("numerical")
