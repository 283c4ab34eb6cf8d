"""A record of the runs that were tried on their models, and the trial of new ones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tttlab.adaptation.method_code import Code
from tttlab.config.params import Params
from tttlab.workflow.training_keys import backbone_code

# The settings of a model that may decide whether a run works on it.
NETWORK = {
    "backbone": True,
    "backbone_options": True,
    "stem": True,
    "mixer": True,
    "objective": True,
    "pretrain": {"epochs"},
    "finetune": {"mode", "inner", "probe", "classes", "mean", "std"},
    "weights": True,
}


def read_code(path: Path) -> dict[str, Code]:
    """Read the code of a run's method, as the previous execution wrote it; {} if unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def try_what_is_new(params: Params, codes: Mapping[str, Mapping[str, Code]], file: Path) -> None:
    """Try every run on its models unless it worked before, and record what works.

    Args:
        params: all settings.
        codes: run → model → the code of the run's method.
        file: the record of the previous execution, which is replaced.
    """
    working = set(file.read_text(encoding="utf-8").split()) if file.exists() else set()
    keys = {
        (name, model): trial_key(params, name, model, code)
        for name, code_by_model in codes.items()
        for model, code in code_by_model.items()
    }
    if new := [pair for pair, key in keys.items() if key not in working]:
        from tttlab.workflow.untrained import try_runs  # seconds of imports

        names = dict.fromkeys(name for name, _ in new)
        print(f"trying on random images: {', '.join(names)}", flush=True)
        names_by_model: dict[str, list[str]] = {}
        for name, model in new:
            names_by_model.setdefault(model, []).append(name)
        for model, names_on_model in names_by_model.items():
            try_runs(params, model, names_on_model)
    file.write_text("\n".join(sorted({*keys.values()})) + "\n", encoding="utf-8")


def trial_key(params: Params, name: str, model: str, code: Code) -> str:
    """Hash what may decide whether a trial succeeds: not learning rate or number of steps."""
    run = params.run_settings(name, model)
    loop = {
        "trainable": run.loop.trainable,
        "normalisation": run.loop.normalisation,
        "average": run.loop.average > 0,
    }
    network = params.models[model].model_dump(mode="json", include=NETWORK)
    network |= {"image_size": params.data.image_size, "code": backbone_code(network["backbone"])}
    batch_size, search = params.adapt.online.batch_size, run.decisive_search
    parts = [run.method, run.settings, search, loop, run.protocol, batch_size, code, network]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
