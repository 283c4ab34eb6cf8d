"""The stage `prepare`: splits, duplicates, shifted sets, images in place, depths, sizes."""

import hashlib
import json
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline import prepare
from tests.helpers import evaluated
from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.shifts.sets import CIFAR10
from tttlab.workflow import places
from tttlab.workflow.shifted import open_sets, open_test
from tttlab.workflow.sizes import check_size, image_size

PROJECT = Path(__file__).parents[2]
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
    monkeypatch.setattr(places, "ROOT", tmp_path)
    values = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text())

    def run(workers=1, seed=0, shifts=None, **changes):
        values.update(seed=seed, data=DATA | changes, machine={"workers": workers})
        default = {"corruptions": ["fog"], "severities": [5], "images": None, "sets": {}}
        values["shifts"] = default | (shifts or {})
        run.params = Params.model_validate(values)
        prepare.run(run.params)
        return {name: ImageSet.load(tmp_path / "outputs/data" / name) for name in SETS}

    run.values = values
    return run


def tree(root, counts, seed):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return {"source": "folder", "root": str(root)}


@pytest.fixture
def three(tmp_path):
    """Settings for three folders of small images."""
    return {
        "image_size": 8,
        "unlabeled": tree(tmp_path / "u", {"any": 4}, 1),
        "labeled": tree(tmp_path / "l", {"ape": 5, "bee": 5, "cow": 5}, 2) | {"validation": 0.4},
        "test": tree(tmp_path / "t", {"bee": 2, "cow": 1}, 3),
    }


def summary(tmp_path):
    return json.loads((tmp_path / "outputs/data/summary.json").read_text())


def test_the_default_sets_are_disjoint_and_together_hold_every_digit(run, capsys):
    sets = run()
    ids = [name for images in sets.values() for name in images.image_ids]
    assert len(ids) == len(set(ids)) == 1797
    for name, share in zip(SETS, (0.45, 0.28, 0.07, 0.20), strict=True):
        assert abs(len(sets[name]) / 1797 - share) < 0.005
    assert set(sets["unlabeled"].labels) == {-1}
    assert sets["test"].classes == sets["labeled_train"].classes == tuple("0123456789")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SETS)


def test_the_summary_counts_what_lies_on_disk(run, tmp_path):
    sets = run()
    entries = summary(tmp_path)
    assert list(entries) == list(SETS)
    for name, images in sets.items():
        assert entries[name]["images"] == len(images)
        assert entries[name]["sha256"] == images.digest()
        assert entries[name]["source"] == "sklearn/digits"
        assert entries[name]["packed"]
    counts = list(entries["test"]["images_per_class"].values())
    assert counts == np.bincount(sets["test"].labels).tolist()
    assert [entries[name]["classes"] for name in SETS] == [0, 10, 10, 10]


def test_the_seed_alone_decides(run):
    first, again, other_seed = run(), run(workers=3), run(seed=1)
    assert all(first[name].digest() == again[name].digest() for name in SETS)
    assert all(first[name].image_ids == again[name].image_ids for name in SETS)
    assert set(first["test"].image_ids) != set(other_seed["test"].image_ids)


def test_three_folders_of_ones_own(run, three):
    sets = run(**three)
    assert [len(sets[name]) for name in SETS] == [4, 9, 6, 3]
    assert sets["test"].labels.tolist() == [1, 1, 2]


def test_a_failed_run_leaves_the_last_result_as_it_was(run, tmp_path):
    before = run()["test"].digest()
    labeled = tree(tmp_path / "l", {"ape": 3, "bee": 3}, 2) | {"validation": 0.4}
    with pytest.raises(UserError, match=r"^data\.test: class '0' is not in data\.labeled"):
        run(labeled=labeled)
    assert ImageSet.load(tmp_path / "outputs/data/test").digest() == before
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["data"]


