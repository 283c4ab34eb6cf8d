"""Let DVC work where there is no git repository, as in a project unpacked from a ZIP file; `make repro` does this first.

Once there is a repository the setting goes: with it DVC would run no experiments.
"""

import re
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(".dvc/config.local")  # of this copy of the project alone


def main() -> None:
    """Tell DVC, if it has not been told."""
    text = SETTINGS.read_text(encoding="utf-8") if SETTINGS.is_file() else ""
    told = (
        re.search(r"^\s*no_scm\s*=\s*true\s*$", text, flags=re.MULTILINE | re.IGNORECASE)
        is not None
    )
    if told == in_git(Path.cwd()):
        change = ["--unset", "core.no_scm"] if told else ["core.no_scm", "true"]
        subprocess.run([sys.executable, "-m", "dvc", "config", "--local", *change], check=True)


def in_git(root: Path) -> bool:
    """Tell whether a project lies in a git repository, its own or a larger one that does not ignore it."""
    if (root / ".git").exists():
        return True
    if not any((folder / ".git").exists() for folder in root.resolve().parents):
        return False
    try:  # DVC refuses files that git ignores
        return (
            subprocess.run(
                ["git", "check-ignore", "--quiet", "dvc.yaml"], cwd=root, check=False
            ).returncode
            != 0
        )
    except FileNotFoundError:  # there is a repository, but no git to ask
        return True


if __name__ == "__main__":
    main()
