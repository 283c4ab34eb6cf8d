"""Folders and tar files: system files, names in other encodings, circular links."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.trees import collect, pack, write_tree
from tttlab.data.copies import check_labels
from tttlab.data.image_sets import ImageSet, align_classes, check_classes
from tttlab.errors import UserError


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    write_tree(tmp_path, {"cat": 2, "dog": 1})
    litter = (
        "__MACOSX/cat",
        "@eaDir",
        "cat/@eaDir/000.png",
        "$RECYCLE.BIN/S-1-5",
        "System Volume Information",
        "lost+found",
        ".ipynb_checkpoints",
        "dog/.ipynb_checkpoints",
        "__pycache__",
        "#recycle",
        "Lost+Found/deep",
    )
    write_tree(tmp_path, dict.fromkeys(litter, 1))
    files = ("cat/Thumbs.db", "desktop.ini", "cat/Desktop.ini", "dog/._000.png", "._cat", "Icon\r")
    for name in files:
        (tmp_path / name).write_text("no image")
    for which in ("labeled", "unlabeled"):
        images = collect(tmp_path, which)
        assert images.image_ids == ("cat/000.png", "cat/001.png", "dog/000.png")
        assert images.skipped == ()
    assert collect(tmp_path).classes == ("cat", "dog")
    assert collect(pack(tmp_path / "t.tar", tmp_path), source="tar").image_ids == images.image_ids


def test_an_archive_of_macos_is_what_was_put_into_it(tmp_path):
    """Next to the folder that wraps everything is one of resource forks with names of images."""
    folders = {"photos/cat": 1, "photos/dog": 1, "__MACOSX/photos/cat": 1}
    tree = write_tree(tmp_path / "tree", folders)
    (tree / "__MACOSX/photos/cat/000.png").rename(tree / "__MACOSX/photos/cat/._000.png")
    (tmp_path / "tars").mkdir()
    file = pack(tmp_path / "tars/all.tar", tree)
    (tmp_path / "tars/._all.tar").write_text("no tar")
    assert collect(file, source="tar").image_ids == ("cat/000.png", "dog/000.png")
    images = collect(tmp_path / "tars", source="tar")
    assert images.image_ids == ("cat/all/000.png", "dog/all/000.png")


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_classes_that_differ_only_in_the_encoding_of_an_accent_are_the_same(tmp_path):
    labeled = collect(write_tree(tmp_path / "a", {COMPOSED: 2, "zoo": 1}))
    tree = write_tree(tmp_path / "b", {DECOMPOSED: 1, "zoo": 1})
    tar = pack(tmp_path / "b.tar", tree)
    for test in (collect(tree, "test"), collect(tar, "test", source="tar")):
        assert test.classes == labeled.classes == (COMPOSED, "zoo")
        check_classes(test.classes, labeled.classes, "data.test")
        assert align_classes(test, labeled.classes).labels.tolist() == [0, 1]
        assert test.image_ids == (f"{COMPOSED}/000.png", "zoo/000.png")  # the same on every machine
        assert DECOMPOSED in test.paths[0]  # but an image is found where it is
    assert Path(collect(tree).paths[0]).is_file()


def test_two_folders_that_differ_only_in_the_encoding_of_an_accent_are_one_class(tmp_path):
    write_tree(tmp_path, {COMPOSED: 2, DECOMPOSED: 3, "zoo": 1})
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system takes both names for the same")
    images = collect(tmp_path)
    assert images.classes == (COMPOSED, "zoo")
    assert images.labels.tolist() == [0, 0, 0, 0, 0, 1]
    assert len(set(images.image_ids)) == 6
    assert f"{COMPOSED}/002.png" in images.image_ids
    write_tree(tmp_path / "empty", {COMPOSED: 1, DECOMPOSED: 0})
    assert collect(tmp_path / "empty").classes == (COMPOSED,)


@pytest.mark.parametrize("which", ["labeled", "unlabeled", "test"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_name_that_is_not_utf_8_is_refused_before_any_image_is_decoded(
    tmp_path, monkeypatch, which, kind
):
    tree = write_tree(tmp_path / "tree", {"cat": 2})
    os.rename(tree / "cat/001.png", os.fsencode(tree / "cat") + b"/caf\xe9.png")
    root = tree if kind == "folder" else pack(tmp_path / "t.tar", tree)
    monkeypatch.setattr("tttlab.data.reading.to_square", None)  # decoding fails
    message = (
        rf"^data\.{which}\.root: expected file names in UTF-8, "
        r"found '.*cat/caf\\udce9\.png'; rename it$"
    )
    with pytest.raises(UserError, match=message) as caught:
        collect(root, which, source=kind)
    str(caught.value).encode()


def test_a_class_that_is_not_utf_8_is_refused_and_a_file_that_is_no_image_is_only_told_of(tmp_path):
    write_tree(tmp_path, {"cat": 1, "dog": 1})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.txt")).write_text("no image")
    images = collect(tmp_path)
    assert images.skipped == (
        "cat/caf\\udce9.txt: its name does not end like an image's that can be read",
    )
    images.save(tmp_path / "set")
    assert ImageSet.load(tmp_path / "set").skipped == images.skipped
    os.rename(tmp_path / "dog", os.fsencode(tmp_path) + b"/d\xf6g")
    with pytest.raises(UserError, match=r"found '.*/d\\udcf6g/000\.png'; rename it"):
        collect(tmp_path)


# --- links ----------------------------------------------------------------------------------------


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("target", ["..", "../..", ".", "../../..", "../cat", "loop"])
def test_a_link_that_leads_upwards_is_not_followed(tmp_path, target):
    root = write_tree(tmp_path / "data/labeled", {"cat/deep": 2, "cat": 1, "dog": 2})
    write_tree(tmp_path / "data/test", {"cat": 5})
    link(root / "cat/loop", target)
    for which in ("labeled", "unlabeled"):
        names = (
            "cat/000.png",
            "cat/deep/000.png",
            "cat/deep/001.png",
            "dog/000.png",
            "dog/001.png",
        )
        assert collect(root, which).image_ids == names


def test_links_that_lead_round_are_followed_once(tmp_path):
    """Two folders outside link to each other."""
    outside = write_tree(tmp_path / "far", {"one": 1, "two": 2})
    link(outside / "one/next", "../two")
    link(outside / "two/next", "../one")
    root = write_tree(tmp_path / "root", {"cat": 1})
    link(root / "cat/all", outside / "one")
    assert collect(root).image_ids == (
        "cat/000.png",
        "cat/all/000.png",
        "cat/all/next/000.png",
        "cat/all/next/001.png",
    )


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    outside = write_tree(tmp_path / "far", {"cats/young": 1, "dogs": 2})
    root = tmp_path / "root"
    root.mkdir()
    link(root / "cat", outside / "cats")
    link(root / "dog", outside / "dogs")
    link(tmp_path / "link", root)  # the root itself may be a link
    images = collect(tmp_path / "link")
    assert images.image_ids == ("cat/young/000.png", "dog/000.png", "dog/001.png")
    assert images.classes == ("cat", "dog")


def test_a_folder_that_is_reached_twice_is_listed_once_where_it_lies(tmp_path):
    root = write_tree(tmp_path, {"cat/z": 1, "dog": 1})
    link(root / "cat/a link to it", "z")
    assert collect(root).image_ids == ("cat/z/000.png", "dog/000.png")
    link(root / "a link to it", "dog")
    assert collect(root, "unlabeled").image_ids == ("cat/z/000.png", "dog/000.png")
    assert collect(root, "test", labels="none").image_ids == ("cat/z/000.png", "dog/000.png")


def test_a_folder_that_is_reached_from_two_classes_is_in_both_and_its_images_contradict_each_other(
    tmp_path,
):
    root = write_tree(tmp_path, {"cat": 1, "dog": 2})
    link(root / "cat/others", "../dog")
    images = collect(root)
    assert images.image_ids == (
        "cat/000.png",
        "cat/others/000.png",
        "cat/others/001.png",
        "dog/000.png",
        "dog/001.png",
    )
    message = (
        r"dog/000\.png of class 'dog' has the same pixels as .*cat/others/000\.png of class 'c"
    )
    with pytest.raises(UserError, match=message):
        check_labels("data.labeled", images)


def test_a_link_to_itself_or_to_nothing_is_named_as_any_unreadable_image(tmp_path):
    root = write_tree(tmp_path, {"cat": 1})
    (root / "cat/gone.png").symlink_to("nothing")
    (root / "cat/self.png").symlink_to("self.png")
    message = r"^data\.labeled: 2 of 3 files cannot be read as images, the first is .*gone\.png"
    with pytest.raises(UserError, match=message):
        collect(root)


def same_as_its_folder(tree, tar, which="labeled", **options):
    """Gather a tar file and the folder it was made of, and compare all but the places."""
    images = collect(tree, which, **options)
    packed = collect(tar, which, source="tar", **options)
    assert packed.image_ids == images.image_ids
    assert packed.classes == images.classes
    assert packed.labels.tolist() == images.labels.tolist()
    assert packed.skipped == images.skipped
    assert np.array_equal(packed.pixels, images.pixels)
    return packed


def linked_tree(root):
    """A tree with every kind of link, and with files of other kinds."""
    write_tree(root, {"cat": 2, "dog": 1, "owl/deep": 1, ".store": 1})
    os.link(root / "cat/000.png", root / "dog/hard.png")
    (root / "cat/soft.png").symlink_to("../dog/000.png")
    (root / "cat/to a link.png").symlink_to("soft.png")
    (root / "cat/to a hard link.png").symlink_to("../dog/hard.png")
    (root / "owl/stored.png").symlink_to("../.store/000.png")
    link(root / "owl/again", "deep")
    link(root / "owl/up", "..")
    link(root / "owl/others", "../cat")
    link(root / "ant", "dog")
    (root / "owl/through.png").symlink_to("others/001.png")
    for name in ("cat/z.heic", "labels.csv", "dog/notes"):
        (root / name).write_text("no image")
    (root / "dog/gone").symlink_to("nothing")
    (root / "dog/loop").symlink_to("loop")
    (root / "dog/outside").symlink_to("../../../elsewhere")
    return root


@pytest.mark.parametrize("prefix", ["", "./", "photos/train/"])
@pytest.mark.parametrize("which", ["labeled", "unlabeled", "test"])
def test_a_tar_file_with_links_gives_what_its_folder_gives(tmp_path, which, prefix):
    tree = linked_tree(tmp_path / "tree")
    packed = same_as_its_folder(tree, pack(tmp_path / "t.tar", tree, prefix), which)
    assert {name.partition(":")[0] for name in packed.skipped} == {
        "cat/z.heic",
        "labels.csv",
        *(f"dog/{name}" for name in ("gone", "loop", "notes", "outside")),
        *(f"ant/{name}" for name in ("gone", "loop", "notes", "outside") if which != "unlabeled"),
        *(["owl/others/z.heic"] if which != "unlabeled" else []),
    }
    ids = {"cat/soft.png", "cat/to a link.png", "dog/hard.png", "owl/stored.png", "owl/through.png"}
    assert ids <= set(packed.image_ids)
    if which != "unlabeled":
        assert {"ant/000.png", "owl/others/001.png"} <= set(packed.image_ids)


def test_the_bytes_of_a_link_in_a_tar_file_are_those_it_leads_to(tmp_path):
    tree = linked_tree(tmp_path / "tree")
    images = collect(pack(tmp_path / "t.tar", tree), source="tar")
    pixels = dict(zip(images.image_ids, images.pixels, strict=True))
    for name, target in (
        ("dog/hard.png", "cat/000.png"),
        ("cat/to a link.png", "dog/000.png"),
        ("cat/to a hard link.png", "cat/000.png"),
        ("owl/through.png", "cat/001.png"),
        ("ant/000.png", "dog/000.png"),
    ):
        assert np.array_equal(pixels[name], pixels[target]), name
    assert not np.array_equal(pixels["cat/000.png"], pixels["dog/000.png"])
    paths = dict(zip(images.image_ids, images.paths, strict=True))
    assert paths["dog/hard.png"] == f"{tmp_path}/t.tar:dog/hard.png"


def test_links_to_nothing_in_a_tar_file_are_named_as_those_in_a_folder(tmp_path):
    tree = write_tree(tmp_path / "tree", {"cat": 1})
    for name, target in (("gone", "nothing"), ("self", "self.png"), ("far", "/etc/hosts")):
        (tree / f"cat/{name}.png").symlink_to(target)
    tar = pack(tmp_path / "t.tar", tree)
    reason = "a link to what is no file of the tar file"
    message = rf"^data\.labeled: 3 of 4 files cannot be read as images, .*cat/far\.png: {reason};"
    with pytest.raises(UserError, match=message):
        collect(tar, source="tar")
    images = collect(tar, source="tar", unreadable="skip")
    assert images.image_ids == ("cat/000.png",)
    names = ("far", "gone", "self")
    assert images.skipped == tuple(f"{tar}:cat/{name}.png: {reason}" for name in names)


def test_files_of_other_kinds_in_several_tar_files_are_told_with_their_tar_file(tmp_path):
    for shard in ("a", "b"):
        tree = write_tree(tmp_path / shard, {"photos/cat": 1, "photos/dog": 1})
        (tree / "photos/cat/z.heic").write_text("no image")
        (tree / "README").write_text("beside the folder that wraps everything")
        (tmp_path / "tars").mkdir(exist_ok=True)
        pack(tmp_path / f"tars/{shard}.tar", tree)
    (tmp_path / "tars/c.tar.gz").write_text("compressed")
    images = collect(tmp_path / "tars", source="tar")
    assert len(images.image_ids) == 4
    names = ("a/README", "b/README", "c.tar.gz", "cat/a/z.heic", "cat/b/z.heic")
    told = "its name does not end like an image's that can be read"
    assert images.skipped == tuple(f"{name}: {told}" for name in names)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    root = write_tree(tmp_path, {"cat": 1, "dog": 1})
    scandir = os.scandir

    def forbidding(path):
        if Path(path) == root / "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", forbidding)
    message = r"/dog: expected a folder that can be read, found none \(Permission denied\); allow"
    with pytest.raises(UserError, match=message):
        collect(root)
