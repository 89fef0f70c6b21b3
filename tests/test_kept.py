"""Kept columns of Parquet files have one type in all objects of an output, and no value is changed for it."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from inprocess import without_ray
from shards import picture, write_tars
from test_run import job, label, problems
from typer.testing import CliRunner

from pipeline import columns
from pipeline.cli import app
from pipeline.columns import cast_kept, kept_types
from pipeline.disk import Disk
from pipeline.errors import JobError, NightlabelError, PermissionDenied, Unidentified
from pipeline.log import Log
from pipeline.nights.generation import to_plan
from pipeline.nights.retry import Retry
from pipeline.plan import Plan
from pipeline.spec import Input, Job
from pipeline.start import load_model, open_log, plan_job, split_unit
from pipeline.tables.publish import check_columns, publish
from pipeline.unit import Unit

STORE = Disk()


class Reads(Disk):
    """Counts the files that are read, and refuses some."""

    def __init__(self, errors: dict[str, NightlabelError] | None = None) -> None:
        object.__setattr__(self, "errors", errors or {})
        object.__setattr__(self, "count", Counter[str]())

    def read(self, uri: str, **more: Any) -> bytes:
        name = Path(uri).name
        self.count[name] += 1  # type: ignore[attr-defined]
        if name in self.errors:  # type: ignore[attr-defined]
            raise self.errors[name]  # type: ignore[attr-defined]
        return super().read(uri, **more)


def shard(path: Path, extra: pa.Array, *, first: int = 0) -> None:
    """A file with a picture, a key and the column `extra` of a row for every value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([picture(first + number) for number in range(len(extra))], pa.binary())
    keys = pa.array([f"{path.stem}{number}" for number in range(len(extra))], pa.string())
    pq.write_table(pa.table({"key": keys, "image": images, "extra": extra}), path)


def wanted_at(folder: Path) -> Input:
    return Input(uri=str(folder), format="parquet", keep=("extra",))


def decided(folder: Path, store: Disk = STORE) -> pa.DataType | None:
    kept = kept_types(store, wanted_at(folder), sorted(STORE.list(str(folder)), key=lambda item: item.uri))
    return None if kept is None else kept.field("extra").type


def kept_job(folder: Path, model: str, **fields: Any) -> Job:
    return job(folder / "in", model, folder / "out", input={"format": "parquet", "keep": ["extra"]}, **fields)


def log_of(wanted: Job) -> Log:
    return open_log(wanted, load_model(wanted, weights=False))


def planned(wanted: Job) -> Plan:
    return plan_job(wanted, load_model(wanted, weights=False))[1]


def types_in(plan: Plan) -> set[str]:
    return {"none" if unit.kept is None else str(unit.kept.field("extra").type) for unit in plan.units}


def output_types(folder: Path) -> set[str]:
    return {str(pq.read_schema(path).field("extra").type) for path in folder.glob("out/*/data/*.parquet")}


NUMBERS = pa.array([1, None, 3], pa.int64())


@pytest.mark.parametrize(
    ("column", "wanted", "values"),
    [
        (NUMBERS, pa.int32(), [1, None, 3]),
        (NUMBERS, pa.string(), ["1", None, "3"]),
        (NUMBERS, pa.float64(), [1.0, None, 3.0]),
        (NUMBERS.cast(pa.int32()), pa.decimal128(12, 1), [Decimal("1.0"), None, Decimal("3.0")]),
        (pa.array([1.0, None]), pa.int64(), [1, None]),
        (pa.array([0.1], pa.float32()), pa.float64(), [pytest.approx(0.1)]),
        (pa.array([0.5]), pa.string(), ["0.5"]),
        (pa.array([None, None], pa.string()), pa.int32(), [None, None]),
        (pa.array([None, None]), pa.list_(pa.int32()), [None, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), pa.string(), ["a", "b", "a"]),
        (pa.array(["a"], pa.large_string()), pa.string(), ["a"]),
        (pa.array([b"a"], pa.large_binary()), pa.string(), ["a"]),
        (pa.array([1], pa.date32()), pa.timestamp("us"), [pa.scalar(86_400_000_000, pa.timestamp("us")).as_py()]),
        (pa.array([1], pa.timestamp("s", "UTC")), pa.timestamp("us", "UTC"), [pa.scalar(1, pa.timestamp("s", "UTC")).as_py()]),
        (pa.array([[1], []]), pa.list_(pa.int32()), [[1], []]),
        (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), pa.list_(pa.int32()), [[1, 2]]),
        (pa.array([[]], pa.list_(pa.null())), pa.list_(pa.int32()), [[]]),
        (
            pa.array([{"b": 1}], pa.struct([pa.field("b", pa.int64(), nullable=False)])),
            pa.struct([("a", pa.string()), ("b", pa.int32())]),
            [{"a": None, "b": 1}],
        ),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.map_(pa.string(), pa.int8()), [[("a", 1)]]),
    ],
)
def test_what_can_be_cast_without_loss_is(column, wanted, values):
    cast = cast_kept(pa.chunked_array([column]), pa.field("extra", wanted), "a.parquet")
    assert (cast.type, cast.to_pylist()) == (wanted, values)


