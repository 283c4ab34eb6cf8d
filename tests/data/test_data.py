import io
import os
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from tests.helpers.trees import collect, fill, pack, picture, spec, write_tree
from tttlab.data.copies import check_duplicates
from tttlab.data.decoding import to_square
from tttlab.data.image_sets import ImageSet, align_classes, check_classes, class_counts
from tttlab.data.sources import ImageSource, open_source
from tttlab.data.splits import balanced_subset, split_validation, take_part
from tttlab.errors import UserError

SHARED = Path(__file__).parents[2] / "../shared/data"
CIFAR = Path(os.environ.get("TTTLAB_DATA", SHARED)) / "cifar10"


def digits(which="test", **settings):
    return fill(spec(source="sklearn/digits", **settings), which, 32)


def fake_source(sizes):
    names = tuple(f"{group}/{index}" for group, size in enumerate(sizes) for index in range(size))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    classes = tuple(str(group) for group in range(len(sizes)))
    return ImageSource(names, names, groups, classes, lambda index: None)


# --- parts, limits, validation --------------------------------------------------------------------


def test_adjacent_parts_share_nothing_leave_nothing_out_and_are_stratified():
    sizes = np.array([100, 37, 5, 1, 1, 1])
    source = fake_source(sizes)
    edges = [0.0, 0.45, 0.8, 1.0]
    parts = [take_part(source, (low, high), 7, "s") for low, high in pairwise(edges)]
    assert sorted(np.concatenate(parts)) == list(range(145))
    for (low, high), part in zip(pairwise(edges), parts, strict=True):
        counts = np.bincount(source.groups[part], minlength=6)
        np.testing.assert_array_less(np.abs(counts - (high - low) * sizes), 1.0 + 1e-9)


def test_classes_of_one_image_are_spread_over_the_parts():
    part = take_part(fake_source([1] * 2000), (0.0, 0.3), 0, "s")
    assert abs(len(part) / 2000 - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)


def test_a_part_depends_on_seed_and_source_name_and_on_nothing_else():
    source = fake_source([50, 50])
    first = take_part(source, (0.0, 0.5), 0, "s")
    assert np.array_equal(first, take_part(source, (0.0, 0.5), 0, "s"))
    assert not np.array_equal(first, take_part(source, (0.0, 0.5), 1, "s"))
    assert not np.array_equal(first, take_part(source, (0.0, 0.5), 0, "t"))


def test_unlabeled_and_labeled_sets_from_one_folder_are_disjoint(tmp_path):
    write_tree(tmp_path, {"cat": 9, "dog": 14, "eel": 6})
    unlabeled = collect(tmp_path, "unlabeled", part=(0.0, 0.5))
    labeled = collect(tmp_path, "labeled", part=(0.5, 1.0))
    assert set(unlabeled.image_ids).isdisjoint(labeled.image_ids)
    assert len(unlabeled) + len(labeled) == 29
    assert set(unlabeled.labels) == {-1}
    assert unlabeled.classes == ()


