"""The side of the images, which params.yaml names or the backbones know."""

from tttlab.config.params import Params
from tttlab.errors import UserError


def image_size(params: Params) -> int:
    """Take the side of the images from params.yaml, or from the backbones, which must then agree."""
    if params.data.image_size != "auto":
        return params.data.image_size
    from tttlab.networks.building import native_size  # seconds of imports

    sizes = {name: native_size(model.backbone) for name, model in params.models.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"data.image_size: auto takes the backbones' own input size, which must be one, found {told}; set a number"
        )
    return next(iter(sizes.values()))
