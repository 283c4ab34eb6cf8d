"""Images read in place: what an access gives, what is saved, what happens when files change."""

import hashlib
import pickle
import shutil
import tarfile
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import trainings
from tttlab.config.images import TargetSpec
from tttlab.data.decoding import to_square
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import InPlace, pixel_hash
from tttlab.data.reading import gather
from tttlab.data.sources import open_source
from tttlab.errors import UserError
from tttlab.training.loaders import Views, open_loader

SIZE = 224
KINDS = {  # what a file of the format can hold
    "png": ("RGB", "L", "LA", "P", "RGBA", "I;16", "1"),
    "jpg": ("RGB", "L", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "P", "1"),
    "tiff": ("RGB", "L", "P", "RGBA", "CMYK", "I;16"),
}


def noise(generator, mode, height, width):
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode in ("P", "1"):
        return noise(generator, "RGB", height, width).convert(mode)
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), generator.bytes(height * width * bands))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Make a folder of images of every kind, of various shapes, in two classes."""
    root, generator = tmp_path_factory.mktemp("zoo") / "tree", np.random.default_rng(0)
    kinds = [(suffix, mode) for suffix, modes in KINDS.items() for mode in modes]
    for number, (suffix, mode) in enumerate(kinds):
        file = root / ("ape", "bee")[number % 2] / f"{number:02d} {mode.replace(';', '')}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = noise(generator, mode, *generator.integers(100, 400, 2))
        assert image.mode == mode
        image.save(file)
    return root


@pytest.fixture(scope="module")
def tar(zoo):
    with tarfile.open(zoo.parent / "zoo.tar", "w") as archive:
        for path in sorted(zoo.rglob("*"), reverse=True):
            archive.add(path, path.relative_to(zoo).as_posix(), recursive=False)
    return zoo.parent / "zoo.tar"


@pytest.fixture(scope="module")
def expected(zoo):
    return np.stack([to_square(path, SIZE) for path in sorted(zoo.glob("*/*"))])


def collect(root, size=SIZE, pack_below=0, limit=None, **options) -> ImageSet:
    kind = "folder" if root.is_dir() else "tar"
    spec = TargetSpec(source=kind, root=str(root), limit=limit)
    source = open_source(spec, "test", root)
    return gather(source, spec, "test", size, 0, pack_below=pack_below, **options)


def noises(root, count, side=24) -> ImageSet:
    """Write numbered images of noise, half of them in each class, and gather them in place."""
    generator = np.random.default_rng(1)
    for number in range(count):
        file = root / "ab"[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(generator, "RGB", side, side).save(file)
    return collect(root, side)


# --- access ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_kind_of_file_is_what_decoding_it_gives(zoo, tar, expected, kind):
    images = collect(zoo if kind == "folder" else tar, workers=2)
    assert isinstance(images.pixels, InPlace)
    assert images.pixels.shape == expected.shape == (22, SIZE, SIZE, 3)
    assert images.image_ids == tuple(
        path.relative_to(zoo).as_posix() for path in sorted(zoo.glob("*/*"))
    )
    pixels = np.asarray(images.pixels)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_an_index_gives_what_an_array_gives(tmp_path):
    lazy = noises(tmp_path, 7).pixels
    whole = np.stack([to_square(path, 24) for path in sorted(tmp_path.glob("*/*"))])
    assert len(lazy) == 7
    mask = np.array([True, False, False, True, True, False, False])
    slices = slice(1, 6, 2), slice(None, None, -1), slice(5, 5)
    for key in (0, -1, np.int64(3), *slices, [4, 4, 0], [], np.array([6, -2, 1]), mask):
        pixels = lazy[key]
        assert isinstance(pixels, np.ndarray)
        assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
        np.testing.assert_array_equal(pixels, whole[key])
    for key in (7, -8, [0, 7]):
        with pytest.raises(IndexError):
            lazy[key]
    for pixels, expected in zip(lazy, whole, strict=True):
        np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(np.asarray(lazy, np.float32), whole.astype(np.float32))


def test_what_is_looked_at_is_a_copy_that_may_be_written_to(tmp_path):
    lazy = noises(tmp_path, 2).pixels
    before = lazy[:]
    lazy[:][:] = 0
    np.testing.assert_array_equal(lazy[:], before)


def test_choosing_looks_at_no_image(tmp_path, monkeypatch):
    images = noises(tmp_path, 6)
    whole = images.pixels[:]
    with monkeypatch.context() as patch:
        patch.setattr("tttlab.data.pixels.to_square", None)  # decoding fails
        part, lazy = images.take([5, 0, 2]), images.pixels.take(np.array([5, 0, 2]))
        assert part.image_ids == tuple(images.image_ids[index] for index in (5, 0, 2))
        assert not part.packed
    np.testing.assert_array_equal(part.pixels[:], whole[[5, 0, 2]])
    np.testing.assert_array_equal(lazy[1], whole[0])
    assert part.pixels.hashes == tuple(pixel_hash(whole[index]) for index in (5, 0, 2))


def test_a_hash_is_blake2b_of_the_pixels_however_they_lie_in_memory():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert pixel_hash(pixels) == hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()
    assert pixel_hash(np.asfortranarray(pixels)) == pixel_hash(pixels)
    assert pixel_hash(pixels[::-1]) != pixel_hash(pixels)


def test_images_read_in_place_can_be_sent_to_another_process(tmp_path):
    images = noises(tmp_path, 3)
    sent = pickle.loads(pickle.dumps(images))
    assert not sent.packed
    assert len(pickle.dumps(images)) < 24 * 24 * 3  # the places, not the pixels
    np.testing.assert_array_equal(sent.pixels[:], images.pixels[:])


def test_training_on_them_sees_what_it_sees_of_packed_ones(tmp_path):
    views = {"objective": Views(2, trainings.VIEWS), "classify": Views(1, trainings.VIEWS)}
    lazy = noises(tmp_path, 21)
    packed = collect(tmp_path, 24, pack_below=1)
    assert (lazy.packed, packed.packed) == (False, True)
    loaders = [
        open_loader(images, views, 8, seed=5, workers=workers)
        for images, workers in ((lazy, 2), (packed, 0))
    ]
    for epoch in (1, 2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for of_lazy, of_packed in zip(*loaders, strict=True):
            for name in ("objective", "classify", "labels"):
                assert torch.equal(of_lazy[name], of_packed[name])


# --- what has changed -----------------------------------------------------------------------------


def looks(images):
    return (
        lambda: images.pixels[1],
        lambda: images.pixels[:],
        lambda: list(images.pixels),
        lambda: np.asarray(images.pixels),
    )


@pytest.mark.parametrize("look", range(4))
def test_an_image_that_is_another_now_is_named(tmp_path, look):
    images = noises(tmp_path, 4)
    noise(np.random.default_rng(9), "RGB", 24, 24).save(tmp_path / "a" / "002.png")
    message = r"^.*/a/002\.png: expected the image that was there .*, found another; "
    with pytest.raises(UserError, match=message) as caught:
        looks(images)[look]()
    assert str(caught.value).endswith("bring it back, or run dvc repro -f prepare")
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(images.pixels[0], to_square(tmp_path / "a" / "000.png", 24))


@pytest.mark.parametrize("how", ["vanished", "emptied", "cut", "no image"])
@pytest.mark.parametrize("look", [0, 1])
def test_an_image_that_cannot_be_read_any_more_is_named(tmp_path, how, look):
    images, file = noises(tmp_path, 4), tmp_path / "a" / "002.png"
    whole = file.read_bytes()
    damaged = {"emptied": b"", "cut": whole[: len(whole) // 2], "no image": b"some words"}
    file.write_bytes(damaged.get(how, whole))
    if how == "vanished":
        file.unlink()
    message = r"^.*/a/002\.png: expected the image that was .* none that can be read \("
    with pytest.raises(UserError, match=message) as caught:
        looks(images)[look]()
    assert "\n" not in str(caught.value)


def test_an_image_that_vanished_is_told_in_one_line_by_a_worker_too(tmp_path):
    images = noises(tmp_path, 4)
    (tmp_path / "a/002.png").unlink()
    with pytest.raises(UserError) as caught:
        list(open_loader(images, {"objective": Views(1, trainings.VIEWS)}, 4, seed=5, workers=1))
    assert "\n" not in str(caught.value)


def test_odd_metadata_are_passed_over_at_every_look_as_while_gathering(tmp_path):
    # It announces five entries and holds half of one.
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01\x03\x00"
    Image.new("RGB", (9, 9)).save(tmp_path / "odd.jpg", exif=exif)
    images = collect(tmp_path, 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert images.pixels[0].shape == (24, 24, 3)
    assert not caught


def test_another_file_with_the_same_pixels_is_the_same_image(tmp_path):
    images, file = noises(tmp_path, 2), tmp_path / "a" / "000.png"
    before = images.pixels[0]
    Image.open(file).save(file, compress_level=0)
    np.testing.assert_array_equal(images.pixels[0], before)


@pytest.mark.parametrize(
    ("change", "fault"),
    [("order", "found another"), ("cut", r"can be read"), ("gone", r"can be read")],
)
def test_a_tar_file_that_changed_is_named_with_its_member(tmp_path, change, fault):
    noises(tmp_path / "tree", 4)
    files, archive = sorted((tmp_path / "tree").glob("*/*")), tmp_path / "images.tar"

    def pack(order):
        with tarfile.open(archive, "w") as opened:
            for file in order:
                opened.add(file, file.relative_to(tmp_path / "tree").as_posix())

    # Files of one length, so that in another order the same bytes are another image.
    for file in files:
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    files = sorted((tmp_path / "tree").glob("*/*"))
    pack(files)
    images = collect(archive, 24)
    if change == "order":
        pack([files[1], files[0], *files[2:]])
    elif change == "cut":
        archive.write_bytes(archive.read_bytes()[:700])
    else:
        archive.unlink()
    message = rf"^.*images\.tar:a/000\.bmp: expected the image that was there .*{fault}"
    with pytest.raises(UserError, match=message):
        images.pixels[0]


# --- gathering and keeping ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_packed_or_in_place_a_set_holds_the_same(tmp_path, kind):
    noises(tmp_path / "tree", 12)
    for name in ("a/002.png", "b/009.png"):
        (tmp_path / "tree" / name).write_bytes((tmp_path / "tree" / name).read_bytes()[:300])
    root = tmp_path / "tree"
    if kind == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as archive:
            archive.add(root, "tree")
        root = tmp_path / "images.tar"
    lazy, packed = (
        collect(root, 32, pack_below, unreadable="skip", limit=9, workers=3)
        for pack_below in (0, 10**6)
    )
    assert (lazy.packed, packed.packed) == (False, True)
    np.testing.assert_array_equal(lazy.pixels[:], packed.pixels)
    np.testing.assert_array_equal(lazy.labels, packed.labels)
    for name in ("image_ids", "classes", "paths", "source", "skipped"):
        assert getattr(lazy, name) == getattr(packed, name)
    assert len(lazy) + len(lazy.skipped) == 9
    assert lazy.skipped


def test_the_same_reason_is_given_at_every_gathering_of_a_tar_file(tmp_path):
    noises(tmp_path / "tree", 2)
    (tmp_path / "tree/a/002.png").write_text("no image")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "tree", "tree")
    first = collect(tmp_path / "images.tar", 24, unreadable="skip")
    second = collect(tmp_path / "images.tar", 24, unreadable="skip", workers=4)
    assert len(first.skipped) == 1
    assert first.skipped == second.skipped
    assert " at 0x" not in first.skipped[0]


def test_what_cannot_be_read_is_named_as_of_a_packed_set(tmp_path):
    noises(tmp_path, 4)
    (tmp_path / "a/002.png").write_text("no image")
    message = r"^data\.test: 1 of 4 files cannot be read as images, the first is .*a/002\.png"
    with pytest.raises(UserError, match=message):
        collect(tmp_path, 24)


def test_the_bound_is_the_size_of_the_decoded_pixels_in_mebibytes(tmp_path):
    noises(tmp_path, 4, side=8)
    packed = [collect(tmp_path, 512, pack_below=mebibytes).packed for mebibytes in (2, 3, 4)]
    assert packed == [False, False, True]  # 4 · 512 · 512 · 3 bytes are 3 MiB


def test_images_that_lie_in_no_files_are_packed_however_small_the_bound():
    spec = TargetSpec(source="sklearn/digits", limit=5)
    assert gather(open_source(spec, "test", None), spec, "test", 8, 0, pack_below=0).packed


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_set_read_in_place_survives_saving_without_a_copy(tmp_path, zoo, tar, kind):
    images = collect(zoo if kind == "folder" else tar, 32)
    images.save(tmp_path / "set")
    files = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert files == ["index.parquet", "meta.json"]
    loaded = ImageSet.load(tmp_path / "set")
    assert not loaded.packed
    np.testing.assert_array_equal(loaded.pixels[:], images.pixels[:])
    np.testing.assert_array_equal(loaded.labels, images.labels)
    for name in ("image_ids", "classes", "paths", "source", "skipped"):
        assert getattr(loaded, name) == getattr(images, name)
    assert loaded.digest() == images.digest()


def test_the_digest_tells_pixels_and_their_order_and_not_where_they_lie(tmp_path):
    images = noises(tmp_path / "one", 4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert collect(tmp_path / "two", 24).digest() == images.digest()
    assert images.take([1, 0, 2, 3]).digest() != images.digest()
    noise(np.random.default_rng(9), "RGB", 24, 24).save(tmp_path / "two/a/000.png")
    assert collect(tmp_path / "two", 24).digest() != images.digest()


def test_gathering_and_choosing_never_hold_all_pixels(tmp_path):
    noises(tmp_path, 40, side=SIZE)
    whole = 40 * SIZE * SIZE * 3

    def peak(work) -> int:
        """Measure the peak memory of Python and NumPy; Pillow's own is not seen."""
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    images = collect(tmp_path)

    def look_at_all():
        for pixels in ImageSet.load(tmp_path / "set").pixels:
            pixels.sum()

    assert peak(lambda: collect(tmp_path, pack_below=10**6)) > whole  # packing is seen
    assert peak(lambda: collect(tmp_path)) < whole / 4
    assert peak(lambda: images.take(range(39, -1, -1)).save(tmp_path / "set")) < whole / 4
    assert peak(look_at_all) < whole / 4
    assert peak(lambda: images.pixels[:8]) < whole / 2
