"""Files of weights: state dicts, read without running code, and compared with a module."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor, nn

from tttlab.errors import UserError

# They decide what fits.
WATCHED = "backbone, backbone_options, stem, mixer, objective and data.image_size"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or from ``torch.save``.

    Raises:
        UserError: the file cannot be read as weights.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(load_state_dict(str(path), weights_only=True))
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        EOFError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: expected weights (.safetensors, or a state dict from torch.save), "
            f"found a file that cannot be read as such ({reason})"
        ) from error


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict into a module, in place.

    Args:
        module: the module.
        state: an entry for each of its tensors, and no other.
        path: of the file that it comes from, for messages.

    Raises:
        UserError: they do not fit.
    """
    if (wrong := misfit(module, state)) is not None:
        raise UserError(f"{path}: the weights do not fit this network: {wrong}; check {WATCHED}")
    module.load_state_dict(state)


def misfit(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Describe the first missing, misshapen or surplus entry; None if all entries fit."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            return f"expected {name} {tuple(tensor.shape)}, found no such entry"
        if state[name].shape != tensor.shape:
            return f"expected {name} {tuple(tensor.shape)}, found {tuple(state[name].shape)}"
    surplus = next((name for name in state if name not in expected), None)
    return surplus and f"expected no entry {surplus}, found one {tuple(state[surplus].shape)}"
