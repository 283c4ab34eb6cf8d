"""One run of params.yaml as one model sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tttlab.config.inner_loop import InnerLoop
from tttlab.config.loop_settings import LoopSettings

OF_TRAINING = ("steps", "optimizer", "lr", "momentum", "trainable", "rank", "clip", "sharpness")
_ACTS_WITH = {  # settings that act with one value of another setting alone
    "prior": ("normalisation", "mixed"),
    "threshold": ("normalisation", "shrink"),
    "momentum": ("optimizer", "sgd"),
    "rank": ("trainable", "lora"),
}


@dataclass(frozen=True)
class RunSettings:
    """One run as one model sees it.

    Attributes:
        method: name of a file in ``methods/`` (never the alias), or the dotted path of a module.
        loop: the inner loop.
        settings: keyword arguments of the method's dataclass, as far as they are set or searched.
        trains: whether the method takes steps.
        search: what to tune: setting → the values to choose from.
        protocol: ``episodic`` or ``online``.
    """

    method: str
    loop: InnerLoop
    settings: dict[str, Any]
    trains: bool = True
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    protocol: str = "episodic"

    def with_values(self, values: Mapping[str, Any]) -> "RunSettings":
        """Replace some settings, whether the inner loop's or the method's."""
        of_loop = {key: value for key, value in values.items() if key in LoopSettings.model_fields}
        of_method = {key: value for key, value in values.items() if key not in of_loop}
        loop = replace(self.loop, **LoopSettings(**of_loop).model_dump(exclude_unset=True))
        return replace(self, loop=loop, settings=self.settings | of_method)

    @property
    def in_use(self) -> dict[str, Any]:
        """Give the inner loop's settings that act on this run.

        Where nothing is learnt there is no learning rate, for instance.
        """
        learns = self.trains and self.loop.steps and self.loop.trainable != "none"
        idle = (
            set() if learns else {*OF_TRAINING} - ({"steps", "trainable"} if self.trains else set())
        )
        idle |= {
            key for key, (other, value) in _ACTS_WITH.items() if getattr(self.loop, other) != value
        }
        return {key: value for key, value in self.loop.settings.items() if key not in idle}

    @property
    def decisive_search(self) -> dict[str, tuple[Any, ...]]:
        """What is searched and may decide whether the run works: not learning rate nor steps."""
        return {key: values for key, values in self.search.items() if key not in ("lr", "steps")}

    @property
    def is_control(self) -> bool:
        """Whether the run changes predictions, but trains nothing."""
        if self.trains and self.loop.steps:
            return False
        acts = self.loop.normalisation != "source" or self.loop.average > 0
        return acts or self.method != "none"

    def values(self) -> dict[str, Any]:
        """Give the settings that are tuned, or would be, with the values that they have."""
        flat = self.loop.settings | self.settings
        keys = [
            *self.search,
            *(["steps"] if self.trains and self.search and "steps" not in self.search else []),
        ]
        return {key: plain(flat[key]) for key in keys if key in flat}


def plain(value: Any) -> Any:
    """Make a value hashable."""
    return tuple(value) if isinstance(value, list) else value
