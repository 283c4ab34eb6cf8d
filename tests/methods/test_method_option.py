"""``pytest --method``: the contract for a user's method, and nothing else."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.helpers import contract
from tools.stage_code import ROOT
from tttlab.errors import UserError

METHOD = """
from dataclasses import dataclass

import torch

from tttlab.adaptation.method import Method


@dataclass(frozen=True)
class Flip(Method):
    protocols = ("episodic", "online")
    trains = False

    {views}

    def predict(self, net, image, views, statistics):
        return net(torch.stack([image, {mate}.flip(-1)])).logits.mean(0)
"""
RIGHT = METHOD.format(views="", mate="image")
WRONG = METHOD.format(
    views="def views(self, network, images, generators):\n"
    "        return images.mean(0).expand_as(images)",
    mate="views",
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "flip.py").write_text(RIGHT)
    (tmp_path / "users" / "mean.py").write_text(WRONG)
    (tmp_path / "users" / "headed.py").write_text(
        RIGHT.replace("trains = False", 'trains = False\n    head = "none such"')
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_runs_the_contract_of_that_method_alone(package):
    """Two methods at once, one of which looks at the other images of its group."""
    options = "-rA --tb=no -p no:cacheprovider -k vit --method users.flip --method users.mean"
    paths = os.pathsep.join([str(package), str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    counts = {"PASSED": Counter(), "FAILED": Counter()}
    for line in done.stdout.splitlines():
        outcome, _, test = line.partition(" tests/methods/test_contract.py::")
        if test:
            name, _, case = test.partition("[")
            counts[outcome][name] += 1
            assert case.startswith("vit-Flip()")
    # Fails for the method that looks at other images, and passes for the other.
    image_by_image = {
        "test_vectorised_equals_one_image_at_a_time": 3,  # inner loops
        "test_vectorised_equals_one_image_at_a_time_in_single_precision": 1,
        "test_results_depend_on_the_image_alone": 4,  # policies
    }
    assert counts["FAILED"] == image_by_image, done.stdout
    passed_by_both = {
        "test_the_network_is_left_as_it_was": 2,
        "test_a_stream_equals_one_batch_after_the_other": 2,
        "test_a_stream_depends_on_its_past_alone_and_leaves_the_network_as_it_was": 2,
    }
    assert counts["PASSED"] == image_by_image | passed_by_both, done.stdout


def test_a_method_that_no_network_of_the_tests_fits_is_told(package):
    message = (
        r"method users\.headed: the tests have no network with the head of objective none such"
    )
    with pytest.raises(UserError, match=message):
        contract.cases("users.headed")
    with pytest.raises(UserError, match="its module cannot be imported"):
        contract.cases("users.flap")
