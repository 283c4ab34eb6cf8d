"""Draw the pictures of README.md from this project's own results: `make pictures`.

Run it after `make repro`. From outputs/ come docs/pictures/first_light.png, first_dark.png and
report.png, from the MLflow store mlflow.png. The screenshots need Chromium; without it the old ones
stay, with a line that says so.
"""

import base64
import io
import shutil
import subprocess
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from PIL import Image

from tttlab.config.params import read_params
from tttlab.errors import UserError, one_line
from tttlab.evaluation.results import Results
from tttlab.reporting import drawings, plots, style
from tttlab.reporting.figures import overview
from tttlab.reporting.pictures import Flip, Flips, read_flips
from tttlab.reporting.tested import Tested
from tttlab.reporting.words import percent
from tttlab.workflow import places
from tttlab.workflow.shifted import open_test

FOLDER = Path("docs/pictures")
LARGEST = 150_000  # bytes of a picture
TURNED_RIGHT, TURNED_WRONG = 4, 2  # examples, a row each
PORT = 5987
MLFLOW, KEPT = (1720, 900), (1270, 900)  # sizes; the right quarter is a panel of MLflow's, cut off
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@one_line()
def main() -> None:
    """Write all pictures."""
    params = read_params(Path("params.yaml"), base=places.ROOT)
    results = Results.read(places.OUTPUTS, params.pairs)
    tested, shifts = open_test(params)
    model, run = shown(results)
    seeds = {"seed": params.seed, "training_seed": params.seeds[0]}
    flips = read_flips(places.OUTPUTS, model, run, tested, shifts, **seeds)
    if flips is None:
        raise UserError(f"{model}/{run}: expected labeled predictions, found none")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        save(first_picture(results, flips), FOLDER / f"first_{theme}.png", theme)
    report = places.OUTPUTS / "report.html"
    photograph(report.resolve().as_uri(), FOLDER / "report.png", (1160, 1020))
    photograph_mlflow(FOLDER / "mlflow.png")


def shown(results: Results) -> tuple[str, str]:
    """Choose the run whose examples are shown: of those of the first model the one that gains most.

    Runs that train come first.
    """
    model = results.models[0]
    runs = results.acting_on(model)
    trained = [run for run in runs if results.trains(model, run)]
    return model, max(trained or runs, key=lambda run: results.summary[model, run]["gain"])


