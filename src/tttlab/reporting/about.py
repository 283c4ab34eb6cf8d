"""What was run, in a sentence: models, runs, images, shifts, streams; and which runs train."""

from typing import TYPE_CHECKING

from tttlab.evaluation.results import CONTROL, Results
from tttlab.reporting.tested import without_labels
from tttlab.reporting.words import enumerate_words

if TYPE_CHECKING:
    from tttlab.config.experiments import Online
    from tttlab.config.images import Shifts

ARRIVALS = {  # by adapt.online.shifts
    "separate": "every shift a stream of its own",
    "continual": "the shifts of a severity one after another in one stream, without a reset",
    "gradual": "all shifts in one stream, their severity rising and falling",
    "mixed": "the shifts of a severity mixed in one stream",
}
_MADE = {"own": "", "cifar10_c": " (strengths of CIFAR-10-C, written anew)"}
_WITHOUT_SEVERITIES = {
    "continual": "the shifts one after another in one stream, without a reset",
    "gradual": "the shifts one after another in one stream, without a reset",
    "mixed": "the shifts mixed in one stream",
}


def arrival(stream: "Online", graded: bool = True) -> str:
    """Say how the images of a stream arrive.

    Args:
        stream: As params.yaml has it.
        graded: Whether any shift has severities; streams are ordered by them.
    """
    order = ", one class after another" if stream.order == "by_class" else ""
    arrivals = ARRIVALS if graded else ARRIVALS | _WITHOUT_SEVERITIES
    return f"{arrivals[stream.shifts]} (batches of {stream.batch_size}{order})"


def note(results: Results, source: str, shifts: "Shifts", stream: "Online") -> str:
    """Say in a sentence what was tested on what, and in another which shifts have no labels.

    Args:
        results: The results.
        source: Where the test images come from.
        shifts: As params.yaml has them.
        stream: How the images of streams arrive.
    """
    protocol = "each adapted to on its own, from the source weights"
    table = results.rows("by_shift")
    if streamed := results.streamed:
        arriving = arrival(stream, graded=bool((table["severity"] > 0).any()))
        mixed = f"{protocol}; {enumerate_words(streamed)}: {arriving}"
        protocol = mixed if set(results.acting) - set(streamed) else arriving
    each = " each" if len(results.models) > 1 else ""
    from_sets = table["shift"].str.contains("/")
    of_test_images = ~from_sets & ((table["shift"] != "clean") | (shifts.clean == "test"))
    tested = _count(int(table[of_test_images]["n"].max()) // results.seeds, "test image")
    times = f"with {results.seeds} seeds" if results.seeds > 1 else "once"
    return (
        f"{_count(len(results.models), 'model')}, trained {times}{each}; {_runs(results)}{each}; "
        f"{tested} from {source}, {_seen_under(shifts)}, {protocol}, without labels."
        f" {without_labels(results)}".rstrip()
    )


def _seen_under(shifts: "Shifts") -> str:
    parts = []
    if shifts.corruptions:
        corruptions = _count(len(shifts.corruptions), "synthetic corruption")
        levels = enumerate_words([str(severity) for severity in shifts.severities])
        severities = "severities" if len(shifts.severities) > 1 else "severity"
        parts.append(f"under {corruptions} at {severities} {levels}{_MADE[shifts.strength]}")
    tests_clean = shifts.clean == "test"
    parts.append(
        "clean" if tests_clean else "shifted as they are (clean: labeled images set aside)"
    )
    if shifts.sets:
        parts.append(f"those of {enumerate_words(list(shifts.sets))}")
    return enumerate_words(parts)


def controls(results: Results) -> list[str]:
    """Say which runs do not train, for a reader who asks what training is worth."""
    sentences = [f"{CONTROL} leaves the network alone."] if CONTROL in results.runs else []
    trained = {
        run
        for (model, run), entry in results.adapted.items()
        if results.trains(model, run) or "lr" in (entry.get("settings") or {})
    }
    idle = [run for run in results.acting if run not in trained]
    if idle and trained:
        do, they, give = ("do", "they", "give") if len(idle) > 1 else ("does", "it", "gives")
        sentences.append(
            f"{enumerate_words(idle)} {do} not train: "
            f"a gain that {they} also {give} is not a gain of training."
        )
    return sentences


def _count(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"


def _runs(results: Results) -> str:
    """Count the runs of a model; models may have different numbers of runs."""
    counts = sorted({len(results.runs_of(model)) for model in results.models})
    return _count(counts[0], "run") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
