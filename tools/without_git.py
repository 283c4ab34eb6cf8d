"""Let DVC work without a git repository, as in a project from a ZIP file; see `make repro`.

The setting is removed once there is a repository, because DVC runs no experiments with it.
"""

import re
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(".dvc/config.local")  # applies to this copy of the project only


def main() -> None:
    """Set or unset ``core.no_scm``, unless it is right already."""
    text = SETTINGS.read_text(encoding="utf-8") if SETTINGS.is_file() else ""
    pattern = r"^\s*no_scm\s*=\s*true\s*$"
    is_set = re.search(pattern, text, flags=re.MULTILINE | re.IGNORECASE) is not None
    if is_set == in_git(Path.cwd()):
        change = ["--unset", "core.no_scm"] if is_set else ["core.no_scm", "true"]
        subprocess.run([sys.executable, "-m", "dvc", "config", "--local", *change], check=True)


def in_git(root: Path) -> bool:
    """Tell whether a project is in a git repository, its own or a larger one that includes it."""
    if (root / ".git").exists():
        return True
    if not any((folder / ".git").exists() for folder in root.resolve().parents):
        return False
    command = ["git", "check-ignore", "--quiet", "dvc.yaml"]  # DVC refuses files that git ignores
    try:
        return subprocess.run(command, cwd=root, check=False).returncode != 0
    except FileNotFoundError:  # git is not installed
        return True


if __name__ == "__main__":
    main()
