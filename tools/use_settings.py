"""Copy settings to params.yaml; the first step of `make repro PARAMS=settings/<name>.yaml`.

The pipeline reads params.yaml alone. Changes in it are never lost: with git they must be committed
first, without git a copy is kept.
"""

import argparse
import hashlib
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

TARGET = Path("params.yaml")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", type=Path, help="a file like params.yaml")
    parser.add_argument(
        "--data", type=Path, help="a folder with train/ and test/ inside, in place of a download"
    )
    parser.add_argument(
        "--over", type=Path, default=TARGET, help="the file to replace (default: %(default)s)"
    )
    arguments = parser.parse_args()
    target = arguments.over
    try:
        changed = use(arguments.settings, arguments.data, target)
    except ValueError as error:
        sys.exit(f"error: {error}")
    holds = "now holds" if changed else "already held"
    print(f"{target} {holds} the settings of {arguments.settings}")


def use(settings: Path, data: Path | None = None, target: Path = TARGET) -> bool:
    """Write the settings to params.yaml, and tell whether that changed it.

    Args:
        settings: the file of settings.
        data: an image folder that replaces every data set that would be downloaded; its splits are
            its first-level folders.
        target: the file to replace; ready-made settings lie in ``settings`` beside it.

    Raises:
        ValueError: there is no such file or folder, or params.yaml has uncommitted changes.
    """
    if not settings.is_file():
        files = sorted((target.parent / "settings").glob("*.yaml"))
        raise ValueError(
            f"PARAMS: expected a file of settings, found none at {settings}; "
            f"there are {', '.join(map(str, files))}"
        )
    text = settings.read_bytes() if data is None else from_folder(settings, data)
    current = target.read_bytes() if target.is_file() else b""
    if same(current, text):
        return False
    if current and not is_kept(current, target):
        keep(current, target)
    target.write_bytes(text)
    stamp_of(target).parent.mkdir(parents=True, exist_ok=True)
    stamp_of(target).write_text(hashlib.sha256(text).hexdigest(), encoding="utf-8")
    return True


def from_folder(settings: Path, data: Path) -> bytes:
    """Read the settings, with an image folder for every data set that would be downloaded.

    Raises:
        ValueError: the folder lacks a split, or the settings say nothing of data.
    """
    yaml, text = YAML(), BytesIO()
    yaml.width = 10_000
    try:
        values = yaml.load(settings)
    except YAMLError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"PARAMS: expected YAML in {settings}, found none ({line})") from error
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise ValueError(f"PARAMS: expected a section data in {settings}, found none")
    for spec in values["data"].values():
        if isinstance(spec, dict) and str(spec.get("source", "")).startswith(("torch/", "hfds/")):
            if not (data / spec["split"]).is_dir():
                raise ValueError(
                    f"DATA: expected a folder with {spec['split']}/<class>/<image> inside, "
                    f"found none at {data}"
                )
            spec["source"], spec["root"] = "folder", str(data)
    yaml.dump(values, text)
    return text.getvalue()


def stamp_of(target: Path) -> Path:
    """Give the file that names the last text that this script wrote to a target."""
    return Path(".dvc", "tmp", "_".join(["settings_used", *target.parent.parts]))


def same(first: bytes, second: bytes) -> bool:
    """Compare two texts without their line ends, which git changes under ``core.autocrlf``."""
    return first.splitlines() == second.splitlines()


def is_kept(text: bytes, target: Path = TARGET) -> bool:
    """Tell whether a text of params.yaml can be restored.

    It can if it is committed, is among the ready-made settings, or was written by this script.
    """
    used = stamp_of(target)
    stamp = used.read_text(encoding="utf-8") if used.is_file() else ""
    copies = [file.read_bytes() for file in (target.parent / "settings").glob("*.yaml")]
    copies.append(committed(target) or b"")
    return any(same(text, copy) for copy in copies) or hashlib.sha256(text).hexdigest() == stamp


def committed(target: Path = TARGET) -> bytes | None:
    """Read params.yaml of the last commit; None without git, a repository, or the file in it."""
    command = ["git", "show", f"HEAD:./{target.as_posix()}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return shown.stdout if shown.returncode == 0 else None


def keep(text: bytes, target: Path = TARGET) -> None:
    """Copy a text of params.yaml to the ready-made settings, if it cannot be committed.

    Raises:
        ValueError: it can be committed.
    """
    if committed(target) is not None:
        raise ValueError(
            f"{target} has changes that would be lost; "
            "commit them or copy them to a file of your own first"
        )
    copy = target.parent / "settings" / f"before_{hashlib.sha256(text).hexdigest()[:8]}.yaml"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(text)
    print(f"{target} as it was is kept; PARAMS={copy} brings it back")


if __name__ == "__main__":
    main()
