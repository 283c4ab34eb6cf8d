"""The command ``ttt-lab check``: the pipeline on one network and two folders, to a verdict.

It runs in a folder of its own, with settings of its own, and touches nothing else.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tttlab
from tttlab.config.params import Params, read_params
from tttlab.errors import UserError
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.compiler import postpone_compiler
from tttlab.runtime.garbage import collect_only_young
from tttlab.workflow import places
from tttlab.workflow.check_folder import find_settings, go_on, settle, taken
from tttlab.workflow.check_settings import MODEL, Request

# The stages in the order of dvc.yaml, and what each does. By the settings that are written there is
# nothing to align, so that stage is not announced.
STAGES = {
    "methods": "try every run on the network, with random images",
    "prepare": "read, check and divide the images",
    "pretrain": "load the network",
    "finetune": "match its classes with the folders",
    "source_stats": "measure the labeled images inside it",
    "tune": "choose settings on labeled images under held-out corruptions",
    "distance": "measure how far the test images lie",
    "adapt": "adapt to the test images, without their labels",
    "align": "",
    "evaluate": "compare with and without",
    "report": "write the report",
    "register": "register the network with its runs in MLflow",
}
OF_ALL = ("pretrain", "finetune", "source_stats", "tune", "distance", "adapt", "align")


def check(request: Request | None, folder: Path) -> None:
    """Run all stages, and print the verdict and the lines that follow it.

    Args:
        request: what to check; None: what the settings in the folder say.
        folder: for settings and results; made if it does not exist.

    Raises:
        UserError: the request, the settings or the images are wrong.
    """
    folder = folder.resolve()
    find_settings(request, folder / "params.yaml")  # in a folder of others nothing is written
    with taken(folder):
        file = settle(request, folder)
        params = read_params(file, base=folder)
        keep_freed_memory()
        collect_only_young()
        postpone_compiler()
        try:
            with within(folder):
                run_stages(params)
                tell(params, folder)
        except UserError as error:
            hint = f"settings: {file}; after an edit: {go_on(folder)}"
            raise UserError(f"{error} ({hint})") from error


def run_stages(params: Params) -> None:
    """Run all stages in their order, and announce those that have something to do."""
    announced = [stage for stage, words in STAGES.items() if words]
    for stage, words in STAGES.items():
        if words:
            step = f"[{announced.index(stage) + 1}/{len(announced)}]"
            print(f"{step} {stage}: {words}", flush=True)
        run_stage(params, stage)


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Have all stages read and write in a folder, not in the project, inside the context."""
    before = places.ROOT, places.OUTPUTS
    places.ROOT, places.OUTPUTS = folder, folder / "outputs"
    try:
        yield
    finally:
        places.ROOT, places.OUTPUTS = before


def run_stage(params: Params, stage: str) -> None:
    """Run a stage of the pipeline in this process, for all its networks or runs."""
    run = load_stage(stage)
    if stage in OF_ALL:
        run(params, [])
    else:
        run(params)


def load_stage(stage: str) -> Callable[..., None]:
    """Import a stage's script, which lies beside the package in the project's folder.

    Raises:
        UserError: it does not lie there.
    """
    root = Path(tttlab.__file__).resolve().parents[2]
    if not (root / "pipeline" / f"{stage}.py").is_file():
        raise UserError(
            f"ttt-lab check: expected the stages of the pipeline in {root / 'pipeline'}, found "
            "none; they come with the project's folder: clone it and run `uv sync` there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"pipeline.{stage}").run


def tell(params: Params, folder: Path) -> None:
    """Print the verdict, the lines that do what it recommends, and where to read more."""
    from tttlab.evaluation.results import Results
    from tttlab.reporting.verdict import judge_models

    results = Results.read(places.OUTPUTS, params.pairs)
    for verdict in judge_models(results, params, places.OUTPUTS):
        name = "" if verdict.model == MODEL else f"{verdict.model}: "
        print(f"\n{name}{verdict.sentence}\n")
        if verdict.code:
            print(f"The lines that do it:\n\n{verdict.code}")
    print(f"report     {places.OUTPUTS / 'report.html'}")
    print(f"settings   {folder / 'params.yaml'}   (edit, then: {go_on(folder)})")
