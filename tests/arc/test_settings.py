"""arc/params.yaml: what is right, and one line for each mistake."""

import copy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tools.stage_code import ROOT
from tttlab.arc.settings import read_settings
from tttlab.errors import UserError
from tttlab.workflow.arc.preparing import check_trainable

FILE = ROOT / "arc" / "params.yaml"
READY = sorted((ROOT / "arc" / "settings").glob("*.yaml"))


def read(tmp_path: Path, **changes):
    """Read the file with some values changed, each named by its path with ``__`` for dots."""
    values = YAML(typ="safe").load(FILE.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = values
        for name in sections:
            section = section[name]
        section[key] = copy.deepcopy(value)
    file = tmp_path / "params.yaml"
    YAML(typ="safe").dump(values, file)
    return read_settings(file)


@pytest.mark.parametrize("file", [FILE, *READY], ids=lambda file: file.name)
def test_ready_settings_are_right(file):
    settings = read_settings(file)
    assert {"none", "token", "all", "joint", "scratch"} <= set(settings.adapt.runs)


def test_the_full_size_is_the_published_one():
    settings = read_settings(ROOT / "arc" / "settings" / "full.yaml")
    network, run = settings.network, settings.adapt.run("all")
    assert (network.canvas, network.patch, network.depth, network.width) == (64, 2, 10, 512)
    assert (network.heads, network.mlp, network.dropout, network.norm) == (8, 512, 0.1, "post")
    assert 1 + len(settings.auxiliary.kinds) * settings.auxiliary.test_time == 51
    assert (run.pairs, run.lr, run.clip, run.placements) == (8, 3e-4, 1.0, 10)
    assert (settings.train.epochs, settings.train.batch_size) == (100, 256)


def test_a_run_changes_the_defaults(tmp_path):
    settings = read(tmp_path, adapt__runs={"none": {"steps": 0}, "all": {"steps": 20, "warmup": 2}})
    assert settings.adapt.run("all").steps == 20
    assert settings.adapt.run("all").lr == settings.adapt.defaults.lr
    assert settings.adapt.steps("all") == [0, 2, 6, 20]
    assert settings.adapt.steps("none") == [0]


RUNS = {"none": {"steps": 0}, "all": {}}
MISTAKES = [
    ({"tasks__largest": 31}, "tasks.largest: expected a number less than or equal to 30"),
    ({"tasks__evaluation": "arc3"}, "tasks.evaluation: found 'arc3'; did you mean"),
    ({"tasks__training": "arc2"}, "tasks.training: the training tasks of arc2 contain evaluation"),
    ({"network__patch": 5}, "network.patch: expected a divisor of canvas"),
    ({"network__width": 66}, "network.width: expected a multiple of 4 · heads"),
    ({"network__canvas": 10}, "network.canvas: expected more than tasks.largest (10)"),
    ({"network__colour": 3}, "network.colour: unknown key"),
    (
        {"auxiliary__symmetries": ["turn45"]},
        "auxiliary.symmetries[0]: found 'turn45'; did you mean",
    ),
    ({"train__warmup_epochs": 1000}, "train.warmup_epochs: expected at most epochs"),
    ({"adapt__runs": {"none": {"steps": 0}}}, "adapt.runs: expected a run 'all'"),
    ({"adapt__runs": {**RUNS, "none": {}}}, "adapt.runs.none.steps: expected 0"),
    ({"adapt__runs": {**RUNS, "all": {"step": 3}}}, "adapt.runs.all.step: unknown key"),
    ({"adapt__runs": {**RUNS, "all": {"lr": "fast"}}}, "adapt.runs.all.lr: expected"),
    ({"adapt__defaults__warmup": 10_000}, "adapt.defaults.warmup: expected fewer than steps"),
    (
        {"adapt__runs": {**RUNS, "joint": {"together": True, "trainable": "tokens"}}},
        "adapt.runs.joint.trainable: expected all, for one network",
    ),
    ({"adapt__record": [1.5]}, "adapt.record[0]: expected a number less than 1"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_a_mistake_is_told_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_parameters_that_the_network_does_not_have_are_told_before_it_is_trained(tmp_path):
    small = {"network__depth": 1, "network__width": 16, "network__heads": 2}
    good = read(tmp_path, adapt__runs={**RUNS, "some": {"trainable": ["blocks.0"]}}, **small)
    check_trainable(good)
    wrong = read(tmp_path, adapt__runs={**RUNS, "some": {"trainable": ["encodr"]}}, **small)
    expected = r"^adapt\.runs\.some\.trainable: 'encodr' matches no parameter; names begin with"
    with pytest.raises(UserError, match=expected):
        check_trainable(wrong)


def test_the_small_size_is_the_default():
    small = ROOT / "arc" / "settings" / "small.yaml"
    assert read_settings(small) == read_settings(FILE)
