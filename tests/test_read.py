"""Units → image rows: nothing is lost, nothing is invented, a shard that is cut anywhere is an error."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import picture, tar_bytes, write_parquet

from pipeline.cut import cut, list_inputs
from pipeline.errors import InputMissing, JobError, ShardError
from pipeline.read import read_unit
from pipeline.spec import Input
from pipeline.storage import Disk, Object
from pipeline.tar import Stream, members
from pipeline.unit import Part, Unit

STORE = Disk()


def rows_of(path: Path | str, **fields: object) -> tuple[list[dict], dict]:
    """(image rows, end row) of everything the job's input names, units joined."""
    wanted = Input(uri=str(path), **fields)
    images: list[dict] = []
    end: dict = {}
    for unit in cut(STORE, wanted, list_inputs(STORE, wanted), tasks=1):
        table = pa.concat_tables(read_unit(STORE, unit, wanted=wanted), promote_options="permissive").to_pylist()
        images += table[:-1]
        end = table[-1]
        assert end["key"] is None
        assert [row["index"] for row in table[:-1]] == list(range(len(table) - 1))
        assert {row["unit"] for row in table} == {unit.id}
        assert end["error_class"] or end["index"] == len(table) - 1
    return images, end


def names(data: bytes, *, chunk: int = 1 << 20, tmp: Path) -> list[tuple[str, bytes]]:
    path = tmp / "x.tar"
    path.write_bytes(data)
    with Stream(STORE, STORE.head(str(path)), chunk=chunk) as stream:
        return [(name, bytes(content)) for name, content in members(stream)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("chunk", [512, 700, 1 << 20])
def test_members_equal_tarfile(tmp_path, tar_format, chunk):
    long = "" if tar_format == tarfile.USTAR_FORMAT else "d/" + "x" * 200 + "é"
    content = {"a.jpg": b"1" * 511, "b/c.jpg": b"", "d.cls": b"2" * 512, f"{long}e.jpg": b"3" * 5000}
    assert names(tar_bytes(content, tar_format=tar_format), chunk=chunk, tmp=tmp_path) == list(content.items())


TAR = tar_bytes({"a.jpg": b"1" * 700, "b.jpg": b"2" * 100, "c.jpg": b"3" * 1024})


@settings(deadline=None, max_examples=150)
@given(st.integers(min_value=0, max_value=len(TAR) - 1))
def test_a_tar_cut_anywhere_is_an_error_or_complete(tmp_path_factory, cut_at: int):
    tmp = tmp_path_factory.mktemp("cut")
    end_of_members = 512 + 1024 + 512 + 512 + 512 + 1024
    if cut_at >= end_of_members + 1024:  # both zero blocks are there, only padding is missing
        assert len(names(TAR[:cut_at], tmp=tmp)) == 3
        return
    with pytest.raises(ShardError) as caught:
        names(TAR[:cut_at], tmp=tmp)
    assert caught.value.error_class in {"TAR_TRUNCATED", "TAR_NO_EOF", "TAR_CORRUPT"}


@pytest.mark.parametrize(
    ("data", "error_class", "words"),
    [
        (b"", "TAR_NO_EOF", "0 bytes"),
        (b"<html>" + b" " * 5000, "TAR_CORRUPT", "not a tar"),
        (b"<html>", "TAR_CORRUPT", "not a tar"),
        (TAR[: 512 + 1024], "TAR_NO_EOF", "no end mark after 1 members"),
        (TAR[:600], "TAR_TRUNCATED", "inside member 1 (a.jpg)"),
        (TAR[: 512 + 1024 + 100], "TAR_TRUNCATED", "inside the header of member 2"),
        (TAR[:1536] + b"junk" * 128 + TAR[2048:], "TAR_CORRUPT", "damaged header after 1 members"),
    ],
)
def test_shard_errors_say_what_and_travel_in_the_end_row(tmp_path, data, error_class, words):
    (tmp_path / "x.tar").write_bytes(data)
    _, end = rows_of(tmp_path / "x.tar")
    assert end["error_class"] == error_class
    assert words in end["error"]


def test_samples_keep_their_keys_and_sidecars(tmp_path):
    content = {
        "d/one.cls": b"7\n",
        "d/one.jpg": b"1",
        "two.JPG": b"2",
        "two.cls": b"8",
        "two.txt": b"ignored",
        "three.left.png": b"3",
        "three.right.webp": b"4",
        "three.cls": b"9",
        "three.left.cls": b"10",
        "._two.jpg": b"mac",
        "four.heic": b"5",
        "two.png": b"6",
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(content))
    rows, _ = rows_of(tmp_path, keep=("cls",))
    assert [(row["key"], row["cls"]) for row in rows] == [
        ("d/one", "7"),
        ("two", "8"),
        ("three.left", "10"),
        ("three.right", "9"),
        ("four", None),
        ("two", None),
    ]
    assert [row["error_class"] for row in rows] == [None] * 5 + ["DUPLICATE_KEY"]
    assert [row["bytes"] for row in rows] == [b"1", b"2", b"3", b"4", b"5", None]


def test_an_empty_tar_has_no_rows_and_no_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({}))
    assert rows_of(tmp_path) == (
        [],
        {"unit": rows_of(tmp_path)[1]["unit"], "index": 0} | dict.fromkeys(["key", "source", "bytes", "error_class", "error"]),
    )


