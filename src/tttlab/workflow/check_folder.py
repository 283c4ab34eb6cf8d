"""The folder of a ``ttt-lab check``: its settings, which are the user's once they are edited."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tttlab.config.params import read_params
from tttlab.errors import UserError, disk_full
from tttlab.workflow import places
from tttlab.workflow.check_settings import HEAD, Request, as_text, is_edited, values_of


def go_on(folder: Path) -> str:
    """Give the command that goes on with the settings in a folder."""
    return f"{places.program()} check --out {shlex.quote(str(folder))}"


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make a folder, and keep every other check out of it inside the context.

    Raises:
        UserError: it cannot be made or written to, or another check is at work there.
    """
    file = folder / "check.lock"
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"this work is already running {told_by(file)}") from error
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(
            f"--out: expected a folder that can be made, found {obstacle(folder, error)}; "
            "name another"
        ) from error
    try:
        file.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def told_by(file: Path) -> str:
    """Say which process holds a lock, and what to do; only the number may be unknown."""
    with suppress(OSError, ValueError):
        owner = int(file.read_text(encoding="utf-8"))
        return f"as process {owner}; wait for it to end or stop it (kill {owner})"
    return f"in {file.parent}; wait for it to end or stop it"


def obstacle(folder: Path, error: OSError) -> str:
    """Say what is in the way of a folder."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            return f"a file at {there}"
    return f"{folder}: {error.strerror}"


def settle(request: Request | None, folder: Path) -> Path:
    """Write the settings, or find them there.

    Settings that nobody has edited give way to those of another request, for a first command may
    be wrong; but not once `tune` has begun, for its results would be lost.

    Raises:
        UserError: there are none, there are others, they are not this command's, or those that the
            request asks for are wrong, and then nothing is written.
    """
    file = folder / "params.yaml"
    there = find_settings(request, file)
    if request is None:
        return file
    text = as_text(request, folder)
    if there is not None and values_of(there) == values_of(text):
        return file
    if there is not None and (is_edited(there) or (folder / "outputs" / "tuned").exists()):
        raise UserError(
            f"{file}: expected no settings or the same, found those of another check; "
            f"go on with them ({go_on(folder)}), or name another folder with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "params.yaml.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        read_params(partial, base=folder)  # wrong settings would stand in the way of right ones
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def find_settings(request: Request | None, file: Path) -> str | None:
    """Read the settings of an earlier check; None: there are none, but a request.

    Raises:
        UserError: there is neither, or what is there was not written by ``ttt-lab check``.
    """
    try:
        file.stat()
    except OSError:  # perhaps a name that no file can have
        if request is None:
            raise UserError(
                f"{file}: expected the settings of an earlier check, found none; give --network, "
                "--labeled and --test"
            ) from None
        return None
    # What is no text is no settings of a check either.
    there = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not there.startswith(HEAD.splitlines()[0]):
        raise UserError(
            f"{file}: expected settings that ttt-lab check has written, found others, "
            "which stay as they are; name another folder with --out"
        )
    return there
