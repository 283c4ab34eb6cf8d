"""The distance of the target from the source in the trained networks, before any adaptation."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.data.splits import balanced_subset
from tttlab.errors import UserError
from tttlab.evaluation import shift_estimates
from tttlab.networks import checkpoints
from tttlab.runtime.devices import choose_device
from tttlab.runtime.parallel import in_order
from tttlab.runtime.progress import open_bar
from tttlab.shifts.shift import Shift
from tttlab.training.probing import encode
from tttlab.workflow import places
from tttlab.workflow.ledger import Ledger, written_whole
from tttlab.workflow.pieces import Network
from tttlab.workflow.shifted import open_test

FIRST = ["model", "seed", "reference", "target", "corruption", "severity"]  # columns


def measure_networks(params: Params, keys: Mapping[Network, str], ledger: Ledger) -> None:
    """Measure with networks, each with its key: a table for each."""
    device = choose_device(params.machine.device, params.machine.precision)
    workers = params.machine.workers if device.type == "cpu" else 0
    with open_bar("distance", len(keys), "network") as bar:
        tables = in_order(partial(measure_network, params, device), list(keys), workers)
        for (piece, key), table in zip(keys.items(), tables, strict=True):
            file = ledger.folder / f"{piece}.csv"
            with written_whole(file) as unfinished:
                table.to_csv(unfinished, index=False, float_format="%.6g")
            ledger.enter(str(piece), key, [file])
            bar.update()


def measure_network(params: Params, device: torch.device, piece: Network) -> pd.DataFrame:
    """Measure with one network; the table is empty if there are too few images."""
    network, _ = checkpoints.load(places.OUTPUTS / "finetuned" / str(piece), device)
    try:
        table = measure(params, network).assign(**piece._asdict())
    except UserError as error:  # no other result depends on this
        print(f"{piece.model}: distances are left out: {error}")
        return pd.DataFrame(columns=FIRST)
    return table[FIRST + [column for column in table if column not in FIRST]]


def measure(params: Params, network: nn.Module) -> pd.DataFrame:
    """Measure the distance from the unlabeled images to all others, and from the labeled ones.

    Raises:
        UserError: there are too few images.
    """

    def sample(images: ImageSet) -> shift_estimates.Sample:
        features, logits, _ = encode(network, images, params.machine.images_per_step)
        if not features.shape[1]:
            raise UserError(
                "the features of this network are unknown; return it as "
                "tttlab.networks.classifiers.Classifier(model, features='name of a layer')"
            )
        return shift_estimates.Sample(features.numpy(), logits.numpy())

    unlabeled, labeled = (
        open_reference(params, name) for name in ("unlabeled", "labeled_validation")
    )
    test, shifts = open_targets(params)
    shifted = {shift.name: shift.of(test) for shift in shifts}
    samples = {shift.name: sample(shift.seen(test, params.seed)) for shift in shifts}
    balanced = all((images.labels >= 0).all() for images in shifted.values())
    tables = []
    for name, images, unshifted in (
        ("unlabeled", unlabeled, {"labeled": labeled}),
        ("labeled", labeled, {}),
    ):
        sizes = [*map(len, shifted.values()), *map(len, unshifted.values())]
        size = shift_estimates.sample_size(len(images), *sizes, at_most=params.distance.images)
        labels = images.labels if name == "labeled" else None
        # Without labels the targets are not balanced by class: the reference must not be, either.
        groups = labels if balanced else None
        rows = choose_rows(params, images, size, "distance")
        reference = shift_estimates.Reference(sample(images), rows, labels, groups)
        targets = {
            key: sample(target).take(choose_rows(params, target, size, "distance"))
            for key, target in unshifted.items()
        }
        for key, target in shifted.items():
            targets[key] = samples[key].take(choose_rows(params, target, size, "shifts"))
        table = shift_estimates.measure_shifts(
            reference, targets, seed=params.seed, permutations=params.distance.permutations
        )
        tables.append(table.assign(reference=name))
    table = pd.concat(tables, ignore_index=True)
    about = {shift.name: (shift.corruption, shift.severity) for shift in shifts}
    about["labeled"] = ("none", 0)
    table[["corruption", "severity"]] = [about[name] for name in table["target"]]
    return table


def open_reference(params: Params, name: str) -> ImageSet:
    """Open part of the source images."""
    images = ImageSet.load(places.OUTPUTS / "data" / name)
    return images.view(choose_rows(params, images, params.distance.images, "distance"))


def open_targets(params: Params) -> tuple[ImageSet, list[Shift]]:
    """Open the test images and their shifts, without clean validation images, a reference here."""
    test, shifts = open_test(params, params.distance.images)
    return test, [shift for shift in shifts if not (shift.clean and shift.images)]


def choose_rows(params: Params, images: ImageSet, count: int | None, key: str) -> np.ndarray:
    """Choose images by number, balanced by class; larger choices contain smaller ones."""
    return balanced_subset(images.image_ids, images.labels, count, params.seed, key)
