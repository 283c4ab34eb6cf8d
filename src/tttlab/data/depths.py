"""How many bits of a pixel were recorded: a file of more than eight holds values, and few files say which one is white.

A camera's 12 bits come in files of 16, as 0 to 4095 or scaled to 0 to 65535, and both are usual. What an image looks like
depends on it, so nothing is guessed from one image alone: either the settings say it, the file does, or a value shows it.
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
        bits: that a value takes in the file.
        recorded: bits that were recorded, if the file says so: values stay below 2 to this power (TIFF).
        significant: bits that were recorded before the values were scaled to all those of the file, if it says so (PNG).
        white_known: Pillow has scaled the values from the file's own white to 16 bits (PGM).
    """

    bits: int = 8
    recorded: int | None = None
    significant: int | None = None
    white_known: bool = False

    def depth_of(self, grey: np.ndarray, declared: int | None) -> int:
        """Tell the number of bits in which white is written.

        Args:
            grey: values of one image, whole numbers of any shape.
            declared: what the settings say.

        Raises:
            UnknownScale: nothing says it, or the values contradict the settings.
        """
        least, largest = int(grey.min()), int(grey.max())
        if least < 0:
            raise UnknownScale(f"grey values from {least} on; scale them to 0 and above")
        if self.white_known or largest == 0:
            return 16
        if declared is not None and largest >> declared:
            raise UnknownScale(
                f"grey values up to {largest}, more than data.depth {declared} holds; set the number of bits "
                f"that were recorded, {largest.bit_length()} or more"
            )
        depth = declared or self._told_depth(grey, largest)
        if depth is None:
            raise UnknownScale(
                f"{self.bits}-bit grey with values up to {largest}, of which nothing says which is white; "
                "set data.depth to the number of bits that were recorded, "
                f"{max(8, largest.bit_length())} or more"
            )
        return depth

    def _told_depth(self, grey: np.ndarray, largest: int) -> int | None:
        if self.recorded and not largest >> self.recorded:
            return self.recorded
        if self.bits == 16 and (largest >> 15 or self.significant == 16):
            return 16
        if self.significant:  # the standard wants values scaled to all 16 bits, and some programs leave them as they were
            if largest >> self.significant:
                return 16
            if not _may_be_scaled(grey, self.significant):
                return self.significant
        return None

    def check_colours(self, image: Image.Image, declared: int | None) -> None:
        """Refuse colours of 16 bits that may be fewer: Pillow keeps the upper eight, which are black then.

        Args:
            image: decoded.
            declared: what the settings say.

        Raises:
            UnknownScale: no value reaches the upper half, and neither the file nor the settings say that all 16 bits count.
        """
        if self.bits <= 8 or 16 in (declared, self.recorded, self.significant):
            return
        largest = max(
            image.getchannel(band).getextrema()[1] for band in image.getbands() if band not in "AaX"
        )
        if largest < 128:
            raise UnknownScale(
                "16-bit colours of which none reaches the upper half of the range, so that they may have been "
                "recorded in fewer; set data.depth: 16 if they are as dark, else convert to 8 bits"
            )


def read_samples(image: Image.Image) -> Samples:
    """Read what a file says of its values, before it is decoded."""
    tile = next(iter(getattr(image, "tile", ())), (None,) * 4)
    arguments = (tile[3],) if isinstance(tile[3], str) else tuple(tile[3] or ())
    bits = (
        16
        if image.mode.startswith("I;16")
        or any(";16" in str(argument) for argument in arguments[:1])
        else 8
    )
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
    # The largest value of the file's unit is written by default, and any other number is the largest that happens to occur.
    told = 8 <= depth < bits - 1 and white == 2**depth - 1
    return Samples(bits, recorded=depth if told else None)


def _significant_bits(file: BinaryIO) -> int | None:
    """Read the chunk sBIT of a PNG file, which Pillow passes over; of several channels the fewest bits."""
    place = file.tell()
    file.seek(8)
    try:
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT":
                return min(file.read(length), default=None)
            if kind == b"IDAT":
                return None
            file.seek(length + 4, 1)  # its sum lies behind it
    finally:
        file.seek(place)
    return None


def _may_be_scaled(grey: np.ndarray, bits: int) -> bool:
    """Whether values may have been scaled from so many bits to 16: by zeros below them, or to the nearest."""
    original = grey >> (16 - bits)
    zeros, nearest = (
        original << (16 - bits),
        np.round(original * (65535 / (2**bits - 1))).astype(np.int64),
    )
    return bool(((grey == zeros) | (grey == nearest)).all())
