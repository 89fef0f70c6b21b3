"""Which way up an image is: the orientation that EXIF or XMP states, and pixels turned by it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

import numpy as np

EXIF_ORIENTATION: Final = 0x0112
TURNED: Final = (5, 6, 7, 8)  # width and height change places
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def jpeg_orientation(data: memoryview) -> int | None:
    """EXIF orientation without a second parse of the file; XMP's where EXIF has none, as Pillow does it. None: not said."""
    xmp = b""
    for segment in _app1_segments(data):
        if segment.startswith(b"Exif\0\0"):
            orientation = _ifd_orientation(segment[6:])
            if orientation is not None:
                return orientation
        elif segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = segment
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else None


def _app1_segments(data: memoryview) -> Iterator[bytes]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the start of scan
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1:
            yield bytes(data[at + 4 : end])
        at = max(end, at + 2)


def _ifd_orientation(tiff: bytes) -> int | None:
    """Tag 0x0112 in the first directory of a TIFF structure; broken metadata of a sound picture says nothing."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == EXIF_ORIENTATION:
                value: int = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)[0]
                return value
    except struct.error:
        pass
    return None


def upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """The eight EXIF orientations; anything else is upright. Turns are views, so the copy is made once, at the end."""
    if orientation in TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