def test_an_image_that_is_tested_on_is_never_trained_on(run, tmp_path, capsys):
    labeled = tree(tmp_path / "l", {"ape": 3, "bee": 3}, 2) | {"validation": 0.4}
    test = tree(tmp_path / "t", {"ape": 2}, 3)
    (tmp_path / "t/ape/1.png").write_bytes((tmp_path / "l/bee/2.png").read_bytes())
    message = r"^data\.test: .*t/ape/1\.png has the same pixels as .*l/bee/2\.png"
    with pytest.raises(UserError, match=message):
        run(image_size=8, labeled=labeled, test=test)
    with pytest.raises(UserError, match=message):
        run(image_size=8, labeled=labeled, test=test, duplicates="allow")
    sets = run(image_size=8, labeled=labeled, test=test, duplicates="skip")
    assert len(sets["test"]) == 2
    image_ids = sets["labeled_train"].image_ids + sets["labeled_validation"].image_ids
    apes_and_bees = ["ape/0.png", "ape/1.png", "ape/2.png", "bee/0.png", "bee/1.png"]
    assert sorted(image_ids) == apes_and_bees
    assert "left out: " in capsys.readouterr().out


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


def test_files_of_other_kinds_are_told_and_stop_nothing(run, tmp_path, capsys):
    """An unreadable photograph must be reported, and a list of labels must not stop the run."""
    test = tree(tmp_path / "t", {"1": 2, "2": 2}, 3)
    raw = [f"2/{index:02}.cr2" for index in range(12)]
    for name in ("1/IMG_7.HEIC", "2/labels.txt", "2/.DS_Store", *raw):
        (tmp_path / "t" / name).write_text("something else")
    assert len(run(test=test)["test"]) == 4
    printed = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(printed) == 11
    assert "1/IMG_7.HEIC: its name does not end like an image's" in printed[0]
    assert printed[-1].endswith("left out: 4 more, see outputs/data/test/meta.json")
    recorded = json.loads((tmp_path / "outputs/data/test/meta.json").read_text())["skipped"]
    assert [line.partition(":")[0] for line in recorded][-1] == "2/labels.txt"
    assert len(recorded) == summary(tmp_path)["test"]["skipped"] == 14


# --- without labels ---


@pytest.mark.parametrize("layout", ["no folders", "no classes"])
def test_test_images_without_labels_are_taken_and_the_price_is_told(
    run, three, tmp_path, capsys, layout
):
    if layout == "no classes":
        folders = {"monday": 2, "tuesday/morning": 3}
        three["test"] = tree(tmp_path / "days", folders, 5) | {"labels": "none"}
    else:
        three["test"] = tree(tmp_path / "days", {".": 5}, 5)
    sets = run(**three)
    assert sets["test"].labels.tolist() == [-1] * 5
    # The classes are the names of the predictions.
    assert sets["test"].classes == sets["labeled_train"].classes == ("ape", "bee", "cow")
    entry = summary(tmp_path)["test"]
    assert (entry["images"], entry["classes"], entry["images_per_class"]) == (5, 0, {})
    lines = capsys.readouterr().out.splitlines()
    (position,) = [number for number, line in enumerate(lines) if line.startswith("test ")]
    assert "5 images, no labels, from folder" in lines[position]
    assert lines[position + 1].startswith("  its accuracy will be unknown")


def test_shifts_that_settings_are_tuned_under_are_told_in_a_line_and_not_tested_on(
    run, three, tmp_path, capsys
):
    spec = corrupted(tmp_path / "c")
    (tmp_path / "c/snow").rename(tmp_path / "c/spatter")
    run(**three, shifts={"sets": {"c": spec}})
    lines = capsys.readouterr().out.splitlines()
    line = "shifts.sets.c: left out spatter: settings are tuned under corruptions of these names"
    assert line in lines
    assert list(summary(tmp_path))[4:] == ["c/fog-2", "c/fog-5"]


def test_nothing_is_told_of_accuracy_where_it_will_be_known(run, three, capsys):
    run(**three)
    assert "accuracy" not in capsys.readouterr().out


def test_a_typo_in_a_class_folder_is_an_error_that_names_both_ways_out(run, three, tmp_path):
    three["test"] = tree(tmp_path / "typo", {"bee": 1, "cwo": 1}, 5)
    message = r"^data\.test: class 'cwo' is not in data\.labeled; did you mean 'cow'\?"
    with pytest.raises(UserError, match=message) as caught:
        run(**three)
    assert "set labels: none if the folders are no classes" in str(caught.value)


def test_labeled_images_need_their_class_folders_all_the_same(run, three, tmp_path):
    three["labeled"] = tree(tmp_path / "loose", {".": 5}, 5) | {"validation": 0.4}
    with pytest.raises(UserError, match=r"^data\.labeled\.root: expected <class>/<image> in "):
        run(**three)


# --- read in place ---