@pytest.mark.parametrize(
    ("column", "wanted", "words"),
    [
        (pa.array([2**40]), pa.int32(), "int64 (Integer value 1099511627776 not in range"),
        (pa.array([2**53 + 1]), pa.float64(), "int64 (Integer value"),
        (pa.array([2**40]), pa.float16(), "int64;"),
        (pa.array(["7"]), pa.int32(), "string;"),
        (pa.array([1.5]), pa.int64(), "double (Float value 1.500000 was truncated"),
        (pa.array([float("nan")]), pa.int64(), "double (Float value nan"),
        (pa.array([1e300]), pa.float32(), "double;"),
        (pa.array([b"\xff"]), pa.string(), "binary (Invalid UTF8"),
        (pa.array([1], pa.int64()), pa.timestamp("us"), "int64;"),
        (pa.array([1], pa.timestamp("us")), pa.int64(), "timestamp[us];"),
        (pa.array([1], pa.timestamp("us")), pa.timestamp("us", "UTC"), "timestamp[us];"),
        (pa.array([1], pa.timestamp("us")), pa.date32(), "timestamp[us];"),
        (pa.array([1], pa.timestamp("ns")), pa.timestamp("us"), "timestamp[ns] (Casting from"),
        (pa.array([True]), pa.string(), "bool;"),
        (pa.array([2]), pa.bool_(), "int64;"),
        (pa.array([{"a": 1, "b": 2}]), pa.struct([("a", pa.int64())]), "struct<a: int64, b: int64>;"),
        (pa.array([[{"a": 1, "b": 2}]]), pa.list_(pa.struct([("a", pa.int64())])), "list<item: struct<a: int64, b: int64>>;"),
        (pa.array([[2**40]]), pa.list_(pa.int32()), "list<item: int64> (Integer value"),
        (pa.array([[1]]), pa.string(), "list<item: int64>;"),
    ],
)
def test_what_would_lose_or_change_a_value_is_one_sentence(column, wanted, words):
    with pytest.raises(JobError) as caught:
        cast_kept(pa.chunked_array([column]), pa.field("extra", wanted), "in/a.parquet")
    text = str(caught.value)
    assert text.startswith(f"in/a.parquet: column extra is {words}"), text
    assert f"required: {wanted} without loss, as the output has it from its first input. Write the file so, leave" in text


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([pa.array([1], pa.int32()), pa.array([1])], pa.int32()),
        ([pa.array([], pa.string()), pa.array([1])], pa.int64()),  # without rows
        ([pa.array([None]), pa.array([None]), pa.array([1.5])], pa.float64()),
        ([pa.array([None]), pa.array([None])], pa.string()),
        ([pa.array([[]], pa.list_(pa.null())), pa.array([["a"]])], pa.list_(pa.string())),
        ([pa.array([None]), pa.array([[]], pa.list_(pa.null()))], pa.list_(pa.string())),
        ([pa.array([[]], pa.list_(pa.null())), pa.array([None])], pa.list_(pa.string())),
        ([pa.array([None], pa.float64()), pa.array([1])], pa.float64()),  # no values, but a type
        ([pa.array(["a"]).dictionary_encode(), pa.array([1])], pa.string()),
        ([pa.array(["a"], pa.large_string())], pa.string()),
        ([pa.array([{"a": 1}], pa.struct([pa.field("a", pa.int8(), nullable=False)]))], pa.struct([("a", pa.int8())])),
        ([], None),
        ([pa.array([], pa.string())], None),
    ],
)
def test_the_first_file_with_rows_decides_and_null_does_not(tmp_path, files, kind):
    (tmp_path / "in").mkdir()
    for number, extra in enumerate(files):
        shard(tmp_path / f"in/{number}.parquet", extra)
    assert decided(tmp_path / "in") == kind