@plots.styled
def first_picture(results: Results, flips: Flips) -> Figure:
    """Draw examples with the prediction before and after, and the gain of every run beside them.

    Args:
        results: Of the project.
        flips: Examples of one run, drawn by seed: as they come, turned right and turned wrong.
    """
    model = flips.model
    table = drawings.at_a_glance(results, model)
    styles = plots.run_styles(results.runs)
    rows = overview.place(plots.drawn_runs(table, styles))
    height = rows[-1].below + 0.25
    figure = Figure(figsize=(8.4, height + 1.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(0.95, 1.0), wspace=0.08)
    draw_examples(left, flips)
    axes = right.subplots()
    overview.draw_rows(axes, table, styles, rows, overview.limits_of({model: table}))
    axes.set_ylim(height, 0)
    axes.set_xlabel("gain in accuracy, percentage points")
    source = percent(results.summary[model, flips.run]["accuracy_source"])
    title = f"{model}: {source} % without adaptation\n{Tested.of(results).sample}"
    axes.set_title(title, fontweight="bold")
    keys = overview.legend_of(table)
    right.legend(keys.values(), keys, loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def draw_examples(figure: Figure, flips: Flips) -> None:
    """Draw a row of images that adaptation turned right, and one that it turned wrong."""
    columns = max(TURNED_RIGHT, TURNED_WRONG)
    rows = figure.subfigures(2, 1)
    for part, examples, word, total, most in zip(
        rows,
        (flips.wrong_to_right, flips.right_to_wrong),
        ("right", "wrong"),
        flips.counts,
        (TURNED_RIGHT, TURNED_WRONG),
        strict=True,
    ):
        drawn = examples[:most]
        head = f"{flips.run}: {total:,} answers turned {word}, {len(drawn)} of them at random"
        part.suptitle(head, x=0.02, ha="left", fontsize=8, fontweight="bold")
        for axes, flip in zip(part.subplots(1, columns, squeeze=False)[0], drawn, strict=False):
            draw_example(axes, flip)
        for axes in part.axes[len(drawn) :]:
            axes.axis("off")


def draw_example(axes: Axes, flip: Flip) -> None:
    """Draw one shifted image with its shift, its class, and the prediction before and after."""
    with Image.open(io.BytesIO(base64.b64decode(flip.image.partition(",")[2]))) as picture:
        axes.imshow(np.asarray(picture), interpolation="none")
    shift = "\n".join(textwrap.wrap(flip.title.rpartition(", ")[2], 16))
    text = f"{shift}\ntrue: {flip.truth}\n{flip.before[0]} → {flip.after[0]}"
    axes.set_xlabel(text, color=plots.INK, fontsize=8)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def save(figure: Figure, path: Path, theme: str) -> None:
    """Write a figure in the light or the dark colours of the report."""
    themes = style.themes()
    if theme == "dark":
        recolor(figure, themes["light"], themes["dark"])
    figure.savefig(path, dpi=150, facecolor=themes[theme]["paper"], metadata={"Software": None})
    shrink(path)


def recolor(figure: Figure, light: dict[str, str], dark: dict[str, str]) -> None:
    """Give everything on a figure the colour of the same name on the dark page."""
    colors = {to_hex(light[name]): dark[name] for name in reversed(light)}
    colors |= {plots.INK: dark["ink"], plots.MUTED: dark["muted"], plots.PAPER: dark["paper"]}
    figure.draw_without_rendering()  # makes the labels of the axes
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or put is None:
                continue
            old = to_rgba_array(get())
            new = [to_rgba(colors.get(to_hex(color), color), color[3]) for color in old]
            if len(new) and not np.array_equal(old, new):
                put(new if len(new) > 1 else new[0])


def shrink(path: Path) -> None:
    """Write a PNG again with as many colours as fit into `LARGEST` bytes, and tell its size."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for colors in (256, 128, 64, 32):
        picture.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"{path}  {path.stat().st_size:,} bytes")


def photograph(address: str, path: Path, size: tuple[int, int], wait: int = 0) -> bool:
    """Take a picture of a page with Chromium, if there is one.

    Args:
        address: Of the page.
        path: Where the picture goes.
        size: Width and height of the window.
        wait: Milliseconds that scripts of the page may take.

    Returns:
        Whether the picture was taken.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{path} stays as it was: none of {', '.join(BROWSERS)} is installed")
        return False
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", f"--user-data-dir={profile}"),
            *(f"--window-size={size[0]},{size[1]}", f"--screenshot={path.resolve()}"),
            *([f"--virtual-time-budget={wait}"] if wait else []),
            address,
        ]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    if done.returncode:
        print(f"{path} stays as it was: {browser} ended with {done.returncode}")
        return False
    shrink(path)
    return True


def photograph_mlflow(path: Path) -> None:
    """Start MLflow's pages, take a picture of the comparison of runs, and stop the server."""
    from tttlab.tracking.pages import ui_command, ui_pages

    if not (places.ROOT / "mlflow.db").is_file():
        print(f"{path} stays as it was: there is no mlflow.db; run `make repro` first")
        return
    server = subprocess.Popen(
        ui_command(places.ROOT, PORT), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        root = f"http://127.0.0.1:{PORT}/"
        if answers(root):
            address = ui_pages(places.ROOT)["comparison"]
            if photograph(root + address, path, MLFLOW, 20_000):
                with Image.open(path) as picture:
                    left = picture.crop((0, 0, *KEPT))
                left.save(path, optimize=True)
        else:
            print(f"{path} stays as it was: MLflow did not answer within a minute")
    finally:
        server.terminate()
        server.wait()


def answers(address: str, tries: int = 60) -> bool:
    """Wait for a server to answer, a second between tries."""
    for _ in range(tries):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except OSError:
            time.sleep(1)
    return False


if __name__ == "__main__":
    main()
