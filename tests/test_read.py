"""Units → image rows: nothing is lost, nothing is invented, a shard that is cut anywhere is an error."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import encryption
from shards import LFS_POINTER, picture, tar_bytes, write_parquet

from pipeline.columns import kept_types
from pipeline.cut import BUNDLE, UNIT_BYTES, check_inputs, count_suffixes, cut, list_inputs
from pipeline.disk import Disk
from pipeline.errors import (
    InputChanged,
    InputMissing,
    JobError,
    PermissionDenied,
    ShardError,
    StoreError,
    Temporary,
    Unidentified,
)
from pipeline.model.preprocessing import Preprocessing
from pipeline.preprocess import Preprocess
from pipeline.read import BATCH_BYTES, read_unit
from pipeline.spec import Input
from pipeline.storage import Object
from pipeline.tar import Stream, members
from pipeline.unit import Part, Unit

STORE = Disk()


def rows_of(path: Path | str, **fields: object) -> tuple[list[dict], dict]:
    """(image rows, end row) of everything the job's input names, units joined."""
    wanted = Input(uri=str(path), **fields)
    images: list[dict] = []
    end: dict = {}
    for unit in cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1):
        table = pa.concat_tables(read_unit(STORE, unit, wanted=wanted), promote_options="permissive").to_pylist()
        images += table[:-1]
        end = table[-1]
        assert end["key"] is None
        assert [row["index"] for row in table[:-1]] == list(range(len(table) - 1))
        assert {row["unit"] for row in table} == {unit.id}
        assert end["error_class"] or end["index"] == len(table) - 1
    return images, end


def check(path: Path, **fields: object) -> None:
    """As a run does before it starts."""
    wanted = Input(uri=str(path), format="parquet", **fields)
    check_inputs(STORE, wanted, list_inputs(STORE, wanted).inputs)


def names(data: bytes, *, chunk: int = 1 << 20, tmp: Path) -> list[tuple[str, bytes]]:
    path = tmp / "x.tar"
    path.write_bytes(data)
    with Stream(STORE, STORE.head(str(path)), chunk=chunk) as stream:
        return [(member.name, bytes(member.read())) for member in members(stream)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("chunk", [512, 700, 1 << 20])
def test_members_equal_tarfile(tmp_path, tar_format, chunk):
    long = "" if tar_format == tarfile.USTAR_FORMAT else "d/" + "x" * 200 + "é"
    content = {"a.jpg": b"1" * 511, "b/c.jpg": b"", "d.cls": b"2" * 512, f"{long}e.jpg": b"3" * 5000, "f.jpg": b"4"}
    assert names(tar_bytes(content, tar_format=tar_format), chunk=chunk, tmp=tmp_path) == list(content.items())


TAR = tar_bytes({"a.jpg": b"1" * 700, "b.jpg": b"2" * 100, "c.jpg": b"3" * 1024})


def test_headers_of_old_tars(tmp_path):
    """Sums of signed bytes, a folder that is a file with a slash at the end, and a path in two fields."""
    folder = tarfile.TarInfo("b/")
    folder.type, folder.size = tarfile.AREGTYPE, 512  # of what, nobody knows: no data of it follows
    long = tarfile.TarInfo("x" * 90 + "/" + "y" * 90 + ".jpg")
    signed = bytearray(tarfile.TarInfo("caf\udce9.jpg").tobuf(tarfile.USTAR_FORMAT, "utf-8"))
    assert bytes(signed[:4]) == b"caf\xe9"
    signed[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(signed))[1]
    plain, rest = tarfile.TarInfo("a.jpg").tobuf(), folder.tobuf() + long.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    path = tmp_path / "a.tar"
    path.write_bytes(plain + signed + rest)
    assert [row["key"] for row in rows_of(path)[0]] == ["a", "caf\\xe9", long.name[:-4]]
    signed[150] ^= 1
    path.write_bytes(plain + signed + rest)
    assert rows_of(path)[1]["error_class"] == "TAR_CORRUPT"


def header(name: str, kind: bytes, content: bytes = b"", *, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def test_headers_of_rare_kinds(tmp_path):
    long = f"{'d' * 90}/{'x' * 90}.jpg"
    path = b" path=pax.jpg\n"
    parts = [
        header("contiguous.jpg", tarfile.CONTTYPE, b"1"),
        *(header(f"{number}.jpg", kind, size=512) for number, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, b"6"))),
        header("././@LongLink", tarfile.GNUTYPE_LONGNAME, long.encode() + b"\0"),
        header("././@LongLink", tarfile.GNUTYPE_LONGLINK, b"y" * 120),
        header("cut", tarfile.SYMTYPE),
        header("solaris", tarfile.SOLARIS_XHDTYPE, b"%d" % (len(path) + 2) + path),
        header("a.jpg", tarfile.REGTYPE, b"2"),
        header("global", tarfile.XGLTYPE, b"%d" % (len(path) + 2) + path),
        header("b.jpg", tarfile.REGTYPE, b"3"),
    ]
    (tmp_path / "x.tar").write_bytes(b"".join(parts) + bytes(1024))
    rows, end = rows_of(tmp_path)
    assert end["error_class"] is None
    assert [(row["key"], row["bytes"]) for row in rows] == [("contiguous", b"1"), (long[:-4], None), ("pax", b"2"), ("b", b"3")]
    for kind in (tarfile.GNUTYPE_SPARSE, b"M"):
        (tmp_path / "x.tar").write_bytes(header("a.jpg", kind, b"1") + bytes(1024))
        _, end = rows_of(tmp_path)
        assert (end["error_class"], "sparse file, or goes on" in end["error"]) == ("TAR_CORRUPT", True)


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
        (TAR + TAR, "TAR_CORRUPT", "goes on behind the end mark after 3 members, as two tars in one file do"),
        (TAR[:1536] + bytes(1024) + TAR[2560:], "TAR_CORRUPT", "goes on behind the end mark after 1 members"),
        (TAR + bytes(2**20), "TAR_CORRUPT", "bytes behind the end mark after 3 members"),
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