@pytest.mark.parametrize("count", [1, 6, 10, 23])
def test_a_limit_is_balanced_as_far_as_there_are_images(count):
    source = fake_source([20, 20, 2])
    indices = balanced_subset(source.image_ids, source.groups, count, 0, "limit")
    counts = np.bincount(source.groups[indices], minlength=3)
    assert counts.sum() == count
    rare = min(2, counts[2])
    assert counts[2] == rare
    assert abs(counts[0] - counts[1]) <= 1
    assert counts[2] >= min(2, count // 3)


def test_a_smaller_limit_is_contained_in_a_larger_one():
    source = fake_source([20, 30])
    small, large = (
        balanced_subset(source.image_ids, source.groups, count, 0, "limit") for count in (7, 19)
    )
    assert set(small) < set(large)
    assert np.array_equal(balanced_subset(source.image_ids, source.groups, None, 0), np.arange(50))


def test_validation_takes_its_share_of_every_class():
    images = digits("labeled")
    train, validation = split_validation(images, 0.2, 0)
    assert set(train.image_ids).isdisjoint(validation.image_ids)
    assert set(train.image_ids) | set(validation.image_ids) == set(images.image_ids)
    for name, count in class_counts(images).items():
        assert class_counts(validation)[name] == round(0.2 * count)
    assert split_validation(images, 0.2, 1)[1].image_ids != validation.image_ids


def test_validation_needs_two_images_of_two_classes(tmp_path):
    write_tree(tmp_path / "a", {"cat": 3, "dog": 1})
    with pytest.raises(UserError, match=r"found 1 of class 'dog'; widen data\.labeled\.part"):
        split_validation(collect(tmp_path / "a"), 0.2, 0)
    write_tree(tmp_path / "b", {"cat": 3})
    with pytest.raises(UserError, match="at least two classes, found cat"):
        split_validation(collect(tmp_path / "b"), 0.2, 0)


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_scaled_to_bytes():
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits()
    source = open_source(spec(source="sklearn/digits"), "test", Path("unused"))
    assert np.array_equal(source.groups, expected.target)
    for index in (0, 5, 1796):
        scaled = np.round(expected.images[index] / 16 * 255).astype(np.uint8)
        assert np.array_equal(np.asarray(source.read(index)), scaled)


def test_digits_are_grey_named_by_position_and_never_the_same_twice():
    images = digits(limit=40)
    assert images.pixels.shape == (40, 32, 32, 3)
    assert np.array_equal(images.pixels[..., 0], images.pixels[..., 2])
    assert class_counts(images) == {str(digit): 4 for digit in range(10)}
    full = digits()
    assert len({pixels.tobytes() for pixels in full.pixels}) == len(full) == 1797
    assert full.image_ids[12] == "digits/00012"


# --- decoding -------------------------------------------------------------------------------------


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    buffer.seek(0)
    return buffer


def test_an_image_of_the_right_size_keeps_every_pixel():
    image = picture(8, 8)
    assert np.array_equal(to_square(saved(image, format="PNG"), 8), np.asarray(image))


def test_grey_palette_bilevel_and_cmyk_become_rgb():
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    assert (to_square(saved(grey, format="PNG"), 8) == 77).all()
    colours = Image.new("RGB", (8, 8), (200, 30, 90))
    assert (to_square(saved(colours.quantize(4), format="PNG"), 8) == (200, 30, 90)).all()
    assert (to_square(saved(Image.new("1", (8, 8), 1), format="PNG"), 8) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = to_square(saved(cmyk, format="JPEG", quality=100), 8).astype(int)
    assert (abs(red - (255, 0, 0)) <= 3).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.full((8, 8), 0x8040, np.uint16)
    assert (to_square(saved(Image.fromarray(values), format="PNG"), 8) == 0x80).all()


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 51))  # alpha 1/5: black on white gives 4/5 of 255
    assert (to_square(saved(half, format="PNG"), 8) == 204).all()
    assert (to_square(saved(Image.new("LA", (8, 8), (0, 0)), format="PNG"), 8) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 20, 30, 40])
    assert (to_square(saved(palette, format="PNG", transparency=1), 8) == 255).all()
    assert (to_square(saved(palette, format="PNG", transparency=0), 8) == (20, 30, 40)).all()


def test_exif_orientation_is_applied():
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    rotated = Image.fromarray(upright[::-1, ::-1])
    assert np.array_equal(to_square(saved(rotated, format="PNG", exif=exif), 8), upright)


def test_the_centre_is_cropped_after_resizing_the_shorter_side():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = np.asarray(picture(8, 8))
    assert np.array_equal(to_square(Image.fromarray(wide), 8), wide[:, 8:16])
    tall = np.repeat(np.linspace(0, 240, 64).astype(np.uint8)[:, None, None], 32, 1).repeat(3, 2)
    shrunk = to_square(Image.fromarray(tall), 16).astype(float)
    expected = tall[16:48].reshape(16, 2, 32, 3).mean((1, 2))
    assert abs(shrunk[2:-2, 8] - expected[2:-2]).max() <= 2


