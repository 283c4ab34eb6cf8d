"""How test images arrive, as params.yaml has it."""

from tttlab.arrivals import Stream
from tttlab.params import Params


def open_stream(params: Params, protocol: str) -> Stream | None:
    """Say how images arrive; None: each is adapted to on its own, so that their order does not matter."""
    return Stream(**params.adapt.online.model_dump()) if protocol == "online" else None
