"""Bytes to pixels: every mode against what it must look like, every failure class from a file made here."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from shards import LFS_POINTER

from pipeline import decode as module
from pipeline.decode import BadImage, decode, decode_small

LIMIT = 10**6
#: 4 × 3, so that no turn looks like another.
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 160, height: int = 120) -> Image.Image:
    return Image.fromarray(COLOURS).resize((width, height), Image.Resampling.BICUBIC)


def failure(data: bytes, limit: int = LIMIT) -> tuple[str, str]:
    with pytest.raises(BadImage) as error:
        decode(data, max_pixels=limit)
    assert "\n" not in error.value.message
    assert "0x7" not in error.value.message  # an address would differ from run to run
    return str(error.value.failure), error.value.message


def reference(data: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_each_format_equals_pillow(kind):
    data = encode(photo(), kind)
    pixels = decode(data, max_pixels=LIMIT)
    assert (pixels.shape, pixels.dtype) == ((120, 160, 3), np.uint8)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable  # torch takes no other
    np.testing.assert_array_equal(pixels, reference(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"quality": 5}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_from_arrow_take_the_fast_path(monkeypatch, mode, options):
    data = encode(photo().convert(mode), "JPEG", **options)
    expected = reference(data)
    monkeypatch.setattr(module, "_decode_pillow", None)  # a silent way round simplejpeg would cost time and nothing else
    scalar = pa.array([data], pa.large_binary())[0]
    np.testing.assert_array_equal(decode(memoryview(scalar.as_buffer()), max_pixels=LIMIT), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(COLOURS), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode(data, max_pixels=LIMIT)
    assert pixels.shape[:2] == ((4, 3) if 5 <= orientation <= 8 else (3, 4))
    np.testing.assert_array_equal(pixels, reference(data))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_exif_in_both_byte_orders_and_types(order, kind):
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((6, 0) if kind == 3 else (6,)))
    tiff = struct.pack(order + "2sHIHHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 0x0112, kind, 1) + value + bytes(4)
    data = encode(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0" + tiff)
    assert decode(data, max_pixels=LIMIT).shape == (4, 3, 3)


@pytest.mark.parametrize("exif", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"nonsense" * 20])
def test_broken_exif_is_upright(exif):
    data = encode(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(data, max_pixels=LIMIT).shape == (3, 4, 3)


def test_xmp_orientation_where_exif_has_none():
    data = encode(Image.fromarray(COLOURS), "JPEG", xmp=b'<rdf:Description tiff:Orientation="8"/>')
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), reference(data))
    assert decode(data, max_pixels=LIMIT).shape == (4, 3, 3)


def pixel(image: Image.Image, kind: str, **options) -> tuple[int, ...]:
    pixels = decode(encode(image, kind, **options), max_pixels=LIMIT)
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_modes(compression):
    def flat(mode: str, colour) -> Image.Image:
        return Image.new(mode, (8, 8), colour)

    palette = flat("P", 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(flat("1", 1), "PNG") == (255, 255, 255)
    assert pixel(flat("L", 77), "PNG") == (77, 77, 77)
    assert pixel(flat("LA", (77, 0)), "PNG") == (77, 77, 77)  # alpha is dropped, not composited
    assert pixel(flat("RGBA", (10, 20, 30, 0)), "PNG") == (10, 20, 30)
    assert pixel(palette, "PNG") == (10, 20, 30)
    assert pixel(palette, "PNG", transparency=1) == (10, 20, 30)
    assert pixel(palette, "PNG", transparency=b"\xff\x40") == (10, 20, 30)
    assert pixel(palette, "GIF", transparency=1) == (10, 20, 30)
    assert pixel(flat("I;16", 0xABCD), "PNG") == (0xAB,) * 3  # Pillow alone: white
    assert pixel(flat("I;16", 0xABCD), "TIFF", compression=compression) == (0xAB,) * 3
    assert pixel(flat("I;16B", 0xABCD), "TIFF") == (0xAB,) * 3
    assert pixel(flat("I", 200), "TIFF", compression=compression) == (200,) * 3
    assert pixel(flat("I", 0x12345678), "TIFF", compression=compression) == (0x12,) * 3
    assert pixel(flat("I", -5), "TIFF", compression=compression) == (0, 0, 0)
    assert pixel(flat("F", 0.5), "TIFF", compression=compression) == (128,) * 3
    assert pixel(flat("F", 200.4), "TIFF", compression=compression) == (200,) * 3
    assert pixel(flat("F", float("nan")), "TIFF", compression=compression) == (0, 0, 0)
    assert pixel(flat("CMYK", (255, 0, 0, 0)), "TIFF", compression=compression) == (0, 255, 255)


def test_cmyk_jpeg_is_not_a_negative():
    data = encode(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "JPEG")
    red, green, blue = decode(data, max_pixels=LIMIT)[16, 16]
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode(data, max_pixels=LIMIT)[4, 4, 0] > 190


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<!DOCTYPE html><html><svg ></svg></html>", b'{"error": "not found"}', b"\0" * 999]
)
def test_not_an_image(data):
    assert failure(data)[0] == "NOT_AN_IMAGE"


def test_an_image_that_git_lfs_has_not_fetched_is_told():
    said = ("NOT_AN_IMAGE", "a Git LFS pointer in place of the image. Fetch the object with git lfs pull")
    assert failure(LFS_POINTER) == said


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("SVG", b"  <svg>"),
        ("AVIF", b"\0\0\0\x20ftypavif\0\0\0\0"),
        ("HEIF", b"\0\0\0\x18ftypheic\0\0\0\0"),
        ("MP4", b"\0\0\0\x18ftypisom\0\0\0\0"),
        ("PSD", b"8BPS\0\x01"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
        ("JPEG XL", b"\xff\x0a\xfa"),
        ("PDF", b"%PDF-1.7"),
        ("NETPBM", b"P6 2 2 255 "),
        ("ICO", b"\0\0\1\0\1\0\x10\x10"),
    ],
)
def test_unsupported_format(name, data):
    assert failure(data) == ("UNSUPPORTED_FORMAT", f"{name} is not decoded; JPEG, PNG, GIF, WebP, BMP and TIFF are")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_truncated(kind, part):
    data = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)), kind)
    assert failure(data[: int(len(data) * part)])[0] == "TRUNCATED"


def test_corrupt_jpeg():
    data = bytearray(encode(photo(), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff\xd9" + bytes(62)  # an end in the middle of the picture
    assert failure(bytes(data))[0] == "CORRUPT"


def test_stray_bytes_before_the_end_are_harmless():
    data = encode(photo(), "JPEG")
    np.testing.assert_array_equal(decode(data[:-2] + b"stray" + data[-2:], max_pixels=LIMIT), reference(data))
    np.testing.assert_array_equal(decode(data + b"trailing", max_pixels=LIMIT), reference(data))


def test_corrupt_png():
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert failure(bytes(data))[0] == "CORRUPT"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_too_large_by_the_header(kind):
    before = Image.MAX_IMAGE_PIXELS
    data = encode(photo(), kind)
    assert decode(data, max_pixels=160 * 120).shape == (120, 160, 3)
    for limit in (160 * 120 - 1, 1000):  # Pillow warns over its limit and refuses over twice its limit
        assert failure(data[: max(600, len(data) // 2)] if kind == "JPEG" else data, limit) == (
            "TOO_LARGE",
            f"0.0192 MP by its header, the limit is {limit / 1e6:g} MP",
        )
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_limit_above_pillows_own_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encode(photo(), "PNG"), max_pixels=LIMIT).shape == (120, 160, 3)


def test_pillows_test_images_equal_pillow(shared_data):
    """Wherever both decode, the pixels are the same; but for deep grey, which Pillow clips."""
    compared = 0
    with tarfile.open(shared_data / "bad_images" / "pillow_test_images.tar.xz") as tar:
        for member in tar:
            if not member.name.endswith((".png", ".jpg", ".bmp", ".gif", ".webp")):
                continue
            data = tar.extractfile(member).read()
            try:
                pixels = decode(data, max_pixels=LIMIT)
            except BadImage:
                continue
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
                if not image.mode.startswith("I"):
                    np.testing.assert_allclose(pixels.astype(int), reference(data), atol=2, err_msg=member.name)
                    compared += 1
    assert compared > 400


@pytest.mark.parametrize(
    ("size", "edge", "shape"),
    [((640, 480), 240, (240, 320)), ((640, 480), 241, None), ((641, 483), 100, (121, 161)), ((4000, 3000), 10, (375, 500))],
)
def test_small_is_a_half_a_quarter_or_an_eighth_and_never_under_the_edge(size, edge, shape):
    data = encode(photo(*size), "JPEG", quality=95)
    small = decode_small(data, edge=edge, max_pixels=10**8)
    if shape is None:
        assert small is None
        return
    pixels, *whole = small
    assert (pixels.shape, whole) == ((*shape, 3), list(size))
    smaller = np.asarray(photo(*size).resize(shape[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels - smaller).mean() < 2


def test_small_is_upright_and_tells_the_size_of_the_upright_image():
    image = photo(640, 480)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, width, height = decode_small(encode(image, "JPEG", exif=exif), edge=200, max_pixels=LIMIT)
    assert (pixels.shape, width, height) == ((320, 240, 3), 480, 640)
    turned = decode(encode(image, "JPEG", exif=exif), max_pixels=LIMIT)
    assert np.abs(pixels.astype(int) - turned[1::2, 1::2]).mean() < 5


@pytest.mark.parametrize(
    "data",
    [
        encode(photo(640, 480), "PNG"),
        encode(photo(640, 480), "JPEG")[:-400],
        encode(photo(640, 480).convert("CMYK"), "JPEG"),
        encode(photo(1200, 1000), "JPEG"),  # over the limit
        b"",
    ],
)
def test_what_cannot_be_decoded_small_is_left_to_decode(data):
    assert decode_small(data, edge=10, max_pixels=LIMIT) is None
