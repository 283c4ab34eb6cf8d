"""Networks on disk: weights (no pickle) and, beside them, the settings to rebuild the network."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tttlab.config.objective_settings import objective_names
from tttlab.errors import UserError, choices
from tttlab.mixers.mixing import mix, other_mixer
from tttlab.networks.building import build_encoder
from tttlab.networks.classifiers import Classifier
from tttlab.networks.files import fill, misfit, read_weights
from tttlab.networks.network import Network, add_probe
from tttlab.networks.objective import Objective
from tttlab.networks.whole import build_whole
from tttlab.seeding import global_stream, stream_seed

# The settings that rebuild a network, apart from its weights.
SETTINGS = ("backbone", "backbone_options", "stem", "mixer", "objective", "probe")
_WEIGHTS, _SIDECAR = "weights.safetensors", "network.json"


# --- building -------------------------------------------------------------------------------------


def build_objective(settings: Mapping[str, Any]) -> Objective | None:
    """Create an objective, importing its file alone; None for the name ``none``.

    Args:
        settings: ``name`` (see `objective_names`, or ``none``) and the objective's fields.

    Raises:
        UserError: there is no such objective.
    """
    values = dict(settings)
    name = values.pop("name")
    if name == "none":
        return None
    if name not in objective_names():
        allowed = choices(name, [*objective_names(), "none"])
        raise UserError(f"objective.name: unknown objective {name!r}; {allowed}")
    module = import_module(f"tttlab.objectives.{name}")
    (objective_class,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Objective)
        and value.__module__ == module.__name__
    )
    return objective_class(**values)


def build_network(
    settings: Mapping[str, Any], num_classes: int, image_size: int, seed: int
) -> tuple[Network, Objective | None]:
    """Create a network with its initial weights, in evaluation mode.

    Args:
        settings: ``backbone``, ``objective`` and, optionally, ``backbone_options``, ``stem``,
            ``mixer`` (see `tttlab.mixers.mixing.mix`), ``probe`` (``depth`` and ``heads``) and
            ``weights``: None (random), ``timm`` (timm's pretrained weights), or the path of a
            checkpoint folder or timm state dict.
        num_classes: K.
        image_size: side of the square images, pixels.
        seed: of the random weights; the global random state does not change.

    Raises:
        UserError: backbone, objective and weights are incompatible.
    """
    objective = build_objective(settings["objective"])
    weights = settings.get("weights")
    with global_stream(stream_seed(seed, "weights")):
        encoder = build_encoder(
            settings["backbone"],
            image_size,
            stem=settings.get("stem", "small"),
            options=settings.get("backbone_options"),
            pretrained=weights == "timm",
        )
        if settings.get("mixer"):
            mix(encoder, **settings["mixer"], seed=seed)
        head = _build_head(objective, encoder, num_classes) if objective else None
        if objective and weights is None:
            objective.initialise(encoder)
        network = Network(encoder, num_classes, head).eval()
        if settings.get("probe"):
            add_probe(network, **settings["probe"], seed=seed)
    if weights not in (None, "timm"):
        load_weights(network, Path(weights))
    return network, objective


def _build_head(objective: Objective, encoder: nn.Module, num_classes: int) -> nn.Module:
    return objective.head(encoder, num_classes) if objective.labels else objective.head(encoder)


# --- our checkpoints ------------------------------------------------------------------------------


def save(
    network: Network | Classifier,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    classes: Sequence[str],
    image_size: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``weights.safetensors`` and ``network.json``.

    Args:
        network: the network to save; of a whole one (`tttlab.networks.whole`) the module's own
            weights, under its own names.
        folder: created if it does not exist.
        settings: as for `build_network`; ``weights`` is recorded as ``initial_weights``.
        classes: names of the K classes.
        image_size: side of the images, pixels.
        extra: further entries of the JSON file: the network's origin, its metrics.

    Returns:
        the contents of ``network.json``, with the weights' hash as ``sha256``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = network.encoder if isinstance(network, Classifier) else network
    # Cloned, for safetensors refuses tensors that share memory, as tied weights do.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    save_file(state, folder / _WEIGHTS)
    about = {
        **{name: settings[name] for name in SETTINGS if name in settings},
        "initial_weights": settings.get("weights"),
        "classes": list(classes),
        "image_size": image_size,
        **(_describe(network) if isinstance(network, Classifier) else {}),
        "sha256": file_hash(folder / _WEIGHTS),
        "versions": {
            "tttlab": _package_version(),
            **{name: version(name) for name in ("torch", "timm", "lightly")},
        },
        **(extra or {}),
    }
    (folder / _SIDECAR).write_text(
        json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return about


def _describe(network: Classifier) -> dict[str, Any]:
    """Tell what a whole network's own weights leave open."""
    values = {name: getattr(network, name) for name in ("mean", "std", "order")}
    return {"whole": True} | {
        name: None if value is None else value.flatten().tolist() for name, value in values.items()
    }


def load(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[Network | Classifier, dict[str, Any]]:
    """Load what `save` wrote: the network in evaluation mode, and the contents of ``network.json``.

    Raises:
        UserError: the folder holds no checkpoint, or its two files do not belong together.
    """
    about = read_sidecar(folder)
    state = read_weights(folder / _WEIGHTS)
    if file_hash(folder / _WEIGHTS) != about["sha256"]:
        raise UserError(
            f"{folder / _WEIGHTS}: expected the weights that {_SIDECAR} describes, found others; "
            "run the stage that makes this folder again"
        )
    if about.get("whole"):
        return _load_whole(about, state, folder / _WEIGHTS).to(device), about
    # The seed does not matter: every weight is replaced.
    network, _ = build_network(
        {name: about[name] for name in SETTINGS if name in about},
        len(about["classes"]),
        about["image_size"],
        seed=0,
    )
    fill(network, state, folder / _WEIGHTS)
    return network.to(device), about


def _load_whole(about: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> Classifier:
    network = build_whole(about, about["image_size"], about["logits"])
    fill(network.encoder, state, path)
    if about["order"]:
        network.reorder(about["order"])
    return network


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Read ``network.json`` of a checkpoint folder.

    Raises:
        UserError: the file is missing or unreadable.
    """
    try:
        return json.loads((folder / _SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected a checkpoint ({_WEIGHTS} and {_SIDECAR}), "
            f"found none that can be read ({type(error).__name__}); run the stage that makes it"
        ) from error


def file_hash(path: Path) -> str:
    """Hash a file (SHA-256, hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- initial weights ------------------------------------------------------------------------------


def load_weights(network: Network, path: Path) -> None:
    """Load initial weights into a network, in place.

    A timm state dict fills the encoder; its classifier is ignored. One of our checkpoints fills the
    encoder, and each other part (classifier, head, probe) only if all of the part's tensors fit.

    Args:
        network: the network to fill.
        path: a checkpoint folder, or a timm state dict (``.safetensors``, or from ``torch.save``).

    Raises:
        UserError: the file cannot be read as weights, or they do not fit the encoder.
    """
    if not path.is_dir():
        classifiers = network.encoder.default_cfg.get("classifier", ())
        classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers or ()
        state = {
            name: tensor
            for name, tensor in read_weights(path).items()
            if name.rpartition(".")[0] not in classifiers
        }
        check_mixer(network, state, path)
        fill(network.encoder, state, path)
        return
    read_sidecar(path)
    state = read_weights(path / _WEIGHTS)
    check_mixer(network, state, path)
    for part, module in network.named_children():
        part_state = {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{part}.")
        }
        if part == "encoder" or misfit(module, part_state) is None:
            fill(module, part_state, path / _WEIGHTS)


def check_mixer(network: Network, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of attention for another mixer, and the other way round.

    Raises:
        UserError: they are of the other kind.
    """
    if wrong := other_mixer(network.encoder, state):
        raise UserError(
            f"{path}: the weights do not fit this network's mixer: {wrong}; "
            "set the mixer that they were trained with, or weights: null"
        )


def _package_version() -> str:
    try:
        return version("ttt-lab")
    except ModuleNotFoundError:  # the package is not installed
        return "source"
