"""Exact versions: the same list in the two files that installers read."""

import tomllib

from tools.stage_code import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    line
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and line[0] not in "#-"
]


def test_uv_and_pip_get_the_same_versions():
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == PINS
    assert not any("://" in pin for pin in PINS)


def test_every_dependency_is_pinned():
    pinned = {pin.split("==")[0] for pin in PINS}
    for requirement in PROJECT["project"]["dependencies"]:
        name = requirement.split(">")[0].split("=")[0]
        assert name in pinned, name


def test_the_successor_under_another_licence_is_kept_out():
    pins = dict(pin.split(";")[0].strip().split("==") for pin in PINS)
    assert pins["albumentations"].startswith("2.0.")
    assert "albumentationsx" not in pins
    assert "lightning" not in pins
