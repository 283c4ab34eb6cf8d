"""What the ready-made settings name and a fresh clone lacks: images of the user, and weights."""

from pathlib import Path

FOLDERS = ("unlabeled", "labeled/a", "test", "photo/a", "art_painting")
WEIGHTS = "downloads/tf_efficientnet_lite0.safetensors"


def lay_out(base: Path) -> Path:
    """Make them, all empty: enough for settings to be read. Returns ``base``."""
    for name in FOLDERS:
        (base / "data" / name).mkdir(parents=True)
    (base / WEIGHTS).parent.mkdir()
    (base / WEIGHTS).touch()
    return base
