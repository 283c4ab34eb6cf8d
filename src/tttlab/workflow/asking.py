"""Single images classified without and with adaptation, by what the pipeline trained and tuned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tttlab.config.params import Params
from tttlab.data.decoding import to_square, why_unreadable
from tttlab.data.pixels import as_images
from tttlab.errors import UserError, choices
from tttlab.evaluation.recommendation import worth_running
from tttlab.evaluation.results import CONTROL
from tttlab.serving.adaptive_model import ServedRun
from tttlab.serving.answers import answer
from tttlab.workflow.loading import build_run, load_gate, load_network, load_tuned


def predict_images(
    params: Params, files: Sequence[Path], model: str | None = None, run: str | None = None
) -> list[dict[str, Any]]:
    """Classify images without and with adaptation, each on its own.

    Args:
        params: all settings.
        files: image files of any size, format and mode.
        model: a model's name; None: the first one of params.yaml.
        run: a run's name; None: the one that tuning recommends, or the control where no run scored
            above the network as it is.

    Returns:
        for each image its ``file``, ``model`` and ``run``, and what
        `tttlab.serving.answers.answer` tells.

    Raises:
        UserError: an image cannot be read, a name is unknown, or the run adapts along streams.
    """
    model, run = choose(params, model, run)
    source, tuned = load_network(params, model, params.seeds[0]), load_tuned(run, model)
    task = build_run(params, run, model, source, tuned["settings"]).task
    images = read(files, source.about["image_size"], params.data.depth).to(source.device)
    run_on_model = ServedRun(task, load_gate(tuned))
    names = [str(file) for file in files]
    rows = answer(run_on_model, images, names, source.about["classes"])
    about = [{"file": name, "model": model, "run": run} for name in names]
    return [first | row for first, row in zip(about, rows, strict=True)]


def choose(params: Params, model: str | None, run: str | None) -> tuple[str, str]:
    """Check the names of a model and a run, or choose them; see `predict_images`."""
    model = model or next(iter(params.models))
    if model not in params.models:
        raise UserError(f"--model: unknown model {model!r}; {choices(model, params.models)}")
    runs = [name for name in params.adapt.runs if model in params.models_of(name)]
    if run is not None and run not in runs:
        raise UserError(f"--run: unknown run {run!r}; {choices(run, runs)}")
    if run is None:
        alone = [name for name in runs if params.run_settings(name, model).protocol == "episodic"]
        run = worth_running({name: load_tuned(name, model) for name in alone}) or CONTROL
    if params.run_settings(run, model).protocol == "online":
        raise UserError(f"--run: {run} adapts along streams; choose one for single images")
    return model, run


def read(files: Sequence[Path], size: int, depth: int | None) -> torch.Tensor:
    """Decode image files as the pipeline does: ``(N, 3, size, size)``, in [0, 1]."""
    pixels = []
    for file in files:
        try:
            pixels.append(to_square(file, size, depth))
        except Exception as error:  # whatever Pillow raises
            raise UserError(
                f"{file}: expected an image, found none that can be read ({why_unreadable(error)})"
            ) from error
    return as_images(torch.from_numpy(np.stack(pixels)))
