"""Writing of the image sets of `prepare`, with a line on the terminal for each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tttlab.data.image_sets import ImageSet, class_counts
from tttlab.shifts.shift import Shift
from tttlab.workflow import places

SHOWN = 10  # files that were left out, as printed on the terminal


def write_set(images: ImageSet, name: str, folder: Path) -> dict[str, Any]:
    """Write one set, print a line about it, and return its entry in the summary."""
    images.save(folder)
    labeled = (images.labels >= 0).any()
    classes = f"{len(images.classes)} classes" if labeled else "no labels"
    where = "" if images.packed else ", read in place"
    print(f"{name:19}{len(images):7,} images, {classes}, from {images.source}{where}")
    skipped = images.skipped if name != "labeled_validation" else ()
    for line in skipped[:SHOWN]:
        print(f"  left out: {line}")
    if len(skipped) > SHOWN:
        final = places.OUTPUTS / "data" / folder.relative_to(places.OUTPUTS / "data.partial")
        print(f"  left out: {len(skipped) - SHOWN:,} more, see {final / 'meta.json'}")
    if name == "test" and not labeled:
        print(
            "  its accuracy will be unknown: the images lie in no class folders, "
            "or data.test.labels is none"
        )
    return {
        "images": len(images),
        "classes": len(images.classes) if labeled else 0,
        "images_per_class": class_counts(images) if labeled else {},
        "source": images.source,
        "sha256": images.digest(),
        "skipped": len(images.skipped),
        "packed": images.packed,
    }


def write_shifted(shifts: Sequence[Shift], folder: Path) -> dict[str, Any]:
    """Write the shifted sets and a list of them, and return their entries in the summary."""
    folder.mkdir(parents=True)
    entries = [
        {
            "corruption": shift.corruption,
            "severity": shift.severity,
            "folder": shift.file_name(),
        }
        for shift in shifts
    ]
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (folder / "shifts.json").write_text(text, encoding="utf-8")
    return {
        shift.name: write_set(shift.images, shift.name, folder / entry["folder"])
        for shift, entry in zip(shifts, entries, strict=True)
    }
