"""Shifted images as others distribute them: small files of each format, and every fault."""

import os
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tttlab.config.images import ImageSpec, ShiftSet
from tttlab.config.values import BENCHMARK, HELD_OUT
from tttlab.data.sources import open_source
from tttlab.errors import UserError
from tttlab.shifts.sets import CIFAR10, left_out, open_shift_set

CIFAR100 = tuple(f"class {number:02d}" for number in range(100))
COUNT = 12  # test images; the real files hold 10,000


def opened(root, format, classes=CIFAR10, **settings):
    spec = ShiftSet(format=format, root=str(root), **settings)
    return list(open_shift_set("mine", spec, classes))


def left_out_of(root, format, **settings):
    return left_out("shifts.sets.c", ShiftSet(format=format, root=str(root), **settings))


def refused(message, root, format, classes=CIFAR10, **settings):
    with pytest.raises(UserError, match=rf"^shifts\.sets\.mine{message}") as caught:
        opened(root, format, classes, **settings)
    assert "\n" not in str(caught.value)


def seen(source) -> np.ndarray:
    return np.stack([np.asarray(source.read(row)) for row in range(len(source.image_ids))])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- CIFAR-10-C, CIFAR-100-C ----------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path):
    """Write fog.npy, brightness.npy and labels.npy as published; return pixels and labels."""
    labels = np.array([3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9])
    files = {
        name: noise(5 * COUNT, 32, 32, 3, seed=seed)
        for seed, name in enumerate(("fog", "brightness"))
    }
    for name, pixels in files.items():
        np.save(tmp_path / f"{name}.npy", pixels)
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return tmp_path, files, labels


def test_cifar_c_gives_every_corruption_at_every_severity_as_it_is(cifar):
    root, files, labels = cifar
    shifts = opened(root, "cifar10_c")
    assert [(shift.name, shift.severity) for shift in shifts] == [
        (name, severity) for name in ("brightness", "fog") for severity in (1, 2, 3, 4, 5)
    ]
    for name, severity, source in shifts:
        rows = slice((severity - 1) * COUNT, severity * COUNT)
        np.testing.assert_array_equal(seen(source), files[name][rows])
        np.testing.assert_array_equal(source.groups, labels)
        assert source.groups.dtype == np.int64
        assert (source.classes, source.labeled) == (CIFAR10, True)


def test_an_image_has_one_name_under_every_corruption_and_in_torchvisions_test_set(
    cifar, monkeypatch, tmp_path
):
    class TorchvisionLike(list):
        targets, classes = cifar[2].tolist(), list(CIFAR10)

    timm = types.ModuleType("timm.data")
    data_set = TorchvisionLike((Image.new("RGB", (32, 32)), None) for _ in range(COUNT))
    timm.create_dataset = lambda *_, **__: data_set
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.data", timm)
    clean = open_source(ImageSpec(source="torch/cifar10", split="test"), "labeled", tmp_path)
    assert clean.image_ids[3] == "cifar10/test/0000003"
    assert clean.classes == CIFAR10
    for shift in opened(cifar[0], "cifar10_c"):
        assert shift.source.image_ids == clean.image_ids
        np.testing.assert_array_equal(shift.source.groups, clean.groups)


def test_only_what_is_wanted_of_cifar_c_is_opened_in_the_order_wanted(cifar):
    root, files, _ = cifar
    (root / "snow.npy").write_text("not looked at")
    (shift,) = opened(root, "cifar10_c", only=("fog",), severities=(4,))
    np.testing.assert_array_equal(seen(shift.source), files["fog"][3 * COUNT : 4 * COUNT])
    shifts = opened(root, "cifar10_c", only=("fog", "brightness"), severities=(5, 2))
    expected = [("fog", 5), ("fog", 2), ("brightness", 5), ("brightness", 2)]
    assert [shift[:2] for shift in shifts] == expected


