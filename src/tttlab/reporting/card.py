"""The card of a registered model: what it is, what its runs gained, and when not to use it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tttlab.evaluation.metrics import verdict as judge
from tttlab.evaluation.results import CONTROL, Results, shift_name
from tttlab.reporting.headline import rows
from tttlab.reporting.verdict import sentence
from tttlab.reporting.words import enumerate_words, interval, percent, points

_FEW = 12  # classes or shifts that are listed by name


def write_card(
    results: Results,
    model: str,
    *,
    trained_on: str,
    tested_on: str,
    about: Mapping[str, Any],
    best: str,
    refused: Mapping[str, str],
    links: Mapping[str, str | None],
) -> str:
    """Write the card of one model, in Markdown.

    Args:
        results: of all models.
        model: the model.
        trained_on: its images and its training, as a sentence.
        tested_on: what it was tested on, as a sentence.
        about: the contents of its ``network.json``.
        best: the run that it takes where none is named.
        refused: its runs that cannot be asked about single images → the reason.
        links: run → the address of the MLflow run that its numbers come from.
    """
    classes = about["classes"]
    named = ", ".join(classes[:_FEW]) + (", …" if len(classes) > _FEW else "")
    parts = [
        _opening(results, model, best),
        sentence(results, model).replace("[", r"\["),  # else MLflow takes [low, high] for a link
        f"**Trained on**: {trained_on}",
        f"**Tested on**: {tested_on}",
        f"**Classes** ({len(classes)}): {named}",
        _table(results, model, best, links),
        "**When not to use it**",
        "\n".join(f"- {line}" for line in _warnings(results, model, best, refused)),
        _use(model),
    ]
    return "\n\n".join(parts)


def _opening(results: Results, model: str, best: str) -> str:
    if best != CONTROL:
        return (
            "An image classifier that adapts to every image it is asked about, without its label, "
            "and answers with and without."
        )
    if not set(results.acting_on(model)) - set(results.streamed):
        return "An image classifier; no run of it adapts to single images."
    return (
        "An image classifier that answers as it is. Asked for a run by its name, it adapts to "
        "every image, without its label, and answers with and without."
    )


def _table(results: Results, model: str, best: str, links: Mapping[str, str | None]) -> str:
    heads = "run | without, % | with, % | gain, points | 95 % interval | clean | ms per image"
    keys = ("source", "adapted", "gain", "interval", "clean", "milliseconds_p50")
    lines = [f"| {heads} |", f"|---|{'--:|' * len(keys)}"]
    for row in rows(results):
        if row["model"] == model and row["run"] not in results.streamed:
            link = links.get(row["run"])
            name = f"[{row['run']}]({link})" if link else row["run"]
            name = f"**{name}** (default)" if row["run"] == best else name
            lines.append(f"| {' | '.join([name, *(row[key] for key in keys)])} |")
    return "\n".join(lines)


def _warnings(results: Results, model: str, best: str, refused: Mapping[str, str]) -> list[str]:
    """Say what the model does not know, and where its best run did harm, unless that is none."""
    entry = results.summary[model, best]
    lines = [
        "On images of other classes: it always answers one of its own, adapted or not.",
        "Under shifts that it was not tested on, before a few labeled images of them have shown "
        "that it helps there, too.",
    ]
    if harm := _harmed(results, model, best):
        lines.append(f"Under {enumerate_words(harm)}: there {best} lost accuracy.")
    if best != CONTROL:
        lines += _against(best, entry)
    lines += [f"For {reason}." for reason in refused.values()]
    return lines


def _against(best: str, entry: Mapping[str, Any]) -> list[str]:
    """Say when the plain network is to be asked instead of a run."""
    lines = []
    if judge(entry["gain_low"], entry["gain_high"]) != "helped":
        lines.append(f"Instead of the plain network: {best} is not known to help; ask for none.")
    return [
        *lines,
        f"Where an answer must come in less than {entry['milliseconds_p95']:.3g} ms on a machine "
        "like the one that measured it (95 of 100 images were faster); ask for none.",
    ]


def _harmed(results: Results, model: str, run: str) -> Sequence[str]:
    """Name the corruptions or shifts, with their losses, that a run is known to lose on."""
    table = results.rows("by_corruption", model=model, run=run)
    return [
        f"{shift_name(row['corruption'])} ({points(row['gain'])} "
        f"{interval(row['gain_low'], row['gain_high'])}, from {percent(row['accuracy_source'])} %)"
        for _, row in table.iterrows()
        if judge(row["gain_low"], row["gain_high"]) == "hurt"
    ]


def _use(model: str) -> str:
    return f"""**Use**

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{model}@champion")
photo = open("photo.png", "rb").read()
answers = model.predict([{{"image": photo}}], params={{"gate": True}})
```"""
