"""Inner steps of many images at once, each from the same parameters, and differentiable."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call, vmap

from tttlab.errors import UserError
from tttlab.networks.gradients import clip_gradients, present_gradients
from tttlab.networks.network import normalisation_parameters, parameter_paths

Parameters = dict[str, Tensor]


def inner_parameters(network: nn.Module, trainable: str) -> Parameters:
    """Select, by name, the parameters that inner steps move.

    Args:
        network: the network.
        trainable: ``all`` that are not frozen | ``norm``: of these the affine ones of normalisation
            layers in the encoder, which is several times quicker.
    """
    names = normalisation_parameters(network) if trainable == "norm" else None
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        and (names is None or (name in names and name.startswith("encoder.")))
    }


def expanded(parameters: Parameters, count: int) -> Parameters:
    """Expand parameters, without copying, to name → ``(count, *shape)``."""
    return {
        name: parameter.expand(count, *parameter.shape) for name, parameter in parameters.items()
    }


def inner_step(
    objectives: Tensor, parameters: Parameters, lr: float, clip: float | None
) -> Parameters:
    """Take a differentiable gradient step on every image's own objective.

    Args:
        objectives: ``(B,)``, at ``parameters``.
        parameters: name → ``(B, *shape)``.
        lr: α.
        clip: largest norm of one image's gradient; None: no clipping.

    Returns:
        new values of the parameters that influence the objective, and of no others.

    Raises:
        UserError: no parameter influences the objective.
    """
    gradients = present_gradients(objectives, parameters, create_graph=True)
    if not gradients:
        raise UserError(
            "meta-learned fine-tuning: expected parameters that influence the objective, "
            f"found none among the {len(parameters)} trainable ones; train the encoder"
        )
    if clip is not None:
        gradients = clip_gradients(gradients, clip)
    return {name: parameters[name] - lr * gradient for name, gradient in gradients.items()}


class PerImage(nn.Module):
    """A function of a network as a module, so that `functional_call` replaces its parameters.

    A `Bound` network replaces them only in its own forward pass, but an objective may also call the
    head directly.
    """

    def __init__(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *data: Tensor) -> Tensor:
        """Call the function with the network and ``data``."""
        return self.function(self.network, *data)


def per_image(network: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Vectorise ``function(network, *data)`` of one image over images.

    It uses plain ``vmap``: `PerImageLayers` has some wrong second derivatives.

    Returns:
        a function of all images' parameters (see `expanded`) and stacked data.
    """
    module, names_by_path = PerImage(network, function), parameter_paths(network)

    def call(parameters: Parameters, *data: Tensor) -> Tensor:
        values = {
            f"network.{path}": parameters[name]
            for path, name in names_by_path.items()
            if name in parameters
        }
        return functional_call(module, values, data, tie_weights=False)

    return vmap(call, randomness="error")