def test_cifar_100_c_has_a_hundred_classes_and_names_of_its_own(tmp_path):
    labels = np.array([99, 0, 41])
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    np.save(tmp_path / "fog.npy", noise(15, 32, 32, 3))
    (shift,) = opened(tmp_path, "cifar100_c", CIFAR100, severities=(2,))
    assert shift.source.image_ids == tuple(f"cifar100/test/000000{row}" for row in range(3))
    assert shift.source.groups.tolist() == [99, 0, 41]
    np.testing.assert_array_equal(seen(shift.source), noise(15, 32, 32, 3)[3:6])


def test_classes_that_are_not_those_of_the_labels_are_refused(cifar, tmp_path):
    root = cifar[0]
    shuffled = (*CIFAR10[1:], CIFAR10[0])
    start = (
        r": expected the classes of CIFAR-10 \(airplane, .*, truck\) in data\.labeled, "
        "for the labels are numbers, found "
    )
    message = start + r"automobile, .*, airplane; rename the class folders$"
    refused(message, root, "cifar10_c", shuffled)
    refused(start + r"0, 1; rename", root, "cifar10_c", ("0", "1"))
    refused(start + r"class 00, .*class 09, …; rename", root, "cifar10_c", CIFAR100)
    message = ": expected the 100 classes of CIFAR-100 in data.labeled, .* found airplane, "
    refused(message, root, "cifar100_c", CIFAR10)


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (noise(5 * COUNT - 1, 32, 32, 3), r"uint8 of shape \(59, 32, 32, 3\)"),
        (noise(COUNT, 32, 32, 3), r"uint8 of shape \(12, 32, 32, 3\)"),  # one severity alone
        (noise(5 * COUNT, 3, 32, 32), r"uint8 of shape \(60, 3, 32, 32\)"),
        (noise(5 * COUNT, 64, 64, 3), r"uint8 of shape \(60, 64, 64, 3\)"),
        (noise(5 * COUNT, 32, 32, 3) / 255, r"float64 of shape \(60, 32, 32, 3\)"),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused(cifar, pixels, found):
    np.save(cifar[0] / "fog.npy", pixels)
    message = (
        r"\.root: expected uint8 of shape \(60, 32, 32, 3\), as many as there are labels, "
        rf"in .*fog\.npy, found {found}; restore the file"
    )
    refused(message, cifar[0], "cifar10_c")


def test_a_fault_shows_before_later_files_are_opened_and_only_if_the_file_is_wanted(cifar):
    np.save(cifar[0] / "fog.npy", noise(3, 32, 32, 3))
    shifts = open_shift_set("mine", ShiftSet(format="cifar10_c", root=str(cifar[0])), CIFAR10)
    assert [next(shifts).name for _ in range(5)] == ["brightness"] * 5
    with pytest.raises(UserError, match=r"fog\.npy"):
        next(shifts)
    assert len(opened(cifar[0], "cifar10_c", only=("brightness",))) == 5


@pytest.mark.parametrize(
    "labels",
    [np.arange(60) // 5 % 10, np.r_[np.tile(np.arange(10), 5), np.arange(9)], np.r_[:48, :12] % 10],
)
def test_labels_that_are_not_the_same_five_times_are_refused(cifar, labels):
    """One image after the other; one missing; the last severity shifted against the first."""
    np.save(cifar[0] / "labels.npy", labels)
    message = (
        r"\.root: expected the same labels five times, a severity after the other, "
        r"in .*labels\.npy, found another order"
    )
    refused(message, cifar[0], "cifar10_c")


WHOLE_NUMBERS = r"expected whole numbers of shape \(N,\) in .*labels\.npy, found "
ZERO_TO_NINE = r"expected labels from 0 to 9 in .*labels\.npy, found "


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((60, 1), int), WHOLE_NUMBERS + r"int64 of shape \(60, 1\)"),
        (np.zeros(60), WHOLE_NUMBERS + r"float64 of shape \(60,\)"),
        (np.tile(np.arange(12), 5), ZERO_TO_NINE + r"0 to 11; restore the file"),
        (np.tile(np.arange(12) % 10 - 1, 5), ZERO_TO_NINE + r"-1 to 8; restore"),
        (np.zeros(0, int), ZERO_TO_NINE + r"none; restore"),
    ],
)
def test_labels_that_cannot_be_are_refused(cifar, labels, message):
    np.save(cifar[0] / "labels.npy", labels)
    refused(rf"\.root: {message}", cifar[0], "cifar10_c")


