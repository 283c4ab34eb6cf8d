"""Try every run's method before anything is trained, and note what it executes, so that DVC reruns a run when it changes."""

import json

from tttlab.adaptation.method_code import method_code, tell_changes
from tttlab.config.params import Params
from tttlab.workflow import command, places
from tttlab.workflow.method_trials import read_code, try_what_is_new


def run(params: Params) -> None:
    """Write outputs/methods: <run>.json, for every model what its method executes; what was tried; that all can be used."""
    folder = places.OUTPUTS / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    after = {
        name: {
            model: method_code(params.run_settings(name, model).method)
            for model in params.models_of(name)
        }
        for name in params.adapt.runs
    }
    before = {path.stem: read_code(path) for path in folder.glob("*.json")}
    try_what_is_new(params, after, folder / "tried")
    for name, codes in after.items():
        if before.get(name) != codes:
            (folder / f"{name}.json").write_text(
                json.dumps(codes, indent=2) + "\n", encoding="utf-8"
            )
    for name in before.keys() - after.keys():  # of runs that are no more
        (folder / f"{name}.json").unlink()
    # The same whatever was tried, so that what follows in dvc.yaml waits for this stage, and does not rerun.
    (folder / "usable").write_text("Every run was tried on its models.\n", encoding="utf-8")
    print("\n".join(tell_changes(before, after)))


if __name__ == "__main__":
    command.main(run, __doc__)
