import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

import pipeline
from pipeline import prepare
from tttlab.data import ImageSet
from tttlab.errors import UserError
from tttlab.params import Params

PROJECT = Path(__file__).parent.parent
SETS = ("unlabeled", "labeled_train", "labeled_validation", "test")


DIGITS = {"source": "sklearn/digits"}
DATA = {
    "image_size": 32,
    "unlabeled": DIGITS | {"part": [0.0, 0.45]},
    "labeled": DIGITS | {"part": [0.45, 0.80], "validation": 0.2},
    "test": DIGITS | {"part": [0.80, 1.0]},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stage in an empty project on DATA with changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    values = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text())

    def run(workers=1, seed=0, **changes):
        values.update(seed=seed, data=DATA | changes, machine={"workers": workers})
        prepare.run(Params.model_validate(values))
        return {name: ImageSet.load(tmp_path / "outputs/data" / name) for name in SETS}

    return run


def tree(root, counts, seed):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return {"source": "folder", "root": str(root)}


def test_the_default_sets_are_disjoint_and_together_hold_every_digit(run, capsys):
    sets = run()
    ids = [name for images in sets.values() for name in images.image_ids]
    assert len(ids) == len(set(ids)) == 1797
    for which, share in zip(SETS, (0.45, 0.28, 0.07, 0.20), strict=True):
        assert abs(len(sets[which]) / 1797 - share) < 0.005
    assert set(sets["unlabeled"].labels) == {-1}
    assert sets["test"].classes == sets["labeled_train"].classes == tuple("0123456789")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SETS)


def test_the_summary_counts_what_lies_on_disk(run, tmp_path):
    sets = run()
    summary = json.loads((tmp_path / "outputs/data/summary.json").read_text())
    assert list(summary) == list(SETS)
    for name, images in sets.items():
        assert summary[name]["images"] == len(images)
        assert summary[name]["sha256"] == images.digest()
        assert summary[name]["source"] == "sklearn/digits"
    assert list(summary["test"]["images_per_class"].values()) == np.bincount(sets["test"].labels).tolist()


def test_the_seed_alone_decides(run):
    first, again, other = run(), run(workers=3), run(seed=1)
    assert all(first[name].digest() == again[name].digest() for name in SETS)
    assert all(first[name].image_ids == again[name].image_ids for name in SETS)
    assert set(first["test"].image_ids) != set(other["test"].image_ids)


def test_three_folders_of_ones_own(run, tmp_path):
    sets = run(
        image_size=8,
        unlabeled=tree(tmp_path / "u", {"any": 4}, 1),
        labeled=tree(tmp_path / "l", {"ape": 5, "bee": 5, "cow": 5}, 2) | {"validation": 0.4},
        test=tree(tmp_path / "t", {"bee": 2, "cow": 1}, 3),
    )
    assert [len(sets[name]) for name in SETS] == [4, 9, 6, 3]
    assert sets["test"].labels.tolist() == [1, 1, 2]


def test_a_failed_run_leaves_the_last_result_as_it_was(run, tmp_path):
    before = run()["test"].digest()
    labeled = tree(tmp_path / "l", {"ape": 3, "bee": 3}, 2) | {"validation": 0.4}
    with pytest.raises(UserError, match=r"^data\.test: class '0' is not in data\.labeled"):
        run(labeled=labeled)
    assert ImageSet.load(tmp_path / "outputs/data/test").digest() == before
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["data"]


def test_an_image_in_two_sets_stops_the_run_unless_allowed(run, tmp_path):
    labeled = tree(tmp_path / "l", {"ape": 3, "bee": 3}, 2) | {"validation": 0.4}
    test = tree(tmp_path / "t", {"ape": 2}, 3)
    (tmp_path / "t/ape/1.png").write_bytes((tmp_path / "l/bee/2.png").read_bytes())
    with pytest.raises(UserError, match=r"^data\.test: .*t/ape/1\.png has the same pixels as .*l/bee/2\.png"):
        run(image_size=8, labeled=labeled, test=test)
    assert len(run(image_size=8, labeled=labeled, test=test, duplicates="allow")["test"]) == 2


def test_skipped_files_are_printed_and_kept_in_the_record(run, tmp_path, capsys):
    test = tree(tmp_path / "t", {"1": 2, "2": 2}, 3)
    (tmp_path / "t/2/0.png").write_text("no image")
    assert len(run(test=test, unreadable="skip")["test"]) == 3
    printed = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(printed) == 1
    assert "2/0.png: " in printed[0]
    recorded = json.loads((tmp_path / "outputs/data/test/meta.json").read_text())["skipped"]
    assert len(recorded) == 1
    assert recorded[0] in printed[0]