def test_files_that_are_missing_or_no_numpy_files_are_named(cifar):
    root = cifar[0]
    for damage in (b"", b"<html>404</html>", (root / "fog.npy").read_bytes()[:5000]):
        (root / "fog.npy").write_bytes(damage)
        message = (
            r"\.root: expected a NumPy file, found none that can be read at .*fog\.npy; restore it"
        )
        refused(message, root, "cifar10_c")
    (root / "fog.npy").unlink()
    (root / "brightness.npy").unlink()
    message = r"\.root: expected <corruption>\.npy in .*, found none; check root and format"
    refused(message, root, "cifar10_c")
    (root / "labels.npy").unlink()
    message = r"\.root: expected a NumPy file, found none that can be read at .*labels\.npy"
    refused(message, root, "cifar10_c")


def test_a_corruption_that_is_not_there_is_named_with_those_that_are(cifar):
    message = r"\.only: 'fogg' is not in .*; did you mean 'fog'\? allowed: brightness, fog$"
    refused(message, cifar[0], "cifar10_c", only=("brightness", "fogg"))
    refused(r"\.only: 'labels' is not in", cifar[0], "cifar10_c", only=("labels",))


def test_hidden_files_are_no_corruptions(cifar):
    (cifar[0] / "._fog.npy").write_bytes(b"Mac OS X")
    assert {shift.name for shift in opened(cifar[0], "cifar10_c")} == {"brightness", "fog"}


# --- what settings are tuned under ----------------------------------------------------------------


@pytest.mark.parametrize(("format", "classes"), [("cifar10_c", CIFAR10), ("cifar100_c", CIFAR100)])
def test_the_whole_archive_is_the_15_corruptions_of_the_benchmark_and_not_the_four_of_tuning(
    tmp_path, format, classes
):
    for name in (*BENCHMARK, *HELD_OUT, "my_own"):
        np.save(tmp_path / f"{name}.npy", noise(5, 32, 32, 3))
    np.save(tmp_path / "labels.npy", np.zeros(5, int))
    shifts = opened(tmp_path, format, classes, severities=(5,))
    assert [shift.name for shift in shifts] == sorted(BENCHMARK)
    assert len(shifts) == 15
    held_out = "gaussian_blur, saturate, spatter, speckle_noise"
    assert left_out_of(tmp_path, format) == [
        f"shifts.sets.c: left out {held_out}: settings are tuned under corruptions of these names",
        "shifts.sets.c: left out my_own: beside the 15 corruptions of the benchmark; "
        "shifts.sets.c.only can name them",
    ]
    (shift,) = opened(tmp_path, format, classes, severities=(5,), only=("my_own",))
    assert shift.name == "my_own"
    assert left_out_of(tmp_path, format, only=("my_own", "fog")) == []


def test_an_archive_of_nothing_but_what_settings_are_tuned_under_is_refused(tmp_path):
    np.save(tmp_path / "spatter.npy", noise(5, 32, 32, 3))
    np.save(tmp_path / "labels.npy", np.zeros(5, int))
    message = r"\.root: expected one of the 15 corruptions in .*, found only spatter; add some"
    refused(message, tmp_path, "cifar10_c")
    write(tmp_path / "f", "spatter/1/ape/0.png")
    message = (
        r"\.root: expected a shift that is not kept for tuning in .*, found only spatter; add some"
    )
    refused(message, tmp_path / "f", "corruption_folders")