def test_downscaling_averages_instead_of_picking_pixels():
    board = np.indices((256, 256)).sum(0) % 2 * 255
    shrunk = to_square(Image.fromarray(board.astype(np.uint8)), 8).astype(int)
    assert abs(shrunk - 127.5).max() <= 2


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same():
    smooth = np.add.outer(np.arange(2000) / 16, np.arange(2000) / 16).astype(np.uint8)
    file = saved(Image.fromarray(smooth).convert("RGB"), format="JPEG", quality=95)
    full = np.asarray(Image.open(file).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    file.seek(0)
    assert abs(to_square(file, 16).astype(int) - full).max() <= 3


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_read_in_sorted_order_with_labels_by_class_name(tmp_path):
    write_tree(tmp_path, {"dog": 2, "cat": 3})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._001.png").write_text("no image either")
    (tmp_path / ".cache").mkdir()
    images = collect(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.image_ids[3] == "dog/000.png"
    assert Path(images.paths[3]) == tmp_path / "dog" / "000.png"
    assert np.array_equal(images.pixels[3], to_square(tmp_path / "dog" / "000.png", 8))


def test_a_split_is_a_folder_inside_the_root(tmp_path):
    write_tree(tmp_path / "val", {"cat": 1, "dog": 2})
    assert collect(tmp_path, split="val").image_ids == ("cat/000.png", "dog/000.png", "dog/001.png")


def test_unlabeled_folders_may_be_nested_loose_or_partly_empty(tmp_path):
    write_tree(tmp_path, {"a/b/c": 2, "d": 1})
    (tmp_path / "empty").mkdir()
    picture().save(tmp_path / "loose.jpg")
    assert collect(tmp_path, "unlabeled").image_ids == (
        "a/b/c/000.png",
        "a/b/c/001.png",
        "d/000.png",
        "loose.jpg",
    )


def test_an_empty_class_is_named(tmp_path):
    write_tree(tmp_path, {"cat": 2, "dog": 0, "eel": 0})
    message = r"^data\.test\.root: the class 'dog' in .* holds no image \(and 1 more\)"
    with pytest.raises(UserError, match=message):
        collect(tmp_path, "test")


@pytest.mark.parametrize("which", ["labeled", "test"])
def test_images_outside_a_class_are_named(tmp_path, which):
    write_tree(tmp_path, {"cat": 2})
    picture().save(tmp_path / "loose.png")
    message = rf"^data\.{which}\.root: expected <class>/<image> in .*, found loose\.png"
    with pytest.raises(UserError, match=message):
        collect(tmp_path, which)


def test_test_images_that_lie_in_no_folder_have_no_labels_and_labeled_ones_must(tmp_path):
    for name in ("b.png", "a.jpg"):
        picture().save(tmp_path / name)
    images = collect(tmp_path, "test")
    assert (images.image_ids, images.labels.tolist(), images.classes) == (
        ("a.jpg", "b.png"),
        [-1, -1],
        (),
    )
    message = r"^data\.labeled\.root: expected <class>/<image> in .*, found a\.jpg"
    with pytest.raises(UserError, match=message):
        collect(tmp_path)


def test_folders_that_are_no_classes_may_hold_anything(tmp_path):
    write_tree(tmp_path, {"monday/early": 2, "tuesday": 3, "empty": 0})
    picture().save(tmp_path / "loose.png")
    images = collect(tmp_path, "test", labels="none")
    assert images.image_ids[:3] == ("loose.png", "monday/early/000.png", "monday/early/001.png")
    assert (set(images.labels), len(images), images.classes) == ({-1}, 6, ())


def test_labels_of_a_named_source_can_be_left_aside_too():
    images = digits(labels="none")
    assert set(images.labels) == {-1}
    assert images.classes == ()
    assert digits().image_ids == images.image_ids


def test_a_limit_takes_no_notice_of_folders_that_are_no_classes(tmp_path):
    """If the folders were classes, all images of monday would be taken."""
    write_tree(tmp_path, {"monday": 3, "tuesday": 60})
    images = collect(tmp_path, "test", labels="none", limit=20)
    days = [name.partition("/")[0] for name in images.image_ids]
    assert len(days) == 20
    assert days.count("monday") < 3
    classes = [name.partition("/")[0] for name in collect(tmp_path, "test", limit=20).image_ids]
    assert classes.count("monday") == 3


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("")
    message = r"^data\.unlabeled\.root: expected images \(\.bmp, .*found none in"
    with pytest.raises(UserError, match=message):
        collect(tmp_path, "unlabeled")


def test_an_empty_part_is_named(tmp_path):
    write_tree(tmp_path, {"cat": 1})
    source = open_source(spec(tmp_path), "test", tmp_path)
    parts = [(index / 8, (index + 1) / 8) for index in range(8)]
    empty = [part for part in parts if take_part(source, part, 0, "folder/None").size == 0]
    with pytest.raises(UserError, match=r"^data\.test\.part: .* of 1 images is none"):
        collect(tmp_path, "test", part=empty[0])


def test_the_number_of_workers_changes_nothing(tmp_path):
    write_tree(tmp_path, {"cat": 20, "dog": 20})
    one, four = (collect(tmp_path, workers=workers, limit=30) for workers in (1, 4))
    assert np.array_equal(one.pixels, four.pixels)
    assert one.image_ids == four.image_ids


def broken_tree(root):
    write_tree(root, {"cat": 4, "dog": 4})
    whole = (root / "dog" / "001.png").read_bytes()
    (root / "dog" / "001.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "002.png").write_text("no image")
    (root / "dog" / "003.png").write_bytes(b"")
    return root


def test_no_file_starts_a_program_whatever_its_name_says(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("started"))
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png", "EPS")
    with pytest.raises(Exception, match="cannot identify image file"):
        to_square(tmp_path / "photo.png", 4)


def test_unreadable_files_are_counted_and_the_first_is_named(tmp_path):
    root = broken_tree(tmp_path)
    message = r"^data\.labeled: 3 of 8 files cannot be read .* first is .*cat/002\.png"
    with pytest.raises(UserError, match=message) as caught:
        collect(root, workers=4)
    assert "data.unreadable: skip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_left_out_and_listed_on_request(tmp_path):
    images = collect(broken_tree(tmp_path), unreadable="skip")
    assert images.image_ids == (
        "cat/000.png",
        "cat/001.png",
        "cat/003.png",
        "dog/000.png",
        "dog/002.png",
    )
    assert len(images.pixels) == len(images.labels) == 5
    assert [line.partition(": ")[0][-11:] for line in images.skipped] == [
        "cat/002.png",
        "dog/001.png",
        "dog/003.png",
    ]
    assert all(line.partition(": ")[2] for line in images.skipped)
    assert np.array_equal(images.pixels[4], to_square(tmp_path / "dog" / "002.png", 8))


def test_nothing_but_unreadable_files_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 1 files cannot be read"):
        collect(tmp_path, unreadable="skip")


def test_an_image_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    write_tree(tmp_path, {"cat": 1})
    picture(40, 40).save(tmp_path / "cat" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses above twice this many
    message = r"first is .*huge\.png: Image size \(1600 pixels\) exceeds limit"
    with pytest.raises(UserError, match=message):
        collect(tmp_path)


def test_real_photographs_keep_their_pixels():
    if not CIFAR.is_dir():
        pytest.skip(f"CIFAR-10 is not in {CIFAR}; set TTTLAB_DATA")
    images = fill(spec(CIFAR, split="test", limit=50), "test", 32, workers=2)
    assert len(images.classes) == 10
    assert set(class_counts(images).values()) == {5}
    for index in (0, 49):
        expected = np.asarray(Image.open(images.paths[index]).convert("RGB"))
        assert np.array_equal(images.pixels[index], expected)
        assert images.classes[images.labels[index]] == Path(images.paths[index]).parent.name


# --- tar files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "./", "photos/train/"])
def test_a_tar_file_gives_what_its_folder_gives(tmp_path, prefix):
    folder = write_tree(tmp_path / "tree", {"cat": 3, "dog": 2})
    expected = collect(folder)
    images = collect(pack(tmp_path / "images.tar", folder, prefix), source="tar", workers=3)
    assert images.image_ids == expected.image_ids
    assert np.array_equal(images.pixels, expected.pixels)
    assert images.labels.tolist() == expected.labels.tolist()
    if prefix != "./":
        assert images.paths[0].endswith(f"images.tar:{prefix}cat/000.png")


def test_a_folder_of_tar_files_is_one_set(tmp_path):
    for shard in ("a", "b"):
        pack(tmp_path / f"{shard}.tar", write_tree(tmp_path / shard, {"cat": 1, "dog": 1}))
    images = collect(tmp_path, source="tar")
    assert images.image_ids == ("cat/a/000.png", "cat/b/000.png", "dog/a/000.png", "dog/b/000.png")
    assert images.labels.tolist() == [0, 0, 1, 1]


def test_a_tar_file_per_class(tmp_path):
    for name in ("cat", "dog"):
        tree = write_tree(tmp_path / "tree", {name: 2})
        pack(tmp_path / f"{name}.tar", tree / name)
    assert collect(tmp_path, source="tar").classes == ("cat", "dog")


def test_a_tar_file_of_test_images_may_hold_no_classes(tmp_path):
    tree = write_tree(tmp_path / "tree", {".": 3})
    loose = collect(pack(tmp_path / "loose.tar", tree), "test", source="tar")
    assert (loose.image_ids, loose.classes) == (("000.png", "001.png", "002.png"), ())
    assert loose.labels.tolist() == [-1] * 3
    days = pack(tmp_path / "days.tar", write_tree(tmp_path / "days", {"monday": 2, "tuesday": 1}))
    assert collect(days, "test", source="tar").classes == ("monday", "tuesday")
    assert collect(days, "test", source="tar", labels="none").labels.tolist() == [-1] * 3


def test_tar_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar file")
    message = r"^data\.test\.root: expected an uncompressed tar file, found .*bad\.tar"
    with pytest.raises(UserError, match=message):
        collect(tmp_path / "bad.tar", "test", source="tar")
    (tmp_path / "none").mkdir()
    message = r"^data\.test\.root: expected a tar file or a folder of them, found no \.tar"
    with pytest.raises(UserError, match=message):
        collect(tmp_path / "none", "test", source="tar")
    tree = write_tree(tmp_path / "tree", {"cat": 1})
    (tree / "dog").mkdir()
    with pytest.raises(UserError, match=r"the class 'dog' in .* holds no image"):
        collect(pack(tmp_path / "t.tar", tree), "test", source="tar")


# --- named data sets ------------------------------------------------------------------------------


@pytest.fixture
def factory(monkeypatch):
    """Stand in for timm's factory of data sets, whose import takes seconds.

    It returns ``calls.result``, or raises it.
    """
    calls = types.SimpleNamespace(seen=[], result=None)

    def create_dataset(name, **options):
        calls.seen.append((name, options))
        if isinstance(calls.result, Exception):
            raise calls.result
        return calls.result

    fake = types.ModuleType("timm.data")
    fake.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.data", fake)
    return calls


class TorchvisionLike(list):
    targets = (1, 0, 1)
    classes = ("truck", "bird")


class ReaderLike(list):
    class_to_idx = {"pear": 0, "apple": 1}  # noqa: RUF012

    def iter_targets(self):
        return (label for _, label in self)


def test_a_torchvision_set_is_fetched_through_timm(factory, tmp_path):
    pictures = [picture(8, 8) for _ in range(3)]
    factory.result = TorchvisionLike((image, None) for image in pictures)
    images = fill(
        spec(source="torch/cifar10", split="train"), "labeled", downloads=tmp_path / "down"
    )
    name, options = factory.seen[0]
    assert (name, options["split"], options["download"]) == ("torch/cifar10", "train", True)
    assert Path(options["root"]) == tmp_path / "down"
    assert images.classes == ("bird", "truck")
    assert images.labels.tolist() == [0, 1, 0]
    assert images.image_ids[2] == "cifar10/train/0000002"
    assert np.array_equal(images.pixels[1], np.asarray(pictures[1]))


def test_a_hugging_face_set_is_read_past_timms_replacement_of_bad_images(factory, tmp_path):
    good = saved(picture(8, 8), format="PNG")
    factory.result = types.SimpleNamespace(reader=ReaderLike([(good, 0), (io.BytesIO(b"bad"), 1)]))
    message = r"^data\.test: 1 of 2 files cannot be read .* first is someone/fruit/val/0000001"
    with pytest.raises(UserError, match=message):
        fill(spec(source="hfds/someone/fruit", split="val"), "test", downloads=tmp_path)


def test_a_named_set_without_labels_serves_for_all_but_training_a_classifier(factory, tmp_path):
    pairs = [(saved(picture(8, 8), format="PNG"), -1) for _ in range(2)]
    factory.result = types.SimpleNamespace(reader=ReaderLike(pairs))
    named = spec(source="hfds/someone/fruit", split="test")
    with pytest.raises(UserError, match=r"^data\.labeled\.split: .* has no labels"):
        fill(named, "labeled", downloads=tmp_path)
    for which in ("unlabeled", "test"):
        images = fill(named, which, downloads=tmp_path)
        assert (images.labels.tolist(), images.classes) == ([-1, -1], ())


def test_a_failed_download_is_one_line(factory, tmp_path):
    factory.result = RuntimeError("no network\nlong story")
    message = r"^data\.test\.source: torch/mnist .* cannot be fetched: no network$"
    with pytest.raises(UserError, match=message):
        fill(spec(source="torch/mnist", split="test"), "test", downloads=tmp_path)


# --- sets together --------------------------------------------------------------------------------


def test_labels_follow_the_labeled_classes_by_name(tmp_path):
    test = collect(write_tree(tmp_path, {"dog": 1, "cat": 2}), "test")
    aligned = align_classes(test, ("ant", "cat", "cow", "dog"))
    assert aligned.labels.tolist() == [1, 1, 3]
    assert class_counts(aligned) == {"ant": 0, "cat": 2, "cow": 0, "dog": 1}


def test_a_test_class_that_was_never_trained_is_named():
    check_classes(("cat",), ("cat", "dog"), "data.test")
    message = r"^data\.test: class 'dgo' is not in data\.labeled; did you mean 'dog'\?"
    with pytest.raises(UserError, match=message) as caught:
        check_classes(("cat", "dgo"), ("cat", "dog"), "data.test")
    assert "set labels: none if the folders are no classes" in str(caught.value)


def test_images_without_labels_stay_without_when_classes_are_aligned(tmp_path):
    test = collect(write_tree(tmp_path, {"dog": 1, "cat": 2}), "test", labels="none")
    assert test.classes == ()
    aligned = align_classes(test, ("cat", "dog"))
    assert aligned.labels.tolist() == [-1, -1, -1]
    assert aligned.classes == ("cat", "dog")


def copy_file(source, target):
    target.write_bytes(source.read_bytes())


@pytest.mark.parametrize("pack_below", [0, 1024])
def test_the_same_pixels_in_two_sets_are_named_and_counted(tmp_path, pack_below):
    write_tree(tmp_path / "a", {"cat": 3})
    write_tree(tmp_path / "b", {"dog": 3})
    trained = {"data.labeled": collect(tmp_path / "a", pack_below=pack_below)}
    check_duplicates(trained, {"data.test": collect(tmp_path / "b", "test")})
    for index in (1, 2):
        copy_file(tmp_path / "a/cat/000.png", tmp_path / f"b/dog/00{index}.png")
    test = collect(tmp_path / "b", "test", pack_below=pack_below)
    message = r"^data\.test: .*b/dog/001\.png has the same pixels as .*a/cat/000\.png"
    with pytest.raises(UserError, match=message) as caught:
        check_duplicates(trained, {"data.test": test})
    assert "of data.labeled (2 such images in all)" in str(caught.value)
    check_duplicates({}, {"data.test": test})  # copies within a test set are no leak


def test_two_sets_to_train_on_must_differ_and_two_to_test_on_need_not(tmp_path):
    write_tree(tmp_path / "a", {"cat": 3})
    write_tree(tmp_path / "b", {"dog": 3})
    copy_file(tmp_path / "a/cat/002.png", tmp_path / "b/dog/000.png")
    a, b = collect(tmp_path / "a"), collect(tmp_path / "b")
    check_duplicates({}, {"data.test": a, "shifts.sets.c": b})
    message = (
        r"^data\.labeled: .*b/dog/000\.png has the same pixels as "
        r".*a/cat/002\.png of data\.unl"
    )
    with pytest.raises(UserError, match=message):
        check_duplicates({"data.unlabeled": a, "data.labeled": b}, {})


def test_an_image_in_every_set_is_told_for_those_that_are_tested_on_too(tmp_path):
    """Both test sets share an image with the training set, so both are counted."""
    for name in "abc":
        write_tree(tmp_path / name, {"cat": 2})
    for name in "bc":
        copy_file(tmp_path / "a/cat/000.png", tmp_path / name / "cat/001.png")
    a, b, c = (collect(tmp_path / name) for name in "abc")
    message = r"^data\.test: .*b/cat/001\.png .* as .*a/cat/000\.png of data\.labeled \(2 such"
    with pytest.raises(UserError, match=message):
        check_duplicates({"data.labeled": a}, {"data.test": b, "shifts.sets.c": c})


def test_a_set_survives_saving(tmp_path):
    images = digits(limit=20)
    images.save(tmp_path / "set")
    loaded = ImageSet.load(tmp_path / "set")
    assert isinstance(loaded.pixels, np.memmap)
    assert np.array_equal(loaded.pixels, images.pixels)
    assert loaded.labels.dtype == np.int64
    assert np.array_equal(loaded.labels, images.labels)
    assert (loaded.image_ids, loaded.classes, loaded.source) == (
        images.image_ids,
        images.classes,
        "sklearn/digits",
    )
    assert loaded.digest() == images.digest()
    two = loaded.take([4, 1])
    assert two.image_ids == (images.image_ids[4], images.image_ids[1])
    assert np.array_equal(two.pixels, images.pixels[[4, 1]])
    assert two.pixels.flags.c_contiguous
    assert len(two) == 2


def test_a_set_that_was_not_prepared_is_named(tmp_path):
    message = "none: expected an image set, found none; run the stage prepare first"
    with pytest.raises(UserError, match=message):
        ImageSet.load(tmp_path / "none")
