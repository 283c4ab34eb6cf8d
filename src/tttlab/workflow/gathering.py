"""Find, check, decode and split the image sets of params.yaml, the checks of names first."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tttlab.config.params import Params
from tttlab.data import copies, image_sets
from tttlab.data.image_sets import ImageSet
from tttlab.data.reading import choose, gather, read_images
from tttlab.data.sources import ImageSource, open_source
from tttlab.data.splits import balanced_subset, check_sizes, split_validation
from tttlab.errors import UserError
from tttlab.networks.known_classes import class_list, order_of
from tttlab.shifts.sets import Shifted, left_out, open_shift_set
from tttlab.shifts.shift import Shift
from tttlab.workflow.sizes import check_size, image_size

TRAINED = ("unlabeled", "labeled")


class Opened(NamedTuple):
    """The sources of the three image sets, and those of the shifted sets by name."""

    sets: dict[str, ImageSource]
    shifted: dict[str, list[Shifted]]


def open_sources(params: Params, downloads: Path) -> Opened:
    """Open all sources and compare their classes, before any image is decoded."""
    check_size(params)
    sets = {
        name: open_source(getattr(params.data, name), name, downloads)
        for name in (*TRAINED, "test")
    }
    classes = sets["labeled"].classes
    chosen = choose(sets["labeled"], params.data.labeled, "labeled", params.seed)
    groups = sets["labeled"].groups[chosen]
    check_sizes(classes, np.bincount(groups, minlength=len(classes)))
    for name, model in params.models.items():
        if model.whole:
            key = f"models.{name}"
            order_of(class_list(model.model_dump(mode="json"), key), classes, key)
    shifted = {
        name: list(open_shift_set(name, spec, classes)) for name, spec in params.shifts.sets.items()
    }
    tested = [("data.test", sets["test"])]
    for name, members in shifted.items():
        tested += [(f"shifts.sets.{name}", member.source) for member in members]
    for key, source in tested:
        image_sets.check_classes(source.classes if source.labeled else (), classes, key)
        if not source.labeled and streams_by_class(params):
            raise UserError(
                f"adapt.online.order: by_class needs the labels of all images, and {key} has none; "
                "set shuffled"
            )
    for name, spec in params.shifts.sets.items():
        for line in left_out(f"shifts.sets.{name}", spec):
            print(line)
    return Opened(sets, shifted)


def streams_by_class(params: Params) -> bool:
    """Tell whether a run adapts along streams in which one class follows another."""
    runs = (
        params.run_settings(run, model)
        for run in params.adapt.runs
        for model in params.models_of(run)
    )
    return params.adapt.online.order == "by_class" and any(run.protocol == "online" for run in runs)


def decode(params: Params, opened: Opened) -> tuple[dict[str, ImageSet], list[Shift]]:
    """Decode the wanted images of the three image sets, and those of the shifted sets."""
    options = {
        "unreadable": params.data.unreadable,
        "pack_below": params.data.pack_below,
        "depth": params.data.depth,
        "workers": params.machine.workers,
    }
    size, classes = image_size(params), opened.sets["labeled"].classes
    sets = {
        name: gather(source, getattr(params.data, name), name, size, params.seed, **options)
        for name, source in opened.sets.items()
    }
    sets["test"] = image_sets.align_classes(sets["test"], classes)
    shifts = []
    for name, members in opened.shifted.items():
        spec = params.shifts.sets[name]
        for member in members:
            source = member.source
            groups = source.groups if source.labeled else 0 * source.groups
            rows = balanced_subset(
                source.image_ids, groups, params.shifts.images, params.seed, "shifts"
            )
            origin = f"{spec.format} {spec.root} {member.name} {member.severity or ''}".rstrip()
            images = read_images(source, rows, f"shifts.sets.{name}", size, origin, **options)
            images = image_sets.align_classes(images, classes)
            shifts.append(Shift(f"{name}/{member.name}", member.severity, images))
    return sets, shifts


def separate(
    params: Params, sets: dict[str, ImageSet], shifts: list[Shift]
) -> tuple[dict[str, ImageSet], list[Shift]]:
    """Settle duplicates, and split the labeled images into training and validation.

    The validation images are taken out of the unlabeled ones: pretraining never sees them.
    """
    by_key = {f"shifts.sets.{shift.name}": shift for shift in shifts}
    trained = {f"data.{name}": sets[name] for name in TRAINED}
    tested = {"data.test": sets["test"]}
    tested |= {key: shift.images for key, shift in by_key.items()}
    uncorrupted = ["data.test", *(key for key, shift in by_key.items() if not shift.severity)]
    trained, tested = copies.settle(trained, tested, uncorrupted, params.data.duplicates)
    train, validation = split_validation(
        trained["data.labeled"], params.data.labeled.validation, params.seed
    )
    every = trained["data.unlabeled"]
    unlabeled = copies.without("data.unlabeled", every, {"labeled_validation": validation})
    if shared := len(every) - len(unlabeled):  # there may be thousands: one line for all
        line = f"{shared:,} images that are validation images"
        unlabeled = replace(unlabeled, skipped=(line, *every.skipped))
    named = {
        "unlabeled": unlabeled,
        "labeled_train": train,
        "labeled_validation": validation,
        "test": tested["data.test"],
    }
    return named, [replace(shift, images=tested[key]) for key, shift in by_key.items()]
