"""Keys of pieces: hashes of everything that a result depends on. Nothing here imports torch."""

from collections.abc import Sequence

from tttlab.arc.settings import Settings
from tttlab.errors import UserError, choices
from tttlab.workflow import places
from tttlab.workflow.arc.preparing import EVALUATION, INVENTED, TRAINING, folder
from tttlab.workflow.ledger import Ledger


def training_key(settings: Settings, ledger: Ledger) -> str:
    """Hash what the offline network depends on."""
    sections = settings.model_dump(mode="json", include={"seed", "auxiliary", "network", "train"})
    del sections["auxiliary"]["test_time"]
    files = [folder() / TRAINING, folder() / INVENTED]
    return ledger.key([sections, settings.tasks.largest], files)


def adapting_key(settings: Settings, name: str, ledger: Ledger) -> str:
    """Hash what the predictions of a run depend on."""
    run = settings.adapt.run(name)
    include = {"seed", "auxiliary", "network"}
    inputs = [folder() / EVALUATION]
    if run.offline:
        inputs.append(places.OUTPUTS / "trained")
    if run.together:
        include.add("train")
    sections = settings.model_dump(mode="json", include=include)
    del sections["auxiliary"]["offline"]
    more = [run.model_dump(mode="json"), settings.adapt.steps(name), settings.tasks.largest]
    return ledger.key([sections, more], inputs)


def list_runs(settings: Settings, names: Sequence[str] = ()) -> list[str]:
    """List some runs, by default all.

    Raises:
        UserError: a run does not exist.
    """
    known = settings.adapt.runs
    for name in names:
        if name not in known:
            raise UserError(f"unknown run {name!r} in arc/params.yaml; {choices(name, known)}")
    return list(names or known)
