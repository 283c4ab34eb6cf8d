"""Show the comparison: figures, one HTML page, MLflow, and a table on the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

import pipeline
from tttlab.params import Params

if TYPE_CHECKING:
    from tttlab.report import Results


def run(params: Params) -> None:
    """Draw, write and log what evaluate computed."""
    from tttlab import plots, report
    from tttlab.data import ImageSet

    shifts = params.shifts
    results = report.Results.read(pipeline.OUTPUTS, list(params.models), list(params.adapt.runs))
    test = ImageSet.load(pipeline.OUTPUTS / "data" / "test")
    pictures = report.shift_pictures(test, shifts.corruptions, shifts.severities, params.seed)
    drawings = report.draw(results, pictures, shifts.severities)
    files = {name: pipeline.OUTPUTS / "figures" / f"{name}.png" for name in drawings}
    for name, path in files.items():
        plots.save_png(drawings[name].figure, path)
    page = pipeline.OUTPUTS / "report.html"
    note = report.about(results, test.source, shifts.corruptions, shifts.severities, params.adapt.protocol)
    page.write_text(report.render(results, drawings, params.model_dump(mode="json"), note), encoding="utf-8")
    _log(params, results, files, page)
    print(f"\n{report.plain_table(results)}\n")
    for model in results.models:
        print(f"{model}: {report.sentence(results, model)}")
    print(f"\nreport   {page.resolve()}\nMLflow   make ui   (or: uv run python -m pipeline.ui)")


def _log(params: Params, results: "Results", files: dict[str, Path], page: Path) -> None:
    """Put the comparison on MLflow's run of this execution, whose stages' runs lie below it."""
    import pandas as pd

    from pipeline.execution import execution
    from tttlab import report, tracking

    parent = tracking.pipeline_run(pipeline.ROOT, execution(params))
    links = {key: tracking.run_link(pipeline.ROOT, entry.get("mlflow_run_id")) for key, entry in results.adapted.items()}
    values = {f"{key}/{model}/{run}": entry[key] for (model, run), entry in results.summary.items()
              for key in ("gain", "accuracy_adapted", "clean_adapted")}  # fmt: skip
    tracking.compare(
        pipeline.ROOT,
        parent,
        table=pd.DataFrame([{"model": m, "run": r, **entry} for (m, r), entry in results.summary.items()]),
        description=report.markdown(results, links),
        figures=files,
        metrics=values,
        page=page,
    )


if __name__ == "__main__":
    pipeline.main(run, __doc__)
