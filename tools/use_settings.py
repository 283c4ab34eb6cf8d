"""Lay a ready-made file of settings over params.yaml: what `make repro PARAMS=settings/<name>.yaml` does first.

params.yaml stays the one file that the pipeline reads. Changes in it that nothing else holds are never lost: with git it wants
them committed, without it keeps a copy.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

TARGET, STAMP = Path("params.yaml"), Path(".dvc/tmp/settings_used")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", type=Path, help="a file like params.yaml")
    parser.add_argument(
        "--data", type=Path, help="a folder with train/ and test/ inside, in place of a download"
    )
    arguments = parser.parse_args()
    try:
        changed = use(arguments.settings, arguments.data)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"params.yaml {'now holds' if changed else 'already held'} the settings of {arguments.settings}"
    )


def use(settings: Path, data: Path | None = None) -> bool:
    """Write the settings to params.yaml, and tell whether that changed it.

    Args:
        settings: the file.
        data: an image folder that takes the place of every named data set; its splits are its first-level folders.

    Raises:
        ValueError: there is no such file or folder, or params.yaml holds changes that were not committed.
    """
    if not settings.is_file():
        raise ValueError(
            f"PARAMS: expected a file of settings, found none at {settings}; "
            f"there are {', '.join(map(str, sorted(Path('settings').glob('*.yaml'))))}"
        )
    text = settings.read_bytes() if data is None else from_folder(settings, data)
    own = TARGET.read_bytes() if TARGET.is_file() else b""
    if same(own, text):
        return False
    if own and not is_kept(own):
        keep(own)
    TARGET.write_bytes(text)
    STAMP.parent.mkdir(parents=True, exist_ok=True)
    STAMP.write_text(hashlib.sha256(text).hexdigest(), encoding="utf-8")
    return True


def from_folder(settings: Path, data: Path) -> bytes:
    """Read the settings with an image folder in place of every data set that would be downloaded."""
    from io import BytesIO

    yaml, text = YAML(), BytesIO()
    yaml.width = 10_000
    values = yaml.load(settings)
    for spec in values["data"].values():
        if isinstance(spec, dict) and str(spec.get("source", "")).startswith(("torch/", "hfds/")):
            if not (data / spec["split"]).is_dir():
                raise ValueError(
                    f"DATA: expected a folder with {spec['split']}/<class>/<image> inside, found none at {data}"
                )
            spec["source"], spec["root"] = "folder", str(data)
    yaml.dump(values, text)
    return text.getvalue()


def same(one: bytes, other: bytes) -> bool:
    """Compare two texts but for their line ends, which git changes in a checkout with core.autocrlf."""
    return one.splitlines() == other.splitlines()


def is_kept(text: bytes) -> bool:
    """Tell whether params.yaml as it is lies in git, among the ready-made settings, or was written by this script."""
    stamp = STAMP.read_text(encoding="utf-8") if STAMP.is_file() else ""
    known = (committed() or b"", *(file.read_bytes() for file in Path("settings").glob("*.yaml")))
    return any(same(text, other) for other in known) or hashlib.sha256(text).hexdigest() == stamp


def committed() -> bytes | None:
    """Read params.yaml as the last commit has it; None: there is no git, no repository, or no commit with it."""
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{TARGET}"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return None
    return shown.stdout if shown.returncode == 0 else None


def keep(text: bytes) -> None:
    """Copy params.yaml as it is to the ready-made settings, where no commit could hold it.

    Raises:
        ValueError: a commit can.
    """
    if committed() is not None:
        raise ValueError(
            "params.yaml has changes that would be lost; commit them or copy them to a file of your own first"
        )
    copy = Path("settings") / f"before_{hashlib.sha256(text).hexdigest()[:8]}.yaml"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(text)
    print(f"params.yaml as it was is kept; PARAMS={copy} brings it back")


if __name__ == "__main__":
    main()
