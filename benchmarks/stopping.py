"""Does a signal tell when to stop the training on an image better than a fixed number of steps?

``python -m benchmarks.stopping`` takes the runs of the last execution (``outputs/``) that train on
single images, with the settings that tuning chose, lets them take ten steps, and notes after each
the prediction and the signals that a gate reads (`tttlab.adaptation.signals`). An image then stops
at the first number of steps, from none on, at which its signal looks like that of an unshifted
image, and at the latest after some steps that are the same for all. Threshold and latest step are
chosen by tuning's score on validation images, clean and under the held-out corruptions; so is the
fixed number of steps that the rule is compared with.

It prints a row per run, network and signal, with what stopping adds to the fixed number and its
95 % interval (docs/statistics.md), and writes ``outputs/stopping.csv``, a row per image and number
of steps.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.labeled import open_labeled
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import ABOVE, Gate
from tttlab.adaptation.method import Method
from tttlab.adaptation.predicting import Readout
from tttlab.adaptation.signals import Signal, logits_and_distance
from tttlab.adaptation.task import Task
from tttlab.config.params import Params, read_params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.errors import UserError, one_line
from tttlab.evaluation.intervals import gain_interval
from tttlab.experiments.gate_choice import QUANTILES, score
from tttlab.experiments.tuning import held_out_shifts
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.shifts.shift import Shift
from tttlab.workflow import places
from tttlab.workflow.loading import SourceNetwork, build_run, load_network, load_tuned
from tttlab.workflow.pieces import Pair, list_pairs
from tttlab.workflow.shifted import choose_images


@one_line()
def main() -> None:
    """Measure the runs of the last execution."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping", description=__doc__)
    parser.add_argument("--images", type=int, default=None, help="of each shift; default: all")
    parser.add_argument("--steps", type=int, default=10, help="of each run; default: 10")
    parser.add_argument("--runs", nargs="*", default=(), help="default: all that train")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UserError(f"--steps: expected at least 1, found {arguments.steps}")
    params = read_params(Path("params.yaml"))
    pairs = training_pairs(params, arguments.runs)
    rows = pd.concat(measure(params, pairs, arguments.images, arguments.steps))
    rows.to_csv(places.OUTPUTS / "stopping.csv", index=False)
    penalty = params.tune.clean_penalty
    summary = [
        row
        for _, part in rows.groupby(["run", "model"], sort=False)
        for row in summarise(part, penalty)
    ]
    print(pd.DataFrame(summary).to_string(index=False, float_format="%.1f"))


def training_pairs(params: Params, names: Sequence[str]) -> list[Pair]:
    """List the pairs of run and model that train on single images.

    Raises:
        UserError: a name is no run's, or no run trains.
    """
    pairs = []
    for pair in list_pairs(params, names):
        settings = params.run_settings(*pair)
        moves = settings.loop.steps and settings.loop.trainable != "none"
        if settings.trains and moves and settings.protocol == "episodic":
            pairs.append(pair)
    if not pairs:
        named = ", ".join(names) or "adapt.runs"
        raise UserError(f"{named}: expected a run that trains on single images, found none")
    return pairs


