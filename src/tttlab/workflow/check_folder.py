"""The folder of a ``ttt-lab check``: its settings, which are the user's once they are edited."""

import shlex
from pathlib import Path

from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.workflow.check_settings import HEAD, Request, as_text, is_edited, values_of


def go_on(folder: Path) -> str:
    """Give the command that goes on with the settings in a folder."""
    return f"ttt-lab check --out {shlex.quote(str(folder))}"


def settle(request: Request | None, folder: Path) -> Path:
    """Write the settings, or find them there.

    Settings that nobody has edited give way to those of another request, for a first command may
    be wrong; but not once `tune` has begun, for its results would be lost.

    Raises:
        UserError: there are none, there are others, they are not this command's, or those that the
            request asks for are wrong, and then nothing is written.
    """
    file = folder / "params.yaml"
    there = find_settings(file)
    if request is None:
        if there is None:
            raise UserError(
                f"{file}: expected the settings of an earlier check, found none; give --network, "
                "--labeled and --test"
            )
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


def find_settings(file: Path) -> str | None:
    """Read the settings of an earlier check; None: there are none.

    Raises:
        UserError: what is there was not written by ``ttt-lab check``.
    """
    if not file.exists():
        return None
    # What is no text is no settings of a check either.
    there = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not there.startswith(HEAD.splitlines()[0]):
        raise UserError(
            f"{file}: expected settings that ttt-lab check has written, found others, "
            "which stay as they are; name another folder with --out"
        )
    return there
