"""Find, check and decode the image sets of params.yaml; everything that a look at names can find wrong shows first."""

from pathlib import Path
from typing import NamedTuple

from pipeline.sizes import image_size
from tttlab import data
from tttlab.data import ImageSet
from tttlab.params import Params
from tttlab.shift_sets import Shifted, open_shift_set
from tttlab.shifts import Shift
from tttlab.sources import Source, open_source

TRAINED = ("unlabeled", "labeled")


class Opened(NamedTuple):
    """The sources of the three sets, and of the shifted sets by their names."""

    sets: dict[str, Source]
    shifted: dict[str, list[Shifted]]


def open_sources(params: Params, downloads: Path) -> Opened:
    """Open everything and compare the classes, before any image is decoded."""
    sets = {which: open_source(getattr(params.data, which), which, downloads) for which in (*TRAINED, "test")}
    classes = sets["labeled"].classes
    shifted = {name: list(open_shift_set(name, spec, classes)) for name, spec in params.shifts.sets.items()}
    tested = [("data.test", sets["test"])]
    tested += [(f"shifts.sets.{name}", each.source) for name, found in shifted.items() for each in found]
    for key, source in tested:
        data.check_classes(source.classes if source.labeled else (), classes, key)
    return Opened(sets, shifted)


def decode(params: Params, opened: Opened) -> tuple[dict[str, ImageSet], list[Shift]]:
    """Decode what is wanted of every set: the three, and the shifted ones with their images."""
    how = {"unreadable": params.data.unreadable, "pack_below": params.data.pack_below, "workers": params.machine.workers}
    size, classes = image_size(params), opened.sets["labeled"].classes
    sets = {which: data.gather(source, getattr(params.data, which), which, size, params.seed, **how)
            for which, source in opened.sets.items()}  # fmt: skip
    sets["test"] = data.align_classes(sets["test"], classes)
    shifts = []
    for name, found in opened.shifted.items():
        for each in found:
            groups = each.source.groups if each.source.labeled else 0 * each.source.groups
            chosen = data.balanced_subset(each.source.image_ids, groups, params.shifts.images, params.seed, "shifts")
            origin = f"{params.shifts.sets[name].format} {params.shifts.sets[name].root} {each.name} {each.severity or ''}"
            images = data.read_images(each.source, chosen, f"shifts.sets.{name}", size, origin.rstrip(), **how)
            shifts.append(Shift(f"{name}/{each.name}", each.severity, data.align_classes(images, classes)))
    if params.data.duplicates == "error":
        tested = {"data.test": sets["test"]} | {f"shifts.sets.{shift.name}": shift.images for shift in shifts}
        data.check_duplicates({f"data.{which}": sets[which] for which in TRAINED}, tested)
    return sets, shifts