def test_sidecars_of_many_kinds(tmp_path):
    content = {
        "d/a.left.jpg": b"1",
        "d/a.cls": b" 7 \r\n",
        "d/a.seg.txt": b"caf\xe9",
        "e/a.jpg": b"2",
        "e/a.txt": b"of its own",
        "b.jpg": b"3",
    }
    files = b"".join(header(name, tarfile.REGTYPE, data) for name, data in content.items())
    (tmp_path / "x.tar").write_bytes(files + header("b.cls", tarfile.SYMTYPE) + bytes(1024))
    rows, _ = rows_of(tmp_path, keep=("cls", "seg.txt"))
    assert [(row["key"], row["cls"], row["seg.txt"]) for row in rows] == [
        ("d/a.left", " 7 ", "caf\ufffd"),
        ("e/a", None, None),
        ("b", None, None),
    ]


class Watched(Disk):
    """A disk that knows how far a file was read."""

    def __init__(self) -> None:
        object.__setattr__(self, "far", 0)

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Object | None = None) -> bytes:
        object.__setattr__(self, "far", max(self.far, stop or 0))  # type: ignore[attr-defined]
        return super().read(uri, start=start, stop=stop, pinned=pinned)


@pytest.mark.parametrize("keep", [(), ("cls",)])
def test_a_tar_whose_names_make_one_sample_of_it_is_not_held_in_memory(tmp_path, monkeypatch, keep):
    """As of `clip.0001.jpg`, `clip.0001.cls`, `clip.0002.jpg`: 160 MiB, of zeros that the disk does not store."""
    monkeypatch.setattr("pipeline.samples.SAMPLE_BYTES", 2 * BATCH_BYTES)
    with open(tmp_path / "x.tar", "wb") as file:
        for number in range(40):
            for suffix, size in (("jpg", 4 * 2**20), ("cls", 512)):
                info = tarfile.TarInfo(f"clip.{number:04d}.{suffix}")
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + (b"%d" % number).ljust(512, b"\n"))
                file.seek(size - 512, os.SEEK_CUR)
        file.write(bytes(1024))
    wanted, store = Input(uri=str(tmp_path), keep=keep), Watched()
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    tables = read_unit(store, unit, wanted=wanted)
    rows = next(tables).to_pylist()
    assert store.far < 100 * 2**20
    rows += [row for table in tables for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [*(f"clip.{number:04d}" for number in range(40)), None]
    if keep:
        assert [row["cls"] for row in rows] == [*map(str, range(40)), None]


IN_SAMPLES = [f"{a}{b}.{c}" for a in "st" for b in ("", ".1", ".2", ".3") for c in ("jpg", "png", "cls", "1.cls")]


@example(["s.1.jpg", "s.2.jpg", "s.cls"], 1)
@given(st.lists(st.sampled_from(IN_SAMPLES), unique=True), st.integers(min_value=1, max_value=4))
def test_images_that_do_not_wait_for_their_sidecars_have_them_or_it_is_said(tmp_path_factory, order, limit):
    (folder := tmp_path_factory.mktemp("order")).joinpath("x.tar").write_bytes(
        tar_bytes({name: name.encode().ljust(10) for name in order})
    )
    held, _ = rows_of(folder, keep=("cls",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.samples.SAMPLE_BYTES", 10 * limit)
        rows, end = rows_of(folder, keep=("cls",))
    if end["error_class"] is None:
        assert rows == held
    else:
        assert (end["error_class"], "comes after more than" in end["error"]) == ("UNFIT", True)
        assert len(rows) < len(held) or any(row["cls"] != other["cls"] for row, other in zip(rows, held, strict=False))


def test_an_empty_tar_has_no_rows_and_no_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({}))
    assert rows_of(tmp_path) == (
        [],
        {"unit": rows_of(tmp_path)[1]["unit"], "index": 0, "error": json.dumps({"empty": [f"{tmp_path}/x.tar"], "imageless": {}})}
        | dict.fromkeys(["key", "source", "bytes", "error_class"]),
    )


def test_parquet_rows_in_order_over_units(tmp_path):
    images = [picture(number) for number in range(45)]
    write_parquet(tmp_path / "a.parquet", images, rows_per_group=5)
    wanted = Input(uri=str(tmp_path), format="parquet", keep=("label",))
    units = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    assert len(units) >= 4
    assert next((part.start, part.stop) for unit in units for part in unit.parts) == (0, units[0].parts[0].stop)
    tables = [table for unit in units for table in read_unit(STORE, unit, wanted=wanted)]
    rows = [row for table in tables for row in table.to_pylist() if row["key"] is not None]
    assert [row["bytes"] for row in rows] == images
    assert [row["label"] for row in rows] == list(range(45))
    assert tables[0].schema.field("label").type == pa.int64()


def test_a_key_that_comes_twice_is_seen_within_the_rows_of_a_unit(tmp_path):
    write_parquet(
        tmp_path / "a.parquet", [picture(number) for number in range(40)], keys=["a", "b", "b", "c"] * 10, rows_per_group=4
    )
    wanted = Input(uri=str(tmp_path), format="parquet")
    units = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=10)
    assert len(units) == 10
    for unit in units:
        rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()[:-1]
        assert [row["error_class"] for row in rows] == [None, None, "DUPLICATE_KEY", None]


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
        ({"key_column": "id"}, r"no column id; .* key_column \(null numbers the rows\)"),
    ):
        with pytest.raises(JobError, match=words):
            check(tmp_path, **fields)
    kind = pa.fixed_shape_tensor(pa.uint8(), (2,))
    tensor = pa.ExtensionArray.from_storage(kind, pa.array([[1, 2]], pa.list_(pa.uint8(), 2)))
    pq.write_table(pa.table({"image": tensor, "key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="extension"):
        check(tmp_path)


def test_a_damaged_parquet_file_is_a_unit_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", [picture(number) for number in range(20)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    for broken in (bytes(data[:-20]), b"PAR1" + data[4:-200] + bytes(200), b"", b"<html>"):
        (tmp_path / "a.parquet").write_bytes(broken)
        _rows, end = rows_of(tmp_path, format="parquet")
        assert end["error_class"] == "PARQUET_CORRUPT", broken[:10]
        assert "a.parquet" in end["error"]


class _KeyInTheFile(encryption.KmsClient):
    def __init__(self, _: encryption.KmsConnectionConfig) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_parquet_file_is_said_to_be_encrypted(tmp_path, plaintext_footer):
    config = encryption.EncryptionConfiguration(
        "k", column_keys={"k": ["image"]}, plaintext_footer=plaintext_footer, double_wrapping=False
    )
    properties = encryption.CryptoFactory(_KeyInTheFile).file_encryption_properties(encryption.KmsConnectionConfig(), config)
    table, path = pa.table({"image": [b"1"], "key": ["a"]}), tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert path.read_bytes()[:4] == (b"PAR1" if plaintext_footer else b"PARE")
    rows, end = rows_of(tmp_path, format="parquet")
    said = "it is encrypted; required: plain Parquet: nightlabel reads no encrypted one. Write it without encryption."
    assert (rows, end["error_class"], end["error"]) == ([], "PARQUET_CORRUPT", f"{path}: {said}")


def test_a_footer_whose_counts_do_not_add_up_is_a_corrupt_file_and_never_fewer_rows(tmp_path):
    """No checksum covers it: every bit of it flipped, once each."""
    whole = pa.table({"image": [b"x"] * 11, "key": [f"k{number}" for number in range(11)]})
    pq.write_table(whole, tmp_path / "a.parquet", row_group_size=4, write_statistics=False, store_schema=False)
    data, told, wanted = bytearray((tmp_path / "a.parquet").read_bytes()), set[str](), Input(uri=str(tmp_path), format="parquet")
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for bit in range(8 * start, 8 * (len(data) - 4)):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.parquet").write_bytes(data)
        unit = Unit((Part(str(tmp_path / "a.parquet"), str((tmp_path / "a.parquet").stat().st_mtime_ns), len(data)),))
        *rows, end = [row for table in read_unit(STORE, unit, wanted=wanted) for row in table.to_pylist()]
        if end["error_class"] is None:
            assert len(rows) == 11, bit
        else:
            told.add(end["error"].partition(": ")[2])
        data[bit // 8] ^= 1 << bit % 8
    assert any("rows in row groups of" in words for words in told)


def test_loose_images_have_relative_keys_and_fail_one_by_one(tmp_path):
    for name in ("a/1.jpg", "a/2.JPEG", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "notes.txt").write_text("no image")
    wanted = Input(uri=str(tmp_path), format="images")
    listing = list_inputs(STORE, wanted).inputs
    (tmp_path / "3.png").unlink()
    unit = Unit(tuple(Part(item.uri, item.etag, item.size) for item in listing))
    rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    assert [(row["key"], row["bytes"], row["error_class"]) for row in rows] == [
        ("3.png", None, "FETCH_FAILED"),
        ("a/1.jpg", b"a/1.jpg", None),
        ("a/2.JPEG", b"a/2.JPEG", None),
        (None, None, None),
    ]


def test_keys_are_relative_to_the_nearest_folder_that_is_named(tmp_path):
    for name in ("a.jpg", "b/c.jpg", "d/e/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    wanted = Input(uri=[str(tmp_path), str(tmp_path / "d/*/*.jpg"), str(tmp_path / "b")], format="images")
    unit = Unit(tuple(Part(item.uri, item.etag, item.size) for item in list_inputs(STORE, wanted).inputs))
    rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    assert [row["key"] for row in rows[:-1]] == ["a.jpg", "c.jpg", "e/f.jpg"]
    assert list_inputs(STORE, wanted.model_copy(update={"uri": list(reversed(wanted.uri))})) == list_inputs(STORE, wanted)
    assert [row["key"] for row in rows_of(tmp_path / "d/e/f.jpg", format="images")[0]] == ["f.jpg"]


TIB = 2**40  # of zeros, on a disk that does not store them


def test_images_that_are_too_large_to_be_read_are_rows(tmp_path):
    for name in ("a.jpg", "b.tif", "c.jpg"):
        (tmp_path / name).write_bytes(b"1")
    os.truncate(tmp_path / "b.tif", TIB)
    rows, _ = rows_of(tmp_path, format="images")
    assert [(row["key"], row["bytes"], row["error_class"]) for row in rows] == [
        ("a.jpg", b"1", None),
        ("b.tif", None, "TOO_LARGE"),
        ("c.jpg", b"1", None),
    ]
    assert rows[1]["error"] == "1,099,511,627,776 bytes, limits.max_bytes is 1,073,741,824"


@pytest.mark.parametrize("padding", [0, 5 * 2**20])
def test_a_member_that_is_too_large_is_a_row_and_is_not_read(tmp_path, padding):
    """Of 1 TiB, and one that nobody asked for, between images; the last may be beyond what is fetched in advance."""
    with open(tmp_path / "x.tar", "wb") as file:
        for name, size in (("a.jpg", 1), ("b.tif", TIB + 5), ("b.cls", 2), ("b.mp4", TIB), ("c.jpg", 1), ("d.jpg", padding)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(b"7" * min(size, 2))
            file.seek(-(-(file.tell() + size - min(size, 2)) // 512) * 512)
        file.write(bytes(1024))
    rows, end = rows_of(tmp_path / "x.tar", keep=("cls",))
    assert end["error_class"] is None
    assert [(row["key"], row["bytes"] and row["bytes"][:1], row["error_class"], row["cls"]) for row in rows] == [
        ("a", b"7", None, None),
        ("b", None, "TOO_LARGE", "77"),
        ("c", b"7", None, None),
        ("d", b"7" if padding else b"", None, None),
    ]
    os.truncate(tmp_path / "x.tar", TIB)
    _, end = rows_of(tmp_path / "x.tar")
    assert (end["error_class"], "inside member 2 (b.tif)" in end["error"]) == ("TAR_TRUNCATED", True)


def test_the_limit_is_the_jobs_and_is_of_images_alone(tmp_path):
    images = {"a.jpg": b"1" * 1024, "b.jpg": b"2" * 1025}
    (tmp_path / "x.tar").write_bytes(tar_bytes(images | {"b.cls": b"3" * 2000}))
    pq.write_table(
        pa.table({"image": [*images.values(), None], "key": ["a", "b", "c"], "cls": ["", "", ""]}), tmp_path / "x.parquet"
    )
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    for kind, keep in (("webdataset", ("cls",)), ("parquet", ("cls",)), ("images", ())):
        wanted = Input(uri=str(tmp_path), format=kind, keep=keep)
        unit = Unit(tuple(Part(item.uri, item.etag, item.size) for item in list_inputs(STORE, wanted).inputs))
        rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted, max_bytes=1024)).to_pylist()[:-1]
        assert [(row["bytes"], row["error_class"]) for row in rows[:2]] == [(images["a.jpg"], None), (None, "TOO_LARGE")]
        assert rows[1]["error"] == "1,025 bytes, limits.max_bytes is 1,024"
        assert [row["bytes"] for row in rows[2:]] == [None] * (kind == "parquet")
        assert rows[1].get("cls", "3" * 2000) in ("", "3" * 2000)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_shard_that_changed_or_went_since_the_plan(tmp_path, kind):
    path = tmp_path / ("x.tar" if kind == "webdataset" else "x.parquet")
    path.write_bytes(TAR)
    wanted = Input(uri=str(tmp_path), format=kind)
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    path.write_bytes(TAR + b"\0" * 512)
    if kind == "parquet":  # sound, and another
        write_parquet(path, [picture(1)])
    assert pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()[-1]["error_class"] == "INPUT_CHANGED"
    path.unlink()
    assert pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()[-1]["error_class"] == "INPUT_MISSING"


def test_nothing_of_the_format_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputMissing, match=r"1 object \(1 \.txt\), no webdataset; required: names that end in \.tar"):
        list_inputs(STORE, Input(uri=str(tmp_path)))
    with pytest.raises(InputMissing):
        list_inputs(STORE, Input(uri=str(tmp_path / "absent/")))


@pytest.mark.parametrize(
    ("name", "wanted", "meant"),
    [("a.JPG", "webdataset", "images"), ("a.pq", "images", "parquet"), ("a.tar", "parquet", "webdataset")],
)
def test_what_lies_there_says_which_format_was_meant(tmp_path, name, wanted, meant):
    (tmp_path / name).touch()
    with pytest.raises(InputMissing, match=rf"\. Set input\.format: {meant}, or check input\.uri\."):
        list_inputs(STORE, Input(uri=str(tmp_path), format=wanted))


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
    assert all(len(unit.parts) == 1 or sum(part.size for part in unit.parts) <= UNIT_BYTES for unit in units)


def test_units_are_bounded(monkeypatch, tmp_path):
    listing = [Object(f"/x/{number:06d}.jpg", 1, "e") for number in range(5 * BUNDLE)]
    units = cut(STORE, Input(uri="/x", format="images"), listing, tasks=1)
    assert [len(unit.parts) for unit in units] == [BUNDLE] * 5
    for share, units in ((1, 40), (3, 14), (8, 5), (99, 4)):
        tars = [Object(f"/x/{number}.tar", UNIT_BYTES // share, "e") for number in range(40)]
        assert len(cut(STORE, Input(uri="/x"), tars, tasks=1)) == units
    write_parquet(tmp_path / "a.parquet", [bytes(1000)] * 100, rows_per_group=1)
    wanted = Input(uri=str(tmp_path), format="parquet")
    listing = list_inputs(STORE, wanted).inputs
    monkeypatch.setattr("pipeline.cut.UNIT_BYTES", listing[0].size // 20)
    assert len(cut(STORE, wanted, listing, tasks=1)) >= 20


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
        assert [member.name for member in members(stream)] == ["caf\\xe9.jpg"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_breaks_in_a_member_whose_name_is_not_utf8_says_so(tmp_path, tar_format):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for name in ("caf\udce9.jpg", "d/" + "x" * 150 * (tar_format != tarfile.USTAR_FORMAT) + "\udce9.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
    first = sink.getvalue().index(b"x" * 600)
    for cut_at in (first + 300, sink.getvalue().rindex(b"x" * 600) + 300):
        (tmp_path / "x.tar").write_bytes(sink.getvalue()[:cut_at])
        _, end = rows_of(tmp_path / "x.tar")
        assert end["error_class"] == "TAR_TRUNCATED"
        assert "\\xe9" in end["error"]


@pytest.mark.parametrize("trouble", ["gone", "changed", "a folder"])
def test_a_loose_image_whose_name_is_not_utf8_fails_as_a_row(tmp_path, trouble):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    Path(path).write_bytes(b"1")
    (tmp_path / "d.jpg").write_bytes(b"2")
    wanted = Input(uri=str(tmp_path), format="images")
    listing = list_inputs(STORE, wanted).inputs
    os.unlink(path)
    if trouble == "changed":
        Path(path).write_bytes(b"3")
        os.utime(path, ns=(1, 1))
    elif trouble == "a folder":
        Path(path).mkdir()
    unit = Unit(tuple(Part(item.uri, item.etag, item.size) for item in listing))
    rows = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    assert [(row["key"], row["error_class"]) for row in rows] == [("caf\\xe9.jpg", "FETCH_FAILED"), ("d.jpg", None), (None, None)]
    assert "caf\\xe9.jpg" in rows[0]["error"]


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


def test_everything_that_looks_like_an_image_is_a_row_links_too(tmp_path):
    names = [f"a.{suffix}" for suffix in ("jfif", "JPE", "bmp", "ppm", "heic", "avif", "jp2", "dng", "tga")] + [".b.jpg"]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(f"{number}/{name}")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0/a.jfif"
            tar.addfile(info)
    (tmp_path / "x.tar").write_bytes(sink.getvalue())
    rows, _ = rows_of(tmp_path)
    assert [row["key"] for row in rows[:-2]] == [f"{number}/a" for number in range(9)] + ["9/.b"]
    assert [(row["key"], row["error_class"]) for row in rows[-2:]] == [("soft", "NULL_IMAGE"), ("hard", "NULL_IMAGE")]
    assert "--hard-dereference" in rows[-1]["error"]
    for name in names[:-1]:
        (tmp_path / "loose").mkdir(exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(b"x")
    for name in ("k.mpo", "l.cr3", "m.ARW"):
        (tmp_path / "loose" / name).write_bytes(b"x")
    assert len(rows_of(tmp_path / "loose", format="images")[0]) == 12


def test_what_stands_beside_the_inputs_is_counted(tmp_path):
    for name in ("a.tar", "b.tgz", "c.tgz", "notes.txt", "README"):
        (tmp_path / name).write_bytes(TAR)
    listing = list_inputs(STORE, Input(uri=str(tmp_path)))
    assert [Path(item.uri).name for item in listing.inputs] == ["a.tar"]
    assert count_suffixes(listing.ignored) == "4 objects (2 .tgz, 1 without suffix, 1 .txt)"


def test_what_macos_puts_beside_files_is_no_input_where_dots_are_seen_too():
    """A bucket shows names that begin with a dot."""

    class Bucket(Disk):
        def list(self, uri, *, glob=True):
            names = ("._0.tar", "0.tar", ".1.tar", "a/._1.jpg", "a/1.jpg", "a._b/2.jpg", "a/._p.parquet", "a/p.parquet")
            yield from (Object(f"{uri}{name}", 1, "x") for name in names)

    for kind, wanted in (
        ("webdataset", [".1.tar", "0.tar"]),
        ("images", ["a._b/2.jpg", "a/1.jpg"]),
        ("parquet", ["a/p.parquet"]),
    ):
        listing = list_inputs(Bucket(), Input(uri="s3://bucket/", format=kind))
        assert [item.uri.removeprefix("s3://bucket/") for item in listing.inputs] == wanted
        assert "3 ._*" in count_suffixes(listing.ignored)


def test_what_a_writer_of_parquet_keeps_in_folders_of_its_own_is_no_input(tmp_path):
    for name in ("part-0", "_delta_log/1.checkpoint", "_temporary/0/part-1", "_day=1/part-2", "_part-3"):
        (tmp_path / "_in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(tmp_path / "_in" / f"{name}.parquet", [picture(1)])
    for uri in ("_in/", "_in", "_in/**/*.parquet"):
        listing = list_inputs(STORE, Input(uri=f"{tmp_path}/{uri}", format="parquet"))
        names = [item.uri.removeprefix(f"{tmp_path}/_in/") for item in listing.inputs]
        assert names == ["_day=1/part-2.parquet", "_part-3.parquet", "part-0.parquet"]
        assert count_suffixes(listing.ignored) == "2 objects (1 in _delta_log/, 1 in _temporary/)"
    with pytest.raises(InputMissing, match=r"5 objects \(5 in _in/\), no parquet"):
        list_inputs(STORE, Input(uri=f"{tmp_path}/**/*.parquet", format="parquet"))
    for uri in ("_in/_temporary/", "_in/_temporary/0/part-1.parquet", "_in/_temporary/0/*"):  # who names it means it
        assert len(list_inputs(STORE, Input(uri=f"{tmp_path}/{uri}", format="parquet")).inputs) == 1
    (tmp_path / "_in" / "_photos").mkdir()
    (tmp_path / "_in" / "_photos" / "a.tar").write_bytes(TAR)
    assert len(list_inputs(STORE, Input(uri=f"{tmp_path}/_in")).inputs) == 1


def test_what_is_no_input_is_said_with_what_to_do(tmp_path):
    (tmp_path / "a[1]").mkdir()
    for name in ("a.tar.gz", "b.tar.zst", "c.zip", "d.arrow", "a[1]/x.jpg"):
        (tmp_path / name).write_bytes(b"x")
    for uri, kind, words in (
        ("", "webdataset", "input.uri; decompress them first: a tar is read as it is; unpack them: tars are read, and loose"),
        ("", "parquet", "write them as Parquet first, as to_parquet() of datasets does"),
        ("/a[[]1]", "images", "a bracket in a name is written [[]; a glob names files, and folders with a / at its end."),
        ("/?.t*", "images", "format; a glob names files, and folders with a / at its end; decompress"),
        (
            "/a*/",
            "webdataset",
            "1 object (1 .jpg), no webdataset; required: names that end in .tar. Set input.format: images, or check input.uri.",
        ),
    ):
        with pytest.raises(InputMissing, match=re.escape(words)):
            list_inputs(STORE, Input(uri=f"{tmp_path}{uri}", format=kind))
    assert [item.uri for item in list_inputs(STORE, Input(uri=f"{tmp_path}/a[[]1]/", format="images")).inputs] == [
        f"{tmp_path}/a[1]/x.jpg"
    ]


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_a_packed_tar_that_is_called_a_tar_is_told(tmp_path, codec):
    whole = tar_bytes({f"{number}.jpg": picture(number) for number in range(3)})
    with pa.CompressedOutputStream(str(tmp_path / "a.tar"), codec) as file:
        file.write(whole)
    end = rows_of(tmp_path)[1]
    assert end["error_class"] == "TAR_CORRUPT"
    assert end["error"].endswith(
        f"a.tar: packed with {codec.replace('bz', 'bzip')}; required: an uncompressed POSIX or GNU tar. Decompress it first."
    )


@pytest.mark.parametrize(
    ("name", "kind", "error_class", "said"),
    [
        ("a.tar", "webdataset", "TAR_CORRUPT", "of the shard; required: an uncompressed POSIX or GNU tar"),
        ("a.parquet", "parquet", "PARQUET_CORRUPT", "of the file; required: the Parquet file itself"),
    ],
)
def test_a_shard_that_git_lfs_has_not_fetched_is_told(tmp_path, name, kind, error_class, said):
    pointer = f"{tmp_path}/{name}: a Git LFS pointer in place {said}"
    for more in (b"", b"ext-0-foo sha256:00\n" * 40):  # shorter and longer than a tar's block
        (tmp_path / name).write_bytes(LFS_POINTER + more)
        rows, end = rows_of(tmp_path, format=kind)
        assert (rows, end["error_class"]) == ([], error_class)
        assert end["error"] == f"{pointer}. Fetch the object with git lfs pull."


@pytest.mark.parametrize(("name", "kind"), [("a.tar", "webdataset"), ("a.parquet", "parquet")])
def test_a_link_to_a_shard_that_is_not_there_is_a_missing_input(tmp_path, name, kind):
    (tmp_path / name).symlink_to(tmp_path / "away" / name)
    rows, end = rows_of(tmp_path, format=kind)
    assert (rows, end["error_class"]) == ([], "INPUT_MISSING")
    assert end["error"].startswith(f"{tmp_path}/{name}: No such file or directory; required: ")


@pytest.mark.parametrize("uri", ["shard-{000..099}.tar", "{a,b}/", "{a,b}/*.tar"])
def test_braces_are_said_not_to_be_expanded(tmp_path, uri):
    with pytest.raises(InputMissing, match=r"Braces are not expanded: give a glob such as shard-\*\.tar, or a list"):
        list_inputs(STORE, Input(uri=f"{tmp_path}/{uri}"))


def test_names_of_any_bytes_are_listed_read_and_planned(tmp_path):
    odd = [b"caf\xe9.jpg", b"new\nline.jpg", b"50% #1?.jpg", b"b[1]*.jpg", "ü 日.jpg".encode()]
    for name in odd:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(name)
    rows, _ = rows_of(tmp_path, format="images")
    assert {row["key"]: row["bytes"] for row in rows} == {name.decode("utf-8", "backslashreplace"): name for name in odd}
    wanted = Input(uri=str(tmp_path), format="images")
    (unit, *_) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    assert len(unit.id) == 32
    (tmp_path / "caf\\xe9.jpg").write_bytes(b"the very name")
    with pytest.raises(StoreError, match="two files are spelt so"):
        list_inputs(STORE, wanted)


@pytest.mark.parametrize("headers", [{"GNU.sparse.map": "0,8192", "GNU.sparse.size": "1048576"}, {"GNU.sparse.numblocks": "1"}])
def test_sparse_files_of_any_age_are_not_taken_for_their_condensed_bytes(tmp_path, headers):
    (tmp_path / "x.tar").write_bytes(pax_tar(headers))
    rows, end = rows_of(tmp_path)
    assert not rows
    assert (end["error_class"], "sparse" in end["error"]) == ("TAR_CORRUPT", True)
    assert end["error"].endswith("Pack it without --sparse, in one volume.")


def test_inputs_with_nothing_to_label_are_named_in_the_end_row(tmp_path):
    """As ImageNet's tar of tars is, or a tar of annotations beside the images."""
    (tmp_path / "a.tar").write_bytes(tar_bytes({"n01440764.tar": TAR, "n01443537.tar": TAR}))
    (tmp_path / "b.tar").write_bytes(tar_bytes({"x.jpg": picture(1)}))
    (tmp_path / "c.tar").write_bytes(tar_bytes({}))
    wanted = Input(uri=str(tmp_path))
    unit = Unit(tuple(Part.of(item) for item in list_inputs(STORE, wanted).inputs))
    *_, end = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    notes = {"empty": [f"{tmp_path}/a.tar", f"{tmp_path}/c.tar"], "imageless": {"tar": 2}}
    assert (end["error_class"], json.loads(end["error"])) == (None, notes)
    (unit,) = (Unit((part,)) for part in unit.parts if part.uri.endswith("b.tar"))
    *_, end = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).to_pylist()
    assert end["error"] is None


def test_an_empty_path_leaves_the_name_of_the_header(tmp_path):
    (tmp_path / "x.tar").write_bytes(pax_tar({"path": ""}))
    (row,), _ = rows_of(tmp_path)
    assert (row["key"], row["bytes"]) == ("a", b"abc")


@pytest.mark.parametrize("length", [b"1" * 5000, b"0", b"99", b"-1", b""])
def test_a_record_of_no_length_is_a_damaged_tar(tmp_path, length):
    (tmp_path / "x.tar").write_bytes(header("pax", tarfile.XHDTYPE, length + b" path=a.jpg\n") + TAR)
    rows, end = rows_of(tmp_path)
    assert not rows
    assert (end["error_class"], "PAX" in end["error"]) == ("TAR_CORRUPT", True)


def test_times_of_a_gnu_backup_are_no_folder(tmp_path):
    """`tar --format=gnu --listed-incremental` writes them where POSIX has the front of a long name."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[345:369] = b"%011o\0" % 3, b"15302032127\x0015302032127\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + b"abc".ljust(512, b"\0") + bytes(1024))
    (row,), _ = rows_of(tmp_path)
    assert row["key"] == "a"


def test_a_name_that_is_a_suffix_is_no_image_and_hidden_ones_have_keys_of_their_own(tmp_path):
    names = ("jpg", "d/png", ".jpg", ".png", "d/.jpg", "a.jpg")
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: name.encode() for name in names}))
    rows, end = rows_of(tmp_path)
    assert [(row["key"], row["bytes"]) for row in rows] == [
        (".jpg", b".jpg"),
        (".png", b".png"),
        ("d/.jpg", b"d/.jpg"),
        ("a", b"a.jpg"),
    ]
    assert end["error_class"] is None


def pax_tar(headers: dict[str, str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, headers
        tar.addfile(info, io.BytesIO(b"abc"))
    return sink.getvalue()


@pytest.mark.parametrize("size", ["many", "-5", "1" * 30, "٣"])
def test_a_pax_size_that_is_no_number_is_a_damaged_tar(tmp_path, size):
    (tmp_path / "x.tar").write_bytes(pax_tar({"size": size}))
    _, end = rows_of(tmp_path)
    assert end["error_class"] in ("TAR_CORRUPT", "TAR_TRUNCATED")


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        (OSError(errno.EIO, "Input/output error"), "TEMPORARY"),
        (MemoryError(), "TEMPORARY"),
        (pa.ArrowMemoryError("malloc of size 5 failed"), "TEMPORARY"),
        (pa.ArrowInvalid("Couldn't deserialize thrift"), "PARQUET_CORRUPT"),
    ],
)
def test_trouble_of_the_machine_is_no_corrupt_file(tmp_path, monkeypatch, error, error_class):
    write_parquet(tmp_path / "a.parquet", [b"1"])

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    _, end = rows_of(tmp_path, format="parquet")
    assert end["error_class"] == error_class


def test_a_tar_for_which_there_is_no_memory_is_no_broken_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(TAR)
    wanted = Input(uri=str(tmp_path))
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    (end,) = pa.concat_tables(read_unit(Refusing(MemoryError()), unit, wanted=wanted)).to_pylist()
    assert (end["error_class"], "not enough memory" in end["error"]) == ("TEMPORARY", True)


@pytest.mark.parametrize(
    ("error", "image", "unit"),
    [
        (PermissionDenied("not this one"), "FETCH_FAILED", None),
        (StoreError("no such region"), None, "UNFIT"),
        (Temporary("slow down"), None, "TEMPORARY"),
        (Unidentified("who?"), None, "UNIDENTIFIED"),
    ],
)
def test_what_is_wrong_with_a_store_makes_no_image_a_failed_one(tmp_path, error, image, unit):
    """For a failed row is committed, and not read again."""
    (tmp_path / "a.jpg").write_bytes(b"1")
    wanted = Input(uri=str(tmp_path), format="images")
    (one,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    *rows, end = pa.concat_tables(read_unit(Refusing(error), one, wanted=wanted)).to_pylist()
    assert [row["error_class"] for row in rows] == ([image] if image else [])
    assert end["error_class"] == unit


def test_a_file_without_rows_has_no_types_that_others_must_have(tmp_path):
    for name, labels in (("a", pa.array([], pa.null())), ("b", pa.array([1], pa.int64()))):
        rows = {"key": ["x"] * len(labels), "image": pa.array([b"1"] * len(labels), pa.binary()), "label": labels}
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    parts = [Part(item.uri, item.etag, item.size) for item in STORE.list(str(tmp_path))]
    wanted = Input(uri=str(tmp_path), format="parquet", keep=("label",))
    for some in (parts, parts[::-1]):
        end = list(read_unit(STORE, Unit(tuple(some)), wanted=wanted))[-1].to_pylist()[-1]
        assert (end["error_class"], end["index"]) == (None, 1), end["error"]


KEPT = {
    "view": pa.array(["a", "b"], pa.string_view()),
    "large": pa.array(["a", "b"], pa.large_string()),
    "coded": pa.array(["a", "b"]).dictionary_encode(),
    "inner": pa.array([["a"], ["b"]], pa.list_(pa.string_view())),
    "raw": pa.array([b"a", b"b"], pa.large_binary()),
    "seen": pa.array([b"a", b"b"], pa.binary_view()),
    "many": pa.array([["a"], ["b"]], pa.large_list(pa.large_string())),
    "pair": pa.array([{"a": "a"}, {"a": "b"}], pa.struct([("a", pa.large_string())])),
    "_id": pa.array([1, 2]),
}


def test_kept_columns_can_be_put_in_order_whatever_their_type_and_are_there_without_rows(tmp_path):
    table = pa.table({"image": pa.array([b"1", b"2"], pa.binary_view()), "key": ["a", "b"], **KEPT})
    for name, part in (("full", table), ("none", table.slice(0, 0))):
        (tmp_path / name).mkdir()
        pq.write_table(part, tmp_path / name / "a.parquet")
        wanted = Input(uri=str(tmp_path / name), format="parquet", keep=tuple(KEPT))
        (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
        whole = pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).sort_by("index")
        kinds = [str(whole.schema.field(column).type) for column in KEPT]
        texts = ["string", "string", "string", "list<item: string>"]
        assert kinds == [*texts, "binary", "binary", "list<item: string>", "struct<a: string>", "int64"]
        assert whole.num_rows == part.num_rows + 1
        assert whole.column("bytes").to_pylist() == [*(b"1", b"2")[: part.num_rows], None]
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "x.tar").write_bytes(tar_bytes({}))
    wanted = Input(uri=str(tmp_path / "tar"), keep=("cls",))
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    assert "cls" in pa.concat_tables(read_unit(STORE, unit, wanted=wanted)).schema.names


def test_keys_of_parquet_are_text_and_a_number_for_a_null_is_no_duplicate(tmp_path):
    keys = pa.array([b"2", b"caf\xe9", None, b"2"], pa.binary())
    pq.write_table(pa.table({"image": [b"1", b"2", b"3", b"4"], "key": keys}), tmp_path / "a.parquet")
    rows, _ = rows_of(tmp_path, format="parquet")
    assert [(row["key"], row["error_class"]) for row in rows] == [
        ("2", None),
        ("caf\\xe9", None),
        ("2", None),
        ("2", "DUPLICATE_KEY"),
    ]
    pq.write_table(pa.table({"image": [b"1"], "key": pa.array([b"ab\xe9"], pa.binary(3))}), tmp_path / "a.parquet")
    assert [row["key"] for row in rows_of(tmp_path, format="parquet")[0]] == ["ab\\xe9"]


def test_a_small_file_without_the_column_is_a_sentence_too(tmp_path):
    """Its columns are not looked at when it is planned."""
    write_parquet(tmp_path / "a.parquet", [b"1"])
    item = STORE.head(str(tmp_path / "a.parquet"))
    wanted = Input(uri=str(tmp_path), format="parquet", keep=("caption",))
    (end,) = pa.concat_tables(read_unit(STORE, Unit((Part(item.uri, item.etag, item.size),)), wanted=wanted)).to_pylist()
    assert (end["error_class"], "no column caption" in end["error"]) == ("UNFIT", True)


def test_batches_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.read.BATCH_BYTES", 100)
    sizes = [*[0] * 70, *[1] * 10, 100, 60, 60, 1]
    (tmp_path / "x.tar").write_bytes(tar_bytes({f"{number}.jpg": b"x" * size for number, size in enumerate(sizes)}))
    wanted = Input(uri=str(tmp_path))
    (unit,) = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=1)
    tables = [table.num_rows for table in read_unit(STORE, unit, wanted=wanted)]
    assert tables == [64, 17, 2, 1, 1], "the last is the end row"


def test_two_columns_of_one_name_are_a_sentence(tmp_path):
    table = pa.table([pa.array([b"1"]), pa.array(["a"]), pa.array([b"2"])], names=["image", "key", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(JobError, match="two columns image"):
        check(tmp_path)


def test_one_large_file_without_the_columns_is_a_unit_and_all_of_them_are_an_error(tmp_path):
    for name, column in (("a", "image"), ("b", "picture"), ("c", "image")):
        table = pa.table({"key": [str(number) for number in range(40)], column: [bytes([number]) * 4000 for number in range(40)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4, compression="none")
    wanted = Input(uri=str(tmp_path), format="parquet")
    units = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=10)
    whole = [unit for unit in units if unit.parts[0].stop is None]
    assert [Path(unit.parts[0].uri).name for unit in whole] == ["b.parquet"]
    other = wanted.model_copy(update={"image_column": "other"})
    listing = list_inputs(STORE, wanted).inputs
    check_inputs(STORE, wanted, listing)
    assert {unit.parts[0].stop for unit in cut(STORE, other, listing, tasks=10)} == {None}
    with pytest.raises(JobError, match=r"a\.parquet: no column other"):
        check_inputs(STORE, other, listing)
    pq.write_table(pa.table({"key": ["s"], "other": [b"x"]}), tmp_path / "s.parquet")
    check_inputs(STORE, other, list_inputs(STORE, wanted).inputs)  # there is one to label
    (tmp_path / "s.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(JobError, match="no column other"):
        check_inputs(STORE, other, list_inputs(STORE, wanted).inputs)
    check_inputs(STORE, other, list_inputs(STORE, wanted).inputs[3:])  # broken, which is no matter of columns


def test_files_of_one_size_are_looked_at_too_and_few_of_many_columns_are_named(tmp_path):
    """As a data set's shards are: none of them is large beside the others."""
    for shard in range(5):
        images = pa.array([{"bytes": b"x", "path": "x.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({"image": images, "label": [1]}), tmp_path / f"train-{shard:05d}-of-00005.parquet")
    with pytest.raises(JobError, match=r"00000-of-00005\.parquet: no column key; required: one of image, label\."):
        check(tmp_path)
    check(tmp_path, key_column=None)
    wide = pa.table({"key": ["a"], **{f"f{number}": [0] for number in range(1000)}, "picture": [b"1"]})
    pq.write_table(wide, tmp_path / "train-00000-of-00005.parquet")
    with pytest.raises(JobError, match=r"one of picture, key, f0, f1, .*, f17 and 982 more"):
        check(tmp_path, image_column="pictures", key_column=None)


@pytest.mark.parametrize("column", ["image", "other"])
def test_a_footer_with_a_column_whose_name_is_not_utf8_is_a_corrupt_file_and_no_others_trouble(tmp_path, column):
    for name in "abc":
        table = pa.table({"image": [bytes([number]) * 4000 for number in range(40)], "key": ["k"] * 40, "other": [1] * 40})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4, compression="none", store_schema=False)
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    at = data.index(column.encode(), data.rindex(b"schema"))
    data[at + 1] ^= 0x80
    (tmp_path / "b.parquet").write_bytes(data)
    wanted = Input(uri=str(tmp_path), format="parquet", key_column=None, keep=("other",))
    listing = list_inputs(STORE, wanted).inputs
    units = cut(STORE, wanted, listing, tasks=10)
    whole = [unit for unit in units if unit.parts[0].stop is None]
    assert [Path(unit.parts[0].uri).name for unit in whole] == ["b.parquet"]
    ends = {unit.id: list(read_unit(STORE, unit, wanted=wanted))[-1].to_pylist()[-1]["error_class"] for unit in units}
    assert {unit_id: error for unit_id, error in ends.items() if error} == {whole[0].id: "PARQUET_CORRUPT"}
    assert kept_types(STORE, wanted, [listing[1], listing[0]]) == pa.schema([("other", pa.int64())])


class Refusing(Disk):
    """A disk that lists, and refuses to be read."""

    def __init__(self, error: Exception) -> None:
        object.__setattr__(self, "error", error)

    def read(self, uri: str, **_: object) -> bytes:
        raise self.error  # type: ignore[attr-defined]


def test_whoever_is_unknown_plans_nothing_and_whoever_may_not_read_one_file_plans_the_others(tmp_path):
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [picture(number) for number in range(20)])
    wanted = Input(uri=str(tmp_path), format="parquet")
    listing = list_inputs(STORE, wanted).inputs
    assert len(cut(STORE, wanted, listing, tasks=10)) > 3
    for error in (
        PermissionDenied("no"),
        Temporary("later"),
        InputMissing("gone"),
        InputChanged("another"),
        OSError("no thrift"),
    ):
        assert len(cut(Refusing(error), wanted, listing, tasks=10)) == 3
    with pytest.raises(Unidentified):  # in whose plan each file would be one unit for good
        cut(Refusing(Unidentified("who?")), wanted, listing, tasks=10)


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1), pa.dictionary(pa.int32(), pa.binary())],
    ids=str,
)
def test_images_of_any_width_of_offsets_are_images(tmp_path, kind):
    images = pa.array([b"1"], kind)
    for column in (images, pa.StructArray.from_arrays([images], ["bytes"])):
        pq.write_table(pa.table({"image": column, "key": ["a"]}), tmp_path / "a.parquet")
        (row,), _ = rows_of(tmp_path, format="parquet")
        assert row["bytes"] == b"1"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("store_schema", [False, True])
def test_of_a_column_of_nulls_alone_each_is_an_image_that_failed(tmp_path, nested, store_schema):
    """Beside a file that has images, as one part of a data set may be that no photograph was found for."""
    for name, images, kind in (("a", [None] * 70, pa.null()), ("b", [b"1", None], pa.binary(1))):
        column = pa.array(images, kind)
        column = pa.StructArray.from_arrays([column], ["bytes"]) if nested else column
        table = pa.table({"image": column, "key": [f"{name}{number}" for number in range(len(images))]})
        pq.write_table(table, tmp_path / f"{name}.parquet", store_schema=store_schema)
    check(tmp_path)
    wanted = Input(uri=str(tmp_path), format="parquet")
    both = Unit(tuple(Part.of(item) for item in list_inputs(STORE, wanted).inputs))
    *rows, end = pa.concat_tables(read_unit(STORE, both, wanted=wanted)).to_pylist()
    assert end["error_class"] is None, end["error"]
    assert [(row["key"], row["bytes"]) for row in rows[68:]] == [("a68", None), ("a69", None), ("b0", b"1"), ("b1", None)]
    whole = Preprocess(Preprocessing(size=32), max_pixels=100)(pa.concat_tables(read_unit(STORE, both, wanted=wanted)))
    assert whole.column("error_class").to_pylist() == [*["NULL_IMAGE"] * 70, "NOT_AN_IMAGE", "NULL_IMAGE", None]


@pytest.mark.parametrize("counts", [(100, 0, 0, 100, 0, 0, 100), (0, 0, 100, 0), (0, 0, 0)])
def test_empty_row_groups_are_in_no_unit(tmp_path, counts):
    rows = pa.table({"image": [bytes([number]) * 1000 for number in range(100)], "key": [str(number) for number in range(100)]})
    with pq.ParquetWriter(tmp_path / "a.parquet", rows.schema, compression="none", use_dictionary=False) as writer:
        for count in counts:
            writer.write_table(rows.slice(0, count))
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == len(counts)
    wanted = Input(uri=str(tmp_path), format="parquet")
    units = cut(STORE, wanted, list_inputs(STORE, wanted).inputs, tasks=10)
    ranges = [(part.start, part.stop) for unit in units for part in unit.parts]
    assert ranges == ([(0, 100), (100, 200), (200, 300)] if sum(counts) == 300 else [(None, None)])


def test_footers_of_large_files_are_read_side_by_side(tmp_path):
    """On S3 each takes 0.2 s and more."""
    rows = pa.table({"image": [bytes([number]) * 1000 for number in range(8)], "key": [str(number) for number in range(8)]})
    for name in "abc":
        pq.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=2, compression="none", use_dictionary=False)
    together = threading.Barrier(3)

    class Slow(Disk):
        def read(self, uri, **span):
            if uri not in seen:
                seen.add(uri)
                together.wait(30)
            return super().read(uri, **span)

    seen: set[str] = set()
    wanted = Input(uri=str(tmp_path), format="parquet")
    units = cut(Slow(), wanted, list_inputs(STORE, wanted).inputs, tasks=5)
    ranges = [(Path(part.uri).stem, part.start, part.stop) for unit in units for part in unit.parts]
    assert ranges == [(name, start, start + 2) for name in "abc" for start in (0, 2, 4, 6)]
