"""The report's figures of signals beside the accuracy: distance, estimates, alignment, confidence.

Every function yields its figures by file name, with their captions; none if there is no data.
"""

import pandas as pd

from tttlab.evaluation.calibration import NUM_BINS
from tttlab.evaluation.results import CONTROL, Results, is_known
from tttlab.reporting import plots
from tttlab.reporting.drawing import Drawing, Named, under_one_caption
from tttlab.reporting.figures.signals import estimated_accuracy, gain_along, reliability
from tttlab.reporting.tested import Tested, span
from tttlab.reporting.words import percent, probability

_FEWEST = 3  # shifts along which a signal is drawn; fewer points show no order


def draw_distance(results: Results) -> Named:
    """Draw the gain of every shift along its distance to the source."""
    caption = (
        f"{Tested.of(results).points} Distance: how far the "
        "images' activation moments lie from the source, in units of their variation from one "
        "source image to the next, mean over the images."
    )
    table, label = results.rows("by_shift"), "distance to the source (1: source images)"
    yield from _along(results, table, "distance", "distance", label, caption)


def draw_alignment(results: Results) -> Named:
    """Draw the gain of every shift along the alignment of its gradients."""
    table = results.rows("alignment")
    if len(table):
        keys = ["model", "run", "shift"]
        severities = results.rows("by_shift")[[*keys, "severity"]]
        table = table.merge(severities, on=keys, how="left").fillna({"severity": 0})
    caption = (
        f"{Tested.of(results).points} Lines are 95 % intervals. "
        "Alignment: cosine between the gradient of the run's own loss and that of the supervised "
        "loss, mean over the images. It needs labels: it explains a gain, it cannot predict one."
    )
    label = "gradient alignment (cosine)"
    yield from _along(results, table, "cosine", "alignment", label, caption)


def draw_estimates(results: Results) -> Named:
    """Draw the estimated against the true accuracy of the source network under every shift."""
    distances = results.rows("distances", reference="labeled")
    if not len(distances):
        return
    estimates = distances[distances["metric"].str.startswith("estimated_accuracy")]
    keys = ["model", "metric", "target"]
    estimates = estimates.groupby(keys, sort=False)["value"].mean().reset_index()
    truth = results.rows("by_shift", run=CONTROL).rename(columns={"accuracy_source": "accuracy"})
    table = estimates.merge(
        truth[["model", "shift", "accuracy"]],
        left_on=["model", "target"],
        right_on=["model", "shift"],
    )
    table = table.dropna(subset=["value", "accuracy"])
    if len(table):
        title = "Estimated accuracy of the source network, from its confidences alone"
        caption = (
            f"A point per shift{', clean included' if (table['shift'] == 'clean').any() else ''}. "
            "Above the line: promised more than was true. "
            "References: Guillory et al. 2021 (difference of confidences), "
            "Garg et al. 2022 (average thresholded confidence)."
        )
        yield "estimated", Drawing(estimated_accuracy(table, title), "distance", caption)


def draw_reliability(results: Results) -> Named:
    """Draw the reliability diagrams of every run, a figure per model."""
    styles, figures = plots.run_styles(results.runs), {}
    for model in results.models:
        rows = results.rows("reliability", model=model, run=list(results.acting))
        if len(rows) and rows["accuracy"].notna().any():
            errors = {}
            for run in results.acting_on(model):
                entry = results.summary[model, run]
                errors[run] = percent(entry.get("ece_source")), percent(entry.get("ece_adapted"))
            tested = Tested.of(results)
            title = f"{model}: accuracy by confidence {tested.over_all}, {tested.sample}"
            figures[f"reliability_{model}"] = reliability(rows, styles, title, errors)
    caption = (
        f"Shifted predictions in {NUM_BINS} bins of confidence, larger points for fuller bins; "
        "hollow: source, filled: adapted. Below the diagonal: too sure. "
        "ECE: expected calibration error, the mean distance from the diagonal."
    )
    yield from under_one_caption("calibration", figures, caption)


def _along(
    results: Results, table: pd.DataFrame, signal: str, section: str, label: str, caption: str
) -> Named:
    """Draw the gain per shift along a signal, with rank correlations, a figure per model."""
    if signal not in table or not table[signal].notna().any():
        return
    if Tested.of(results).count < _FEWEST:
        return
    styles, figures = plots.run_styles(results.runs), {}
    name = label.split(" (")[0]
    known_rows = table[table[signal].notna() & table["gain"].notna()]
    for model in results.models:
        changing = [run for run in results.acting_on(model) if results.changed(model, run)]
        of_model = known_rows["model"] == model
        rows = known_rows[of_model & known_rows["run"].isin(changing)]
        if len(rows):
            counts = int(rows["n"].min()), int(rows["n"].max())
            what = "prediction" if counts[1] == 1 else "predictions"
            title = f"{model}: gain along the {name}, {span(*counts)} {what} per point"
            notes = _correlation_notes(results, model, signal)
            figures[f"{section}_{model}"] = gain_along(rows, signal, styles, title, label, notes)
    yield from under_one_caption(section, figures, caption)


def _correlation_notes(results: Results, model: str, signal: str) -> dict[str, str]:
    """Write the rank correlation of a signal with the gain over the shifts, by run."""
    correlations = results.rows("correlations", model=model, level="corruption", signal=signal)
    return {
        row.run: f"Spearman {row.spearman:+.2f}, p {probability(row.p)}".replace("-", "−")
        for row in correlations.itertuples()
        if is_known(row.spearman)
    }
