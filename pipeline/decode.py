"""One encoded image → RGB pixels, upright, or a `BadImage` with the class of its failure.

JPEG goes through simplejpeg, everything else, and JPEGs that simplejpeg cannot do, through Pillow. Both give the same pixels;
Pillow takes 1.4 times as long. The format is told by the first bytes, never by a name, and only six formats are decoded at all,
because every further decoder is code that strangers' files can attack; Pillow tries just the format that the bytes announce.
The price: HEIF, AVIF, JPEG 2000, PSD and SVG are failed rows.

A JPEG with lost data is refused, where Pillow fills the hole with grey or noise and says nothing: a missing label can be counted,
a wrong one cannot. Harmless oddities (stray bytes before a marker, an odd start of scan) are left to Pillow, which reads them.

One image at a time in a process: Pillow's pixel limit is a global, set for the time of one image.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from pipeline.orientation import EXIF_ORIENTATION, TURNED, jpeg_orientation, upright
from pipeline.rows import FETCH_LFS, LFS_POINTER, Failure

# Image.open registers BMP, GIF, JPEG and PNG itself; to look for these two it would import all of its forty plugins.
_PLUGINS: Final = (TiffImagePlugin, WebPImagePlugin)


class BadImage(Exception):
    """An image that cannot be decoded: its `failure` class and a `message` of one line."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(failure, message)
        self.failure, self.message = failure, message


#: What is decoded; the group is Pillow's name of the format.
_READABLE: Final = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<GIF>GIF8[79]a)|(?P<WEBP>RIFF.{4}WEBP)|(?P<BMP>BM)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])",
    re.DOTALL,
)
#: What is known to be an image, or nearly one, and refused.
_REFUSED: Final = re.compile(
    rb"(?P<AVIF>.{4}ftypavi[fs])|(?P<HEIF>.{4}ftyp(?:he|mif1|msf1))|(?P<MP4>.{4}ftyp)|(?P<PSD>8BPS)|(?P<ICNS>icns)"
    rb"|(?P<JPEG_XL>\xff\x0a|\0{3}\x0cJXL )|(?P<JPEG_2000>\0{3}\x0cjP  |\xff\x4f\xff\x51)|(?P<NETPBM>P[1-7F]\s)|(?P<DDS>DDS )"
    rb"|(?P<ICO>\0\0[\x01\x02]\0[^\0]\0)|(?P<OPENEXR>v/1\x01)|(?P<QOI>qoif)|(?P<PDF>%PDF-)|(?P<EPS>%!PS)|(?P<XCF>gimp xcf)"
    rb"|(?P<DICOM>.{128}DICM)|(?P<SVG>[\s\xef\xbb\xbf]*<(?:svg|(?!!doctype\s+html)[?!].*?<svg)[\s>])",
    re.DOTALL | re.IGNORECASE,
)
#: Of JPEGs that simplejpeg decodes; CMYK is Pillow's.
_COLORSPACES: Final = ("YCbCr", "RGB", "Gray")
#: Warnings of libjpeg-turbo that mean lost pixels; every other complaint is Pillow's to judge.
_JPEG_DAMAGE: Final = re.compile(r"premature end|bad Huffman code|bad arithmetic code|instead of RST", re.IGNORECASE)
_CUT_SHORT: Final = re.compile(r"truncated|Premature end of JPEG file|not enough image data|unexpected end", re.IGNORECASE)
#: Pillow's plugins parse strangers' bytes in Python and let through whatever that raises (seen on its own test images).
_PILLOW_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_SUBFILE: Final = 0x00FE


