"""What every method is given when the tests try them all: settings that suit untrained networks, and source statistics."""

import os
from functools import cache

import networks
import torch

from tttlab.method import Method
from tttlab.method_settings import method_names
from tttlab.networks import Network
from tttlab.registry import load_method
from tttlab.source_statistics import Statistics
from tttlab.sweep import complete

SETTINGS = {
    "eata": {"margin": 2.0, "epsilon": 2.0},
    "deyo": {"margin": 2.0, "plpd_threshold": -1.0},
    "symmetries": {"permutations": 3},  # an untrained transformer hardly tells left from right
    "sar": {"margin": 2.0},  # an untrained network is never sure enough
}


def names() -> tuple[str, ...]:
    """List the methods to try: those of the package, and those of others that the environment names by their dotted paths."""
    return (*method_names(), *os.environ.get("OWN_METHODS", "").split())


def load(name: str) -> Method:
    """Create a method by its file's name, with the settings above."""
    return load_method(name, SETTINGS.get(name, {}))


@cache
def source(kind: str, method: Method, dtype: torch.dtype = torch.float64) -> tuple[Network, Statistics]:
    """Give the network of a kind, see `networks.source_statistics`, with all the statistics that a method needs."""
    network, statistics = networks.source_statistics(kind, dtype)
    return network, complete(statistics, method, network, lambda: [networks.images(64, seed=7).to(dtype)])
