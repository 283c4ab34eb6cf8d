"""What could be had if the shift were known: the ceiling of adapting to one image.

A single test image tells little about its shift. ``python -m benchmarks.known_shift`` takes that
out of the question: it does the very corruption of the test images to source images, whose labels
are known, and asks of the networks of the last execution (``outputs/``) how much then

- statistics give: ``normalised_n`` normalises BatchNorm by n changed source images; ``matched_n``
  undoes what the change did to the activations of n source images
  (`tttlab.adaptation.moment_matching`);
- training gives on top: ``trained`` takes steps on the cross-entropy of changed source images, and
  then does what ``matched`` does with the most of them. Rate and number of steps are those that are
  best for the network under the four held-out corruptions, on validation images.

It prints a row per network, with what training adds to ``matched`` and its 95 % interval
(docs/statistics.md), and writes ``outputs/known_shift.csv``, a row per network, seed, shift, way
and image. Nothing of this can be done at test time, where the shift is not known.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.labeled import open_labeled
from tttlab.adaptation.moment_matching import moments_matched, observe, together
from tttlab.adaptation.normalisation import running_moments
from tttlab.config.params import Params, read_params
from tttlab.config.values import HELD_OUT
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.errors import UserError, one_line
from tttlab.evaluation.intervals import gain_interval
from tttlab.networks.checkpoints import load
from tttlab.networks.taps import Moments, batch_norm_layers
from tttlab.seeding import numpy_generator
from tttlab.shifts.shift import Shift
from tttlab.workflow import places
from tttlab.workflow.pieces import Network, list_networks
from tttlab.workflow.shifted import choose_images

COUNTS = (4, 16, 64, 256)  # source images whose moments are taken
STEPS, RATES = (10, 30, 100), (1e-3, 1e-2)
BATCH = 32  # images of a step
FORWARD = 256  # images of a forward pass without gradients
MOMENTUM = 0.9
WAYS = ["none", *(f"{way}_{count}" for way in ("normalised", "matched") for count in COUNTS)]


@one_line()
def main() -> None:
    """Measure networks of the last execution."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.known_shift", description=__doc__)
    parser.add_argument("--images", type=int, default=None, help="of each shift; default: all")
    parser.add_argument("--models", nargs="*", default=(), help="default: all")
    arguments = parser.parse_args()
    params = read_params(Path("params.yaml"))
    measured = list_networks(params, arguments.models)
    rows = pd.concat(measure(params, measured, arguments.images))
    rows.to_csv(places.OUTPUTS / "known_shift.csv", index=False)
    summary = pd.DataFrame([summarise(part) for _, part in rows.groupby("model", sort=False)])
    print(summary.to_string(index=False, float_format="%.1f"))


def measure(
    params: Params, networks: Sequence[Network], count: int | None
) -> Iterator[pd.DataFrame]:
    """Measure networks under every corruption that is tested, and under the held-out ones.

    Raises:
        UserError: no corruption is tested.
    """
    test, shifts = open_labeled(params, count)
    tested = [(shift, test, False) for shift in shifts if shift.synthetic]
    if not tested:
        raise UserError("shifts.corruptions: expected some, for only they can be done again")
    validation = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    validation = choose_images(params, validation, count or params.shifts.images)
    severity = max(params.shifts.severities)
    held_out = [
        (Shift(name, severity, strength=params.shifts.strength), validation, True)
        for name in HELD_OUT
    ]
    source = draw_source(params)
    for model, seed in networks:
        network, _ = load(places.OUTPUTS / "finetuned" / model / str(seed))
        each = moments_of_each(network, as_batch(np.asarray(source.pixels)))
        for shift, images, chooses in [*held_out, *tested]:
            found = measure_shift(network, shift, images, source, each, params.seed)
            about = {"model": model, "seed": seed, "shift": shift.name, "chooses": chooses}
            frame = pd.DataFrame(found).assign(image=images.image_ids, **about)
            yield frame.melt([*about, "image"], var_name="way", value_name="correct")
        print(f"{model} {seed}", flush=True)


def draw_source(params: Params) -> ImageSet:
    """Draw the source images: the first ones for moments, others for the steps.

    Where there are too few for the steps, those others are gone through again.

    Raises:
        UserError: there are too few for the moments, or none is left for the steps.
    """
    source, first = ImageSet.load(places.OUTPUTS / "data" / "labeled_train"), COUNTS[-1]
    if len(source) <= first:
        raise UserError(f"labeled images: expected more than {first}, found {len(source)}")
    rows = numpy_generator(params.seed, "known_shift").permutation(len(source))
    others = np.resize(rows[first:], STEPS[-1] * BATCH)
    return source.view(np.concatenate([rows[:first], others]))