def decode(data: bytes | memoryview, *, max_pixels: int) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3], RGB, C-contiguous, with its EXIF orientation applied; the first frame of several.

    Alpha is dropped as `PIL.Image.convert("RGB")` drops it, because training code did; 16-bit grey is scaled, not clipped.
    Raises BadImage; TOO_LARGE, over `max_pixels`, comes from the header, before anything is decoded.
    """
    data = memoryview(data).cast("B")  # Arrow's buffers call themselves signed, which simplejpeg refuses
    head = bytes(data[:1024])
    match = _READABLE.match(head)
    if match is None or match.lastgroup is None:
        _refuse(head)
    try:
        pixels = _decode_jpeg(data, max_pixels) if match.lastgroup == "JPEG" else None
        if pixels is None:
            pixels = _decode_pillow(data, match.lastgroup, max_pixels)
    except MemoryError:
        raise BadImage(Failure.DECODER_CRASH, f"decoding this {match.lastgroup} needs more memory than there is") from None
    return pixels


def _refuse(head: bytes) -> NoReturn:
    if not head:
        raise BadImage(Failure.NOT_AN_IMAGE, "0 bytes")
    if head.startswith(LFS_POINTER):
        raise BadImage(Failure.NOT_AN_IMAGE, f"a Git LFS pointer in place of the image. {FETCH_LFS}")
    match = _REFUSED.match(head)
    if match is None or match.lastgroup is None:
        raise BadImage(Failure.NOT_AN_IMAGE, f"starts like no image format: {head[:16]!r}")
    name = match.lastgroup.replace("_", " ")
    raise BadImage(Failure.UNSUPPORTED_FORMAT, f"{name} is not decoded; JPEG, PNG, GIF, WebP, BMP and TIFF are")


def _too_large(pixels: int, max_pixels: int) -> BadImage:
    return BadImage(Failure.TOO_LARGE, f"{pixels / 1e6:g} MP by its header, the limit is {max_pixels / 1e6:g} MP")


def decode_small(data: bytes | memoryview, *, edge: int, max_pixels: int) -> tuple[np.ndarray, int, int] | None:
    """A large JPEG decoded at a half, a quarter or an eighth of its size, whichever is the smallest whose short edge still has
    `edge` pixels: (uint8 [H, W, 3] as `decode` gives it, and width and height of the whole image, upright).

    None when even the half would be too small, and whenever `decode` may do otherwise: no JPEG, too many pixels, CMYK, damage.
    The pixels are not those of a resize: the decoder averages within blocks of the cosine transform."""
    data = memoryview(data).cast("B")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        factor = min(8, 1 << max(0, (min(height, width) // edge).bit_length() - 1))  # what libjpeg-turbo has vector code for
        if factor == 1 or height * width > max_pixels or colorspace not in _COLORSPACES:
            return None
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, **least, min_factor=factor)
    except (ValueError, KeyError, MemoryError):
        return None
    orientation = jpeg_orientation(data)
    if orientation in TURNED:
        width, height = height, width
    return upright(pixels, orientation), width, height


def has_plain_header(data: memoryview, size: tuple[int, int]) -> bool:
    """Is this a JPEG of this width and height, grey or in YCbCr, about whose header libjpeg-turbo has no complaint?"""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):
        return False
    return (width, height) == size and colorspace in ("YCbCr", "Gray")


def _decode_jpeg(data: memoryview, max_pixels: int) -> np.ndarray | None:
    """The fast path, or None where Pillow has to look: CMYK, odd subsamplings, 12 bits, oddities of the headers."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels:
            raise _too_large(height * width, max_pixels)
        if colorspace not in _COLORSPACES:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data)
    except (ValueError, KeyError) as error:  # KeyError: a subsampling that simplejpeg has no name for, 4:4:1
        if _JPEG_DAMAGE.search(str(error)):
            raise _bad("JPEG", data, error) from None
        return None
    return upright(pixels, jpeg_orientation(data))


def _decode_pillow(data: memoryview, kind: str, max_pixels: int) -> np.ndarray:
    try:
        with _pillow_limits(max_pixels), Image.open(io.BytesIO(data), formats=[kind]) as image:
            if kind == "TIFF" and getattr(image, "tag_v2", {}).get(_SUBFILE) == 1:  # so begins camera raw
                raise BadImage(Failure.UNSUPPORTED_FORMAT, "a TIFF that begins with its thumbnail is not decoded")
            image.load()
            try:
                orientation = image.getexif().get(EXIF_ORIENTATION)  # after load: TIFF turns itself, PNG may carry it at its end
            except _PILLOW_ERRORS:
                orientation = None
            return upright(_rgb(image), orientation)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        raise _too_large(int(found[0]) if found else max_pixels + 1, max_pixels) from None
    except _PILLOW_ERRORS as error:
        raise _bad(kind, data, error) from None


@contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Pillow's own guard set to our limit, and strict, for one image; its other warnings are noise in a bulk job."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _rgb(image: Image.Image) -> np.ndarray:
    """Any mode as uint8 [H, W, 3]. Pillow clips deep grey to white, so that is scaled here:

    I;16 >> 8; I by whole bytes until its maximum fits (its files hold 8, 16 or 32 bits and do not say which);
    F as 0..1 when it stays within, else as 0..255. All other modes: Pillow's conversion, which drops alpha.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(min=0)
        shift = 8 if image.mode.startswith("I;16") else max(int(values.max()).bit_length() - 1, 0) // 8 * 8
        grey = values >> shift
    elif image.mode == "F":
        floats = np.nan_to_num(np.asarray(image))
        grey = np.rint(floats * (255 if floats.max() <= 1 else 1)).clip(0, 255)
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _bad(kind: str, view: memoryview, error: Exception) -> BadImage:
    """TRUNCATED where the decoder says so or the file stops before its own format says it does, else CORRUPT."""
    # Pillow's "cannot identify" names an address in memory: the same image would get another message on every run.
    said = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    data = bytes(view)
    ends_early = {
        "JPEG": b"\xff\xd9" not in data,
        "PNG": b"IEND" not in data,
        "GIF": not data.rstrip(b"\0").endswith(b";"),
        "WEBP": len(data) < 8 + int.from_bytes(data[4:8], "little"),
        "BMP": len(data) < int.from_bytes(data[2:6], "little"),
    }
    failure = Failure.TRUNCATED if _CUT_SHORT.search(said) or ends_early.get(kind) else Failure.CORRUPT
    return BadImage(failure, f"{kind}: {said}"[:200])
