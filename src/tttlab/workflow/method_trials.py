"""Which runs have been tried on their models, and the trial of those that are new."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tttlab.adaptation.method_code import Code
from tttlab.config.params import Params

# What of a model may decide whether a run can be done on it.
NETWORK = {
    "backbone": True,
    "backbone_options": True,
    "stem": True,
    "objective": True,
    "finetune": {"probe"},
}


def read_code(path: Path) -> dict[str, Code]:
    """Read what the last time wrote for a run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def try_what_is_new(params: Params, codes: Mapping[str, Mapping[str, Code]], file: Path) -> None:
    """Try every run on its models, but for what is known to work from the last time, and note what works."""
    known = set(file.read_text(encoding="utf-8").split()) if file.exists() else set()
    keys = {
        (name, model): trial_key(params, name, model, code)
        for name, own in codes.items()
        for model, code in own.items()
    }
    if new := [pair for pair, key in keys.items() if key not in known]:
        from tttlab.workflow.untrained import try_runs  # seconds of imports

        print(
            f"trying on random images: {', '.join(dict.fromkeys(name for name, _ in new))}",
            flush=True,
        )
        for model in dict.fromkeys(model for _, model in new):
            try_runs(params, model, [name for name, own in new if own == model])
    file.write_text("\n".join(sorted({*keys.values()})) + "\n", encoding="utf-8")


def trial_key(params: Params, name: str, model: str, code: Code) -> str:
    """Hash what may decide whether a trial succeeds; that is no learning rate and no number of steps."""
    own = params.run_settings(name, model)
    how = {
        "trainable": own.loop.trainable,
        "normalisation": own.loop.normalisation,
        "average": own.loop.average > 0,
    }
    network = params.models[model].model_dump(mode="json", include=NETWORK) | {
        "image_size": params.data.image_size
    }
    what = [
        own.method,
        own.settings,
        how,
        own.protocol,
        params.adapt.online.batch_size,
        code,
        network,
    ]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
