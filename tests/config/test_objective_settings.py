"""What objectives declare; and that their files are all that other code learns of them by."""

import ast

import pytest
from pydantic import TypeAdapter, ValidationError

from tools.stage_code import FOLDERS, SOURCES, module_name
from tttlab.config import objective_settings
from tttlab.config.objective_settings import declared_objective, objective_names
from tttlab.errors import UserError

OWN = """
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from tttlab.networks.objective import Objective


@dataclass(frozen=True)
class Own(Objective):
    \"\"\"An objective of one's own.\"\"\"

    width: Annotated[int, Ge(8)] = 16
    heads: Annotated[int, Ge(1)] = 2
    alone = False
    multiples = (("width", "heads"),)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write an objective's file, and read what it declares."""
    monkeypatch.setattr(objective_settings, "OBJECTIVES", tmp_path)
    declared_objective.cache_clear()

    def read(text=OWN):
        (tmp_path / "own.py").write_text(text)
        return declared_objective("own")

    yield read
    declared_objective.cache_clear()


def test_a_file_is_all_that_an_objective_needs(own):
    declared = own()
    assert objective_names() == ("own",)
    assert (declared.alone, declared.labels, declared.patches) == (False, False, False)
    section = TypeAdapter(declared.section)
    values = {"name": "own", "width": 12, "heads": 3}
    assert section.validate_python(values).model_dump() == values
    for wrong in ({"width": 4}, {"width": 13}, {"heads": True}, {"depth": 1}, {"name": "other"}):
        with pytest.raises(ValidationError):
            section.validate_python(values | wrong)
    with pytest.raises(ValidationError):  # every key stands in params.yaml
        section.validate_python({"name": "own", "width": 12})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frozen=True)", "frozen=True", r"own\.py, line \d+: not valid Python"),
        ("(Objective)", "", r"own\.py: expected one public class .* found 0"),
        (" = 16", "", r"own\.py, line 14: setting width has no default"),
        ("Annotated[int, Ge(8)]", "torch.Tensor", "setting width is of a type that params.yaml"),
        ("alone = False", "alone = 3", r"own\.py, line 16: alone: expected a valid boolean"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(own, old, new, message):
    with pytest.raises(UserError, match=message):
        own(OWN.replace(old, new))


def test_a_mistake_in_an_objectives_file_is_told_when_params_yaml_is_checked(own):
    with pytest.raises(UserError, match=r"own\.py, line 14: setting width has no default"):
        own(OWN.replace(" = 16", ""))
    with pytest.raises(UserError, match=r"own\.py, line 14: setting width has no default"):
        TypeAdapter(objective_settings.ObjectiveSection).validate_python({"name": "own"})


def test_what_objectives_say_of_themselves_is_what_their_classes_say():
    from tttlab.networks.checkpoints import build_objective

    for name in objective_names():
        declared = declared_objective(name)
        defaults = {
            "simclr": {"temperature": 0.5, "hidden_dim": 8, "projection_dim": 4},
            "mae": {"mask_ratio": 0.5, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2},
            "simsiam": {"hidden_dim": 8, "projection_dim": 4, "prediction_dim": 2},
            "clust3": {"stages": (1, 2), "heads": 2, "clusters": 3},
            "rotation": {"shared_stages": None},
            "it3": {"stage": None},
            "learned": {"stage": 1, "dim": 8, "trained": True},
        }[name]
        section = declared.section.model_validate({"name": name} | defaults)
        objective = build_objective(section.model_dump())
        for word in ("alone", "labels", "patches", "meta"):
            assert getattr(declared, word) is getattr(objective, word), (name, word)


def test_no_other_code_names_an_objective():
    """A new one touches one file, and its method another; the masks of MAE are an exception."""
    named = {
        module_name(path)
        for path in SOURCES
        if path.parent not in (FOLDERS["tttlab"] / "objectives", FOLDERS["tttlab"] / "methods")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Constant) and node.value in objective_names())
        or (
            isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tttlab.objectives")
        )
    }
    # `rotation` there is matplotlib's word.
    assert named == {"tttlab.training.meta_training", "tttlab.reporting.figures.accuracy"}
