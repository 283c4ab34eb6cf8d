"""docs/tour.ipynb shows what a fresh run shows, and what it says holds for another training too."""

import json
import re

import nbformat
import pytest

from tools.stage_code import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
# What its last cell says, in points: run → the least and the largest gain, and gain by training.
GAIN = {
    "nothing": (0, 0),
    "re-normalise": (15, 60),
    "train": (-6, 8),
    "train, re-normalised": (9, 64),
    "blurred": (12, 68),
}
BY_TRAINING = {"train": (-6, 8), "train, re-normalised": (-6, 4), "blurred": (-3, 8)}
NUMBER = r"[+−-]?\d+\.\d"
INTERVAL = rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    """All that the cells print."""
    return "\n".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def rows(notebook):
    """Read the tables: run → the (mean, low, high) of its gain and, where it trains, of that."""
    table = {}
    for line in printed(notebook).splitlines():
        name, *_ = re.split(r"\s{2,}", line)
        if name in GAIN:
            table[name] = [
                tuple(float(value) for value in values) for values in re.findall(INTERVAL, line)
            ]
    return table


def assert_what_it_says_holds(notebook):
    table = rows(notebook)
    assert table.keys() == GAIN.keys()
    for name, (least, most) in GAIN.items():
        (gain, low, high), *training = table[name]
        assert least <= gain <= most, name
        assert low <= gain <= high
        assert len(training) == (name in BY_TRAINING)
        if training:
            least, most = BY_TRAINING[name]
            assert least <= training[0][0] <= most, name
    # The difference of both gains is what training adds to the same normalisation.
    for name in ("train, re-normalised", "blurred"):
        added = table[name][0][0] - table["re-normalise"][0][0]
        assert added == pytest.approx(table[name][1][0], abs=0.11)  # each is rounded to a tenth
    assert table["re-normalise"][0][1] > 0  # the interval leaves out 0
    clean = float(re.search(r"accuracy on clean digits (\S+)%", printed(notebook))[1])
    assert clean > 90


def test_the_stored_notebook_is_a_whole_run_and_small():
    text = TOUR.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 400_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {(output.output_type, output.get("name")) for output in outputs(notebook)}
    assert kinds == {("stream", "stdout"), ("display_data", None)}  # no error, no warning
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 3
    assert str(ROOT) not in text
    assert json.loads(text)["metadata"].keys() == {"kernelspec", "language_info"}
    assert_what_it_says_holds(notebook)


@pytest.mark.slow
def test_what_the_notebook_says_holds_for_another_training(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(TOUR, as_version=4)
    first = next(cell for cell in notebook.cells if "SEED = 0" in cell.source)
    first.source = first.source.replace("SEED = 0", "SEED = 1")
    stored = rows(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert_what_it_says_holds(notebook)
    assert rows(notebook) != stored  # it was another training
