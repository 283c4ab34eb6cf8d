"""Which parameters of a network are trained."""

from collections.abc import Sequence

from torch import nn

from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.low_rank import low_rank_parameters, with_low_rank
from tttlab.networks.network import Bound, normalisation_parameters


def with_trainable(network: nn.Module, loop: InnerLoop, seed: int = 0) -> nn.Module:
    """Return the network with what the loop trains and the network lacks: updates of low rank.

    Raises:
        UserError: no layer can have one.
    """
    return with_low_rank(network, loop.rank, seed) if loop.trainable == "lora" else network


def bind(network: nn.Module, method: Method, loop: InnerLoop) -> Bound:
    """Bind a network to its own parameters; `Bound.trained` are those that the loop names.

    If the method does not train, there are none.

    Raises:
        UserError: the loop names no parameter that can be trained.
    """
    trained = select_parameters(network, loop.trainable) if method.trains else {}
    return Bound(network, {name: value.detach() for name, value in trained.items()})


def select_parameters(
    network: nn.Module, trainable: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    """Select the parameters to train, by name; see `InnerLoop.trainable`.

    Frozen parameters are left out: they are constants, such as a fixed position embedding.

    Raises:
        UserError: nothing matches, or only frozen parameters do.
    """
    if trainable == "none":
        return {}
    parameters = dict(network.named_parameters())
    if trainable == "all":
        matches = {"all": list(parameters)}
    elif trainable == "norm":
        names = normalisation_parameters(network)
        matches = {"norm": [n for n in names if n.startswith("encoder.") and n in parameters]}
    elif trainable == "lora":
        matches = {"lora": low_rank_parameters(network)}
    else:
        parts = (trainable,) if isinstance(trainable, str) else tuple(trainable)
        prefixes = {part: f"{part.rstrip('.')}." for part in parts}
        matches = {
            part: [name for name in parameters if f"{name}.".startswith(prefix)]
            for part, prefix in prefixes.items()
        }
    for part, names in matches.items():
        if not names:
            begin = ", ".join(sorted({".".join(name.split(".")[:2]) for name in parameters}))
            raise UserError(
                f"trainable: {part!r} matches no parameter; names begin with, for example, {begin}"
            )
        if not any(parameters[name].requires_grad for name in names):
            raise UserError(
                f"trainable: {part!r} matches frozen parameters alone (requires_grad=False), such "
                f"as {names[0]}; call requires_grad_(True) on them: what moves are copies, the "
                "network stays as it is"
            )
    selected = set().union(*matches.values())
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name in selected and parameter.requires_grad
    }
