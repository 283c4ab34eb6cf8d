"""How often intervals cover the true gain, simulated: ``docs/coverage.csv``, ``docs/coverage.png``.

Networks and images are drawn anew for every data set. An image's margin (its distance from the
decision boundary, positive if it is classified correctly) is a sum of four parts: of the image, of
the network, of the pair of both, and of the image under each shift. Adapting shifts the margin and
adds parts of the same kinds. All are normal, so that the true gain over all images and all training
seeds is known exactly.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from benchmarks.amount import FULL, SMOKE
from benchmarks.bootstrap import draw_weights
from tttlab.errors import one_line
from tttlab.evaluation.intervals import crossed_interval
from tttlab.seeding import numpy_generator

BLOCK = 100  # data sets that share the draws of their bootstrap samples
TAILS = (0.025, 0.975)
Interval = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Population:
    """The distribution of margins.

    A field without a comment is the standard deviation of the part that it names, and ``…_change``
    of the part that adapting adds. The unit is that of the part per image and shift.
    """

    accuracy: float  # under the middle shift
    gain: float  # mean change of the margin by adapting
    image: float = 1.0
    image_change: float = 0.3
    shift_change: float = 0.3
    pair: float = 0.5
    pair_change: float = 0.2
    network: float = 0.1
    network_change: float = 0.0
    spread: float = 0.6  # the shifts' mean margins lie evenly within ± this: not random


POPULATIONS = {
    "typical": Population(0.85, 0.15),
    "helps only": Population(0.85, 0.3, image_change=0, shift_change=0.05, pair_change=0),
    "flips under all shifts": Population(
        0.85, 0.3, image=4, image_change=1, shift_change=0.1, spread=0.2
    ),
    "rare flips": Population(0.88, 0.02, image_change=0.03, shift_change=0.03, pair_change=0.02),
}


@dataclass(frozen=True)
class Case:
    """One cell of the simulation; ``seed_effect`` takes the place of ``network_change``."""

    population: str
    images: int
    shifts: int
    seeds: int = 1
    seed_effect: float = 0.0


def list_cases() -> list[Case]:
    """List one-seed cases for every population, then several seeds for typical and rare flips."""
    sizes = [
        (images, shifts)
        for images in (50, 100, 500)
        for shifts in (1, 10, 45)
        if images * shifts <= 5_000
    ]
    one_seed = [Case(name, *size) for name in POPULATIONS for size in sizes]
    panels = [("typical", 2), ("typical", 3), ("typical", 5), ("rare flips", 3)]
    effects = {"typical": (0, 0.05, 0.25), "rare flips": (0, 0.005, 0.025)}
    grid = [(name, seeds, effect) for name, seeds in panels for effect in effects[name]]
    return one_seed + [
        Case(name, images, 10, seeds, effect)
        for (name, seeds, effect), images in itertools.product(grid, (100, 500))
    ]


def simulate(
    case: Case, data_sets: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw data sets: (n, S, G) sums of the differences over the shifts, (G,) numbers of flips."""
    law, mean = describe(case)
    mean = mean[:, None].astype(np.float32)
    scales = law.image, law.pair, law.network, 1
    scales_of_change = law.image_change, law.pair_change, law.network_change, law.shift_change
    sums, flips = np.empty((case.images, case.seeds, data_sets)), np.empty(data_sets)
    block = max(1, 2_000_000 // (case.images * case.shifts * case.seeds))
    for start in range(0, data_sets, block):
        part = slice(start, min(start + block, data_sets))
        before = _normal(generator, case, part, *scales) + mean
        change = _normal(generator, case, part, *scales_of_change)
        difference = (before + change + law.gain > 0).astype(np.int8) - (before > 0)
        sums[..., part] = difference.sum(axis=2).transpose(1, 2, 0)
        flips[part] = np.abs(difference).sum(axis=(1, 2, 3))
    return sums, flips


def describe(case: Case) -> tuple[Population, np.ndarray]:
    """Give the case's distribution, and the (J,) mean margins under its shifts."""
    law = replace(POPULATIONS[case.population], network_change=case.seed_effect)
    if case.seeds == 1:  # one fixed network: the pair's part is part of the image's
        law = replace(law, pair=0, pair_change=0, network=0)
    middle = stats.norm.ppf(law.accuracy) * np.sqrt(1 + law.image**2 + law.pair**2 + law.network**2)
    return law, middle + np.linspace(-1, 1, case.shifts) * law.spread * (case.shifts > 1)


def true_gain(case: Case) -> tuple[float, float]:
    """Give the gain over all images and networks, and its standard deviation between networks."""
    law, mean = describe(case)
    before = 1 + law.image**2 + law.pair**2
    after = before + law.shift_change**2 + law.image_change**2 + law.pair_change**2
    network = law.network * np.random.default_rng(0).standard_normal((20_000, 1))
    change = law.network_change * np.random.default_rng(1).standard_normal((20_000, 1))
    accuracies = stats.norm.cdf((mean + network) / np.sqrt(before))
    gains = stats.norm.cdf((mean + law.gain + network + change) / np.sqrt(after)) - accuracies
    after, before = after + law.network**2 + law.network_change**2, before + law.network**2
    accuracy = stats.norm.cdf(mean / np.sqrt(before))
    gain = stats.norm.cdf((mean + law.gain) / np.sqrt(after)) - accuracy
    return gain.mean(), gains.mean(axis=1).std().round(9)


def _normal(generator: np.random.Generator, case: Case, part: slice, *scales: float) -> np.ndarray:
    """Draw (g, n, J, S) sums of normal parts.

    ``scales`` are standard deviations per image, per pair, per network, and per value; a part of
    scale 0 is not drawn.
    """
    g, n, shifts, seeds = part.stop - part.start, case.images, case.shifts, case.seeds
    shapes = [(g, n, 1, 1), (g, n, 1, seeds), (g, 1, 1, seeds), (g, n, shifts, seeds)]
    parts = [
        scale * generator.standard_normal(shape, np.float32)
        for scale, shape in zip(scales, shapes, strict=True)
        if scale
    ]
    return sum(parts, np.zeros(shapes[-1], np.float32))


def reported(sums: np.ndarray, flips: np.ndarray, case: Case) -> Interval:
    """The interval that `evaluate` reports."""
    return tuple(crossed_interval(sums, np.full(sums.shape, float(case.shifts)), flips).T)


def plain_t(means: np.ndarray) -> Interval:
    """Student's t over image means."""
    means = means.mean(axis=1)
    half = stats.t.ppf(TAILS[1], len(means) - 1) * stats.sem(means)
    return means.mean(axis=0) - half, means.mean(axis=0) + half


def satterthwaite(means: np.ndarray) -> Interval:
    """One t quantile at Satterthwaite's degrees of freedom, with the variance of `reported`."""
    n, seeds, _ = means.shape
    centre = means.mean(axis=(0, 1))
    by_image, by_seed = means.mean(axis=1) - centre, means.mean(axis=0) - centre
    residuals = means - centre - by_image[:, None] - by_seed
    error = (residuals**2).sum(axis=(0, 1)) / ((n - 1) * (seeds - 1) * n * seeds)
    images = np.maximum(by_image.var(axis=0, ddof=1) / n - error, 0)
    networks = by_seed.var(axis=0, ddof=1) / seeds
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = (images + networks) ** 2 / (images**2 / (n - 1) + networks**2 / (seeds - 1))
    half = stats.t.ppf(TAILS[1], np.nan_to_num(freedom, nan=n - 1)) * np.sqrt(images + networks)
    return centre - half, centre + half


def percentile(
    means: np.ndarray, generator: np.random.Generator, resamples: int, *, over_seeds: bool
) -> Interval:
    """Percentile bootstrap over images; with ``over_seeds``, Owen's pigeonhole bootstrap."""
    blocks = _resampled(means, generator, resamples, over_seeds)
    ends = [np.quantile(drawn, TAILS, axis=0) for _, drawn in blocks]
    return tuple(np.concatenate(ends, axis=1))


def accelerated(means: np.ndarray, generator: np.random.Generator, resamples: int) -> Interval:
    """Efron's BCa bootstrap over images, as in `scipy.stats.bootstrap`.

    All data sets of a block share its draws.
    """
    ends = []
    for block, drawn in _resampled(means, generator, resamples, over_seeds=False):
        centre = block.mean(axis=0)
        below = ((drawn < centre - 1e-9).mean(axis=0) + (drawn <= centre + 1e-9).mean(axis=0)) / 2
        bias = stats.norm.ppf(below)
        skewness = np.nan_to_num(stats.skew(block, axis=0) if len(block) > 2 else 0)
        pulled = bias + stats.norm.ppf(TAILS)[:, None]
        levels = stats.norm.cdf(bias + pulled / (1 - skewness / (6 * np.sqrt(len(block))) * pulled))
        levels = np.nan_to_num(levels, nan=0.5)
        ends += [np.quantile(drawn[:, k], levels[:, k]) for k in range(drawn.shape[1])]
    return tuple(np.stack(ends, axis=1))


def _resampled(
    means: np.ndarray, generator: np.random.Generator, resamples: int, over_seeds: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the (n, g) image means of a block of data sets, and (resamples, g) resampled means."""
    n, seeds, data_sets = means.shape
    for start in range(0, data_sets, BLOCK):
        block = means[..., start : start + BLOCK]
        weights = np.concatenate(list(draw_weights(generator, n, resamples)))
        drawn = (weights @ block.reshape(n, -1) / n).reshape(resamples, seeds, -1)
        shares = np.ones((resamples, seeds))
        if over_seeds:
            shares = np.concatenate(list(draw_weights(generator, seeds, resamples)))
        yield block.mean(axis=1), (drawn * shares[:, :, None]).mean(axis=1)


def measure(
    case: Case,
    data_sets: int = FULL.data_sets,
    seed: int = 0,
    only: str = "",
    resamples: int = FULL.resamples,
) -> list[dict]:
    """Find the coverage and mean width of each method whose name contains ``only``."""
    generator = numpy_generator(seed, "coverage", repr(case))
    (sums, flips), (gain, spread) = simulate(case, data_sets, generator), true_gain(case)
    means = sums / case.shifts
    bootstrap = partial(percentile, means, generator, resamples)
    methods: dict[str, Callable[[], Interval]] = {"reported": lambda: reported(sums, flips, case)}
    if case.seeds == 1:
        methods |= {
            "t over images": lambda: plain_t(means),
            "percentile bootstrap": lambda: bootstrap(over_seeds=False),
            "BCa bootstrap": lambda: accelerated(means, generator, resamples),
        }
    else:
        methods |= {
            "Satterthwaite": lambda: satterthwaite(means),
            "percentile, images and seeds": lambda: bootstrap(over_seeds=True),
            "percentile, images": lambda: bootstrap(over_seeds=False),
        }
    rate = flips.mean() / (case.images * case.shifts * case.seeds)
    rows = []
    for name, find in methods.items():
        if only in name:
            low, high = find()
            covered = (low <= gain) & (gain <= high)
            ends = proportion_confint(covered.sum(), data_sets, method="wilson")
            row = {
                "method": name,
                "coverage": covered.mean(),
                "low": ends[0],
                "high": ends[1],
                "width": (high - low).mean(),
            }
            rows.append({**vars(case), "gain": gain, "flip_rate": rate, "seed_sd": spread, **row})
    return rows


@one_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run every case, write table and figure, and print the range of each method."""
    from benchmarks.coverage_figure import draw

    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="next to nothing of all, to see that it works; into outputs/smoke",
    )
    smoke = parser.parse_args(arguments).smoke
    amount, folder = (SMOKE, Path("outputs/smoke")) if smoke else (FULL, Path("docs"))
    began, rows = time.perf_counter(), []
    for case in list_cases():
        if smoke and case.images > 100:
            continue
        measured = measure(case, amount.data_sets, resamples=amount.resamples)
        coverages = [f"{row['method']} {row['coverage']:.3f}" for row in measured]
        print(case, *coverages, flush=True)
        rows += measured
    table = pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "coverage.csv", index=False, float_format="%.5g")
    draw(table, amount.data_sets).savefig(folder / "coverage.png", dpi=110)
    groups = table.assign(several=table["seeds"] > 1).groupby(["several", "method"])
    print(groups["coverage"].agg(["min", "median", "max"]))
    print(f"{amount.data_sets} data sets per case, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
