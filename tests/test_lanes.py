"""Which image takes which lane, and that both give the same rows. The GPU's decoder is stood in for by the CPU's."""

from __future__ import annotations

import io
import struct

import numpy as np
import pyarrow as pa
import pytest
import torch
from models import small_artifact
from PIL import Image
from shards import picture
from standing import Standing
from test_preprocess import MAX_PIXELS, encode, noise, table

from pipeline import lanes
from pipeline.artifact import load_artifact
from pipeline.lanes import GpuLane, Lanes, Split, all_on_gpu, plain
from pipeline.model.preprocessing import Preprocessing
from pipeline.predict import Predict
from pipeline.preprocess import Preprocess
from pipeline.rows import SAME_LABEL, handed_on
from pipeline.spec import ModelSource, Output
from pipeline.stages import gathered

SMALL = Preprocessing(size=32)


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    """A picture with these after its JFIF header."""
    data = picture(1)
    return data[:20] + b"".join(struct.pack(">BBH", 255, kind, len(body) + 2) + body for kind, body in segments) + data[20:]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(noise(40, 30)), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (picture(1), (40, 30)),
        (encode(Image.fromarray(noise(40, 30)), "JPEG", subsampling=0), (40, 30)),
        (encode(Image.fromarray(noise(40, 30)), "JPEG", comment=b"x" * 9000), (40, 30)),
        (encode(Image.fromarray(noise(40, 30)), "JPEG", progressive=True), None),
        (encode(Image.fromarray(noise(40, 30)).convert("L"), "JPEG"), (40, 30)),
        (encode(Image.fromarray(noise(40, 30)).convert("CMYK"), "JPEG"), None),
        (encode(Image.fromarray(noise(40, 30)), "JPEG", keep_rgb=True), None),
        (encode(Image.fromarray(noise(40, 30))), None),
        (encode(Image.fromarray(noise(2, 90)), "JPEG"), None),  # a strip
        (encode(Image.fromarray(noise(4000, 2600)), "JPEG", quality=1), None),  # over max_pixels
        (encode(Image.fromarray(noise(900, 800)), "JPEG", quality=100, subsampling=0), (900, 800)),
        (turned(), None),
        (with_segments((0xE2, b"ICC_PROFILE\0\5\1xx")), None),  # libjpeg-turbo complains, so Pillow has a word in it
        (with_segments((0xE0, b"JFIF\0\2\1\0\0\1\0\1\0\0")), None),
        (with_segments((0xFE, b"of no harm")), (40, 30)),
        (picture(1)[:-2], None),
        (picture(1) + b"\0", None),
        (b"\xff\xd8\xff\xd9", None),
        (b"", None),
    ],
)
def test_plain_jpegs_are_told_from_their_header(data: bytes, size: tuple[int, int] | None) -> None:
    assert plain(memoryview(data), SMALL, MAX_PIXELS) == size
    for end in range(0, min(len(data), 700), 7):  # no header is too short
        assert plain(memoryview(data[:end]), SMALL, MAX_PIXELS) is None


