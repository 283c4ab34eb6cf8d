"""Collect the three image sets of params.yaml under outputs/data: split, checked, and packed into one file each."""

import json
import os
import shutil

import pipeline
from tttlab.params import Params


def run(params: Params) -> None:
    """Write the sets into a folder beside outputs/data that takes its place at the end: it is never half full."""
    from tttlab.data import align_classes, check_duplicates, class_counts, gather, split_validation

    settings = params.data
    sets = {
        which: gather(
            getattr(settings, which),
            which,
            settings.image_size,
            params.seed,
            downloads=pipeline.ROOT / "downloads",
            unreadable=settings.unreadable,
            workers=params.machine.workers,
        )
        for which in ("unlabeled", "labeled", "test")
    }
    sets["test"] = align_classes(sets["test"], sets["labeled"].classes, "test")
    if settings.duplicates == "error":
        check_duplicates(sets)
    train, validation = split_validation(sets.pop("labeled"), settings.labeled.validation, params.seed)
    sets |= {"labeled_train": train, "labeled_validation": validation}

    target, partial = pipeline.OUTPUTS / "data", pipeline.OUTPUTS / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    summary = {}
    for name in ("unlabeled", "labeled_train", "labeled_validation", "test"):
        images = sets[name]
        images.save(partial / name)
        summary[name] = {
            "images": len(images),
            "classes": len(images.classes),
            "images_per_class": class_counts(images),
            "source": images.source,
            "sha256": images.digest(),
            "skipped": len(images.skipped),
        }
        print(f"{name:19}{len(images):7,} images, {len(images.classes) or 'no'} classes, from {images.source}")
        for line in images.skipped if name != "labeled_validation" else ():
            print(f"  left out: {line}")
    (partial / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


if __name__ == "__main__":
    pipeline.main(run, __doc__)
