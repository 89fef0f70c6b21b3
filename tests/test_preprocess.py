"""The stage on whole batches: pixels against Pillow, every row accounted for, the corpora of malformed files."""

from __future__ import annotations

import io
import tarfile
import warnings

import numpy as np
import poison
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline import rows
from pipeline.careful import CarefulLimits
from pipeline.model.preprocessing import Preprocessing
from pipeline.preprocess import Preprocess, resize_and_crop

MAX_PIXELS = 10**7
PREPROCESSINGS = {
    "torchvision": Preprocessing(),
    "hugging-face": Preprocessing(resample="bicubic"),
    "timm": Preprocessing(crop_pct=0.95, resample="bicubic"),
    "no-margin": Preprocessing(size=64, crop_pct=1.0),
}


def table(images, **columns) -> pa.Table:
    count = len(images)
    defaults = {
        "unit": ["u"] * count,
        "index": list(range(count)),
        "key": [f"k{number}" for number in range(count)],
        "source": ["s"] * count,
        "bytes": images,
        "error_class": [None] * count,
        "error": [None] * count,
    }
    data = {name: pa.array(columns.pop(name, values), rows.IMAGE.field(name).type) for name, values in defaults.items()}
    kept = pa.table(columns) if columns else pa.table({})
    return pa.table(
        [*data.values(), *kept.columns], schema=pa.schema([*rows.IMAGE, *kept.schema], metadata={"by": "test_preprocess"})
    )


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Noise over gradients: every level occurs, and both filters have edges to ring at."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2)
    return np.clip(ramp + np.random.default_rng(seed).integers(-60, 60, (height, width, 3)), 0, 255).astype(np.uint8)


