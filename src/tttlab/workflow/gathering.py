"""Find, check, decode and split the image sets of params.yaml; all that a look at names can find wrong shows first."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tttlab.config.params import Params
from tttlab.data import copies, image_sets
from tttlab.data.image_sets import ImageSet
from tttlab.data.reading import gather, read_images
from tttlab.data.sources import Source, open_source
from tttlab.data.splits import balanced_subset, split_validation
from tttlab.shifts.sets import Shifted, left_out, open_shift_set
from tttlab.shifts.shift import Shift
from tttlab.workflow.sizes import image_size

TRAINED = ("unlabeled", "labeled")


class Opened(NamedTuple):
    """The sources of the three sets, and of the shifted sets by their names."""

    sets: dict[str, Source]
    shifted: dict[str, list[Shifted]]


def open_sources(params: Params, downloads: Path) -> Opened:
    """Open everything and compare the classes, before any image is decoded."""
    sets = {
        which: open_source(getattr(params.data, which), which, downloads)
        for which in (*TRAINED, "test")
    }
    classes = sets["labeled"].classes
    shifted = {
        name: list(open_shift_set(name, spec, classes)) for name, spec in params.shifts.sets.items()
    }
    tested = [("data.test", sets["test"])]
    tested += [
        (f"shifts.sets.{name}", each.source) for name, found in shifted.items() for each in found
    ]
    for key, source in tested:
        image_sets.check_classes(source.classes if source.labeled else (), classes, key)
    for name, spec in params.shifts.sets.items():
        for line in left_out(f"shifts.sets.{name}", spec):
            print(line)
    return Opened(sets, shifted)


def decode(params: Params, opened: Opened) -> tuple[dict[str, ImageSet], list[Shift]]:
    """Decode what is wanted of every set: the three, and the shifted ones with their images."""
    how = {
        "unreadable": params.data.unreadable,
        "pack_below": params.data.pack_below,
        "depth": params.data.depth,
        "workers": params.machine.workers,
    }
    size, classes = image_size(params), opened.sets["labeled"].classes
    sets = {
        which: gather(source, getattr(params.data, which), which, size, params.seed, **how)
        for which, source in opened.sets.items()
    }
    sets["test"] = image_sets.align_classes(sets["test"], classes)
    shifts = []
    for name, found in opened.shifted.items():
        for each in found:
            groups = each.source.groups if each.source.labeled else 0 * each.source.groups
            chosen = balanced_subset(
                each.source.image_ids, groups, params.shifts.images, params.seed, "shifts"
            )
            origin = f"{params.shifts.sets[name].format} {params.shifts.sets[name].root} {each.name} {each.severity or ''}"
            images = read_images(
                each.source, chosen, f"shifts.sets.{name}", size, origin.rstrip(), **how
            )
            shifts.append(
                Shift(
                    f"{name}/{each.name}", each.severity, image_sets.align_classes(images, classes)
                )
            )
    return sets, shifts


def separate(
    params: Params, sets: dict[str, ImageSet], shifts: list[Shift]
) -> tuple[dict[str, ImageSet], list[Shift]]:
    """Settle what is there twice, and split the labeled images into training and validation, which pretraining never sees."""
    keys = [f"shifts.sets.{shift.name}" for shift in shifts]
    trained = {f"data.{which}": sets[which] for which in TRAINED}
    tested = {"data.test": sets["test"]} | {
        key: shift.images for key, shift in zip(keys, shifts, strict=True)
    }
    uncorrupted = [
        "data.test",
        *(key for key, shift in zip(keys, shifts, strict=True) if not shift.severity),
    ]
    trained, tested = copies.settle(trained, tested, uncorrupted, params.data.duplicates)
    train, validation = split_validation(
        trained["data.labeled"], params.data.labeled.validation, params.seed
    )
    unlabeled = copies.without(
        "data.unlabeled", trained["data.unlabeled"], {"labeled_validation": validation}
    )
    if shared := len(trained["data.unlabeled"]) - len(
        unlabeled
    ):  # one line of them, which may be thousands
        told = f"{shared:,} images that are validation images"
        unlabeled = replace(unlabeled, skipped=(told, *trained["data.unlabeled"].skipped))
    named = {
        "unlabeled": unlabeled,
        "labeled_train": train,
        "labeled_validation": validation,
        "test": tested["data.test"],
    }
    return named, [
        replace(shift, images=tested[key]) for key, shift in zip(keys, shifts, strict=True)
    ]
