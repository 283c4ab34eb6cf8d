"""Requests to Ray Serve: bodies up to a limit, errors with their status, and the settings."""

import asyncio

import pytest
from fastapi import Request

from tttlab.errors import UserError
from tttlab.serving.invocations import NoJson, Slow, TooLarge, receive, refusal
from tttlab.serving.pictures import Limits
from tttlab.serving.ray_settings import read_settings
from tttlab.serving.service import Busy, Late


def test_every_error_has_its_status():
    errors = UserError, TooLarge, NoJson, Slow, Busy, Late
    statuses = [refusal(error("a\n  b"))[0] for error in errors]
    assert statuses == [400, 413, 415, 408, 429, 504]
    assert refusal(Busy("a\n  b"))[1] == {"error_code": "RESOURCE_EXHAUSTED", "message": "a b"}


def received(chunks: list[bytes], kind: str = "application/json") -> tuple[bytes | str, int]:
    """Receive a body; → it or what is told, and how many chunks were taken."""
    taken = 0

    async def take() -> dict:
        nonlocal taken
        taken += 1
        more = taken < len(chunks)
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": more}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    try:
        return asyncio.run(receive(Request(scope, take), megabytes=0.001, seconds=60)), taken
    except UserError as error:
        return f"{type(error).__name__}: {error}", taken


def test_a_body_is_taken_up_to_its_limit_and_dropped_beyond():
    assert received([b"a" * 400, b"b" * 600]) == (b"a" * 400 + b"b" * 600, 2)
    line = "TooLarge: expected a body of at most 0.001 MB, found more; send fewer or smaller images"
    assert received([b"a" * 400, b"b" * 601]) == (line, 2)
    assert received([b"a" * 1000] * 100) == (line, 9)
    assert received([b"a"], "text/csv") == (
        "NoJson: Content-Type: expected 'application/json', found 'text/csv'",
        0,
    )
    assert received([b"a"], "application/json; charset=utf-8") == (b"a", 1)


def test_a_body_that_does_not_come_is_not_waited_for():
    async def never() -> dict:
        await asyncio.sleep(3600)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Slow, match=r"the body did not arrive within 0\.05 s"):
        asyncio.run(receive(Request(scope, never), megabytes=1, seconds=0.05))


def test_settings_of_a_deployment_are_read_from_text_and_from_yaml(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = read_settings({"folder": "m", "num_replicas": "2", "num_gpus": "0.25"})
    assert settings.folder == str(tmp_path / "m")
    assert (settings.num_replicas, settings.num_gpus) == (2, 0.25)
    assert settings.limits == Limits()
    settings = read_settings({"uri": "models:/m@champion", "megabytes": 1, "seconds": 5})
    assert settings.limits == Limits(megabytes=1, seconds=5)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({}, r"expected folder=.* or uri=models:/<name>@champion, found neither$"),
        ({"folder": "a", "uri": "models:/b@champion"}, r"expected folder=.*, found both$"),
        ({"folder": "absent"}, r"folder: expected a model that adapts, found none in .*absent; "),
        ({"uri": "models:/b/1", "replicas": 2}, r"unknown key 'replicas'; did you mean 'num_rep"),
        ({"uri": "models:/b/1", "num_replicas": "0"}, r"num_replicas: expected a number greater"),
        ({"uri": "models:/b/1", "seconds": "1e10"}, r"seconds: expected a number less than"),
        ({"uri": "models:/b/1", "seconds": "inf"}, r"seconds: expected a "),
        ({"uri": "models:/b/1", "num_gpus": "half"}, r"num_gpus: expected a valid number"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused_before_it_starts(args, line):
    with pytest.raises(UserError, match=f"^{line}"):
        read_settings(args)