def reference(image: Image.Image, preprocessing: Preprocessing, *, first: str = "") -> np.ndarray:
    """The training path: Pillow from the first byte to the last, uint8 [3, S, S]."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    edge, size = preprocessing.resize_edge, preprocessing.size
    short = min(image.size)
    width, height = (int(edge * length / short) for length in image.size)
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))  # noqa: RUF046  as torchvision writes it
    resample = Image.Resampling[preprocessing.resample.upper()]
    if first:
        image = image.resize((width, image.height) if first == "width" else (image.width, height), resample)
    resized = image.resize((width, height), resample)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(np.int16) - other)


def distance_to_pillow(array: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """How far `resize_and_crop` is from Pillow, in levels.

    Pillow 13 resizes some pictures over twice as tall as wide vertically first, every other one horizontally first, as torch
    does; bicubic overshoots are clipped in between, and noise comes out up to 11 levels apart. Either order is Pillow's.
    """
    got = resize_and_crop(array, preprocessing)
    assert got.dtype == np.uint8
    image = Image.fromarray(array)
    orders = ["width", "height"] if preprocessing.resample == "bicubic" and image.height > 2 * image.width else [""]
    return min((distance(got, reference(image, preprocessing, first=order)) for order in orders), key=np.max)


@pytest.fixture(scope="session")
def photos(shared_data) -> list[bytes]:
    images = []
    for path in sorted((shared_data / "photos").glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    return images


def test_photographs_equal_pillow(photos):
    preprocessing = Preprocessing()
    out = Preprocess(preprocessing, max_pixels=MAX_PIXELS)(table(photos))
    assert out["pixels"].null_count == out["width"].null_count == 0
    pixels = rows.pixels_view(out["pixels"], preprocessing.size)
    means = []
    for row, data in enumerate(photos):
        with Image.open(io.BytesIO(data)) as image:
            far = distance(pixels[row], reference(image, preprocessing))
            assert (out["width"][row].as_py(), out["height"][row].as_py()) == ImageOps.exif_transpose(image).size
        assert far.max() <= 2, row
        means.append(far.mean())
    assert np.mean(means) < 0.01


@pytest.mark.parametrize("name", PREPROCESSINGS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(short=st.integers(1, 500), ratio=st.floats(1, 12), upright=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_size_equals_pillow(name, short, ratio, upright, seed):
    long = int(short * ratio)
    far = distance_to_pillow(noise(short, long, seed) if upright else noise(long, short, seed), PREPROCESSINGS[name])
    assert far.max() <= 2
    assert far.mean() < 0.5  # ±1 where a small picture's levels fall on ties; photographs: 0.002


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (224, 224), (256, 256), (255, 257), (3000, 2000), (300, 1)])
@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_odd_sizes_equal_pillow(name, size):
    assert distance_to_pillow(noise(*size), PREPROCESSINGS[name]).max() <= 2


def test_a_one_pixel_strip_is_not_blown_up():
    # Resized as a whole it would be 256 × 16,776,960, 13 GB.
    out = Preprocess(Preprocessing(), max_pixels=MAX_PIXELS)(table([encode(Image.new("L", (1, 65535), 77))]))
    assert out["height"].to_pylist() == [65535]
    assert (rows.pixels_view(out["pixels"], 224) == 77).all()


def test_the_nine_exif_orientations_look_alike(shared_data):
    images = [path.read_bytes() for path in sorted((shared_data / "bad_images" / "exif").glob("*.jpg"))]
    out = Preprocess(Preprocessing(), max_pixels=MAX_PIXELS)(table(images))
    pixels = rows.pixels_view(out["pixels"], 224)
    assert len(images) == 9
    assert set(zip(out["width"].to_pylist(), out["height"].to_pylist(), strict=True)) == {(1800, 1200)}
    assert max(distance(pixels[row], pixels[0]).mean() for row in range(9)) < 3  # each was encoded anew, and carries its number


def test_every_row_comes_out_and_kept_columns_stay():
    good = encode(Image.new("RGB", (30, 20), (1, 2, 3)))
    batch = table(
        [good, None, b"", None, good, None],
        key=["a", "b", "c", "d", "e", None],
        index=[4, 5, 6, 7, 8, 9],
        error_class=[None, None, None, "FETCH_FAILED", "DUPLICATE_KEY", "TAR_TRUNCATED"],
        error=[None, None, None, "timed out", "like a", "cut short"],
        cls=pa.array([1, None, 3, 4, 5, None], pa.int16()),
        tags=pa.array([["x"], [], None, ["y", "z"], None, None]),
    )
    out = Preprocess(Preprocessing(size=16), max_pixels=MAX_PIXELS)(batch)
    names = ["unit", "index", "key", "source", "error_class", "error", "cls", "tags", "pixels", "width", "height"]
    assert out.schema.names == names
    assert out.schema.metadata == batch.schema.metadata
    assert out.schema.field("pixels").type == pa.large_binary()
    assert out.schema.field("width").type == out.schema.field("height").type == pa.int32()
    untouched = ["unit", "index", "key", "source", "cls", "tags"]
    assert out.select(untouched).equals(batch.select(untouched), check_metadata=True)
    assert out["error_class"].to_pylist() == [
        None,
        "NULL_IMAGE",
        "NOT_AN_IMAGE",
        "FETCH_FAILED",
        "DUPLICATE_KEY",
        "TAR_TRUNCATED",
    ]
    assert out["error"].to_pylist() == [None, "no bytes", "0 bytes", "timed out", "like a", "cut short"]
    assert [value is None for value in out["pixels"].to_pylist()] == [False, True, True, True, True, True]
    assert out["width"].to_pylist() == [30, None, None, None, None, None]
    assert out["height"].to_pylist() == [20, None, None, None, None, None]


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_empty_and_chunked_batches(chunks):
    part = table([encode(Image.new("L", (9, 9), level)) for level in (10, 20, 30)])
    batch = pa.concat_tables([part.slice(1, 2)] * chunks) if chunks else part.slice(0, 0)
    out = Preprocess(Preprocessing(size=8), max_pixels=MAX_PIXELS)(batch)
    assert out.num_rows == 2 * chunks
    assert out.schema.field("error_class").type == pa.string()
    assert [value[0] for value in out["pixels"].to_pylist()] == [20, 30] * chunks


@pytest.mark.parametrize("corpus", ["jpeg_seed_corpus", "pillow_test_images"])
def test_malformed_files_are_rows(shared_data, corpus):
    with tarfile.open(shared_data / "bad_images" / f"{corpus}.tar.xz") as tar:
        files = [tar.extractfile(member).read() for member in tar if member.isfile()]
    out = Preprocess(Preprocessing(), max_pixels=MAX_PIXELS)(table(files))
    counts = out["error_class"].combine_chunks().value_counts().to_pylist()
    by_class = {count["values"]: count["counts"] for count in counts}
    assert sum(by_class.values()) == out.num_rows == len(files)
    assert set(by_class) <= {None, "NOT_AN_IMAGE", "TRUNCATED", "CORRUPT", "TOO_LARGE", "UNSUPPORTED_FORMAT"}
    assert by_class[None] > 0
    for row, data in enumerate(files):
        ok = out["error_class"][row].as_py() is None
        assert ok == out["pixels"][row].is_valid == out["width"][row].is_valid == (out["error"][row].as_py() is None)
        size = _size_in_pillow(data) if ok else None
        assert size is None or size == (out["width"][row].as_py(), out["height"][row].as_py()), row


def _size_in_pillow(data: bytes) -> tuple[int, int] | None:
    """Size of the upright image, by its header; None where Pillow cannot open what libjpeg-turbo's own interface can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return ImageOps.exif_transpose(image).size
        except (OSError, SyntaxError, ValueError):
            return None


