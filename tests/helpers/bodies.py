"""Bodies of requests that a server must refuse, each with the status and words of its answer."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

from PIL import Image


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def of(*images, **params) -> bytes:
    """A request for images; bytes are sent in base64."""
    sent = [encoded(image) if isinstance(image, bytes) else image for image in images]
    return json.dumps(
        {"instances": [{"image": image} for image in sent], "params": params}
    ).encode()


def picture(size=(20, 20), file_format="PNG", colour=(90, 30, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, file_format)
    return buffer.getvalue()


def blank(side: int, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, file_format)
    return buffer.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of 60,000 × 60,000 px in 10 MB that would take 10 GB."""
    packer = zlib.compressobj(9)
    row = packer.compress(b"\0" * (3 * side + 1))
    rows = row + b"".join(packer.compress(b"\0" * (3 * side + 1)) for _ in range(side // 60))
    return _png(side, side, rows + packer.flush())


def text_bomb(megabytes: int = 100) -> bytes:
    """A small PNG with a comment that takes 100 MB once it is unpacked."""
    comment = b"Comment\0\0" + zlib.compress(b" " * megabytes * 10**6, 9)
    return _png(2, 2, zlib.compress(b"\0" * 14), _chunk(b"zTXt", comment))


def much_text(megabytes: int = 50) -> bytes:
    """A small PNG with comments that take some memory for as long as it is open."""
    comment = b"Comment\0\0" + zlib.compress(b" " * 10**6, 9)
    return _png(2, 2, zlib.compress(b"\0" * 14), _chunk(b"zTXt", comment) * megabytes)


def many_scans(count: int = 101) -> bytes:
    """A progressive JPEG whose last scan stands there many times."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (count - content.count(b"\xff\xda")) + content[-2:]


def plain_text(kilobytes: int = 256) -> bytes:
    """A picture as text, with a comment that would be read again for every character."""
    return b"P3 2 2 255\n#" + b"a" * kilobytes * 1000 + b"\n" + b"0 " * 12


def _png(width: int, height: int, pixels: bytes, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + before + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


GOOD = picture()
DEEP = b"[" * 200_000
NESTED = b"[" * 900 + b"]" * 900  # JSON reads this


def bad(folder: Path) -> dict[str, tuple[bytes, int, str]]:
    """Name → (body, status, words of the message); ``folder`` lies beside what is allowed."""
    image = {"image": encoded(GOOD)}
    return {
        "empty": (b"", 400, "expected JSON such as"),
        "no JSON": (b"a photograph, please", 400, "expected JSON such as"),
        "no UTF-8": (b"\xff\xfe{}", 400, "expected JSON such as"),
        "JSON cut off": (of(GOOD)[:-20], 400, "expected JSON such as"),
        "a long number": (b'{"instances": [' + b"9" * 10_000 + b"]}", 400, "expected JSON such as"),
        "nested without end": (b'{"instances": ' + DEEP, 400, "too deeply nested"),
        "nested deeply": (b'{"instances": [{"image": ' + NESTED + b"}]}", 400, "image"),
        "null": (b"null", 400, "found null"),
        "a list": (b"[1, 2]", 400, "found a list"),
        "no images": (b"{}", 400, "expected one of"),
        "two formats": (b'{"instances": [], "inputs": []}', 400, "instances and inputs"),
        "an unknown key": (json.dumps({"instances": [image], "x": 1}).encode(), 400, "unknown key"),
        "no list": (b'{"instances": 7}', 400, "expected a list of images, found an integer"),
        "an empty list": (b'{"instances": []}', 400, "expected 1 to 64 images, found 0"),
        "a number": (b'{"instances": [7]}', 400, 'expected images as {"image": '),
        "text that is none": (b'{"instances": ["abc"]}', 400, "image 1: expected an image in bas"),
        "half a character": (
            b'{"instances": ["AAAA", "\\ud800"]}',
            400,
            "image 2: expected base64 or lists (H, W, 3), found text with half a character",
        ),
        "half a character among numbers": (
            of([[1, "\udfff"]]),
            400,
            "image 1: expected whole numbers from 0 to 255, found a value of type str",
        ),
        "half a character in an object": (
            of({"a": "\udfff"}),
            400,
            "image 1: expected an image as bytes, base64",
        ),
        "half a character in a name": (of(GOOD, run="\udfff"), 400, "run: unknown run '\\udfff'"),
        "a character of two halves": (of("\U0001f41d"), 400, "image 1: expected an image in bas"),
        "a record without a name": (
            b'{"dataframe_records": ["eA=="]}',
            400,
            'expected images as {"image": ',
        ),
        "another column": (b'{"instances": [{"picture": "abc"}]}', 400, "found an object with"),
        "a bad table": (b'{"dataframe_split": {"columns": ["x"]}}', 400, "dataframe_split: expec"),
        "many columns": (
            json.dumps({"instances": [{str(n): n for n in range(100_000)}]}).encode(),
            400,
            "expected images as",
        ),
        "many images": (of(*["AAAA"] * 100_000), 400, "expected 1 to 64 images, found 100000"),
        "many values": (
            b'{"instances": [' + b"0," * 5_000_000 + b"0]}",
            400,
            "send images in base64",
        ),
        "null as image": (of(None), 400, "image 1: expected an image as bytes, base64"),
        "a number as image": (of(3), 400, "image 1: expected an image as bytes, base64"),
        "an object as image": (of({"a": 1}), 400, "image 1: expected an image as bytes, base64"),
        "no base64": (of("***"), 400, "image 1: expected an image in base64"),
        "no image": (of(GOOD, b"no image at all"), 400, "image 2: expected an image, found none"),
        "a PDF": (of(b"%PDF-1.4 1 0 obj"), 400, "image 1: expected an image, found none"),
        "EPS": (of(b"%!PS-Adobe-3.0 EPSF-3.0\n"), 400, "image 1: expected an image, found none"),
        "an image cut off": (of(picture((400, 400))[:-60]), 400, "truncated"),
        "a JPEG cut off": (of(picture((400, 400), "JPEG")[:-300]), 400, "truncated"),
        "10,000 x 10,000 px": (of(blank(10_000)), 400, "at most 40,000,000 pixels, found"),
        "a decompression bomb": (of(bomb()), 400, "found far more"),
        "a WebP of 7,000 x 7,000": (of(blank(7_000, "WEBP")), 400, "found 7000 x 7000"),
        "a comment as a bomb": (of(text_bomb()), 400, "image 1: expected an image, found none"),
        "many scans": (of(many_scans()), 400, "at most 100 scans of a progressive JPEG, found 101"),
        "a picture as text": (of(plain_text()), 400, "image 1: expected an image, found none"),
        "many pixels together": (
            of(*[blank(5_000)] * 3),
            400,
            "at most 40,000,000 pixels together, found 75,000,000",
        ),
        "lists of different lengths": (of([[1, 2], [3]]), 400, "lists of different lengths"),
        "numbers too large": (of([[300, 2], [3, 4]]), 400, "whole numbers from 0 to 255"),
        "long text among lists": (
            of([["a" * 50_000, *["a"] * 10_000]]),
            400,
            "image 1: expected base64 or lists (H, W, 3), found a list of images",
        ),
        "long text behind numbers": (
            of([[1, "a" * 50_000, *["a"] * 10_000]]),
            400,
            "image 1: expected whole numbers from 0 to 255, found a value of type str",
        ),
        "images in the place of one": (of([encoded(GOOD)] * 2), 400, "give each a row of its own"),
        "many arrays in the place of one": (of([[[[0]]]]), 400, "give each a row of its own"),
        "fractions": (of([[0.5, 0.5]]), 400, "whole numbers from 0 to 255"),
        "a path outside": (of("file:../outside.png"), 400, "in the folder that this server allows"),
        "an absolute path": (of(f"file:{folder}/outside.png"), 400, "in the folder that this serv"),
        "a link outside": (of("file:link.png"), 400, "in the folder that this server allows"),
        "a zero byte": (of("file:a\0b.png"), 400, "in the folder that this server allows"),
        "a run's name of 2 MB": (of(GOOD, run="m" * 2_000_000), 400, "run: expected at most 200"),
        "an unknown run": (of(GOOD, run="memmo"), 400, "did you mean 'memo'?"),
        "a run on streams": (of(GOOD, run="tent"), 400, "adapts along a stream"),
        "steps beyond": (of(GOOD, steps=10**6), 400, "steps: expected an integer from 0 to 50"),
        "a huge number": (of(GOOD, steps=10**30), 400, "steps"),
        "steps as text": (of(GOOD, steps="many"), 400, "steps: expected an integer, found te"),
        "steps as a fraction": (of(GOOD, steps=1.5), 400, "steps: expected an integer, found a"),
        "steps as NaN": (of(GOOD, steps=float("nan")), 400, "steps: expected an integer, f"),
        "gate as text": (of(GOOD, gate="open"), 400, "gate: expected true or false, found text"),
        "gate as null": (of(GOOD, gate=None), 400, "gate: expected true or false, found null"),
        "steps as true": (of(GOOD, steps=True), 400, "steps: expected an integer, found true"),
        "an unknown parameter": (of(GOOD, epochs=3), 400, "params: unknown name 'epochs'"),
        "parameters as list": (
            b'{"instances": [{"image": "AAAA"}], "params": [1]}',
            400,
            "params: ",
        ),
        "50 MB": (b" " * 50_000_000, 413, "expected a body of at most 16 MB"),
    }
