"""Images of more than eight bits: which value is white, and images refused if nothing says it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tttlab.data.decoding import to_square
from tttlab.data.depths import UnknownScale

RAMP = np.arange(64).reshape(8, 8)  # values of six bits, which tests scale to more
MAX_SAMPLE, SIGNED_MAX_SAMPLE = 281, 341


def saved(values, format="PNG", **options):
    buffer = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(buffer, format=format, **options)
    buffer.seek(0)
    return buffer


def grey(values, format="PNG", **options):
    return saved(np.asarray(values, np.uint16), format, **options)


def with_chunk(file, kind, data):
    """Insert a chunk after the header of a PNG file, where the standard wants sBIT."""
    content, end = file.getvalue(), 8 + 8 + 13 + 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return io.BytesIO(content[:end] + chunk + content[end:])


def twelve_bits(depth=12):
    """A ramp over all values of ``depth`` bits, and its upper eight bits."""
    values = np.linspace(0, 2**depth - 1, 64).astype(int).reshape(8, 8)
    return values, values // 2 ** (depth - 8)


def decoded(file, depth=None):
    square = to_square(file, 8, depth)
    assert (square == square[..., :1]).all()
    return square[..., 0]


def refused(match, file, depth=None):
    with pytest.raises(UnknownScale, match=match) as caught:
        to_square(file, 8, depth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("depth", [8, 10, 12, 14, 15, 16])
def test_a_declared_depth_gives_the_upper_eight_of_its_bits(format, depth):
    values, expected = twelve_bits(depth)
    np.testing.assert_array_equal(decoded(grey(values, format), depth), expected)
    dark = values // 4  # an image of the same camera without white
    np.testing.assert_array_equal(decoded(grey(dark, format), depth), dark // 2 ** (depth - 8))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_without_a_declaration_only_values_that_need_all_16_bits_say_that_there_are_16(format):
    values = RAMP * 521  # up to 32,823 > 2¹⁵
    np.testing.assert_array_equal(decoded(grey(values, format)), values // 256)
    for values in (RAMP * 520, RAMP * 65, RAMP * 4):  # up to 32,760, 4,095 and 252
        message = (
            rf"^16-bit grey with values up to {values.max()}, .*; "
            r"set data\.depth to the number of bits that were recorded, "
            rf"{int(values.max()).bit_length()} or more$"
        )
        refused(message, grey(values, format))
    assert (decoded(grey(0 * RAMP, format)) == 0).all()  # black on every scale


def test_values_beyond_the_declared_depth_are_refused():
    message = r"^grey values up to 4096, more than data\.depth 12 holds; .* 13 or more$"
    refused(message, grey(RAMP + 4033), 12)
    assert decoded(grey(RAMP + 4032), 12).max() == 255


def test_eight_bits_are_eight_bits_whatever_is_declared():
    values = (RAMP * 3).astype(np.uint8)
    np.testing.assert_array_equal(decoded(saved(values), 12), values)
    colours = np.random.default_rng(0).integers(0, 100, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_square(saved(colours), 8), colours)


# --- what files say -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [10, 12, 14])
def test_the_significant_bits_of_a_png_file_are_those_of_values_left_as_they_were_recorded(depth):
    values, expected = twelve_bits(depth)
    file = with_chunk(grey(values), b"sBIT", bytes([depth]))
    np.testing.assert_array_equal(decoded(file), expected)
    file.seek(0)
    np.testing.assert_array_equal(decoded(file, 16), values // 256)  # a declared depth wins


@pytest.mark.parametrize("depth", [10, 12, 14])
@pytest.mark.parametrize("how", ["zeros", "replicated", "nearest"])
def test_values_that_were_scaled_to_16_bits_as_the_standard_says_are_not_scaled_twice(depth, how):
    """PNG standard, third edition, 13.12: by zeros, the upper bits once more, or to the nearest."""
    values, expected = twelve_bits(depth)
    scale = {
        "zeros": lambda original: original << 16 - depth,
        "replicated": lambda original: original << 16 - depth | original >> 2 * depth - 16,
        "nearest": lambda original: np.round(original * 65535 / (2**depth - 1)),
    }[how]
    file = with_chunk(grey(scale(values)), b"sBIT", bytes([depth]))
    np.testing.assert_array_equal(decoded(file), expected)
    dark = scale(RAMP % 2 ** (2 * depth - 16))  # so dark that these could be unscaled values
    assert 0 < dark.max() < 2**depth
    file = with_chunk(grey(dark), b"sBIT", bytes([depth]))
    refused(r"nothing says which is white; set data\.depth", file)


def test_sixteen_significant_bits_are_16():
    file = with_chunk(grey(RAMP * 65), b"sBIT", bytes([16]))
    np.testing.assert_array_equal(decoded(file), RAMP * 65 // 256)


def test_other_chunks_and_those_behind_the_image_say_nothing():
    refused("nothing says", with_chunk(grey(RAMP * 65), b"gAMA", struct.pack(">I", 45455)))
    chunk = struct.pack(">I", 1) + b"sBIT" + bytes([12]) + bytes(4)
    refused("nothing says", io.BytesIO(grey(RAMP * 65).getvalue() + chunk))


@pytest.mark.parametrize("tag", [MAX_SAMPLE, SIGNED_MAX_SAMPLE])
def test_the_largest_value_that_a_tiff_file_allows_tells_its_depth(tag):
    values, expected = twelve_bits()
    np.testing.assert_array_equal(decoded(grey(values, "TIFF", tiffinfo={tag: 4095})), expected)
    dark = grey(values // 4, "TIFF", tiffinfo={tag: 4095})
    np.testing.assert_array_equal(decoded(dark), values // 64)


def test_a_compressed_tiff_file_tells_its_depth_too():
    values, expected = twelve_bits()
    content = grey(values, "TIFF", tiffinfo={MAX_SAMPLE: 4095}, compression="tiff_lzw").getvalue()
    written = struct.pack("<HHIHH", MAX_SAMPLE, 3, 1, 1, 0)  # libtiff writes 1 instead of 4095
    assert content.count(written) == 1
    content = content.replace(written, struct.pack("<HHIHH", MAX_SAMPLE, 3, 1, 4095, 0))
    np.testing.assert_array_equal(decoded(io.BytesIO(content)), expected)


@pytest.mark.parametrize("largest", [3071, 1023, 65535, 32767])
def test_a_largest_value_that_happens_to_occur_or_is_the_default_tells_nothing(largest):
    """3071 is not 2**n − 1, 1023 is exceeded, and the others are the largest values of 16 bits."""
    refused("nothing says which is white", grey(RAMP * 65, "TIFF", tiffinfo={MAX_SAMPLE: largest}))


def tiff_of_12_bits(values):
    """Write 12 bits per pixel, two pixels in three bytes, as a camera does; Pillow cannot."""
    first, second = values.reshape(-1, 2).T
    triples = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    packed = np.stack(triples, 1).astype(np.uint8)
    tags = [
        (256, 8),
        (257, 8),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 9 + 4),
        (277, 1),
        (278, 8),
        (279, packed.size),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return io.BytesIO(head + entries + bytes(4) + packed.tobytes())


def test_a_tiff_file_of_12_bits_a_pixel_is_that_deep():
    values, expected = twelve_bits()
    np.testing.assert_array_equal(decoded(tiff_of_12_bits(values)), expected)
    np.testing.assert_array_equal(decoded(tiff_of_12_bits(values // 4)), values // 64)


def test_a_pgm_file_says_which_value_is_white():
    def pgm(values):
        return io.BytesIO(b"P5 8 8 4095\n" + values.astype(">u2").tobytes())

    values, expected = twelve_bits()
    for depth in (None, 12):
        np.testing.assert_array_equal(decoded(pgm(values), depth), expected)
    dark = values // 64  # 0 to 63 of 4095
    np.testing.assert_array_equal(decoded(pgm(dark)), dark // 16)


def test_32_bits_need_a_declaration_and_values_below_zero_are_refused():
    values = (RAMP * 65).astype(np.int32)
    refused(r"^32-bit grey with values up to 4095, of which nothing says", saved(values, "TIFF"))
    np.testing.assert_array_equal(decoded(saved(values, "TIFF"), 12), values // 16)
    file = saved(values, "TIFF", tiffinfo={MAX_SAMPLE: 4095})
    np.testing.assert_array_equal(decoded(file), values // 16)
    refused(r"^grey values from -1 on; scale them", saved(values - 1, "TIFF"), 12)


def test_an_image_that_came_without_its_file_is_judged_by_its_values():
    values = (RAMP * 65).astype(np.uint16)
    np.testing.assert_array_equal(decoded(Image.fromarray(values), 12), values // 16)
    refused("^16-bit grey with values up to 4095", Image.fromarray(values))
    refused("^32-bit grey with values up to 63", Image.fromarray(RAMP.astype(np.int32)))


# --- colours of 16 bits, of which Pillow keeps the upper eight ------------------------------------


def png_of_16_bits(values):
    """Write colours of 16 bits, which Pillow cannot: (H, W, 3) or, with alpha, (H, W, 4 or 2)."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("bands", [3, 4, 2])
