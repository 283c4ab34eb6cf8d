"""The mixer of a model as params.yaml sets it: the fields of its declaration, ready to check."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, SerializeAsAny, create_model
from pydantic_core import PydanticCustomError

from tttlab.config.loop_settings import strict_fields
from tttlab.config.mixers import MIXERS
from tttlab.config.objective_settings import declared_objective
from tttlab.config.strict import Strict, fault, show
from tttlab.config.values import is_plain_transformer
from tttlab.errors import choices


class Model(Protocol):
    """What a mixer must fit."""

    backbone: str
    weights: str | None
    objective: Any
    whole: bool


@cache
def mixer_section(name: str) -> type[Strict]:
    """Make the section of a mixer: ``name`` and its settings, which all have defaults."""
    declared = MIXERS[name]
    return create_model(
        declared.__name__,
        __base__=Strict,
        __doc__=declared.__doc__,
        name=(Literal[name], ...),
        **strict_fields(declared),
    )


def _by_name(values: Any) -> Any:
    """Check the section by what is declared of the mixer of its name."""
    if not isinstance(values, Mapping):
        return values  # null, or a mistake that pydantic tells
    if "name" not in values:
        raise fault(f"missing; allowed: {', '.join(MIXERS)}", "name")
    name = values["name"]
    if name not in tuple(MIXERS):  # a list has no hash
        raise fault(f"found {show(name)}; {choices(str(name), MIXERS)}", "name")
    section = mixer_section(name).model_validate(values)
    if name == "ttt_mlp" and not section.learned_init:
        raise fault(
            "expected true: an MLP whose weights are all zero has no gradient, found false",
            "learned_init",
        )
    return section


MixerSection = Annotated[SerializeAsAny[Strict], BeforeValidator(_by_name)]


def mixer_mistake(mixer: Any, model: Model) -> PydanticCustomError | None:
    """Say what keeps a mixer from taking the place of a model's attention, if anything does."""
    if not is_plain_transformer(model.backbone):
        return fault(
            "a mixer takes the place of attention in a plain vision transformer (vit_*, deit_*), "
            f"found {model.backbone!r}; remove it, or choose such a backbone",
            "mixer",
        )
    if mixer.name == "attention":
        return None
    if model.whole:
        return fault(
            "with finetune.mode none the network is kept as it is, with its attention; remove it",
            "mixer",
        )
    if model.weights == "timm":
        return fault(
            f"expected null or the path of a checkpoint with mixer {mixer.name}: timm's weights "
            "are of attention, found timm",
            "weights",
        )
    name = model.objective.name
    if mixer.name == "ttt_conv" and name != "none" and declared_objective(name).patches:
        return fault(
            f"ttt_conv needs the whole grid of patches, of which {name} drops some; "
            "choose ttt_linear or ttt_mlp, or another objective",
            "mixer.name",
        )
    return None
