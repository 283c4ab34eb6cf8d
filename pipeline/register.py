"""Register every model with its tuned runs in MLflow, ready to be loaded and served."""

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params) -> None:
    """Write outputs/served, and register what is new there under the alias `champion`."""
    from tttlab.evaluation.results import Results
    from tttlab.tracking.runs import start_run
    from tttlab.workflow.execution import parent_run
    from tttlab.workflow.registering import describe, register_model, write_model

    results = Results.read(places.OUTPUTS, params.pairs)
    parent = parent_run(params)
    for model in params.models:
        folder = places.OUTPUTS / "served" / model
        served = write_model(params, model, folder)
        about = {"stage": "register", "name": f"register {model}", "params": {}}
        with start_run(places.ROOT, **about, parent=parent, tags={"model": model}) as run:
            card = describe(params, results, served)
            print(register_model(run, folder, served, card))
    print(f"models   {places.look_with('ui')}   (page Models)")
    print(f"service  {places.look_with('serve')}")


if __name__ == "__main__":
    command.main(run, __doc__)
