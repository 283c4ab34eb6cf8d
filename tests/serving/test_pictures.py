"""Images as they are sent become what the pipeline makes of their files."""

import base64
import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.helpers import bodies
from tttlab.data.decoding import to_square
from tttlab.errors import UserError
from tttlab.serving.pictures import Limits, decode, take

LIMITS = Limits()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(256, size=(30, 24, 3), dtype=np.uint8)


@pytest.fixture
def file(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_every_form_of_an_image_gives_what_the_pipeline_makes_of_its_file(file, pixels):
    expected = to_square(file, 16)
    content = file.read_bytes()
    text = base64.b64encode(content).decode()
    forms = {
        "bytes": content,
        "bytearray": bytearray(content),
        "memory": memoryview(content),
        "base64": text,
        "data URI": f"data:image/png;base64,{text}",
        "array": pixels,
        "lists": pixels.tolist(),
        "int64": pixels.astype(np.int64),
        "file": "file:a.png",
        "absolute": f"file:{file}",
        "path": file,
    }
    limits = replace(LIMITS, folder=str(file.parent))
    for name, form in forms.items():
        np.testing.assert_array_equal(decode(form, 16, None, limits), expected, err_msg=name)


def test_a_grey_array_is_the_same_in_all_colours(pixels):
    grey = pixels[..., 0]
    found = decode(grey, 16, None, LIMITS)
    np.testing.assert_array_equal(found, decode(np.stack([grey] * 3, -1), 16, None, LIMITS))


def test_upright_transparent_and_deep_images_are_read_as_by_the_pipeline(tmp_path):
    random = np.random.default_rng(1)
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "turned.jpg": (random.integers(256, size=(30, 24, 3), dtype=np.uint8), {"exif": turned}),
        "glass.png": (random.integers(256, size=(30, 24, 4), dtype=np.uint8), {}),
        "deep.png": (random.integers(4096, size=(30, 24), dtype=np.uint16), {}),
    }
    for name, (values, options) in images.items():
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "JPEG" if name.endswith("jpg") else "PNG", **options)
        depth = 12 if name == "deep.png" else None
        (tmp_path / name).write_bytes(buffer.getvalue())
        found = decode(buffer.getvalue(), 16, depth, LIMITS)
        np.testing.assert_array_equal(found, to_square(tmp_path / name, 16, depth), err_msg=name)


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        (None, "expected an image as bytes, base64 or an array (H, W, 3), found NoneType"),
        (1.5, "expected an image as bytes, base64 or an array (H, W, 3), found float"),
        ("no/base64!", "expected an image in base64, found text that is none"),
        ("äöü", "expected an image in base64, found text that is none"),
        ("", "expected an image, found none that can be read"),
        (b"nothing", "expected an image, found none that can be read"),
        ([], "expected an array (H, W, 3) or (H, W), found one of shape (0,)"),
        (np.zeros((2, 2, 4), np.uint8), "found one of shape (2, 2, 4)"),
        (np.zeros((0, 2, 3), np.uint8), "found one of shape (0, 2, 3)"),
        (np.zeros((2, 2, 3)), "expected whole numbers from 0 to 255, found float64"),
        ([[-1, 2]], "expected whole numbers from 0 to 255, found int64 from -1 to 2"),
        ([["a", "b"]], "expected whole numbers from 0 to 255, found a value of type str"),
        ([[True, False]], "expected whole numbers from 0 to 255, found a value of type bool"),
        ([[1, None]], "expected whole numbers from 0 to 255, found a value of type NoneType"),
        (np.zeros((2, 2), bool), "expected whole numbers from 0 to 255, found bool"),
        (bodies.many_scans(), "expected at most 100 scans of a progressive JPEG, found 101"),
        (bodies.plain_text(1), "expected an image, found none that can be read"),
        ([[2**70, 1]], "expected whole numbers from 0 to 255, found object"),
        (bodies.picture((400, 400))[:-60], "image file is truncated"),
        ("file:a.png", "this server opens none; its owner allows a folder"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(picture, line):
    with pytest.raises(UserError) as caught:
        decode(picture, 16, None, LIMITS)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    large, bomb = bodies.blank(7_000), bodies.bomb()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    few = replace(LIMITS, pixels=399)
    with pytest.raises(UserError, match="at most 399 pixels, found 20 x 20; send it smaller"):
        decode(bodies.GOOD, 16, None, few)
    with pytest.raises(UserError, match="at most 40,000,000 pixels, found 7000 x 7000"):
        decode(large, 16, None, LIMITS)
    with pytest.raises(UserError, match="at most 40,000,000 pixels, found far more"):
        decode(bomb, 16, None, LIMITS)


@pytest.mark.parametrize("name", ["../b.png", "link.png", "sub", "", ".", "a\0b", "x" * 5000, "no"])
def test_only_files_within_the_folder_are_opened(name, file):
    folder = file.parent / "allowed"
    (folder / "sub").mkdir(parents=True)
    (file.parent / "b.png").write_bytes(bodies.GOOD)
    (folder / "link.png").symlink_to(file.parent / "b.png")
    with pytest.raises(UserError, match="expected a file in the folder that this server allows"):
        decode(f"file:{name}", 16, None, replace(LIMITS, folder=str(folder)))


def test_a_file_that_is_no_image_does_not_tell_its_content(tmp_path):
    (tmp_path / "secret.txt").write_text("the password", encoding="utf-8")
    with pytest.raises(UserError, match="expected an image, found none that can be read") as caught:
        decode("file:secret.txt", 16, None, replace(LIMITS, folder=str(tmp_path)))
    assert "password" not in str(caught.value)


def test_a_file_that_is_no_image_or_too_large_does_not_tell_where_it_lies(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    limits = replace(LIMITS, folder=str(tmp_path), megabytes=1)
    with pytest.raises(UserError) as caught:
        decode("file:a.png", 16, None, limits)
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "b.png").write_bytes(bodies.GOOD + b"0" * 10**6)
    with pytest.raises(UserError, match="expected a file of at most 1 MB, found a larger"):
        decode("file:b.png", 16, None, limits)


def test_what_a_file_tells_of_itself_is_not_kept():
    """A PNG may hold 64 MB of text, and a request many of them."""
    tracemalloc.start()
    try:
        kept = [take(bodies.much_text(), LIMITS) for _ in range(3)]
        assert tracemalloc.get_traced_memory()[0] < 5e6
    finally:
        tracemalloc.stop()
    assert [picture.pixels for picture in kept] == [4, 4, 4]


def test_a_usual_progressive_jpeg_is_read():
    found = decode(bodies.many_scans(100), 8, None, LIMITS)
    np.testing.assert_allclose(found, np.full((8, 8, 3), 128), atol=2)  # decoders round
