"""How many bits of a pixel were recorded, where a file has more than eight.

A camera's 12 bits come in files of 16, either as 0 to 4095 or scaled to 0 to 65535. Both are usual,
few files say which, and it decides how bright the image is. So nothing is guessed from one image:
the settings say it, the file says it, or a value proves it.
"""

import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _MAX_SAMPLE, _SIGNED_MAX_SAMPLE = 258, 281, 341  # tags of TIFF


class UnknownScale(ValueError):
    """Nothing says which of an image's values is white."""


class Samples(NamedTuple):
    """What a file says of its values.

    Attributes:
        bits: bits that a value takes in the file.
        recorded: recorded bits, if the file says so: values stay below 2 to this power (TIFF).
        significant: recorded bits, if the file says so, of values scaled to all its bits (PNG).
        white_known: Pillow has scaled the values from the file's own white to 16 bits (PGM).
    """

    bits: int = 8
    recorded: int | None = None
    significant: int | None = None
    white_known: bool = False

    def depth_of(self, grey: np.ndarray, declared: int | None) -> int:
        """Find the number of bits n for which white is ``2**n − 1``.

        Args:
            grey: values of one image, whole numbers of any shape.
            declared: the number in the settings, if any.

        Raises:
            UnknownScale: the number is not known, or the values contradict the settings.
        """
        least, largest = int(grey.min()), int(grey.max())
        if least < 0:
            raise UnknownScale(f"grey values from {least} on; scale them to 0 and above")
        if self.white_known or largest == 0:
            return 16
        if declared is not None and largest >> declared:
            raise UnknownScale(
                f"grey values up to {largest}, more than data.depth {declared} holds; "
                f"set the number of bits that were recorded, {largest.bit_length()} or more"
            )
        depth = declared or self._depth_from_file(grey, largest)
        if depth is None:
            raise UnknownScale(
                f"{self.bits}-bit grey with values up to {largest}, "
                "of which nothing says which is white; "
                "set data.depth to the number of bits that were recorded, "
                f"{max(8, largest.bit_length())} or more"
            )
        return depth

    def _depth_from_file(self, grey: np.ndarray, largest: int) -> int | None:
        if self.recorded and not largest >> self.recorded:
            return self.recorded
        if self.bits == 16 and (largest >> 15 or self.significant == 16):
            return 16
        # The standard wants values scaled to all 16 bits, but some programs leave them unscaled.
        if self.significant:
            if largest >> self.significant:
                return 16
            if not _may_be_scaled(grey, self.significant):
                return self.significant
        return None

    def check_colours(self, image: Image.Image, declared: int | None) -> None:
        """Refuse 16-bit colours that may have been recorded in fewer bits.

        Pillow keeps the upper eight bits, and such an image would be black.

        Args:
            image: the decoded image.
            declared: the number of bits in the settings, if any.

        Raises:
            UnknownScale: no value reaches the upper half of the range, and neither the file nor the
                settings say that all 16 bits were recorded.
        """
        if self.bits <= 8 or 16 in (declared, self.recorded, self.significant):
            return
        colours = [band for band in image.getbands() if band not in "AaX"]
        largest = max(image.getchannel(band).getextrema()[1] for band in colours)
        if largest < 128:
            raise UnknownScale(
                "16-bit colours of which none reaches the upper half of the range, "
                "so that they may have been recorded in fewer; "
                "set data.depth: 16 if they are as dark, else convert to 8 bits"
            )


def read_samples(image: Image.Image) -> Samples:
    """Read what a file says of its values, before it is decoded."""
    tile = next(iter(getattr(image, "tile", ())), (None,) * 4)
    arguments = (tile[3],) if isinstance(tile[3], str) else tuple(tile[3] or ())
    raw_mode = str(arguments[0]) if arguments else ""
    bits = 16 if image.mode.startswith("I;16") or ";16" in raw_mode else 8
    if image.format == "PNG" and bits == 16 and image.fp:
        return Samples(bits, significant=_significant_bits(image.fp))
    if image.format == "TIFF":
        return _tiff_samples(image)
    if image.format == "PPM" and arguments[-1:] == (65535,):
        return Samples(16)
    if image.format == "PPM" and image.mode == "I" and bits == 8:
        return Samples(16, white_known=True)
    return Samples(32 if image.mode == "I" and bits == 8 else bits)


def _tiff_samples(image: Image.Image) -> Samples:
    tags = image.tag_v2
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 1)))
    if bits not in (8, 16, 32):
        return Samples(bits, recorded=bits)
    white = int(np.max(tags.get(_SIGNED_MAX_SAMPLE, tags.get(_MAX_SAMPLE, 0))))
    depth = white.bit_length()
    # Some programs write the largest value the file could hold, others the largest that occurs.
    # Neither says what was recorded.
    recorded = depth if 8 <= depth < bits - 1 and white == 2**depth - 1 else None
    return Samples(bits, recorded=recorded)


def _significant_bits(file: BinaryIO) -> int | None:
    """Read a PNG file's chunk sBIT, which Pillow ignores: the fewest bits of any channel."""
    start = file.tell()
    file.seek(8)
    try:
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT":
                return min(file.read(length), default=None)
            if kind == b"IDAT":
                return None
            file.seek(length + 4, 1)  # the chunk and its checksum
    finally:
        file.seek(start)
    return None


def _may_be_scaled(grey: np.ndarray, bits: int) -> bool:
    """Whether values may have been scaled to 16 bits, by a shift or to the nearest value."""
    values = np.unique(grey).astype(np.int64)  # few, where an image may have 10⁸
    original = values >> (16 - bits)
    shifted = original << (16 - bits)
    nearest = np.round(original * (65535 / (2**bits - 1))).astype(np.int64)
    return bool(((values == shifted) | (values == nearest)).all())