def test_folders_from_the_bound_on_are_read_in_place_and_hold_the_same(
    run, three, tmp_path, capsys
):
    packed = {
        name: (images.image_ids, images.labels.tolist(), images.pixels[:].copy())
        for name, images in run(**three).items()
    }
    assert "read in place" not in capsys.readouterr().out
    in_place = run(**three, pack_below=0)
    for name, (image_ids, labels, pixels) in packed.items():
        images = in_place[name]
        assert (images.image_ids, images.labels.tolist()) == (image_ids, labels)
        np.testing.assert_array_equal(images.pixels[:], pixels)
        assert not summary(tmp_path)[name]["packed"]
        assert summary(tmp_path)[name]["sha256"] == images.digest()
    assert not list((tmp_path / "outputs").rglob("pixels.npy"))
    assert all(line.endswith(", read in place") for line in capsys.readouterr().out.splitlines())


def test_duplicates_are_found_among_images_read_in_place(run, three, tmp_path):
    (tmp_path / "t/bee/1.png").write_bytes((tmp_path / "u/any/2.png").read_bytes())
    message = (
        r"^data\.test: .*t/bee/1\.png has the same pixels as .*u/any/2\.png of data\.unlabeled"
    )
    with pytest.raises(UserError, match=message):
        run(**three, pack_below=0)


# --- sets that come shifted ---


def corrupted(root, severities=(2, 5)):
    """Write fog and snow in the form of ImageNet-C."""
    counts = {"ape": 4, "bee": 5, "cow": 3}
    for number, name in enumerate(("fog", "snow")):
        for severity in severities:
            tree(root / name / str(severity), counts, 10 * severity + number)
    return {"format": "corruption_folders", "root": str(root)}


def photographed(root):
    """Write two domains: one with class folders, one without."""
    tree(root / "day", {"ape": 3, "cow": 2}, 7)
    tree(root / "by night", {".": 4}, 8)
    return {"format": "domain_folders", "root": str(root)}


def test_domains_with_long_names_that_are_not_latin_are_read_back_whole(run, three, tmp_path):
    """A file's name may have 255 bytes; quoted, each of these letters takes nine."""
    names = ["雪" * 80, "雪" * 79 + "雨", "雨 1", "a" * 246, "b" * 247]
    for number, name in enumerate(names):
        tree(tmp_path / "p" / name, {"ape": 2 + number}, 70 + number)
    photos = {"format": "domain_folders", "root": str(tmp_path / "p")}
    run(**three, shifts={"sets": {"photos": photos}})
    counts = {shift.name: len(shift.images) for shift in open_sets(run.params, None)}
    assert counts == {f"photos/{name}": 2 + number for number, name in enumerate(names)}
    folders = {path.name for path in (tmp_path / "outputs/data/shifted").iterdir() if path.is_dir()}
    whole = {"photos%2F%E9%9B%A8 1", f"photos%2F{'a' * 246}"}  # the second has 255 bytes
    digest = hashlib.sha256(f"photos%2F{'b' * 247}".encode()).hexdigest()[:16]
    assert whole | {f"photos%2F{'b' * 111}-{digest}"} < folders
    assert len(folders) == len(names)


def test_sets_that_come_shifted_land_beside_the_three(run, three, tmp_path, capsys):
    shifted = {"c": corrupted(tmp_path / "c"), "photos": photographed(tmp_path / "p")}
    run(**three, shifts={"sets": shifted})
    folder = tmp_path / "outputs/data/shifted"
    entries = json.loads((folder / "shifts.json").read_text())
    assert [(entry["corruption"], entry["severity"]) for entry in entries] == [
        ("c/fog", 2),
        ("c/fog", 5),
        ("c/snow", 2),
        ("c/snow", 5),
        ("photos/by night", 0),
        ("photos/day", 0),
    ]
    folders = {entry["folder"] for entry in entries}
    assert {path.name for path in folder.iterdir()} == {"shifts.json"} | folders
    sets = {
        (entry["corruption"], entry["severity"]): ImageSet.load(folder / entry["folder"])
        for entry in entries
    }
    assert [len(images) for images in sets.values()] == [12, 12, 12, 12, 4, 5]
    assert all(images.classes == ("ape", "bee", "cow") for images in sets.values())
    assert sets["photos/day", 0].labels.tolist() == [0, 0, 0, 2, 2]  # cow is the third class
    assert sets["photos/by night", 0].labels.tolist() == [-1] * 4
    assert len({sets["c/fog", severity].image_ids for severity in (2, 5)}) == 1
    image = Image.open(tmp_path / "c/snow/5/bee/3.png")
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC, (2, 0, 12, 10)))
    pixels = sets["c/snow", 5].pixels[sets["c/snow", 5].image_ids.index("bee/3.png")]
    assert abs(pixels.astype(int) - expected).max() <= 1

    entries = summary(tmp_path)
    shifted = ["c/fog-2", "c/fog-5", "c/snow-2", "c/snow-5", "photos/by night", "photos/day"]
    assert list(entries) == [*SETS, *shifted]
    assert entries["c/fog-2"]["images_per_class"] == {"ape": 4, "bee": 5, "cow": 3}
    assert entries["c/fog-2"]["source"] == f"corruption_folders {tmp_path / 'c'} fog 2"
    assert entries["photos/by night"]["classes"] == 0
    assert entries["photos/by night"]["images_per_class"] == {}
    assert entries["photos/day"]["sha256"] == sets["photos/day", 0].digest()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["c/snow-5", "12"] for line in lines)
    _, shifts = open_test(run.params)
    assert [shift.name for shift in shifts] == ["clean", "fog-5", *shifted]


