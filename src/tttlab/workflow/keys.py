"""Keys of pieces of runs: hashes of everything that the result of a piece depends on.

Those of trained networks are in `tttlab.workflow.training_keys`. Nothing here imports torch, so
that a stage whose pieces are all there ends at once.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tttlab.adaptation.method_code import method_code
from tttlab.config.params import Params
from tttlab.workflow import places
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import Network, Pair, Piece
from tttlab.workflow.tuned import choice_file


def tuning_key(params: Params, pair: Pair, ledger: Ledger) -> str:
    """Hash what the choice for a pair depends on: source images alone."""
    network = Network(pair.model, params.seeds[0])
    inputs = [*_networks(network), *_image_sets("labeled_train", "labeled_validation")]
    search = params.run_settings(*pair).search
    settings = [_settings(params, *pair), search, params.tune.model_dump(mode="json")]
    strength = params.shifts.model_dump(mode="json", include={"strength"})  # empty for our own
    return ledger.key([*pair, *settings, *filter(None, [strength])], inputs)


def distance_key(params: Params, network: Network, ledger: Ledger) -> str:
    """Hash what the distances in one network depend on."""
    images = _image_sets("unlabeled", "labeled_validation", "test", "shifted")
    settings = params.model_dump(mode="json", include={"seed", "shifts", "distance"})
    return ledger.key([*network, settings], [_networks(network)[0], *images])


def adapting_key(params: Params, piece: Piece, ledger: Ledger) -> str:
    """Hash what the predictions of a piece depend on."""
    pair, network = Pair(piece.run, piece.model), Network(piece.model, piece.seed)
    has_curve = piece.seed == params.seeds[0]
    sections = params.model_dump(mode="json", include={"shifts": True, "adapt": {"curve"}})
    settings = [*piece, has_curve, _settings(params, *pair), sections]
    return ledger.key(settings, _tested(pair, network))


def aligning_key(params: Params, pair: Pair, ledger: Ledger) -> str:
    """Hash what the agreement of gradients of a pair depends on."""
    network = Network(pair.model, params.seeds[0])
    sections = params.model_dump(mode="json", include={"shifts", "alignment"})
    settings = [*pair, _settings(params, *pair), sections]
    return ledger.key(settings, _tested(pair, network))


def _networks(network: Network) -> list[Path]:
    return [places.OUTPUTS / name / str(network) for name in ("finetuned", "source_stats")]


def _image_sets(*names: str) -> list[Path]:
    return [places.OUTPUTS / "data" / name for name in names]


def _tested(pair: Pair, network: Network) -> Sequence[Path]:
    """List what every result on test images is made from."""
    images = _image_sets("labeled_train", "labeled_validation", "test", "shifted")
    return [*_networks(network), choice_file(*pair), *images]


def _settings(params: Params, name: str, model: str) -> dict[str, Any]:
    """List what a run on one model depends on, apart from its network and its search."""
    settings, trained = params.run_settings(name, model), params.models[model]
    return {
        "loop": asdict(replace(settings.loop, augmentation=params.adapt.augment)),
        "objective": trained.objective.model_dump(mode="json"),
        "objective_views": asdict(trained.pretrain.augment),
        "online": params.adapt.online.model_dump(mode="json"),
        "source_stats": params.source_stats.model_dump(mode="json"),
        "seed": params.seed,
        "protocol": settings.protocol,
        "method": settings.method,
        "settings": settings.settings,
        "code": method_code(settings.method),
    }