@pytest.mark.parametrize(
    "name",
    ["speckle_noise", "Gaussian Blur", "spatter-3", "saturate_5", "SPATTER", "speckle-noise"],
)
@pytest.mark.parametrize(
    ("format", "below"), [("corruption_folders", "2/ape/0.png"), ("domain_folders", "ape/0.png")]
)
def test_folders_named_like_what_settings_are_tuned_under_are_left_out_and_told(
    tmp_path, format, below, name
):
    write(tmp_path, f"{name}/{below}", f"fog/{below}", f"my own/{below}", f"blur/{below}")
    assert [shift.name for shift in opened(tmp_path, format)] == ["blur", "fog", "my own"]
    assert left_out_of(tmp_path, format) == [
        f"shifts.sets.c: left out {name}: settings are tuned under corruptions of these names"
    ]
    assert [shift.name for shift in opened(tmp_path, format, only=("my own",))] == ["my own"]


def test_nothing_is_told_where_nothing_is_left_out(cifar, tmp_path):
    assert left_out_of(cifar[0], "cifar10_c") == []
    write(tmp_path / "domains", "night/ape/0.png")
    assert left_out_of(tmp_path / "domains", "domain_folders") == []


# --- CIFAR-10.1 -----------------------------------------------------------------------------------


@pytest.fixture
def cifar10_1(tmp_path):
    for version, count in (("v4", 7), ("v6", 5)):
        pixels = noise(count, 32, 32, 3, seed=count)
        pixels[1] = 200  # the same image in both versions
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", pixels)
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", np.arange(count, dtype=np.int32))
    return tmp_path


def test_cifar_10_1_has_versions_of_their_own_sizes_and_no_severity(cifar10_1):
    shifts = opened(cifar10_1, "cifar10_1")
    assert [shift[:2] for shift in shifts] == [("v4", 0), ("v6", 0)]
    for (version, _, source), count in zip(shifts, (7, 5), strict=True):
        pixels = np.load(cifar10_1 / f"cifar10.1_{version}_data.npy")
        np.testing.assert_array_equal(seen(source), pixels)  # bytes, read twice
        assert source.groups.tolist() == list(range(count))
        assert source.classes == CIFAR10
    first, second = (set(source.image_ids) for _, _, source in shifts)
    assert len(first) == 7
    assert first & second == {shifts[0].source.image_ids[1]}  # one image has one id
    assert [shift.name for shift in opened(cifar10_1, "cifar10_1", only=("v6",))] == ["v6"]


def test_mistakes_in_cifar_10_1_are_named(cifar10_1):
    refused(r"\.only: 'v5' is not in .* allowed: v4, v6", cifar10_1, "cifar10_1", only=("v5",))
    refused(": expected the classes of CIFAR-10 ", cifar10_1, "cifar10_1", CIFAR100)
    np.save(cifar10_1 / "cifar10.1_v6_labels.npy", np.arange(5) + 6)
    message = r"\.root: expected labels from 0 to 9 in .*v6_labels\.npy, found 6 to 10"
    refused(message, cifar10_1, "cifar10_1")
    np.save(cifar10_1 / "cifar10.1_v6_labels.npy", np.arange(4))
    message = r"\.root: expected uint8 of shape \(4, 32, 32, 3\), as many as there are labels"
    refused(message, cifar10_1, "cifar10_1")
    (cifar10_1 / "cifar10.1_v6_labels.npy").unlink()
    refused(r"\.root: expected a NumPy file, found none .*v6_labels\.npy", cifar10_1, "cifar10_1")
    for file in cifar10_1.glob("*_data.npy"):
        file.unlink()
    message = r"\.root: expected cifar10\.1_<version>_data\.npy in .*, found none"
    refused(message, cifar10_1, "cifar10_1")


# --- folders --------------------------------------------------------------------------------------


def write(root, *names):
    """Write a different image under every name; return their pixels."""
    pixels = {}
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels[name] = noise(6, 6, 3, seed=number)
        Image.fromarray(pixels[name]).save(root / name)
    return pixels


def contents(source):
    """Read every image of a source, by its name."""
    return {
        name: np.asarray(Image.open(source.read(row).open()))
        for row, name in enumerate(source.image_ids)
    }


