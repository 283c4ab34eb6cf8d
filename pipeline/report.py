"""Show the comparison: figures, one HTML page, MLflow, and a table on the terminal."""

from functools import partial

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params) -> None:
    """Draw, write and log the results of evaluate."""
    from tttlab.data.image_sets import ImageSet
    from tttlab.evaluation.results import Results
    from tttlab.reporting import about, drawings, page, pictures, plots, report, verdict
    from tttlab.runtime.parallel import in_order
    from tttlab.workflow.report_log import log_report
    from tttlab.workflow.shifted import open_test

    outputs, shifts = places.OUTPUTS, params.shifts
    results = Results.read(outputs, params.pairs)
    test = ImageSet.load(outputs / "data" / "test")
    tested, tested_shifts = open_test(params)
    made = shifts.corruptions, shifts.severities, params.seed, shifts.strength
    shown = pictures.shift_pictures(test, *made)
    of_sets = pictures.set_pictures(tested_shifts)
    drawn = drawings.draw(results, shown, shifts.severities, of_sets, shifts.strength)
    files = {name: outputs / "figures" / f"{name}.png" for name in drawn}

    def draw(name: str) -> str:
        plots.save_png(drawn[name].figure, files[name])
        return page.to_svg(name, drawn[name])

    svgs = dict(zip(drawn, in_order(draw, list(drawn), params.machine.workers), strict=True))
    trained = [key for key in results.summary if results.trains(*key)]
    read = partial(
        pictures.read_flips,
        outputs,
        test=tested,
        shifts=tested_shifts,
        seed=params.seed,
        training_seed=params.seeds[0],
    )
    flips = [flip for key in trained if (flip := read(*key))]
    note = about.note(results, test.source, shifts, params.adapt.online)
    target = outputs / "report.html"
    verdicts = verdict.judge_models(results, params, outputs)
    settings = params.model_dump(mode="json")
    text = page.render(results, drawn, settings, note, flips, verdicts, lambda name, _: svgs[name])
    target.write_text(text, encoding="utf-8")
    log_report(params, results, files, target)
    print(f"\n{report.plain_table(results)}\n")
    for model in results.models:
        print(f"{model}: {report.sentence(results, model)}")
    print(f"\nreport   {target.resolve()}")
    print(f"MLflow   {places.look_with('ui')}")


if __name__ == "__main__":
    command.main(run, __doc__)
