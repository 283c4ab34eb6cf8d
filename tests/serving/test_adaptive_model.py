"""A model in a folder of its own: what is read back is what was written, and adapts alike."""

import json
from dataclasses import replace

import pytest
import torch

from tests.helpers import contract, networks, served
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.errors import UserError
from tttlab.networks import checkpoints
from tttlab.serving import adaptive_model
from tttlab.serving.adaptive_model import AdaptiveModel, ServedRun


def test_what_is_read_back_is_what_was_written(tmp_path):
    model, _ = served.model(tmp_path / "network")
    loaded = adaptive_model.load(served.written(tmp_path / "again"))
    assert (loaded.name, loaded.best, loaded.refused) == (model.name, model.best, model.refused)
    assert (loaded.classes, loaded.image_size) == (served.CLASSES, 16)
    assert list(loaded.runs) == list(model.runs)
    for name, run in loaded.runs.items():
        task = model.runs[name].task
        assert (run.task.method, run.task.loop, run.task.seed) == (task.method, task.loop, 3)
        assert run.gate == model.runs[name].gate
        assert run.task.statistics.keys() == task.statistics.keys()
        for key, value in task.statistics.items():
            torch.testing.assert_close(run.task.statistics[key], value)


@pytest.mark.parametrize(
    "name", [n for n in contract.names() if "episodic" in contract.load(n).protocols]
)
def test_every_method_adapts_as_before_it_was_written(name, tmp_path):
    """Its settings, the views that its head was trained on, and its own source statistics."""
    kind, method = contract.cases(name)[0]
    if any(part == "augmentation" for part in method.__dataclass_fields__):
        method = replace(method, augmentation=Augmentation(min_scale=0.4, jitter=0.1))
    network, statistics = contract.source(kind, method, torch.float32)
    loop = InnerLoop(steps=1 if method.trains else 0, lr=1e-3, trainable="encoder")
    run = ServedRun(Task(network, method, loop, statistics, seed=1), Gate("confidence", 0.9))
    objective = {"name": networks.HEADS[kind], **HEADS.get(networks.HEADS[kind], {})}
    settings = BACKBONES[kind.startswith("vit") or kind.endswith("vit")] | {"objective": objective}
    about = checkpoints.save(
        network, tmp_path / "network", settings=settings, classes=served.CLASSES, image_size=16
    )
    model = AdaptiveModel("m", about, {"run": run}, "run")
    adaptive_model.save(model, tmp_path / "served", tmp_path / "network")
    (loaded,) = adaptive_model.load(tmp_path / "served").runs.values()
    assert loaded.task.method == method
    images, results = contract.shifted(3, torch.float32), []
    for task in (run.task, loaded.task):
        arguments = task.network, images, task.method, task.loop
        results.append(adapt(*arguments, statistics=task.statistics, seed=task.seed).logits)
    torch.testing.assert_close(*results)


HEADS = {
    "simclr": {"hidden_dim": 16, "projection_dim": 8},
    "simsiam": {"hidden_dim": 16, "projection_dim": 16, "prediction_dim": 8},
    "mae": {"decoder_dim": 16},
    "clust3": {"heads": 2, "clusters": 4},
    "learned": {"stage": 3, "dim": 6},
}
BACKBONES = {
    False: {"backbone": "resnet18", "backbone_options": networks.RESNET, "stem": "small"},
    True: {"backbone": "vit_tiny_patch16_224", "backbone_options": networks.VIT, "stem": "small"},
}


def test_what_all_runs_share_is_written_once(tmp_path):
    folder = served.written(tmp_path)
    own = {path.parent.name for path in folder.glob("source_stats/*/*.safetensors")}
    assert own <= {"simclr"}
    assert (folder / "source_stats" / "statistics.safetensors").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


def test_a_run_is_found_by_name_and_the_best_one_without(tmp_path):
    model, _ = served.model(tmp_path)
    assert model.find(None)[0] == "memo"
    assert model.find("shrink")[0] == "shrink"
    with pytest.raises(UserError, match=r"^run: unknown run 'shrnk'; did you mean 'shrink'\?"):
        model.find("shrnk")
    with pytest.raises(UserError, match=r"^run: tent, which adapts along a stream"):
        model.find("tent")


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.json: expected a model that adapts, found none"):
        adaptive_model.load(tmp_path)
    folder = served.written(tmp_path)
    sidecar = folder / "network" / "network.json"
    about = json.loads(sidecar.read_text(encoding="utf-8"))
    sidecar.write_text(json.dumps(about | {"sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match=r"weights\.safetensors: expected the weights that"):
        adaptive_model.load(folder)