def test_a_folder_per_corruption_and_severity(tmp_path):
    images = ("bee/2.png", "ape/1.png", "ape/0.png")
    folders = ("snow/3", "fog/5", "fog/1")
    pixels = write(tmp_path, *(f"{folder}/{image}" for folder in folders for image in images))
    write(tmp_path, ".cache/1/ape/0.png")
    shifts = opened(tmp_path, "corruption_folders")
    assert [shift[:2] for shift in shifts] == [("fog", 1), ("fog", 5), ("snow", 3)]
    for name, severity, source in shifts:
        assert source.image_ids == tuple(sorted(images))  # the same under every corruption
        assert source.paths[0] == str(tmp_path / name / str(severity) / "ape/0.png")
        assert (source.classes, source.labeled) == (("ape", "bee"), True)
        assert source.groups.tolist() == [0, 0, 1]
        for image, array in contents(source).items():
            np.testing.assert_array_equal(array, pixels[f"{name}/{severity}/{image}"])


def test_only_what_is_wanted_of_the_folders(tmp_path):
    folders = [f"{name}/{severity}" for name in ("fog", "snow") for severity in (1, 2, 3)]
    write(tmp_path, *(f"{folder}/ape/0.png" for folder in folders))
    shifts = opened(tmp_path, "corruption_folders", only=("snow",), severities=(3, 1))
    assert [shift[:2] for shift in shifts] == [("snow", 3), ("snow", 1)]
    message = r"\.only: 'snwo' is not in .*; did you mean 'snow'\?"
    refused(message, tmp_path, "corruption_folders", only=("snwo",))
    message = r"\.severities: expected a folder .*/fog/4, found none; leave 4 out"
    refused(message, tmp_path, "corruption_folders", severities=(1, 4))


def test_a_folder_that_is_no_severity_is_named(tmp_path):
    write(tmp_path, "fog/1/ape/0.png", "fog/mild/ape/0.png")
    message = (
        r"\.root: expected folders 1 to 5 in .*/fog, found 'mild'; "
        "for a folder per domain set format: domain_folders"
    )
    refused(message, tmp_path, "corruption_folders")
    write(tmp_path, "snow/6/ape/0.png")
    message = r"\.root: expected folders 1 to 5 in .*/snow, found '6'"
    refused(message, tmp_path, "corruption_folders", only=("snow",))


def test_what_systems_leave_behind_is_no_shift_and_no_severity(tmp_path):
    write(
        tmp_path,
        "fog/2/ape/0.png",
        "__MACOSX/2/ape/0.png",
        "fog/@eaDir/ape/0.png",
        "fog/2/__MACOSX/0.png",
        "lost+found/1/ape/0.png",
    )
    (shift,) = opened(tmp_path, "corruption_folders")
    assert (shift[:2], shift.source.image_ids) == (("fog", 2), ("ape/0.png",))
    assert [shift.name for shift in opened(tmp_path, "domain_folders", labels="none")] == ["fog"]


def test_shifts_and_classes_are_the_same_however_their_accents_are_encoded(tmp_path):
    composed, decomposed = "\u00e9t\u00e9", "e\u0301te\u0301"
    write(tmp_path, f"{decomposed}/{decomposed}/0.png")
    for only in (None, (composed,), (decomposed,)):
        (shift,) = opened(tmp_path, "domain_folders", only=only)
        assert (shift.name, shift.source.classes) == (composed, (composed,))
        assert shift.source.image_ids == (f"{composed}/{composed}/0.png",)
        assert len(contents(shift.source)) == 1
    write(tmp_path, f"{composed}/{composed}/1.png")
    if len(list(tmp_path.iterdir())) == 2:
        message = r"\.root: expected every name once, found '\u00e9t\u00e9' twice in "
        refused(message, tmp_path, "domain_folders")


@pytest.mark.parametrize(
    ("format", "below"), [("corruption_folders", "2/ape/0.png"), ("domain_folders", "ape/0.png")]
)
def test_names_that_are_not_utf_8_are_refused(tmp_path, format, below):
    write(tmp_path, f"fog/{below}")
    os.rename(tmp_path / "fog", os.fsencode(tmp_path) + b"/caf\xe9")
    message = r"\.root: expected names in UTF-8, found 'caf\\udce9' in .*; rename it$"
    refused(message, tmp_path, format)
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9", tmp_path / "fog")
    image = tmp_path / "fog" / below
    os.rename(image, os.fsencode(image.parent) + b"/caf\xe9.png")
    message = r"\.root: expected file names in UTF-8, found '.*caf\\udce9\.png'; rename it$"
    refused(message, tmp_path, format)


