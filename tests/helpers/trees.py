"""Folders and tar files of noise images, and image sets gathered from them as `prepare` does."""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tttlab.config.images import ImageSpec, TargetSpec
from tttlab.data.reading import gather
from tttlab.data.sources import open_source

RNG = np.random.default_rng(0)


def picture(height=12, width=12):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tree(root, counts):
    """Write noise images root/<class>/<number>.png."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture().save(root / name / f"{index:03d}.png")
    return root


def spec(root=None, source="folder", **more):
    return TargetSpec(source=source, root=root and str(root), **more)


def fill(spec, which, size=8, downloads=Path("unused"), **options):
    """Open the source of a set and gather from it, as the stage does."""
    if which != "test":  # only the test set has a setting `labels`
        spec = ImageSpec(**spec.model_dump(exclude={"labels"}))
    return gather(open_source(spec, which, downloads), spec, which, size, 0, **options)


def collect(root, which="labeled", **more):
    options = {key: more.pop(key) for key in ("unreadable", "workers", "pack_below") if key in more}
    return fill(spec(root, **more), which, **options)


def pack(file, root, prefix=""):
    with tarfile.open(file, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, prefix + path.relative_to(root).as_posix(), recursive=False)
    return file