class WithDistance(Readout):
    """Predict an image's logits and, as one number more, its distance to the source.

    Args:
        statistics: source statistics of the layers that the distance is measured at.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def read(
        self, net: Bound, looks: Tensor, method: Method, views: Any, statistics: Statistics
    ) -> Tensor:
        """Give ``(K + 1,)``; the distance is that of the image itself, by its own parameters."""
        logits = super().read(net, looks, method, views, statistics)
        _, distance = logits_and_distance(net, looks[:1], self.statistics)
        return torch.cat([logits, distance])


def measure(
    params: Params, pairs: Sequence[Pair], count: int | None, steps: int
) -> Iterator[pd.DataFrame]:
    """Measure pairs on all training seeds, under the tested shifts and those of tuning."""
    test, tested = open_labeled(params, count)
    validation = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    validation = choose_images(params, validation, count or params.shifts.images)
    held_out = held_out_shifts(params.tune.severities, params.shifts.strength)
    looked_at = [(shift, shift.seen(validation, params.seed), True) for shift in held_out]
    looked_at += [(shift, shift.seen(test, params.seed), False) for shift in tested]
    sources: dict[tuple[str, int], SourceNetwork] = {}
    for pair in pairs:
        tuned = load_tuned(*pair)["settings"] | {"steps": steps}
        for seed in params.seeds:
            network = pair.model, seed
            if network not in sources:
                sources[network] = load_network(params, *network)
            task = build_run(params, *pair, sources[network], tuned).task
            task = replace(task, readout=WithDistance(sources[network].statistics))
            for shift, images, chooses in looked_at:
                yield measure_shift(task, shift, images, steps).assign(
                    run=pair.run, model=pair.model, seed=seed, chooses=chooses
                )
        print(pair, flush=True)


def measure_shift(task: Task, shift: Shift, images: ImageSet, steps: int) -> pd.DataFrame:
    """Measure images ``(N)`` that are seen under a shift: a row per image and number of steps."""
    names = [str(name) for name in images.image_ids]
    device = next(task.network.parameters()).device
    adapted = adapt(
        task.network,
        as_images(torch.from_numpy(np.ascontiguousarray(images.pixels))).to(device),
        task.method,
        task.loop,
        statistics=task.statistics,
        image_ids=names,
        seed=task.seed,
        record=range(steps + 1),
        readout=task.readout,
    )
    logits, distance = adapted.logits_at[..., :-1], adapted.logits_at[..., -1]
    labels = torch.from_numpy(np.asarray(images.labels))
    source = adapted.source_logits[:, :-1].argmax(-1) == labels
    return pd.DataFrame(
        {
            "shift": shift.name,
            "clean": shift.clean,
            "image": np.repeat(names, steps + 1),
            "steps": np.tile(np.arange(steps + 1), len(names)),
            "source": np.repeat(source.numpy(), steps + 1),
            "correct": (logits.argmax(-1) == labels[:, None]).numpy().ravel(),
            "confidence": logits.softmax(-1).amax(-1).numpy().ravel(),
            "distance": distance.numpy().ravel(),
            "loss": adapted.losses.numpy().ravel(),
        }
    )


def summarise(rows: pd.DataFrame, clean_penalty: float) -> Iterator[dict]:
    """Summarise one run on one model, over its seeds, by signal; shifts weigh by their images.

    Yields:
        accuracy in per cent on tested shifted images: ``before`` any step, after the ``fixed``
        number of ``steps``, ``stopped`` by the signal after ``taken`` steps on the mean; ``adds``,
        in points, what stopping adds to the fixed number, with ``low`` and ``high``; ``clean``
        after stopping; ``any``, the share that some number of steps classifies rightly, which only
        labels could choose.
    """
    chosen_on, tested = (table(part) for _, part in sorted(rows.groupby(~rows["chooses"])))
    most = tested["correct"].shape[1] - 1
    fixed = max(range(most + 1), key=lambda steps: (judge(chosen_on, steps, clean_penalty), -steps))
    shifted = ~tested["clean"]
    by_fixed = tested["correct"][:, fixed]
    for signal in ABOVE:
        threshold, latest = choose(chosen_on, signal, clean_penalty)
        taken = stopping_steps(tested[signal], signal, threshold, latest)
        by_signal = right_after(tested, taken)
        adds = by_signal[shifted].astype(int) - by_fixed[shifted]
        keys = tested["keys"][shifted]
        one_group = np.zeros(len(keys), int)
        interval = gain_interval(adds, keys["image"], keys["seed"], one_group, num_groups=1)
        yield {
            "run": rows["run"].iloc[0],
            "model": rows["model"].iloc[0],
            "signal": signal,
            "before": 100 * tested["correct"][shifted, 0].mean(),
            "fixed": 100 * by_fixed[shifted].mean(),
            "steps": fixed,
            "stopped": 100 * by_signal[shifted].mean(),
            "taken": taken[shifted].mean(),
            "adds": 100 * adds.mean(),
            "low": 100 * interval[0, 0],
            "high": 100 * interval[0, 1],
            "clean": 100 * by_signal[~shifted].mean(),
            "any": 100 * tested["correct"][shifted].any(1).mean(),
        }


def table(rows: pd.DataFrame) -> dict[str, Any]:
    """Arrange rows by image: ``correct`` and every signal ``(N, S + 1)``, along the steps.

    ``source`` and ``clean`` are ``(N,)``; ``keys`` name seed, shift and image.
    """
    keys = ["seed", "shift", "image", "clean", "source"]
    wide = rows.set_index([*keys, "steps"])[["correct", *ABOVE]].unstack("steps")
    about = wide.index.to_frame(index=False)
    found = {name: wide[name].to_numpy(float) for name in ABOVE}
    found |= {name: about[name].to_numpy(bool) for name in ("clean", "source")}
    return found | {"correct": wide["correct"].to_numpy(bool), "keys": about}


def choose(found: dict[str, Any], signal: Signal, clean_penalty: float) -> tuple[float, int]:
    """Choose a threshold and the latest step by tuning's score; of equals the fewest steps."""
    values = found[signal]
    thresholds = np.unique(np.nanquantile(values, QUANTILES if ABOVE[signal] else 1 - QUANTILES))
    rules = list(itertools.product(map(float, thresholds), range(values.shape[1])))

    def key(rule: tuple[float, int]) -> tuple[float, float]:
        taken = stopping_steps(values, signal, *rule)
        return judge(found, taken, clean_penalty), -taken.mean()

    return max(rules, key=key)


def judge(found: dict[str, Any], taken: np.ndarray | int, clean_penalty: float) -> float:
    """Give tuning's score of images that took so many steps ``(N,)``."""
    right = right_after(found, np.broadcast_to(taken, len(found["correct"])))
    return score(found["source"], right, found["clean"], clean_penalty)


def right_after(found: dict[str, Any], taken: np.ndarray) -> np.ndarray:
    """Tell which images are classified rightly after so many steps each, ``(N,)``."""
    return np.take_along_axis(found["correct"], taken[:, None], axis=1)[:, 0]


def stopping_steps(values: np.ndarray, signal: Signal, threshold: float, latest: int) -> np.ndarray:
    """Give the steps ``(N,)`` after which images stop, from their signal ``(N, S + 1)``.

    An image stops at the first step where a gate with this threshold would be shut, and at the
    latest after ``latest``. A signal that is not finite shuts it.
    """
    shut = ~np.asarray(Gate(signal, threshold).opens(values))
    shut[:, latest] = True
    return shut.argmax(1)


if __name__ == "__main__":
    main()
