"""One run of params.yaml as one model sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tttlab.config.adapter_settings import AdapterSettings

OF_TRAINING = ("steps", "optimizer", "lr", "momentum", "trainable", "clip", "sharpness")
_ACTS_WITH = {  # settings that act with one value of another setting alone
    "prior": ("normalisation", "mixed"),
    "threshold": ("normalisation", "shrink"),
    "momentum": ("optimizer", "sgd"),
}


@dataclass(frozen=True)
class RunSettings:
    """One run as one model sees it.

    Attributes:
        method: name of a file in ``methods/`` (never the alias), or the dotted path of a module elsewhere.
        adapter: settings of the adapter.
        settings: keyword arguments of the method's dataclass, as far as they are set.
        trains: whether the method takes steps.
        search: what to tune: setting → the values to choose from.
        protocol: ``episodic`` or ``online``.
    """

    method: str
    adapter: AdapterSettings
    settings: dict[str, Any]
    trains: bool = True
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    protocol: str = "episodic"

    def with_values(self, values: Mapping[str, Any]) -> "RunSettings":
        """Replace some settings, whether the adapter's or the method's."""
        own = {key: value for key, value in values.items() if key in AdapterSettings.model_fields}
        rest = {key: value for key, value in values.items() if key not in own}
        adapter = AdapterSettings(**(self.adapter.model_dump() | own))
        return replace(self, adapter=adapter, settings=self.settings | rest)

    @property
    def in_use(self) -> dict[str, Any]:
        """Give the adapter's settings that act on this run: no learning rate where nothing is learnt, for instance."""
        learns = self.trains and self.adapter.steps and self.adapter.trainable != "none"
        idle = (
            set() if learns else {*OF_TRAINING} - ({"steps", "trainable"} if self.trains else set())
        )
        idle |= {
            key
            for key, (other, value) in _ACTS_WITH.items()
            if getattr(self.adapter, other) != value
        }
        return {key: value for key, value in self.adapter.model_dump().items() if key not in idle}

    def values(self) -> dict[str, Any]:
        """Give the settings that are tuned, or would be, with the values that they have."""
        flat = self.adapter.model_dump() | self.settings
        keys = [
            *self.search,
            *(["steps"] if self.trains and self.search and "steps" not in self.search else []),
        ]
        return {key: plain(flat[key]) for key in keys if key in flat}


def plain(value: Any) -> Any:
    """Make a value hashable."""
    return tuple(value) if isinstance(value, list) else value