def measure_shift(
    network: nn.Module,
    shift: Shift,
    test: ImageSet,
    source: ImageSet,
    each: dict[str, Moments],
    seed: int,
) -> dict[str, np.ndarray]:
    """Give, by way, which test images ``(N,)`` are classified rightly.

    ``each`` are the moments of the source images as they are, from `moments_of_each`.
    """
    labels, looks = np.asarray(test.labels), as_batch(shift.apply(test, seed))
    changed = as_batch(shift.apply(source, seed + 1))  # other draws than those of the test images

    def right(net: nn.Module, wanted: dict[str, Moments], images: Tensor) -> np.ndarray:
        with torch.no_grad(), moments_matched(net, wanted) as moments:
            net(images)
        return classify(net, looks, wanted, moments) == labels

    found = {"none": classify(network, looks, {}, {}) == labels}
    for count in COUNTS:
        if normal := running(network):
            found[f"normalised_{count}"] = right(network, normal, changed[:count])
        wanted = moments_of(each, slice(count))
        found[f"matched_{count}"] = right(network, wanted, changed[:count])
    targets = torch.from_numpy(np.asarray(source.labels))
    for rate in RATES:
        for number, trained in train(network, each, changed, targets, rate):
            found[f"trained_{rate:g}_{number}"] = right(trained, wanted, changed[: COUNTS[-1]])
    return found


def as_batch(pixels: np.ndarray) -> Tensor:
    """Turn uint8 pixels ``(N, S, S, 3)`` into images ``(N, 3, S, S)``."""
    return as_images(torch.from_numpy(np.ascontiguousarray(pixels)))


@torch.no_grad()
def moments_of_each(network: nn.Module, images: Tensor) -> dict[str, Moments]:
    """Give each image's moments ``(N, C)``, by layer, as the network ordinarily runs."""
    parts = [observe(network, part)[1] for part in images.split(FORWARD)]
    return {
        layer: Moments(*map(torch.cat, zip(*(part[layer] for part in parts), strict=True)))
        for layer in parts[0]
    }


def moments_of(each: dict[str, Moments], part: slice) -> dict[str, Moments]:
    """Give the moments ``(C,)`` of some images together, by layer."""
    return {
        layer: together(Moments(*(value[part] for value in moments)))
        for layer, moments in each.items()
    }


def running(network: nn.Module) -> dict[str, Moments]:
    """Give the moments that BatchNorm layers normalise with."""
    return {
        f"{name}.input": running_moments(network.get_submodule(name))
        for name in batch_norm_layers(network)
    }


@torch.no_grad()
def classify(
    network: nn.Module, images: Tensor, wanted: dict[str, Moments], found: dict[str, Moments]
) -> np.ndarray:
    """Give the classes ``(N,)`` of images, with moments mapped from ``found`` to ``wanted``."""
    with moments_matched(network, wanted, found):
        parts = [network(part).logits.argmax(-1) for part in images.split(FORWARD)]
    return torch.cat(parts).numpy()


def train(
    network: nn.Module, each: dict[str, Moments], changed: Tensor, labels: Tensor, rate: float
) -> Iterator[tuple[int, nn.Module]]:
    """Train a copy on changed images, moments matched; give it after every number of `STEPS`.

    The first images, whose moments are taken in the end, are left out.
    """
    trained = copy.deepcopy(network)
    optimizer = torch.optim.SGD(trained.parameters(), lr=rate, momentum=MOMENTUM)
    for step in range(STEPS[-1]):
        start = COUNTS[-1] + step * BATCH
        part = slice(start, start + BATCH)
        with moments_matched(trained, moments_of(each, part)):
            loss = F.cross_entropy(trained(changed[part]).logits, labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in STEPS:
            yield step + 1, trained


def summarise(rows: pd.DataFrame) -> dict:
    """Summarise one network, over its seeds; shifts weigh alike, by their numbers of images.

    Returns:
        accuracy in per cent by way; ``trained`` with the rate and steps that are best under the
        held-out corruptions, which are ``chosen``; ``adds``, in points, what it adds to the same
        without training, with ``low`` and ``high``.
    """
    means = 100 * rows.groupby(["chooses", "way"])["correct"].mean()
    trained = [way for way in means[True].index if way.startswith("trained")]
    chosen = means[True][trained].idxmax()
    found = {way: means[False][way] for way in WAYS if way in means[False]}
    tested = rows[~rows["chooses"]].pivot_table(
        index=["seed", "shift", "image"], columns="way", values="correct", aggfunc="first"
    )
    differences = tested[chosen].to_numpy(int) - tested[f"matched_{COUNTS[-1]}"].to_numpy(int)
    keys = tested.index.to_frame(index=False)
    groups = np.zeros(len(keys), int)
    interval = gain_interval(differences, keys["image"], keys["seed"], groups, num_groups=1)
    low, high = 100 * interval[0]
    about = {"model": rows["model"].iloc[0], **found, "trained": means[False][chosen]}
    return about | {
        "chosen": chosen.removeprefix("trained_"),
        "adds": 100 * differences.mean(),
        "low": low,
        "high": high,
    }


if __name__ == "__main__":
    main()
