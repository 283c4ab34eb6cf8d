"""What is tried before any training: the values that tuning may choose, weights, the true size."""

from contextlib import nullcontext

import pytest
import timm
import torch
from ruamel.yaml import YAML

from tools.stage_code import ROOT
from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.workflow.processes import check_processes
from tttlab.workflow.untrained import try_runs


@pytest.fixture
def params(tmp_path):
    """Give a function that reads the default settings with one model and one run more."""

    def read(run: dict, model: str = "simclr_convnet", **changes):
        settings = YAML().load(ROOT / "params.yaml")
        settings["models"] = {model: settings["models"][model]}
        settings["data"]["image_size"] = changes.pop("image_size", 16)
        settings["machine"]["devices"] = changes.pop("devices", "auto")
        settings["models"][model]["finetune"] |= changes.pop("finetune", {})
        settings["models"][model] |= changes
        settings["adapt"]["runs"] = {"none": {"method": "none"}, "tried": run}
        YAML().dump(settings, tmp_path / "params.yaml")
        return read_params(tmp_path / "params.yaml", base=tmp_path)

    return read


MEMO = {"method": "memo", "num_views": 2, "steps": 1, "lr": 0.01, "trainable": "norm"}


def test_every_value_that_tuning_may_choose_is_tried(params):
    good = params(MEMO | {"search": {"trainable": ["norm", "encoder"], "num_views": [2, 3]}})
    try_runs(good, "simclr_convnet", ["none", "tried"])
    low_rank = params(MEMO | {"search": {"trainable": ["norm", "lora"]}}, "mae_vit")
    try_runs(low_rank, "mae_vit", ["tried"])
    wrong = params(MEMO | {"search": {"trainable": ["norm", "lora"]}})
    with pytest.raises(UserError, match=r"linear layers .*\(search: trainable: lora\)"):
        try_runs(wrong, "simclr_convnet", ["tried"])


def test_weights_that_do_not_fit_are_told_before_any_training(params, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    wrong = params(MEMO, weights="weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: the weights do not fit"):
        try_runs(wrong, "simclr_convnet", ["tried"])


def test_the_true_size_of_the_images_counts_not_that_of_the_trial(params):
    with pytest.raises(UserError, match=r"multiple of the patches' 4 pixels, found 70"):
        try_runs(params(MEMO, "mae_vit", image_size=70), "mae_vit", ["tried"])


@pytest.mark.parametrize(
    ("epochs", "after", "norm_layer", "refused"),
    [
        (0, 0, None, True),
        (1, 0, None, False),
        (0, 1, None, False),
        (0, 0, "groupnorm1", False),
    ],
)
def test_meta_needs_statistics_of_batch_norm(params, epochs, after, norm_layer, refused):
    model = YAML().load(ROOT / "params.yaml")["models"]["simclr_convnet"]
    options = {"norm_layer": norm_layer} if norm_layer else {}
    inner = {"lr": 0.1, "steps": 1, "pairs": 1, "after": after}
    meta = params(
        MEMO,
        objective={"name": "simsiam", "hidden_dim": 8, "projection_dim": 8, "prediction_dim": 4},
        backbone_options=dict(model["backbone_options"]) | options,
        pretrain=dict(model["pretrain"]) | {"epochs": epochs, "warmup_epochs": 0},
        finetune={"mode": "meta", "inner": inner},
    )
    expected = r"models\.simclr_convnet\.finetune\.mode: meta does not change the statistics"
    with pytest.raises(UserError, match=expected) if refused else nullcontext():
        try_runs(meta, "simclr_convnet", ["tried"])


@pytest.mark.parametrize("launched", [False, True])
def test_what_trains_in_one_process_refuses_several_at_once(params, monkeypatch, launched):
    meta = {
        "objective": {
            "name": "simsiam",
            "hidden_dim": 8,
            "projection_dim": 8,
            "prediction_dim": 4,
        },
        "finetune": {"mode": "meta", "inner": {"lr": 0.1, "steps": 1, "pairs": 1}},
    }
    check_processes(params(MEMO, **meta))
    if launched:
        for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", "4")
    several = params(MEMO, **meta, devices="auto" if launched else 2)
    found = r"machine\.devices: .*models\.simclr_convnet.* one process, found " + "24"[launched]
    with pytest.raises(UserError, match=found):
        check_processes(several)
    check_processes(params(MEMO, devices=2))