def test_16_bit_colours_are_taken_where_some_value_needs_them_and_else_refused(bands):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, bands))
    values[..., -1] = 65535 if bands != 3 else values[..., -1]
    colours = values[..., :3] if bands > 2 else values[..., [0, 0, 0]]
    np.testing.assert_array_equal(to_square(png_of_16_bits(values), 8), colours >> 8)
    values[..., : bands - (bands != 3)] >>= 4  # a camera's 12 bits, with an opaque alpha channel
    message = r"^16-bit colours of which none reaches the upper half .*; set data\.depth: 16 if"
    for depth in (None, 12):
        refused(message, png_of_16_bits(values), depth)
    assert to_square(png_of_16_bits(values), 8, 16).max() == 15
    file = with_chunk(png_of_16_bits(values), b"sBIT", bytes([16] * bands))
    assert to_square(file, 8).max() == 15


def test_dark_colours_of_a_ppm_file_are_those_that_its_head_says():
    head, values = b"P6 8 8 %d\n", np.random.default_rng(0).integers(0, 4096, (8, 8, 3))
    square = to_square(io.BytesIO(head % 4095 + values.astype(">u2").tobytes()), 8)
    np.testing.assert_array_equal(square, np.round(values * 255 / 4095))
    refused("^16-bit colours", io.BytesIO(head % 65535 + values.astype(">u2").tobytes()))
