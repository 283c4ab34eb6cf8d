"""The side of the images, as params.yaml or the backbones define it."""

from tttlab.config.params import Params
from tttlab.errors import UserError


def image_size(params: Params) -> int:
    """Take the side of the images from params.yaml, or from the backbones if these agree."""
    if params.data.image_size != "auto":
        return params.data.image_size
    from tttlab.networks.building import native_size  # seconds of imports

    sizes = {name: native_size(model.backbone) for name, model in params.models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            "data.image_size: auto takes the backbones' own input size, which must be one, "
            f"found {listed}; set a number"
        )
    return next(iter(sizes.values()))


def check_size(params: Params) -> None:
    """Refuse corruptions whose strengths are not defined at the size of the images.

    Raises:
        UserError: they are not; params.yaml alone tells unless the size is the backbones'.
    """
    strange = params.shifts.strength != "own"
    if strange and (mistake := params.shifts.size_mistake(image_size(params))):
        raise UserError(f"shifts.strength: {mistake}")
