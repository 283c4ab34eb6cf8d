"""The pieces of work that a stage consists of: runs on models, or on trained networks."""

from collections.abc import Sequence
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


def list_pairs(params: Params, names: Sequence[str] = ()) -> list[Pair]:
    """List the pairs of some runs, or of all.

    Raises:
        UserError: there is no such run.
    """
    runs = params.adapt.runs
    for name in names:
        if name not in runs:
            raise UserError(f"unknown run {name!r} in params.yaml; {choices(name, runs)}")
    return [Pair(name, model) for name in names or runs for model in params.models_of(name)]


def list_pieces(params: Params, names: Sequence[str] = ()) -> list[Piece]:
    """List the pieces of some runs, or of all; see `list_pairs`."""
    return [Piece(*pair, seed) for pair in list_pairs(params, names) for seed in params.seeds]
