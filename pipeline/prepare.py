"""Collect the image sets of params.yaml under outputs/data: checked, split, and packed, or noted where they lie."""

import json
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tttlab.config.params import Params
from tttlab.workflow import command, places

if TYPE_CHECKING:
    from tttlab.data.image_sets import ImageSet
    from tttlab.shifts.shift import Shift


SHOWN = 10  # of the files that were left out, in the terminal


def run(params: Params) -> None:
    """Write the sets into a folder beside outputs/data that takes its place at the end: it is never half full."""
    from tttlab.workflow.gathering import decode, open_sources, separate

    sets, shifts = separate(
        params, *decode(params, open_sources(params, places.ROOT / "downloads"))
    )
    target, partial = places.OUTPUTS / "data", places.OUTPUTS / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    summary = {name: write(images, name, partial / name) for name, images in sets.items()}
    summary |= write_shifted(shifts, partial / "shifted")
    (partial / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def write(images: "ImageSet", name: str, folder) -> dict[str, Any]:
    """Write one set, say so, and return its entry in the summary."""
    from tttlab.data.image_sets import class_counts

    images.save(folder)
    known = (images.labels >= 0).any()
    classes = f"{len(images.classes)} classes" if known else "no labels"
    print(
        f"{name:19}{len(images):7,} images, {classes}, from {images.source}{'' if images.packed else ', read in place'}"
    )
    skipped = images.skipped if name != "labeled_validation" else ()
    for line in skipped[:SHOWN]:
        print(f"  left out: {line}")
    if len(skipped) > SHOWN:
        place = places.OUTPUTS / "data" / folder.relative_to(places.OUTPUTS / "data.partial")
        print(f"  left out: {len(skipped) - SHOWN:,} more, see {place / 'meta.json'}")
    if name == "test" and not known:
        print(
            "  its accuracy will be unknown: the images lie in no class folders, or data.test.labels is none"
        )
    return {
        "images": len(images),
        "classes": len(images.classes) if known else 0,
        "images_per_class": class_counts(images) if known else {},
        "source": images.source,
        "sha256": images.digest(),
        "skipped": len(images.skipped),
        "packed": images.packed,
    }


def write_shifted(shifts: Sequence["Shift"], folder) -> dict[str, Any]:
    """Write the images of the shifted sets, with a list of them; return their entries in the summary."""
    folder.mkdir(parents=True)
    entries = [
        {
            "corruption": shift.corruption,
            "severity": shift.severity,
            "folder": quote(shift.name, safe=" "),
        }
        for shift in shifts
    ]
    (folder / "shifts.json").write_text(
        json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {
        shift.name: write(shift.images, shift.name, folder / entry["folder"])
        for shift, entry in zip(shifts, entries, strict=True)
    }


if __name__ == "__main__":
    command.main(run, __doc__)