def test_the_images_of_a_shift_are_limited_and_balanced_and_fewer_are_among_more(
    run, three, tmp_path
):
    sets = {"c": corrupted(tmp_path / "c"), "photos": photographed(tmp_path / "p")}
    image_ids = {}
    for count in (3, 6):
        run(**three, shifts={"sets": sets, "images": count})
        entries = summary(tmp_path)
        assert entries["c/fog-2"]["images"] == count
        assert entries["photos/by night"]["images"] == min(count, 4)
        assert entries["photos/day"]["images"] == min(count, 5)
        assert set(entries["c/snow-5"]["images_per_class"].values()) == {count // 3}
        test, shifts = open_test(run.params)
        image_ids[count] = {shift.name: set(shift.of(test).image_ids) for shift in shifts[2:]}
    for name, few in image_ids[3].items():
        assert few < image_ids[6][name]
    assert image_ids[6]["c/fog-2"] == image_ids[6]["c/snow-5"]  # the same under every corruption
    test, shifts = open_test(run.params, 3)  # a later stage that takes 3 of the 6 images
    assert {shift.name: set(shift.of(test).image_ids) for shift in shifts[2:]} == image_ids[3]


def test_cifar_10_c_arrives_as_it_is_and_its_images_are_those_of_the_clean_test_set(run, tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (150, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(30) % 10
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c/fog.npy", pixels)
    np.save(tmp_path / "c/labels.npy", np.tile(labels, 5))
    labeled = tree(tmp_path / "l", dict.fromkeys(CIFAR10, 2), 2) | {"validation": 0.5}
    spec = {"format": "cifar10_c", "root": str(tmp_path / "c"), "severities": [4]}
    test = tree(tmp_path / "t", {"cat": 2}, 3)
    run(labeled=labeled, test=test, shifts={"sets": {"c": spec}, "images": 20})
    images = ImageSet.load(tmp_path / "outputs/data/shifted/c%2Ffog-4")
    rows = [int(name.removeprefix("cifar10/test/")) for name in images.image_ids]
    np.testing.assert_array_equal(images.pixels, pixels[90:120][rows])
    np.testing.assert_array_equal(images.labels, labels[rows])
    assert np.bincount(images.labels).tolist() == [2] * 10


def test_shifted_folders_are_read_in_place_from_the_same_bound_on(run, three, tmp_path):
    run(**three, pack_below=0, shifts={"sets": {"photos": photographed(tmp_path / "p")}})
    assert not summary(tmp_path)["photos/day"]["packed"]
    images = ImageSet.load(tmp_path / "outputs/data/shifted/photos%2Fday")
    assert images.paths[0] == str(tmp_path / "p/day/ape/0.png")
    assert images.pixels[:].shape == (5, 8, 8, 3)


def test_sets_that_are_no_longer_wanted_do_not_stay(run, three, tmp_path):
    run(**three, shifts={"sets": {"photos": photographed(tmp_path / "p")}})
    run(**three)
    assert [path.name for path in (tmp_path / "outputs/data/shifted").iterdir()] == ["shifts.json"]
    assert json.loads((tmp_path / "outputs/data/shifted/shifts.json").read_text()) == []


@pytest.mark.parametrize("pack_below", [0, 1024])
def test_a_shifted_image_that_was_trained_on_stops_the_run_or_is_left_out_of_training(
    run, three, tmp_path, pack_below
):
    shifts = {"sets": {"photos": photographed(tmp_path / "p")}}
    (tmp_path / "p/day/cow/1.png").write_bytes((tmp_path / "l/ape/3.png").read_bytes())
    message = (
        r"^shifts\.sets\.photos/day: .*p/day/cow/1\.png has the same pixels as "
        r".*l/ape/3\.png of data\.labeled \(1 such"
    )
    with pytest.raises(UserError, match=message):
        run(**three, shifts=shifts, pack_below=pack_below)
    with pytest.raises(UserError, match=message):
        run(**three, shifts=shifts, pack_below=pack_below, duplicates="allow")
    sets = run(**three, shifts=shifts, pack_below=pack_below, duplicates="skip")
    assert "ape/3.png" not in sets["labeled_train"].image_ids + sets["labeled_validation"].image_ids
    assert summary(tmp_path)["photos/day"]["images"] == 5


# --- what pretraining sees ---


def shared(tmp_path, pack_below):
    """Settings with one folder for pretraining and for training, as in settings/cifar10.yaml."""
    source = tree(tmp_path / "all", {"ape": 10, "bee": 10}, 9)
    return {
        "image_size": 8,
        "pack_below": pack_below,
        "duplicates": "allow",
        "unlabeled": source,
        "labeled": source | {"validation": 0.3},
        "test": tree(tmp_path / "t", {"ape": 2}, 3),
    }


@pytest.mark.parametrize("pack_below", [0, 1024])
def test_pretraining_sees_training_images_where_allowed_and_validation_images_never(
    run, tmp_path, capsys, pack_below
):
    sets = run(**shared(tmp_path, pack_below))
    assert [len(sets[name]) for name in SETS] == [14, 14, 6, 2]
    assert sets["unlabeled"].packed == bool(pack_below)
    assert set(sets["unlabeled"].image_ids) == set(sets["labeled_train"].image_ids)
    seen = {pixels.tobytes() for pixels in sets["unlabeled"].pixels}
    assert not seen & {pixels.tobytes() for pixels in sets["labeled_validation"].pixels}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("unlabeled               14 images")
    assert lines[1] == "  left out: 6 images that are validation images"
    assert sets["unlabeled"].skipped == ("6 images that are validation images",)
    assert set(sets["unlabeled"].labels) == {-1}


def test_validation_images_are_known_by_their_pixels_whatever_they_are_called(run, tmp_path):
    settings = shared(tmp_path, 1024)
    (tmp_path / "u").mkdir()
    for number, file in enumerate(sorted((tmp_path / "all").rglob("*.png"))):
        (tmp_path / f"u/{number:02}.png").write_bytes(file.read_bytes())
    renamed = run(**settings | {"unlabeled": {"source": "folder", "root": str(tmp_path / "u")}})
    expected = run(**settings)
    assert len(renamed["unlabeled"]) == 14
    assert renamed["unlabeled"].hashes == expected["unlabeled"].hashes


@pytest.mark.parametrize("name", ["cifar10", "cifar10_methods"])
def test_the_ready_made_settings_share_images_for_pretraining_and_keep_validation_apart(
    run, tmp_path, name
):
    """One folder stands for the training split of the file, and another for its test split."""
    values = YAML(typ="safe", pure=True).load((PROJECT / f"settings/{name}.yaml").read_text())
    data = values["data"]
    folders = {
        "train": tree(tmp_path / "train", dict.fromkeys(CIFAR10, 40), 1),
        "test": tree(tmp_path / "test", {"cat": 9}, 2),
    }
    for part in ("unlabeled", "labeled", "test"):
        data[part] |= folders[data[part]["split"]] | {"split": None}
    sets = run(**data)
    unlabeled, train, validation, _ = (set(sets[part].image_ids) for part in SETS)
    assert unlabeled == train
    assert not unlabeled & validation
    share = len(validation) / (len(train) + len(validation))
    # Rounded by half an image for each of 10 classes, of 160 images or more.
    assert abs(share - data["labeled"]["validation"]) < 10 * 0.5 / 160


def test_the_same_picture_in_two_classes_or_twice_in_one_is_named(run, three, tmp_path):
    copy = tmp_path / "l/bee/copy.png"
    copy.write_bytes((tmp_path / "l/ape/3.png").read_bytes())
    message = (
        r"^data\.labeled: .*l/bee/copy\.png of class 'bee' has the same pixels as "
        r".*l/ape/3\.png of class 'ape'"
    )
    for duplicates in ("error", "allow"):
        with pytest.raises(UserError, match=message):
            run(**three, duplicates=duplicates)
    copy.rename(tmp_path / "l/ape/copy.png")
    message = r"^data\.labeled: .*l/ape/copy\.png has the same pixels as .*l/ape/3\.png"
    with pytest.raises(UserError, match=message):
        run(**three)
    for seed in range(6):
        sets = run(**three, duplicates="allow", seed=seed)
        sides = [
            {"ape/3.png", "ape/copy.png"} & set(sets[name].image_ids)
            for name in ("labeled_train", "labeled_validation")
        ]
        assert sorted(map(len, sides)) == [0, 2]


def test_a_loop_of_links_adds_no_image(run, three, tmp_path):
    before = {name: (images.image_ids, images.digest()) for name, images in run(**three).items()}
    (tmp_path / "l/ape/loop").symlink_to("..", target_is_directory=True)
    after = {name: (images.image_ids, images.digest()) for name, images in run(**three).items()}
    assert after == before


# --- more than eight bits ---


def twelve_bits(root, counts):
    """Write grey images of 12 bits in 16-bit files; return the expected pixels by relative path."""
    rng, expected = np.random.default_rng(5), {}
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            values = rng.integers(0, 4096, (8, 8), dtype=np.uint16)
            Image.fromarray(values).save(root / name / f"{index}.png")
            expected[f"{name}/{index}.png"] = np.repeat((values >> 4)[..., None], 3, 2)
    return expected


@pytest.mark.parametrize("pack_below", [0, 1024])
def test_a_declared_depth_reaches_every_look_at_every_set(run, three, tmp_path, pack_below):
    expected = twelve_bits(tmp_path / "d/night", {"ape": 3, "cow": 2})
    photos = {"photos": {"format": "domain_folders", "root": str(tmp_path / "d")}}
    test = three["test"] | {"root": str(tmp_path / "d/night")}
    settings = three | {"pack_below": pack_below, "test": test}
    message = (
        r"^data\.test: .*d/night/ape/0\.png: 16-bit grey .*; set data\.depth to .* 12 or more$"
    )
    with pytest.raises(UserError, match=message):
        run(**settings, shifts={"sets": photos})
    test = run(**settings, depth=12, shifts={"sets": photos})["test"]
    assert test.packed == bool(pack_below)
    night = ImageSet.load(tmp_path / "outputs/data/shifted/photos%2Fnight")
    for images in (test, night, night.take(np.arange(len(night))[::-1])):
        for name, pixels in zip(images.image_ids, images.pixels, strict=True):
            np.testing.assert_array_equal(pixels, expected[name.removeprefix("night/")])


def test_an_unknown_scale_is_no_unreadable_image_that_could_be_skipped(run, three, tmp_path):
    twelve_bits(tmp_path / "t/cow/more", {"a": 1})
    message = r"^data\.test: .*t/cow/more/a/0\.png: 16-bit grey with values up to"
    with pytest.raises(UserError, match=message):
        run(**three, unreadable="skip")


def test_images_that_are_tested_on_twice_are_no_leak(run, three, tmp_path):
    photos = photographed(tmp_path / "p")
    (tmp_path / "t/bee/1.png").write_bytes((tmp_path / "p/day/ape/1.png").read_bytes())
    run(**three, shifts={"sets": {"photos": photos, "again": photos}})
    assert summary(tmp_path)["again/day"]["sha256"] == summary(tmp_path)["photos/day"]["sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["fgo"]}, r"^shifts\.sets\.z\.only: 'fgo' is not in .*; did you mean 'fog'\?"),
        (
            {"severities": [2, 3]},
            r"^shifts\.sets\.z\.severities: expected a folder .*fog/3, found none",
        ),
        (
            {"format": "domain_folders"},
            r"^shifts\.sets\.z: class '2' is not in data\.labeled; .*; set labels: none",
        ),
        (
            {"format": "cifar10_c"},
            r"^shifts\.sets\.z\.root: expected a NumPy file, "
            r"found none that can be read at .*labels\.npy",
        ),
    ],
)
def test_what_is_wrong_with_a_set_shows_before_any_image_is_decoded(
    run, three, tmp_path, monkeypatch, changes, message
):
    def decoding(*_):
        raise AssertionError

    monkeypatch.setattr("tttlab.data.reading.to_square", decoding)
    sets = {"photos": photographed(tmp_path / "p"), "z": corrupted(tmp_path / "c") | changes}
    with pytest.raises(UserError, match=message):
        run(**three, shifts={"sets": sets})


def test_an_unreadable_shifted_image_is_named_or_left_out_as_any_other(
    run, three, tmp_path, capsys
):
    shifts = {"sets": {"photos": photographed(tmp_path / "p")}}
    (tmp_path / "p/day/cow/1.png").write_text("no image")
    message = r"^shifts\.sets\.photos: 1 of 5 files cannot be read .* first is .*day/cow/1\.png"
    with pytest.raises(UserError, match=message):
        run(**three, shifts=shifts)
    run(**three, shifts=shifts, unreadable="skip")
    entry = summary(tmp_path)["photos/day"]
    assert (entry["images"], entry["skipped"]) == (4, 1)
    assert "left out: " in capsys.readouterr().out


# --- the side of the images ---


def sized(size, **backbones):
    models = {
        name: types.SimpleNamespace(backbone=backbone) for name, backbone in backbones.items()
    }
    data = types.SimpleNamespace(image_size=size)
    return image_size(types.SimpleNamespace(data=data, models=models))


def test_the_side_is_that_of_the_file_or_the_one_that_all_backbones_were_trained_on():
    assert sized(40, a="resnet18", b="vit_tiny_patch16_384") == 40
    assert sized("auto", a="resnet18", b="vit_tiny_patch16_224") == 224
    assert sized("auto", a="vit_tiny_patch16_384") == 384
    message = r"^data\.image_size: auto .* must be one, found a 224, b 384; set a number"
    with pytest.raises(UserError, match=message):
        sized("auto", a="resnet18", b="vit_tiny_patch16_384")


def test_strengths_of_other_sizes_are_refused_where_the_size_is_the_backbones():
    models = {"a": types.SimpleNamespace(backbone="resnet18")}
    params = types.SimpleNamespace(
        data=types.SimpleNamespace(image_size="auto"),
        models=models,
        shifts=evaluated.settings(strength="cifar10_c"),
    )
    with pytest.raises(UserError, match=r"^shifts\.strength: expected own, .* images of 224; set"):
        check_size(params)
    params.data.image_size = 32
    check_size(params)
    params.data.image_size, params.shifts = 224, evaluated.settings()
    check_size(params)


def test_auto_is_the_side_of_what_is_prepared(run, three):
    sets = run(**three | {"image_size": "auto"})
    assert {images.pixels.shape[1:] for images in sets.values()} == {(224, 224, 3)}


@pytest.fixture
def undecodable(three):
    """The three folders, with a file that stops the stage once images are decoded."""
    (Path(three["unlabeled"]["root"]) / "any" / "broken.png").write_bytes(b"no image")
    return three


def test_too_few_classes_or_images_are_told_before_any_image_is_decoded(run, undecodable):
    labeled = undecodable["labeled"]
    above = labeled | {"root": str(Path(labeled["root"]).parent / "above")}
    tree(Path(above["root"]), {"train/ape": 2, "train/bee": 2}, 4)
    with pytest.raises(UserError, match=r"at least two classes, found train; .*root must be"):
        run(**undecodable | {"labeled": above})
    with pytest.raises(UserError, match="found 1 of class 'ape'; widen"):
        run(**undecodable | {"labeled": labeled | {"limit": 3}})
    with pytest.raises(UserError, match=r"broken\.png"):
        run(**undecodable)


def test_a_stream_class_by_class_needs_labels_before_any_image_is_decoded(run, undecodable):
    run.values["adapt"]["online"]["order"] = "by_class"
    unlabeled = undecodable | {"test": undecodable["test"] | {"labels": "none"}}
    with pytest.raises(UserError, match=r"broken\.png"):  # no run is a stream
        run(**unlabeled)
    run.values["adapt"]["runs"]["stream"] = {"method": "lame", "protocol": "online"}
    with pytest.raises(UserError, match=r"by_class needs the labels .* data\.test has none"):
        run(**unlabeled)