@pytest.mark.parametrize("name", ["fog/0.png", "fog/.hidden/0.png"])
def test_a_corruption_without_severities_is_named(tmp_path, name):
    write(tmp_path, name)
    refused(r"\.root: expected folders 1 to 5 in .*/fog", tmp_path, "corruption_folders")


@pytest.mark.parametrize("format", ["corruption_folders", "domain_folders"])
def test_a_root_without_folders_is_named(tmp_path, format):
    write(tmp_path, "loose.png", ".hidden/1/ape/0.png")
    forms = {
        "corruption_folders": "<corruption>/<severity>/<class>/<image>",
        "domain_folders": "<domain>/<class>/<image>",
    }
    message = rf"\.root: expected {forms[format]} in .*, found none; check root and format"
    refused(message, tmp_path, format)


@pytest.mark.parametrize(
    ("format", "top"), [("corruption_folders", "fog/2"), ("domain_folders", "night")]
)
def test_mistakes_inside_a_shift_are_those_of_any_folder_of_classes(tmp_path, format, top):
    write(tmp_path, f"{top}/ape/0.png", f"{top}/loose.png")
    message = (
        rf"\.root: expected <class>/<image> in .*/{top}, found loose\.png outside any class folder"
    )
    refused(message, tmp_path, format)
    (tmp_path / top / "loose.png").unlink()
    (tmp_path / top / "bee").mkdir()
    refused(rf"\.root: the class 'bee' in .*/{top} holds no image", tmp_path, format)
    (tmp_path / top / "ape/0.png").unlink()
    refused(rf"\.root: expected images \(\.bmp, .*found none in .*/{top}", tmp_path, format)


def test_a_folder_per_domain_whose_images_are_not_those_of_another(tmp_path):
    pixels = write(tmp_path, "night/ape/0.png", "night/bee/0.png", "art by hand/ape/0.png")
    art, night = opened(tmp_path, "domain_folders")
    assert (art[:2], night[:2]) == (("art by hand", 0), ("night", 0))
    assert night.source.image_ids == ("night/ape/0.png", "night/bee/0.png")
    assert art.source.image_ids == ("art by hand/ape/0.png",)
    assert (night.source.classes, night.source.groups.tolist()) == (("ape", "bee"), [0, 1])
    assert art.source.classes == ("ape",)
    for shift in (art, night):
        for name, array in contents(shift.source).items():
            np.testing.assert_array_equal(array, pixels[name])
    names = ("night", "art by hand")
    shifts = opened(tmp_path, "domain_folders", only=names)
    assert tuple(shift.name for shift in shifts) == names
    message = r"\.only: 'nihgt' is not in .*; did you mean 'night'\?"
    refused(message, tmp_path, "domain_folders", only=("nihgt",))


def test_domains_without_class_folders_have_no_labels_each_for_itself(tmp_path):
    write(tmp_path, "day/ape/0.png", "night/0.png", "night/1.png")
    day, night = opened(tmp_path, "domain_folders")
    assert (day.source.labeled, night.source.labeled) == (True, False)
    assert night.source.image_ids == ("night/0.png", "night/1.png")


@pytest.mark.parametrize(
    ("format", "top"), [("corruption_folders", "fog/2"), ("domain_folders", "night")]
)
def test_folders_that_are_said_to_be_no_classes_are_none(tmp_path, format, top):
    write(tmp_path, f"{top}/camera 1/0.png", f"{top}/camera 2/july/0.png", f"{top}/loose.png")
    (shift,) = opened(tmp_path, format, labels="none")
    assert not shift.source.labeled
    assert [name.removeprefix("night/") for name in shift.source.image_ids] == [
        "camera 1/0.png",
        "camera 2/july/0.png",
        "loose.png",
    ]
