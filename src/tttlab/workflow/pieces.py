"""The pieces of work that a stage consists of: runs on models, or on trained networks."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tttlab.config.params import Params
from tttlab.errors import UserError, choices


class Pair(NamedTuple):
    """A run of params.yaml and a model, which are tuned together."""

    run: str
    model: str

    def __str__(self) -> str:
        return "/".join(self)


class Piece(NamedTuple):
    """A run of params.yaml on the network of one model and training seed."""

    run: str
    model: str
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


class Network(NamedTuple):
    """A model and a training seed."""

    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}/{self.seed}"


def list_networks(params: Params, models: Sequence[str] = ()) -> list[Network]:
    """List the networks of some models, by default of all.

    Raises:
        UserError: a model does not exist.
    """
    _check_names("model", models, params.models)
    return [Network(model, seed) for model in models or params.models for seed in params.seeds]


def list_pairs(params: Params, names: Sequence[str] = ()) -> list[Pair]:
    """List the pairs of some runs, by default of all.

    Raises:
        UserError: a run does not exist.
    """
    runs = params.adapt.runs
    _check_names("run", names, runs)
    return [Pair(name, model) for name in names or runs for model in params.models_of(name)]


def list_pieces(params: Params, names: Sequence[str] = ()) -> list[Piece]:
    """List the pieces of some runs, by default of all; see `list_pairs`."""
    return [Piece(*pair, seed) for pair in list_pairs(params, names) for seed in params.seeds]


def _check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"unknown {kind} {name!r} in params.yaml; {choices(name, known)}")
