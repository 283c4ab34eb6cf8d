"""The files of an execution with one small network, as benchmarks and later stages read them."""

import json
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from tests.helpers import trainings
from tools.stage_code import ROOT
from tttlab.data.pixels import as_images
from tttlab.networks import source_statistics
from tttlab.networks.checkpoints import build_network, read_sidecar, save

MODEL = "groupnorm"


def write_execution(project: Path, tuned: dict[str, dict[str, Any]] | None = None) -> Path:
    """Write ``params.yaml``, images, one untrained network with its source statistics, choices.

    The settings are those of settings/robust.yaml, for this network alone, one seed and fog.

    Args:
        project: where to.
        tuned: run → the values that tuning is to have chosen.

    Returns:
        the folder ``outputs``.
    """
    yaml = YAML()
    settings = yaml.load(ROOT / "settings" / "robust.yaml")
    settings["seeds"] = [0]
    section = settings["models"][MODEL]
    settings["models"] = {MODEL: section}
    settings["shifts"]["corruptions"] = ["fog"]
    for run in settings["adapt"]["runs"].values():
        run.pop("models", None)
    yaml.dump(settings, project / "params.yaml")
    outputs = project / "outputs"
    for number, name in enumerate(("test", "labeled_train", "labeled_validation")):
        trainings.image_set(12, number).save(outputs / "data" / name)
    (outputs / "data" / "shifted").mkdir()
    (outputs / "data" / "shifted" / "shifts.json").write_text(json.dumps([]), encoding="utf-8")
    write_network(section, outputs)
    for run, values in (tuned or {}).items():
        choice = {"tuned": True, "settings": values, "default": {}, "candidates": [], "gate": None}
        (outputs / "tuned" / run).mkdir(parents=True)
        file = outputs / "tuned" / run / f"{MODEL}.json"
        file.write_text(json.dumps(choice), encoding="utf-8")
    return outputs


def write_network(section: dict[str, Any], outputs: Path) -> None:
    """Write a network and its statistics, measured on the labeled images."""
    network, _ = build_network(section, trainings.CLASSES, trainings.SIZE, seed=0)
    folder = outputs / "finetuned" / MODEL / "0"
    about = {"settings": section, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    save(network, folder, **about)
    pixels = trainings.image_set(12, 1).pixels
    measured = source_statistics.layer_statistics(
        network.eval(), [as_images(torch.from_numpy(pixels))]
    )
    checkpoint = read_sidecar(folder)["sha256"]
    source_statistics.save(measured, outputs / "source_stats" / MODEL / "0", checkpoint=checkpoint)
