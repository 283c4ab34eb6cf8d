"""Try every run's method before any training, and record its code: DVC reruns it on changes."""

import json

from tttlab.adaptation.method_code import Code, describe_changes, method_code
from tttlab.config.params import Params
from tttlab.workflow import command, places
from tttlab.workflow.method_trials import read_code, try_what_is_new


def run(params: Params) -> None:
    """Write outputs/methods: <run>.json (code by model), tried (keys of what works) and usable."""
    if any(model.finetune.mode == "meta" for model in params.models.values()):
        from tttlab.workflow.processes import check_processes  # seconds of imports

        check_processes(params)
    folder = places.OUTPUTS / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    after: dict[str, dict[str, Code]] = {name: {} for name in params.adapt.runs}
    for name, code_by_model in after.items():
        for model in params.models_of(name):
            code_by_model[model] = method_code(params.run_settings(name, model).method)
    before = {path.stem: read_code(path) for path in folder.glob("*.json")}
    try_what_is_new(params, after, folder / "tried")
    for name, codes in after.items():
        if before.get(name) != codes:
            text = json.dumps(codes, indent=2) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    for name in before.keys() - after.keys():  # runs that no longer exist
        (folder / f"{name}.json").unlink()
    # This file never changes: the stages that depend on it wait for this one without rerunning.
    (folder / "usable").write_text("Every run was tried on its models.\n", encoding="utf-8")
    print("\n".join(describe_changes(before, after)))


if __name__ == "__main__":
    command.main(run, __doc__)
