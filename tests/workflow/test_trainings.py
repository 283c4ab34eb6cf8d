"""Several trainings side by side: what is finished is kept, whatever becomes of the others."""

import time

import pytest

from tools.stage_code import ROOT
from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.workflow import places
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import Network
from tttlab.workflow.trainings import train_networks


@pytest.fixture
def params():
    params = read_params(ROOT / "params.yaml")
    machine = params.machine.model_copy(update={"device": "cpu", "devices": 1, "workers": 2})
    return params.model_copy(update={"machine": machine})


@pytest.mark.parametrize("names", [("slow", "quick", "late"), ("quick", "slow", "late")])
def test_a_training_that_fails_takes_no_finished_one_with_it(names, params, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "OUTPUTS", tmp_path)

    def train(_params, network, place):
        time.sleep({"slow": 2, "quick": 0, "late": 60}[network.model])
        if network.model == "slow":
            raise UserError("the loss is not a number")
        file = place.folder / network.model / "network.json"
        file.parent.mkdir(parents=True)
        file.write_text("trained")
        return [file]

    keys = {Network(name, 0): f"key of {name}" for name in names}
    with pytest.raises(UserError, match="not a number"):
        train_networks(params, keys, Ledger("finetune"), train)
    assert {network.model for network in Ledger("finetune").missing(keys)} == {"slow", "late"}