def images() -> list[bytes | None]:
    """70, some of them broken, some for the CPU alone; 0 and 64 are those looked at twice, and 64 is cut short in its scan."""
    made: list[bytes | None] = [picture(number) for number in range(70)]
    made[3], made[5], made[7], made[9] = None, b"no image", picture(5, kind="PNG"), turned()
    for row in (11, 12, 64):
        made[row] = picture(row)[:-40] + b"\xff\xd9"
    return made


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look at rows 0 and 64."""
    monkeypatch.setattr(lanes, "_COMPARED_EVERY", 64)


@pytest.fixture(scope="module")
def predict(tmp_path_factory: pytest.TempPathFactory) -> Predict:
    artifact = load_artifact(small_artifact(tmp_path_factory.mktemp("model")))
    return Predict(artifact, ModelSource(uri="x", engine="torch"), device="cpu", batch_size=16, output=Output(uri="x"))


def chain(share: float, decoder: Standing, predict: Predict, *, fast: bool = False) -> pa.Table:
    preprocess = Preprocess(SMALL, max_pixels=MAX_PIXELS, fast=fast)
    batch = table(images(), cls=pa.array(range(70)))
    ends = pa.table({**{name: pa.nulls(1, batch.schema.field(name).type) for name in batch.column_names}, "index": [70]})
    routed = Lanes(preprocess, SMALL, MAX_PIXELS, lambda _: share)(pa.concat_tables([batch, ends.cast(batch.schema)]))
    return GpuLane(decoder, preprocess, predict, all_on_gpu)(routed)


@pytest.mark.parametrize(("share", "doubted"), [(1.0, 0), (1.0, 9), (0.5, 0), (0.0, 0)])
@pytest.mark.parametrize("fast", [False, True])
def test_both_lanes_give_the_same_rows(predict: Predict, share: float, doubted: int, *, fast: bool) -> None:
    expected = predict(Preprocess(SMALL, max_pixels=MAX_PIXELS)(table(images(), cls=pa.array(range(70))))).sort_by("index")
    decoder = Standing(slice(doubted))
    out = chain(share, decoder, predict, fast=fast).sort_by("index")
    end = out.slice(70)
    assert end["key"].to_pylist() == end["status"].to_pylist() == [None]
    same = out.slice(0, 70)
    for name in set(expected.column_names) - {"score", "topk"}:
        assert same[name].to_pylist() == expected[name].to_pylist(), name
    failed = [row for row, status in enumerate(same["status"].to_pylist()) if status == "failed"]
    assert failed == [3, 5, 11, 12, 64]
    np.testing.assert_allclose(same["score"].drop_null().to_numpy(), expected["score"].drop_null().to_numpy(), rtol=0, atol=1e-5)
    compared = [row for row, same in enumerate(out[SAME_LABEL].to_pylist()) if same is not None]
    assert compared == ([0] if share and not doubted else [])
    # Of the 66 plain ones, of which the CPU's second look has found one broken.
    assert decoder.seen == {1.0: 65, 0.5: 33, 0.0: 0}[share]


def test_no_image_is_copied_for_the_cpu_to_decode() -> None:
    def places(of: pa.Table) -> set[int]:
        return {chunk.buffers()[2].address for chunk in of["bytes"].chunks if len(chunk)}

    def preprocess(part: pa.Table) -> pa.Table:
        seen.append(places(part))
        return decode(part)

    decode, seen = Preprocess(SMALL, max_pixels=MAX_PIXELS), list[set[int]]()
    batch = pa.concat_tables([table(images()), table(images())])
    Lanes(preprocess, SMALL, MAX_PIXELS, all_on_gpu)(batch)
    assert seen == [places(batch)] * 2, "those that are looked at twice, and those that are not the GPU's"


def test_a_label_that_differs_is_counted(predict: Predict) -> None:
    class Grey(Standing):
        def __call__(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
            pixels, vouched = super().__call__(encoded, sizes)
            return torch.full_like(pixels, 128), vouched

    out = chain(1.0, Grey(), predict).sort_by("index")
    assert out[SAME_LABEL].to_pylist()[0] is False


def test_the_share_makes_both_sides_end_together() -> None:
    split, decode, passing, gpu, actors = Split(12.0), 2.6e-3, 6e-5, 1.2e-4, 12.0
    assert split.share({}) == 0.5
    split.share({"gpu": (512, 512 * gpu)})
    share = split.share({"pass": (1000, 1000 * passing), "decode": (500, 500 * decode)})
    assert share * gpu == pytest.approx(((1 - share) * decode + passing) / actors)
    assert split.share({"decode": (200_000, 200_000 * 1e-5)}) < 0.1  # what is long past is forgotten
    assert split.share({"decode": (200_000, 200_000 * 1.0)}) == pytest.approx(1, abs=0.01)


def test_a_batch_of_nothing_passes(predict: Predict) -> None:
    preprocess = Preprocess(SMALL, max_pixels=MAX_PIXELS)
    routed = Lanes(preprocess, SMALL, MAX_PIXELS, all_on_gpu)(table([]))
    assert GpuLane(Standing(), preprocess, predict, all_on_gpu)(routed).num_rows == 0


def test_the_strip_is_pillows() -> None:
    assert SMALL.is_strip(2, 90)
    assert not SMALL.is_strip(40, 30)
    assert SMALL.is_strip(1000, 4200)
    assert not SMALL.is_strip(4000, 1000)
    with Image.open(io.BytesIO(picture(1))) as image:
        assert SMALL.placement(*image.size) == (48, 36, 8, 2)


def test_what_goes_to_another_process_is_in_one_piece_but_for_images() -> None:
    rows = pa.concat_tables([table([picture(number)], cls=pa.array([number])) for number in range(5)])
    rows = rows.append_column("pixels", pa.chunked_array([pa.nulls(1, pa.large_binary())] * 5))
    passed = handed_on(rows)
    assert passed.equals(rows)
    assert {name: passed[name].num_chunks for name in passed.column_names} == dict.fromkeys(rows.column_names, 1) | {"bytes": 5}
    assert handed_on(rows.slice(0, 0)).schema == rows.schema


@pytest.mark.parametrize(("size", "rows"), [(0, [3, 2, 1, 4]), (1, [3, 2, 1, 4]), (40, [5, 5]), (10**9, [10])])
def test_tables_are_gathered_by_their_bytes(size: int, rows: list[int]) -> None:
    numbers = iter(range(10))
    tables = [pa.table({"index": pa.array([next(numbers) for _ in range(count)])}) for count in (3, 2, 1, 4)]
    found = list(gathered(iter(tables), size))
    assert [part.num_rows for part in found] == rows
    assert pa.concat_tables(found)["index"].to_pylist() == list(range(10))


def test_each_table_is_asked_once_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 40 us, and a thousand tables of thumbnails make a block."""
    asked: list[int] = []

    class Table:
        @property
        def nbytes(self) -> int:
            asked.append(1)
            return 1

    monkeypatch.setattr(pa, "concat_tables", len)
    assert list(gathered(iter([Table()] * 100), 40)) == [40, 40, 20]
    assert len(asked) == 100
