"""Surroundings of every test: no look at the network, and threads that leave the processor to others."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are tiny: a second thread makes the tests twice as slow


def pytest_collection_modifyitems(items):
    """Mark as numerical what another arithmetic of PyTorch can change: all tests of a module that uses it."""
    for item in items:
        if "torch" in vars(item.module):
            item.add_marker("numerical")