def test_parquet_rows_in_order_over_units(tmp_path):
    images = [picture(number) for number in range(45)]
    write_parquet(tmp_path / "a.parquet", images, rows_per_group=5)
    wanted = Input(uri=str(tmp_path), format="parquet", keep=("label",))
    units = cut(STORE, wanted, list_inputs(STORE, wanted), tasks=1)
    assert len(units) >= 4
    assert next((part.start, part.stop) for unit in units for part in unit.parts) == (0, units[0].parts[0].stop)
    tables = [table for unit in units for table in read_unit(STORE, unit, wanted=wanted)]
    rows = [row for table in tables for row in table.to_pylist() if row["key"] is not None]
    assert [row["bytes"] for row in rows] == images
    assert [row["label"] for row in rows] == list(range(45))
    assert tables[0].schema.field("label").type == pa.int64()


def test_parquet_struct_null_and_missing_keys(tmp_path):
    images = [{"bytes": b"1", "path": "p"}, None, {"bytes": None, "path": "q"}]
    table = pa.table(
        {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "key": ["a", None, "a"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows, _ = rows_of(tmp_path, format="parquet")
    assert [(row["key"], row["bytes"], row["error_class"]) for row in rows] == [
        ("a", b"1", None),
        ("1", None, None),
        ("a", None, "DUPLICATE_KEY"),
    ]
    rows, _ = rows_of(tmp_path, format="parquet", key_column=None)
    assert [row["key"] for row in rows] == ["0", "1", "2"]


def test_parquet_columns_are_checked_before_the_run(tmp_path):
    pq.write_table(pa.table({"img": [b"1"], "image": [[1]], "key": ["a"]}), tmp_path / "a.parquet")
    for fields, words in (
        ({"image_column": "picture"}, "no column picture"),
        ({}, "column image is list"),
        ({"keep": ("x",)}, "no column x"),
    ):
        with pytest.raises(JobError, match=words):
            rows_of(tmp_path, format="parquet", **fields)
    kind = pa.fixed_shape_tensor(pa.uint8(), (2,))
    tensor = pa.ExtensionArray.from_storage(kind, pa.array([[1, 2]], pa.list_(pa.uint8(), 2)))
    pq.write_table(pa.table({"image": tensor, "key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="extension"):
        rows_of(tmp_path, format="parquet")


def test_a_damaged_parquet_file_is_a_unit_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(number) for number in range(20)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    for broken in (bytes(data[:-20]), b"PAR1" + data[4:-200] + bytes(200), b"", b"<html>"):
        (tmp_path / "a.parquet").write_bytes(broken)
        _rows, end = rows_of(tmp_path, format="parquet")
        assert end["error_class"] == "PARQUET_CORRUPT", broken[:10]
        assert "a.parquet" in end["error"]


def test_loose_images_have_relative_keys_and_fail_one_by_one(tmp_path):
    for name in ("a/1.jpg", "a/2.JPEG", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "notes.txt").write_text("no image")
    wanted = Input(uri=str(tmp_path), format="images")
    listing = list_inputs(STORE, wanted)
    (tmp_path / "3.png").unlink()
    unit = Unit(tuple(Part(item.uri, item.etag, item.size) for item in listing))
    rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    assert [(row["key"], row["bytes"], row["error_class"]) for row in rows] == [
        ("3.png", None, "FETCH_FAILED"),
        ("a/1.jpg", b"a/1.jpg", None),
        ("a/2.JPEG", b"a/2.JPEG", None),
        (None, None, None),
    ]


def test_a_shard_that_changed_or_went_since_the_plan(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(TAR)
    wanted = Input(uri=str(tmp_path))
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted), tasks=1)
    path.write_bytes(TAR + b"\0" * 512)
    assert pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()[-1]["error_class"] == "INPUT_CHANGED"
    path.unlink()
    assert pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()[-1]["error_class"] == "INPUT_MISSING"


def test_nothing_of_the_format_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputMissing, match=r"none \.tar"):
        list_inputs(STORE, Input(uri=str(tmp_path)))
    with pytest.raises(InputMissing):
        list_inputs(STORE, Input(uri=str(tmp_path / "absent/")))


@given(
    st.lists(st.integers(min_value=0, max_value=2**28), min_size=1, max_size=60),
    st.integers(min_value=1, max_value=4),
    st.sampled_from(["webdataset", "images"]),
)
def test_cutting_keeps_every_input_once_and_enough_units(sizes, tasks, kind):
    listing = [Object(f"/x/{number:04d}.tar", size, "e") for number, size in enumerate(sizes)]
    units = cut(STORE, Input(uri="/x", format=kind), listing, tasks=tasks)
    assert [part.uri for unit in units for part in unit.parts] == [item.uri for item in listing]
    assert len(units) >= min(4 * tasks, len(listing))
    assert len({unit.id for unit in units}) == len(units)


def test_picture_bytes_are_images():
    assert picture(1)[:2] == b"\xff\xd8"
    assert io.BytesIO(picture(1)).read() != picture(2)


def test_a_name_that_is_not_utf8_is_spelt_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.jpg")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    store = Disk()
    with Stream(store, store.head(str(tmp_path / "a.tar"))) as stream:
        assert [name for name, _ in members(stream)] == ["caf\\xe9.jpg"]


def test_files_of_one_unit_whose_kept_columns_differ_are_told_apart(tmp_path):
    parts = []
    for name, labels in (("a", [1, 2]), ("b", ["one", "two"])):
        pq.write_table(pa.table({"key": ["x", "y"], "image": [b"1", b"2"], "label": labels}), tmp_path / f"{name}.parquet")
        item = Disk().head(str(tmp_path / f"{name}.parquet"))
        parts.append(Part(item.uri, item.etag, item.size))
    wanted = Input(uri=str(tmp_path), format="parquet", keep=("label",))
    end = list(read_unit(Disk(), Unit(tuple(parts)), wanted=wanted))[-1].to_pylist()[-1]
    assert (end["error_class"], end["key"]) == ("UNFIT", None)
    assert "b.parquet: column label is string; required: int64" in end["error"]
    for part in parts:
        assert list(read_unit(Disk(), Unit((part,)), wanted=wanted))[-1].to_pylist()[-1]["error_class"] is None