def test_a_file_that_cannot_be_read_or_lacks_a_column_decides_nothing(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"PAR1 broken")
    pq.write_table(pa.table({"image": [b"1"], "extra": ["no key"]}), tmp_path / "1.parquet")
    shard(tmp_path / "2.parquet", pa.array(["denied"]))
    shard(tmp_path / "3.parquet", pa.array([1]))
    assert decided(tmp_path, Reads({"2.parquet": PermissionDenied("no")})) == pa.int64()
    with pytest.raises(Unidentified):
        decided(tmp_path, Reads({"2.parquet": Unidentified("who?")}))


def test_of_many_files_one_is_read_and_of_a_column_without_values_not_all(tmp_path, monkeypatch):
    for number in range(60):
        shard(tmp_path / f"typed/{number:02d}.parquet", pa.array([1]))
        shard(tmp_path / f"null/{number:02d}.parquet", pa.array([None]))
    reads = Reads()
    assert decided(tmp_path / "typed", reads) == pa.int64()
    assert set(reads.count) == {"00.parquet"}
    assert reads.count.total() <= 2
    monkeypatch.setattr(columns, "LOOKED_AT", 20)
    reads = Reads()
    assert decided(tmp_path / "null", reads) == pa.string()
    assert len(reads.count) == 20


def test_sidecars_of_tars_are_text_and_nothing_is_read_for_it(tmp_path, model):
    write_tars(tmp_path / "in", shards=2, images=1)
    wanted = job(tmp_path / "in", model, tmp_path / "out", input={"keep": ["cls"]})
    assert {unit.kept for unit in planned(wanted).units} == {None}


def test_a_plan_says_the_types_and_every_later_one_has_them(tmp_path, model):
    """Whatever becomes of the file that decided: it is replaced, and the next in order has another type."""
    for name in "bcd":
        shard(tmp_path / f"in/{name}.parquet", pa.array([1], pa.int32()))
    wanted = kept_job(tmp_path, model)
    first = planned(wanted)
    assert types_in(first) == {"int32"}
    assert types_in(planned(wanted)) == {"int32"}, "found again"
    shard(tmp_path / "in/b.parquet", pa.array(["now text"]))
    replaced = planned(wanted)
    assert (replaced.run_id, types_in(replaced)) == ("000002", {"int32"})
    shard(tmp_path / "in/a.parquet", pa.array([0.5]))
    assert types_in(planned(wanted)) == {"int32"}
    assert [str(run.kept.field("extra").type) for run in log_of(wanted).runs()] == ["int32"] * 3


def test_pieces_of_a_unit_and_tombstones_have_the_types_of_the_plan(tmp_path, model):
    for number in range(40):
        shard(tmp_path / f"in/{number:02d}.parquet", pa.array([1], pa.int64() if number else pa.int32()))
    wanted = kept_job(tmp_path, model, resources={"read": {"tasks": 1}})
    artifact = load_model(wanted, weights=False)
    log, plan = plan_job(wanted, artifact)
    joined = next(unit for unit in reversed(plan.units) if len(unit.parts) > 1)
    assert {piece.kept for piece in joined.pieces()} == {joined.kept}
    assert split_unit(log, joined, wanted, artifact, why="a test")
    assert output_types(tmp_path) == {"int32"}, "its own inputs are int64"
    again = planned(wanted)
    assert (len(again.units), types_in(again)) == (len(plan.units) - 1 + len(joined.parts), {"int32"})


def begun_before(wanted: Job) -> Plan:
    """The plan of an earlier version: without types."""
    artifact = load_model(wanted, weights=False)
    log, plan = plan_job(wanted, artifact, write=False)
    units = [Unit(unit.parts) for unit in plan.units]
    assert log.append(units, after=[]) == "000001"
    return plan


