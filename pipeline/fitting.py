"""Whether a run's method fits a network, which is tried before any work."""

from typing import TYPE_CHECKING

from tttlab import sweep
from tttlab.errors import UserError
from tttlab.inner_loop import InnerLoop, select_parameters
from tttlab.method import Method
from tttlab.method_trial import try_method, watched
from tttlab.params import Params
from tttlab.runs import RunSettings
from tttlab.source_statistics import Statistics

if TYPE_CHECKING:
    from pipeline.loading import Source


def fit(
    params: Params, name: str, model: str, source: "Source", chosen: RunSettings, method: Method, loop: InnerLoop
) -> Statistics:
    """Give the source statistics that a run needs of a network; the first time the run is tried on it.

    Raises:
        UserError: what does not fit, or is wrong with the method.
    """
    try:
        tried = watched(method)
        tried.check(source.network)
        select_parameters(source.network, loop.trainable)
        known = source.measured.get(repr(method), source.statistics)
        known = source.measured.setdefault(repr(method), sweep.complete(known, tried, source.network, source.batches))
        if name not in source.tried:
            size, batch_size = source.about["image_size"], params.adapt.online.batch_size
            try_method(source.network, method, loop, known, size, chosen.protocol, batch_size)
    except UserError as error:
        raise UserError(f"adapt.runs.{name}, method {chosen.method} on {model}: {error}") from error
    source.tried.add(name)
    return known
