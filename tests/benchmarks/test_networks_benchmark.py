"""Networks beside one of them: paired by image and shift, with the report's own interval."""

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import benchmarks.networks
from benchmarks.networks import compare, main
from tools.stage_code import ROOT
from tttlab.errors import UserError
from tttlab.evaluation.metrics import summarise


def table(right: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Make predictions of a network: ``right`` (shifts, seeds, images), the first shift clean."""
    rows = []
    for shift, of_shift in zip(("clean", "fog-5", "snow-5"), right, strict=True):
        for seed, of_seed in enumerate(of_shift):
            for image, (is_right, label) in enumerate(zip(of_seed, labels, strict=True)):
                prediction = label if is_right else (label + 1) % 3
                rows.append((str(image), shift, seed, label, prediction))
    columns = ["image_id", "shift", "seed", "label", "source_prediction"]
    made = pd.DataFrame(rows, columns=columns)
    return made.assign(
        adapted_prediction=made["source_prediction"],
        untrained_prediction=made["source_prediction"],
        corruption=made["shift"],
        severity=5,
        source_confidence=0.5,
        adapted_confidence=0.5,
        loss_first=np.nan,
        loss_last=np.nan,
        distance=0.0,
        gate_open=True,
        fell_back=False,
        milliseconds=1.0,
        gate_milliseconds=0.0,
    )


@pytest.fixture
def networks():
    """Make two networks, right on about 0.5 and 0.7 of 40 images."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 40)
    return [(share > generator.random((3, 2, 40)), labels) for share in (0.5, 0.7)]


def test_gains_and_intervals_are_those_of_a_report_in_which_one_network_adapts_to_the_other(
    networks,
):
    (first, labels), (second, _) = networks
    found = compare(table(second, labels), table(first, labels))
    assert found["clean"] == pytest.approx(100 * second[0].mean())
    assert found["shifted"] == pytest.approx(100 * second[1:].mean())
    before, after = table(first, labels), table(second, labels)
    report = before.assign(adapted_prediction=after["source_prediction"])
    entry = summarise(report)
    for key, name in (("gain", "gain"), ("low", "gain_low"), ("high", "gain_high")):
        assert found[f"shifted_{key}"] == pytest.approx(100 * entry[name])
    assert found["shifted_low"] < found["shifted_gain"] < found["shifted_high"]
    itself = compare(before, before)
    for part in ("clean", "shifted"):
        assert [itself[f"{part}_{key}"] for key in ("gain", "low", "high")] == [0, 0, 0]


def test_networks_that_saw_other_images_are_not_compared(networks):
    (first, labels), (second, _) = networks
    fewer = table(second, labels)
    with pytest.raises(UserError, match="expected two tables of the same images, shifts and seeds"):
        compare(fewer[fewer["image_id"] != "3"], table(first, labels))


def test_a_row_per_network_and_run_beside_the_reference_adapted_by_its_own(
    networks, monkeypatch, tmp_path, capsys
):
    (first, labels), (second, _) = networks
    tables = {
        ("none", "simclr_convnet"): table(first, labels),
        ("none", "mae_vit"): table(first[:, ::-1], labels),
        ("views", "simclr_convnet"): table(second, labels),
        ("views", "mae_vit"): table(second[:, ::-1], labels),
    }
    monkeypatch.setattr(benchmarks.networks, "read", tables.__getitem__)
    monkeypatch.setattr(benchmarks.networks.places, "OUTPUTS", tmp_path)
    command = "networks --reference mae_vit --reference-run views --runs none views"
    monkeypatch.setattr("sys.argv", command.split())
    main()
    rows = pd.read_csv(tmp_path / "networks.csv").set_index(["run", "model"])
    assert list(rows.index) == list(tables)
    for pair, row in rows.iterrows():
        expected = compare(tables[pair], tables["views", "mae_vit"])
        assert row.to_dict() == pytest.approx(expected)
    assert capsys.readouterr().out.count("simclr_convnet") == 2


@pytest.mark.parametrize(
    ("option", "what", "found"),
    [
        ("--reference", "model", "mae_vitt"),
        ("--runs", "run", "vews"),
        ("--reference-run", "run", "vews"),
    ],
)
def test_a_name_that_does_not_exist_ends_the_command_with_one_line(
    monkeypatch, capsys, option, what, found
):
    monkeypatch.setattr("sys.argv", ["networks", option, found])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    meant = {"mae_vitt": "mae_vit", "vews": "views"}[found]
    assert said.startswith(
        f"error: unknown {what} {found!r} in params.yaml; did you mean {meant!r}?"
    )
    assert said.count("\n") == 1


def test_a_reference_is_adapted_by_a_run_of_its_own_only(monkeypatch, capsys, tmp_path):
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["adapt"]["runs"]["actmad"]["models"] = ["mae_vit"]
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["networks", "--reference-run", "actmad"])
    with pytest.raises(SystemExit):
        main()
    assert "actmad/simclr_convnet: expected a run of this model" in capsys.readouterr().err