def test_a_run_that_was_begun_without_types_goes_on_as_before(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    kinds = {"a": pa.array([1], pa.int32()), "b": pa.array(["x"]), "c": pa.array([0.5]), "d": pa.array([1])}
    for name, extra in kinds.items():
        shard(tmp_path / f"in/{name}.parquet", extra)
    wanted = kept_job(tmp_path, model)
    begun_before(wanted)
    assert types_in(planned(wanted)) == {"none"}
    shard(tmp_path / "in/e.parquet", pa.array([True]))
    grown = planned(wanted)
    assert (grown.run_id, types_in(grown)) == ("000002", {"none"}), "it has units of the one begun before"
    assert label(wanted).exit_code == 0
    assert output_types(tmp_path) == {"int32", "string", "double", "int64", "bool"}
    shard(tmp_path / "in/f.parquet", pa.array([1]))
    assert types_in(planned(wanted)) == {"int32"}, "what is begun now has them"


def test_units_of_an_unfinished_plan_without_types_take_those_that_the_output_has(tmp_path, model):
    shard(tmp_path / "in/a.parquet", pa.array([1]))
    wanted = kept_job(tmp_path, model)
    begun_before(wanted)
    shard(tmp_path / "other/a.parquet", pa.array([1], pa.int32()))
    other = job(tmp_path / "other", model, tmp_path / "out", input={"format": "parquet", "keep": ["extra"]})
    assert types_in(planned(other)) == {"int32"}
    assert types_in(planned(wanted)) == {"none"}
    shard(tmp_path / "in/b.parquet", pa.array([1]))
    both = planned(wanted)
    assert (both.run_id, len(both.units), types_in(both)) == ("000003", 2, {"int32"})


def test_units_of_two_types_make_no_plan(tmp_path, model):
    for name in "ab":
        shard(tmp_path / f"in/{name}.parquet", pa.array([1]))
    wanted = kept_job(tmp_path, model)
    log, plan = plan_job(wanted, load_model(wanted, weights=False), write=False)
    with pytest.raises(AssertionError, match="two types"):
        log.append([plan.units[0], Unit(plan.units[1].parts)], after=[])


MIXED = {
    "a": pa.array([1, None], pa.int32()),
    "b": pa.array([2, 3]),
    "c": pa.array([None, None]),
    "d": pa.array([4.0, 5.0]),
    "e": pa.array(["6", "x"]),
    "f": pa.array([7, 2**40]),
    "g": pa.array([8, 9], pa.int8()).dictionary_encode(),
}


def test_shards_of_many_types_are_one_table_and_those_that_do_not_fit_are_named_alone(tmp_path, model, monkeypatch):
    """Two of them to a unit: what fits is split off, and read by everybody."""
    without_ray(monkeypatch)
    for number, (name, extra) in enumerate((MIXED | {f"h{n}": pa.array([n, n]) for n in range(9)}).items()):
        shard(tmp_path / f"in/{name}.parquet", extra, first=2 * number)
    wanted = kept_job(tmp_path, model, publish={"format": "delta"}, resources={"read": {"tasks": 1}})
    assert any(len(unit.parts) > 1 for unit in planned(wanted).units)
    receipt = label(wanted)
    assert (receipt.exit_code, receipt.rows_in) == (2, 2 * 14)
    assert sorted((Path(item.inputs[0]).name, item.error_class) for item in receipt.trouble) == [
        ("e.parquet", "UNFIT"),
        ("f.parquet", "UNFIT"),
    ]
    errors = {Path(item.inputs[0]).stem: item.error for item in receipt.trouble}
    assert "e.parquet: column extra is string; required: int32 without loss" in errors["e"]
    assert "f.parquet: column extra is int64 (Integer value 1099511627776 not in range" in errors["f"]
    assert output_types(tmp_path) == {"int32"}, "tombstones too"
    values = [1, None, 2, 3, None, None, 4, 5, 8, 9, *(n for n in range(9) for _ in "12")]
    (root,) = (tmp_path / "out").glob("*/data")
    assert pyarrow.dataset.dataset(root).to_table().sort_by("key").column("extra").to_pylist() == values
    query = f"select extra from read_parquet('{root}/*.parquet') order by key"
    assert [value for (value,) in duckdb.sql(query).fetchall()] == values
    done = publish(wanted, log_of(wanted))
    assert done is not None
    rows = DeltaTable(str(root.parent)).to_pyarrow_table()
    assert rows.sort_by("key").column("extra").to_pylist() == values
    shard(tmp_path / "in/e.parquet", pa.array([6, 6], pa.int64()))
    shard(tmp_path / "in/f.parquet", pa.array([7, 7], pa.uint64()))
    assert (label(wanted).exit_code, output_types(tmp_path), problems(wanted)) == (0, {"int32"}, [])


def test_workers_of_ray_are_told_the_types(tmp_path, model, on_ray):
    for name in "acf":
        shard(tmp_path / f"in/{name}.parquet", MIXED[name])
    receipt = label(kept_job(tmp_path, model))
    assert [(Path(item.inputs[0]).name, item.error_class) for item in receipt.trouble] == [("f.parquet", "UNFIT")]
    assert output_types(tmp_path) == {"int32"}


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "gone on with"])
@pytest.mark.parametrize("before", [False, True], ids=["with types", "without"])
def test_rows_that_are_labelled_again_have_the_type_of_those_that_stay(tmp_path, model, monkeypatch, before, killed):
    without_ray(monkeypatch)
    (tmp_path / "in").mkdir()
    for stem, kind in (("a", pa.int32()), ("b", pa.int64()), ("c", pa.int16())):
        rows = {"key": [f"{stem}1", f"{stem}2"], "image": pa.array([picture(1), None], pa.binary())}
        pq.write_table(pa.table(rows | {"extra": pa.array([1, 2], kind)}), tmp_path / f"in/{stem}.parquet")
    wanted = kept_job(tmp_path, model)
    if before:
        begun_before(wanted)
    label(wanted)
    assert output_types(tmp_path) == ({"int32", "int64", "int16"} if before else {"int32"})
    if killed:
        units = [Unit(unit.parts) for unit in log_of(wanted).runs()[0].units]
        assert to_plan(log_of(wanted), ("NULL_IMAGE",)).begin(("NULL_IMAGE",), units)
    done = Retry(wanted, ("NULL_IMAGE",), observe=lambda event, fields: None, started=time.perf_counter()).retry()
    assert (done.retried, done.units_done, done.trouble) == (3, 3, ())
    for path in tmp_path.glob("out/*/generations/*/data/*.parquet"):
        old = pq.read_table(path.parents[3] / "data" / path.name)
        assert pq.read_table(path).select(["key", "extra"]).equals(old.select(["key", "extra"]))


