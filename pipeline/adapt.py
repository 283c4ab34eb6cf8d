"""Adapt every model to the shifted test images, each on its own or along streams, by one run of params.yaml."""

import json

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, name: str) -> None:
    """Write outputs/adapted/<run>/<model>.parquet (and .steps.parquet) for every model, and outputs/adapt/<run>.json."""
    from tttlab.workflow.adaptations import adapt_model
    from tttlab.workflow.processes import open_processes, shared_work
    from tttlab.workflow.sweeps import open_sweeps

    fabric = open_processes(params)
    sets = ("data/test", "data/labeled_validation", "data/shifted")
    chosen = (f"tuned/{name}.json", f"methods/{name}.json")
    inputs = [places.OUTPUTS / folder for folder in ("finetuned", "source_stats", *sets, *chosen)]
    sections = {
        "seed": True,
        "seeds": True,
        "source_stats": True,
        "shifts": True,
        "adapt": {"protocol": True, "online": True, "augment": True, "curve": True, "runs": {name}},
    }
    settings = params.model_dump(mode="json", include=sections)
    sweeps = open_sweeps(params, name, fabric)
    with shared_work(fabric, f"adapt {name}", settings, inputs) as work:
        about = {
            model: adapt_model(params, name, model, own, work) for model, own in sweeps.items()
        }
        if fabric.is_global_zero:  # the first process writes
            (places.OUTPUTS / "adapt").mkdir(parents=True, exist_ok=True)
            (places.OUTPUTS / "adapt" / f"{name}.json").write_text(
                json.dumps(about, indent=2) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    command.main(run, __doc__, "run")