def test_careful_mode_costs_one_row_a_poison():
    good = encode(Image.new("RGB", (30, 20), (1, 2, 3)))
    limits = CarefulLimits(timeout_s=60, memory_bytes=2**29)  # each new child imports torch: hangs are test_careful's
    stage = Preprocess(Preprocessing(size=16), max_pixels=MAX_PIXELS, careful=limits, decode=poison.decode)
    out = stage(table([good, b"hog", good, b"<svg>", b"abort", good]))
    wanted = [None, "DECODER_CRASH", None, "UNSUPPORTED_FORMAT", "DECODER_CRASH", None]
    assert out["error_class"].to_pylist() == wanted
    plain = Preprocess(Preprocessing(size=16), max_pixels=MAX_PIXELS)(table([good]))
    assert {value for value in out["pixels"].to_pylist() if value is not None} == set(plain["pixels"].to_pylist())


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"crop_pct": 0}, {"crop_pct": 1.1}, {"resample": "lanczos"}, {"mean": (0.5, 0.5)}, {"std": (1, 0, 1)}],
)
def test_preprocessing_is_checked(wrong):
    with pytest.raises(ValueError, match="required"):
        Preprocessing(**wrong)


def test_resize_edges_of_the_three_in_the_wild():
    assert [PREPROCESSINGS[name].resize_edge for name in ("torchvision", "hugging-face", "timm")] == [256, 256, 235]


def test_fast_decoding_changes_large_jpegs_alone_and_gives_some_of_them_exactly_too():
    preprocessing = Preprocessing(size=64)
    smooth = Image.fromarray(noise(30, 23)).resize((901, 703), Image.Resampling.BICUBIC)
    large, small = encode(smooth, "JPEG", quality=95), encode(smooth.resize((120, 90)), "JPEG", quality=95)
    batch = table([large, small, encode(smooth), b"no image", *[large] * 61, None, large])
    exact, fast = (Preprocess(preprocessing, max_pixels=MAX_PIXELS, fast=fast)(batch) for fast in (False, True))
    assert "exact" not in exact.column_names
    for name in ("width", "height", "error_class", "error"):
        assert fast[name].equals(exact[name])
    one, other = (rows.pixels_view(out["pixels"], 64) for out in (fast, exact))
    have = np.flatnonzero(exact["pixels"].is_valid())
    changed = [row for place, row in enumerate(have.tolist()) if (one[place] != other[place]).any()]
    assert changed == [0, *range(4, 65), 66]
    beside = distance(other[0][..., 1:], other[0][..., :-1]).mean()  # what a crop that lies a pixel beside is off by
    assert distance(one[0], other[0]).mean() < beside / 5
    given = fast["exact"].to_pylist()
    assert [row for row, pixels in enumerate(given) if pixels is not None] == [0, 64]
    assert given[0] == other[0].tobytes()
    same = Preprocess(preprocessing, max_pixels=MAX_PIXELS, fast=True)(table([small]))
    assert same["exact"].to_pylist() == [None], "there is nothing to compare"


def test_fast_and_careful_go_together():
    careful = CarefulLimits(timeout_s=30, memory_bytes=2**30)
    large = encode(Image.fromarray(noise(300, 200)), "JPEG")
    stages = [Preprocess(Preprocessing(size=32), max_pixels=MAX_PIXELS, careful=limits, fast=True) for limits in (None, careful)]
    plain, alone = (stage(table([large, b"no image"])) for stage in stages)
    assert alone["pixels"].equals(plain["pixels"])
    assert "exact" not in alone.column_names
    assert "room" not in plain.column_names
    assert alone["room"].to_pylist() == [None, bytes(3 * 32 * 32)], "each row is as large as the other"