def test_a_type_that_the_table_has_not_is_refused_whichever_file_has_it(tmp_path, model):
    shard(tmp_path / "in/a.parquet", pa.array([None]))
    shard(tmp_path / "in/b.parquet", pa.array([1], pa.uint64()))
    path = tmp_path / "job.yaml"
    path.write_text(kept_job(tmp_path, model, publish={"format": "delta"}).model_dump_json(exclude_unset=True))
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert "is uint64, which delta has not" in str(done.exception)
    assert isinstance(done.exception, JobError)


@pytest.mark.parametrize("command", [["run"], ["plan"], ["retry-failed", "--class", "CORRUPT"]], ids=lambda command: command[0])
def test_a_type_that_the_output_has_is_held_against_the_table_and_not_what_its_inputs_are_since(
    tmp_path, model, monkeypatch, command
):
    without_ray(monkeypatch)
    path = tmp_path / "job.yaml"
    wanted = kept_job(tmp_path, model, publish={"format": "delta"})
    path.write_text(wanted.model_dump_json(exclude_unset=True))
    for there, since in ((pa.int64(), pa.uint64()), (pa.uint64(), pa.int64())):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shard(tmp_path / "in/a.parquet", pa.array([1], there))
        assert label(wanted).exit_code == 0
        shard(tmp_path / "in/a.parquet", pa.array([1], since), first=1)
        done = CliRunner().invoke(app, [*command, str(path)])
        if there == pa.int64():
            assert done.exit_code == 0, done.exception
        else:
            assert f"column extra of {log_of(wanted).root} is uint64, which delta has not" in str(done.exception)
            assert isinstance(done.exception, JobError)
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(JobError, match="is uint64, which delta has not"):
        check_columns(wanted)


def test_a_damaged_note_of_types_is_a_damaged_plan(tmp_path, model):
    shard(tmp_path / "in/a.parquet", pa.array([1]))
    wanted = kept_job(tmp_path, model)
    log, plan = plan_job(wanted, load_model(wanted, weights=False))
    path = Path(log.run_key(plan.run_id, "plan.parquet"))
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table.replace_schema_metadata({"nightlabel.kept": "bm8="}), path)
    with pytest.raises(NightlabelError, match="not a plan"):
        planned(wanted)
