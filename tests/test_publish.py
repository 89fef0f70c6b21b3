"""Publishing: the files of an output as a Delta or Iceberg table, on a disk and on a real S3 server, read by duckdb."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from inprocess import without_ray
from shards import picture, write_tars
from test_nightly import invoke, write
from test_retry import guard, loose
from test_run import job, label, problems
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import Conflict, JobError, NightlabelError, StoreError, Temporary
from pipeline.job.jobfile import parse_job
from pipeline.log import Log
from pipeline.nights import generation
from pipeline.rows import PREDICTION
from pipeline.spec import Job
from pipeline.start import fingerprint, load_model
from pipeline.storage import join, open_store
from pipeline.tables import publish as publishing
from pipeline.tables.publish import Published, check_columns, check_publisher, publish
from pipeline.tables.published import File, Table

FINGERPRINT = "0123456789ab"


def parquet(keys: list[str], *, label: str | None = "cat", **columns: pa.Array) -> bytes:
    status = "ok" if label else "failed"
    row = {"source": "a.tar", "status": status, "label": label, "error_class": None if label else "FETCH_FAILED"}
    rows = [row | {"key": key, "index": at} for at, key in enumerate(keys)]
    table = pa.Table.from_pylist(rows, schema=PREDICTION)
    for name, column in columns.items():
        table = table.append_column(name, column)
    sink = BytesIO()
    pq.write_table(table.replace_schema_metadata({"nightlabel": "{}"}), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


class Labels:
    """An output that is written by hand, and the job that publishes it."""

    def __init__(self, wanted: Job, root: str) -> None:
        self.job, self.log = wanted, Log(open_store(root, wanted.output.s3), root)

    def put(self, name: str, data: bytes, *, generation: int = 0) -> str:
        folder = f"generations/{generation:06d}/data" if generation else "data"
        uri = join(self.log.root, folder, f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.parquet")
        assert self.log.store.create(uri, data)
        return uri

    def publish(self) -> Published:
        done = publish(self.job, self.log)
        assert done is not None
        return done


@pytest.fixture(scope="module", autouse=True)
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """pyiceberg reads its environment once, when it is imported."""
    folder = tmp_path_factory.mktemp("catalog")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYICEBERG_CATALOG__NIGHT__URI", f"sqlite:///{folder}/catalog.db")
        patch.setenv("PYICEBERG_HOME", str(folder))
        import pyiceberg.catalog  # noqa: F401

        yield


@pytest.fixture
def iceberg() -> str:
    """The name of a table that is not there."""
    return f"products.t{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["disk", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path, iceberg: str) -> Callable[..., Labels]:
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        out = f"s3://{s3.bucket()}/labels"
    else:
        out = str(tmp_path / "my labels")

    def build(kind: str, fingerprint: str = FINGERPRINT) -> Labels:
        wanted: dict[str, Any] = {"format": kind}
        if kind == "iceberg":
            wanted |= {"catalog": "night", "table": iceberg}
        output: dict[str, Any] = {"uri": out}
        if request.param == "s3":
            output["s3"] = s3.options.model_dump()
        return Labels(job("in", "model", out, output=output, publish=wanted), join(out, fingerprint))

    return build


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., Labels]:
    def build(kind: str, table: str) -> Labels:
        wanted = {"format": kind} | ({"catalog": "night", "table": table} if kind == "iceberg" else {})
        return Labels(job("in", "model", tmp_path, publish=wanted), str(tmp_path / FINGERPRINT))

    return build


def read(labels: Labels) -> pa.Table:
    """What the table holds, as the format's own library sees it."""
    if labels.job.publish.format == "delta":
        from deltalake import DeltaTable

        from pipeline.tables.delta import _options

        options = _options(labels.job.output.s3) if labels.log.root.startswith("s3://") else None
        return DeltaTable(labels.log.root, storage_options=options).to_pyarrow_table()
    from pyiceberg.catalog import load_catalog

    from pipeline.tables.iceberg import _options as options_of

    return load_catalog("night", **options_of(labels.job.output.s3)).load_table(labels.job.publish.table).scan().to_arrow()


def counts(labels: Labels) -> list[tuple[Any, ...]]:
    rows = read(labels)
    query = "select label, count(*), count(distinct key) from rows group by label order by label"
    return duckdb.from_arrow(rows).query("rows", query).fetchall()


def test_an_object_that_is_no_parquet_file_is_a_conflict(make):
    labels = make("delta")
    labels.put("a", b"hello")
    with pytest.raises(Conflict, match=r"parquet: not a unit of nightlabel"):
        labels.publish()


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_what_is_new_is_registered_once(make, kind):
    labels = make(kind)
    labels.put("a", parquet(["1", "2"]))
    labels.put("empty", parquet([]))
    assert (labels.publish().added, labels.publish().added) == (1, 0)
    labels.put("b", parquet(["3"], label="dog"))
    later = labels.publish()
    assert (later.added, later.removed, later.line().rpartition(": ")[2]) == (1, 0, "1 files added")
    assert counts(labels) == [("cat", 2, 2), ("dog", 1, 1)]
    assert read(labels).schema.field("topk").type.value_type.num_fields == 3


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_retried_unit_replaces_its_older_version(make, kind):
    labels = make(kind)
    labels.put("a", parquet(["1", "2"]))
    labels.put("b", parquet(["3", "4"], label=None))
    labels.publish()
    labels.put("b", parquet(["3", "4"]), generation=1)
    done = labels.publish()
    assert (done.added, done.removed) == (1, 1)
    assert counts(labels) == [("cat", 4, 4)]
    assert (labels.publish().added, labels.publish().removed) == (0, 0)
    labels.put("c", parquet(["5"], label=None))
    labels.put("c", parquet(["5"]), generation=2)
    assert labels.publish().added == 1, "of a unit that was retried before it was published, the newest alone"
    assert counts(labels) == [("cat", 5, 5)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, for jobs whose paths are relative."""
    without_ray(monkeypatch)
    guard(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
@pytest.mark.parametrize("out", ["labels/", "file://{here}/labels"])
def test_a_table_holds_the_same_files_however_the_job_spells_its_output(here, model, iceberg, kind, out):
    loose(Path("in"), 4)
    Path("in/01.jpg.denied").touch()
    wanted = {"format": kind} | ({"catalog": "night", "table": iceberg} if kind == "iceberg" else {})
    path = write(Path(), job("in", model, out.format(here=here), input={"format": "images"}, publish=wanted))

    def rows() -> list[tuple[str, str]]:
        (root,) = (here / "labels").iterdir()
        found = read(Labels(job("in", model, "labels", publish=wanted), str(root)))
        return sorted(zip(*(found.column(name).to_pylist() for name in ("key", "status")), strict=True))

    assert invoke("run", path)[0] == 0
    assert [status for _, status in rows()] == ["ok", "failed", "ok", "ok"]
    Path("in/01.jpg.denied").unlink()
    code, said, err = invoke("retry-failed", path, "--class", "FETCH_FAILED")
    assert (code, "1 files added, 1 replaced" in said) == (0, True), (said, err)
    assert rows() == [(f"0{number}.jpg", "ok") for number in range(4)]
    code, said, err = invoke("run", path)
    assert (code, rows()) == (0, [(f"0{number}.jpg", "ok") for number in range(4)]), (said, err)


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_transaction_says_of_which_run_it_is(make, kind):
    labels = make(kind)
    labels.put("a", parquet(["1"]))
    labels.log.store.create(labels.log.run_key("000007", "manifest.json"), b"{}")
    labels.publish()
    if kind == "delta":
        from deltalake import DeltaTable

        from pipeline.tables.delta import _options

        options = _options(labels.job.output.s3) if labels.log.root.startswith("s3://") else None
        table = DeltaTable(labels.log.root, storage_options=options)
        assert table.transaction_version("nightlabel") == 7
        assert pa.table(table.get_add_actions()).column("num_records").to_pylist() == [1]
        assert table.metadata().name == labels.job.name
    else:
        from pyiceberg.catalog import load_catalog

        from pipeline.tables.iceberg import _options as options_of

        table = load_catalog("night", **options_of(labels.job.output.s3)).load_table(labels.job.publish.table)
        assert table.current_snapshot().summary["nightlabel.run"] == "000007"


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_columns_that_differ_are_refused_and_the_table_stays(make, kind):
    labels = make(kind)
    labels.put("a", parquet(["1"], cls=pa.array(["1"])))
    labels.publish()
    labels.put("b", parquet(["2"], cls=pa.array([2.5])))
    with pytest.raises(StoreError) as caught:
        labels.publish()
    assert "columns" in str(caught.value)
    assert counts(labels) == [("cat", 1, 1)]


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_columns_of_every_file_are_held_against_the_table(on_disk, iceberg, kind):
    labels = on_disk(kind, iceberg)
    for name, column in (("d", pa.array(["1"])), ("a", pa.array([2.5]))):
        labels.put(name, parquet([name], cls=column))
    first, second = (path.name for path in sorted(Path(labels.log.root, "data").iterdir()))
    assert first < second == f"{hashlib.sha256(b'a').hexdigest()[:32]}.parquet", "the one that fits comes first"
    with pytest.raises(StoreError, match="columns"):
        labels.publish()


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_table_lies_where_the_environment_says_that_s3_is(s3, kind, iceberg, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    out = f"s3://{s3.bucket()}/labels"
    wanted = {"format": kind} | ({"catalog": "night", "table": iceberg} if kind == "iceberg" else {})
    labels = Labels(job("in", "model", out, publish=wanted), join(out, FINGERPRINT))
    labels.put("a", parquet(["1", "2"]))
    assert (labels.publish().added, counts(labels)) == (1, [("cat", 2, 2)])


def test_a_table_that_somebody_compacted_is_refused(tmp_path):
    from deltalake import DeltaTable

    out = str(tmp_path)
    labels = Labels(job("in", "model", out, publish={"format": "delta"}), join(out, FINGERPRINT))
    for name in "ab":
        labels.put(name, parquet([name]))
    labels.publish()
    DeltaTable(labels.log.root).optimize.compact()
    with pytest.raises(StoreError, match="Compact a copy"):
        labels.publish()
    assert counts(labels) == [("cat", 2, 2)]


def aged(folder: Path) -> None:
    """Makes all in it a year old."""
    for path in folder.rglob("*"):
        os.utime(path, (then := time.time() - 365 * 86_400, then))


@pytest.mark.parametrize("state", ["absent", "made"])
def test_a_vacuum_takes_nothing_of_an_output(on_disk, state):
    from deltalake import DeltaTable

    labels = on_disk("delta", "")
    begun(labels, state)
    labels.put("a", parquet(["1"], label=None))
    labels.put("a tombstone", parquet([]))
    labels.log.append([], after=[])
    labels.publish()
    aged(Path(labels.log.root))
    assert DeltaTable(labels.log.root).vacuum(full=True, dry_run=True) == []
    labels.put("a", parquet(["1"]), generation=1)
    labels.publish()
    labels.put("b", parquet(["2"]))
    aged(Path(labels.log.root))
    table = DeltaTable(labels.log.root)
    assert table.vacuum(full=True, dry_run=True) == []
    table.alter.set_table_properties({"delta.deletedFileRetentionDuration": "interval 30 days"})
    labels.publish()
    assert "data" in str(DeltaTable(labels.log.root).vacuum(full=True, dry_run=True)), "who sets it knows what for"


def test_what_an_iceberg_table_drops_stays(on_disk, iceberg):
    from pyiceberg.catalog import load_catalog

    labels = on_disk("iceberg", iceberg)
    begun(labels, "made")
    for name, wanted in (("a", "false"), ("b", "true")):
        labels.put(name, parquet([name]))
        labels.publish()
        table = load_catalog("night").load_table(iceberg)
        assert table.properties["gc.enabled"] == wanted
        with table.transaction() as transaction:
            transaction.set_properties({"gc.enabled": "true"})


def test_a_delta_table_may_have_columns_and_comments_of_somebody_elses(on_disk):
    from deltalake import DeltaTable, Field
    from deltalake.schema import PrimitiveType

    labels = on_disk("delta", "")
    labels.put("a", parquet(["1"], label=None))
    labels.publish()
    table = DeltaTable(labels.log.root)
    table.alter.set_column_metadata("label", {"comment": "what it shows"})
    table.alter.add_columns([Field("reviewed_by", PrimitiveType("string"))])
    labels.put("a", parquet(["1"]), generation=1)
    assert (labels.publish().added, counts(labels)) == (1, [("cat", 1, 1)])
    schema = DeltaTable(labels.log.root).schema()
    assert {field.name: field.metadata for field in schema.fields if field.metadata} == {"label": {"comment": "what it shows"}}
    assert read(labels).column("reviewed_by").null_count == 1


def test_whoever_follows_a_delta_table_sees_what_is_new_and_what_it_replaces(on_disk):
    """Spark's streams pass over what says that it changes no data."""
    labels = on_disk("delta", "")
    labels.put("a", parquet(["1"], label=None))
    labels.publish()
    labels.put("a", parquet(["1"]), generation=1)
    labels.publish()
    said = [json.loads(line) for line in Path(labels.log.root, f"_delta_log/{2:020d}.json").read_text().splitlines()]
    assert sorted((name, action[name]["dataChange"]) for action in said for name in ("add", "remove") if name in action) == [
        ("add", True),
        ("remove", True),
    ]


@pytest.mark.parametrize("region", [None, "eu-west-1"])
def test_a_table_on_s3_is_asked_for_as_the_images_are(region, monkeypatch):
    from pipeline.spec import S3
    from pipeline.tables import delta
    from pipeline.tables import iceberg as iceberg_table

    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    wanted = S3(region=region, requester_pays=True)
    options = delta._options(wanted)
    assert (options["AWS_REGION"], options["AWS_REQUEST_PAYER"]) == (region or "eu-north-1", "true")
    assert iceberg_table._options(wanted)["s3.region"] == (region or "eu-north-1")


def made_otherwise(labels: Labels, how: str) -> None:
    """Makes a Delta table as we would not."""
    from deltalake import DeltaTable, Schema, TableFeatures

    schema, lacks = PREDICTION, how == "more columns"
    if lacks:
        schema = schema.append(pa.field("reviewed", pa.bool_(), nullable=False))
    partitions = ["status"] if how == "partitions" else None
    settings = {"delta.appendOnly": "true"} if how == "appends alone" else {}
    table = DeltaTable.create(labels.log.root, Schema.from_arrow(schema), partition_by=partitions, configuration=settings)
    if how == "deletion vectors":
        table.alter.add_feature(TableFeatures.DeletionVectors, allow_protocol_versions_increase=True)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("partitions", "is partitioned by status; required: one that is not"),
        ("more columns", "its columns are not those of the table"),
        ("deletion vectors", "has deletionVectors; required: one without"),
        ("appends alone", "took no change, 5 times: .*append"),
    ],
)
def test_a_delta_table_that_would_not_be_right_is_refused_as_it_is(on_disk, how, words):
    from deltalake import DeltaTable

    labels = on_disk("delta", "")
    made_otherwise(labels, how)
    labels.put("a", parquet(["1"], label=None))
    if how in ("deletion vectors", "appends alone"):
        assert labels.publish().added == 1
        labels.put("a", parquet(["1"]), generation=1)
    before = DeltaTable(labels.log.root).file_uris()
    with pytest.raises(NightlabelError, match=words):
        labels.publish()
    assert DeltaTable(labels.log.root).file_uris() == before


def test_another_models_labels_do_not_mix_into_an_iceberg_table(tmp_path, iceberg):

    def labels(fingerprint: str, table: str) -> Labels:
        wanted = {"format": "iceberg", "catalog": "night", "table": table}
        made = Labels(job("in", "model", tmp_path, publish=wanted), str(tmp_path / fingerprint))
        return made

    first = labels(FINGERPRINT, iceberg)
    first.put("a", parquet(["1"]))
    first.publish()
    second = labels("ba9876543210", iceberg)
    second.put("a", parquet(["1"]))
    with pytest.raises(StoreError, match="name another table for another model"):
        second.publish()
    third = labels("ba9876543210", iceberg + "_{fingerprint}")
    assert (third.publish().table, third.publish().added) == (f"{iceberg}_ba9876543210", 0)


class Slow:
    """A publisher's table; what stands in `between` happens just before its change, long after its look."""

    def __init__(self, table: Table, between: list[Callable[[], object]]) -> None:
        self.where, self.files, self._table, self._between = table.where, table.files, table, between

    def change(self, added: Sequence[File], removed: Sequence[str], *, run: str) -> None:
        if self._between:
            self._between.pop()()
        self._table.change(added, removed, run=run)


def begun(labels: Labels, state: str) -> None:
    """Brings the table into the state that two publishers find it in."""
    wanted = labels.job.publish
    if state == "made":
        if wanted.format == "delta":
            from deltalake import DeltaTable, Schema

            DeltaTable.create(labels.log.root, Schema.from_arrow(PREDICTION))
            return
        from pyiceberg.catalog import load_catalog

        catalog = load_catalog("night")
        catalog.create_namespace_if_not_exists("products")
        catalog.create_table(wanted.table, PREDICTION, location=join(labels.log.root, "iceberg"))
    elif state in ("filled", "snapshot isolation"):
        labels.put("other", parquet(["9"], label="dog"))
        labels.publish()
    if state == "snapshot isolation" and wanted.format == "iceberg":
        from pyiceberg.catalog import load_catalog

        with load_catalog("night").load_table(wanted.table).transaction() as transaction:
            names = ("write.delete.isolation-level", "write.update.isolation-level")
            transaction.set_properties(dict.fromkeys(names, "snapshot"))


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
@pytest.mark.parametrize("state", ["absent", "made", "filled", "snapshot isolation"])
@pytest.mark.parametrize("retried", [False, True])
def test_a_publisher_that_was_overtaken_looks_again(on_disk, monkeypatch, kind, state, retried):
    labels = on_disk(kind, f"products.t{uuid.uuid4().hex[:8]}")
    begun(labels, state)
    labels.put("a", parquet(["1", "2"], label=None))

    def overtake() -> None:
        if retried:
            labels.put("a", parquet(["1", "2"]), generation=1)
        assert labels.publish().added == 1

    between, make_table = [overtake], publishing._table
    monkeypatch.setattr(publishing, "_table", lambda *known: Slow(make_table(*known), between))
    assert labels.publish().added == 0
    others = [("dog", 1, 1)] if state in ("filled", "snapshot isolation") else []
    assert sorted(counts(labels), key=str) == sorted([("cat" if retried else None, 2, 2), *others], key=str)


def test_days_that_share_an_iceberg_table_touch_only_their_own_files(tmp_path, iceberg, monkeypatch):
    wanted = {"format": "iceberg", "catalog": "night", "table": iceberg}
    days = [tmp_path / name / FINGERPRINT for name in ("date=2026-11-01", "date=2026-11-02")]
    first, second = (Labels(job("in", "model", day, publish=wanted), str(day)) for day in days)
    for labels in (first, second):
        labels.put("a", parquet([labels.log.root]))
        labels.put("b", parquet([labels.log.root + " b"], label=None))
    between, make_table = [lambda: second.publish()], publishing._table
    monkeypatch.setattr(publishing, "_table", lambda *known: Slow(make_table(*known), between))
    assert first.publish().added == 2
    assert counts(first) == [("cat", 2, 2), (None, 2, 2)]
    second.put("b", parquet([second.log.root + " b"]), generation=1)
    between.append(lambda: first.publish())
    done = second.publish()
    assert (done.added, done.removed) == (1, 1)
    assert counts(first) == [("cat", 3, 3), (None, 1, 1)]


#: Calls of the formats' libraries after which something stands in the table or its catalog that did not before.
STEPS = (
    ("delta", "absent", "deltalake.DeltaTable.create"),
    ("delta", "made", "deltalake.table.TableAlterer.set_table_properties"),
    ("delta", "absent", "deltalake.DeltaTable.create_write_transaction"),
    ("iceberg", "absent", "pyiceberg.catalog.sql.SqlCatalog.create_namespace"),
    ("iceberg", "absent", "pyiceberg.catalog.sql.SqlCatalog.create_table"),
    ("iceberg", "absent", "pyiceberg.catalog.sql.SqlCatalog.commit_table"),
)


@pytest.mark.parametrize("broken_step", STEPS, ids=[step.rpartition(".")[2] for _, _, step in STEPS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publish_that_broke_off_is_made_up_for(on_disk, monkeypatch, broken_step, when):
    kind, state, step = broken_step
    labels = on_disk(kind, f"not_there_{uuid.uuid4().hex[:8]}.t")
    begun(labels, state)
    call, broken = resolve_name(step), list[str]()

    def break_off(*known: Any, **named: Any) -> Any:
        if when == "after":
            call(*known, **named)
        broken.append(when)
        raise OSError("the machine is away")

    def publish_twice() -> list[tuple[Any, ...]]:
        with monkeypatch.context() as patch, contextlib.suppress(Temporary):
            patch.setattr(step, break_off)
            labels.publish()
        labels.publish()
        return sorted(counts(labels), key=str)

    labels.put("a", parquet(["1", "2"]))
    labels.put("b", parquet(["3"], label=None))
    assert (publish_twice(), bool(broken)) == ([("cat", 2, 2), (None, 1, 1)], True)
    labels.put("b", parquet(["3"]), generation=1)
    labels.put("c", parquet(["4"]))
    assert publish_twice() == [("cat", 4, 4)]


def test_a_commit_whose_answer_was_lost_stays_whole(on_disk, iceberg, monkeypatch):
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.exceptions import CommitFailedException

    labels = on_disk("iceberg", iceberg)
    begun(labels, "filled")
    labels.put("a", parquet(["1", "2"]))
    commit, asked = SqlCatalog.commit_table, []

    def commit_and_ask_again(*known: Any) -> Any:
        asked.append(known)
        done = commit(*known)
        if len(asked) == 1:
            raise CommitFailedException("the second of two requests, of which the first one's answer was lost")
        return done

    monkeypatch.setattr(SqlCatalog, "commit_table", commit_and_ask_again)
    assert (labels.publish().added, len(asked)) == (1, 1)
    assert counts(labels) == [("cat", 2, 2), ("dog", 1, 1)]


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_two_publishers_at_once_register_everything_once(on_disk, iceberg, kind):
    from concurrent.futures import ThreadPoolExecutor

    labels = on_disk(kind, f"{iceberg}.in_a_namespace_that_is_not_there")
    for number in range(6):
        labels.put(str(number), parquet([str(number)]))
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: labels.publish(), range(4)))
    assert all(item.added in (0, 6) for item in done)
    assert counts(labels) == [("cat", 6, 6)]


def test_what_cannot_be_published_is_refused_before_the_first_image():
    base = b"name: x\ninput: {uri: a}\nmodel: {uri: m}\n"
    for more, words in (
        (b"output: {uri: o, probabilities: true}\npublish: {format: delta}", "float16"),
        (b"output: {uri: o}\npublish: {format: iceberg}", "table is missing"),
        (b"output: {uri: o}\npublish: {format: delta, table: a.b}", "table is a.b"),
        (b"output: {uri: o}\ninput: {uri: a, keep: [Label]}\npublish: {format: delta}", "keep names Label, and label is there"),
        (b"output: {uri: o}\ninput: {uri: a, keep: [x, X]}\npublish: {format: delta}", "keep names x, and X is there"),
    ):
        with pytest.raises(JobError, match=words):
            parse_job((base.replace(b"input: {uri: a}\n", b"") if b"input:" in more else base) + more)
    iceberg = b"publish: {format: iceberg, table: a.b}"
    parse_job(base.replace(b"{uri: a}", b"{uri: a, keep: [Label, x, X]}") + b"output: {uri: o}\n" + iceberg)


ODD = ("%20", "100%", "a%2fb", "a\\b", "a#b", "my labels", "f\xfc", "a+b", "it's", '"q"', "a:b", "tab\t")


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
@pytest.mark.parametrize("name", ODD)
def test_a_table_lies_in_a_folder_of_any_name_or_is_refused_at_once(tmp_path, iceberg, kind, name):
    wanted = {"format": kind} | ({"catalog": "night", "table": iceberg} if kind == "iceberg" else {})
    labels = Labels(job("in", "model", tmp_path / name, publish=wanted), str(tmp_path / name / FINGERPRINT))
    labels.put("a", parquet(["1", "2"], label=None))
    if kind == "delta" and name in ("%20", "a%2fb", "a\\b", "tab\t"):
        with pytest.raises(JobError, match=r"takes .* for something else; required: a path without it\. Change output\.uri"):
            check_publisher(labels.job)
        return
    check_publisher(labels.job)
    labels.publish()
    labels.put("a", parquet(["1", "2"]), generation=1)
    assert (labels.publish().removed, labels.publish().added, counts(labels)) == (1, 0, [("cat", 2, 2)])


@pytest.mark.parametrize(
    ("kind", "uri"), [("delta", "s3://bucket/a#b"), ("iceberg", "s3://bucket/a#b"), ("delta", "s3://bucket/%20")]
)
def test_a_prefix_that_a_tables_library_reads_as_another_is_refused(kind, uri):
    wanted = {"format": kind} | ({"table": "a.b"} if kind == "iceberg" else {})
    with pytest.raises(JobError, match="for something else"):
        check_publisher(job("in", "model", uri, publish=wanted))


#: Columns at the end of their types' ranges: of what all readers should make the same.
KEPT = {
    "text": pa.array(["x"]),
    "bytes": pa.array([b"x"]),
    "int16": pa.array([-(2**15)], pa.int16()),
    "int64": pa.array([2**63 - 1]),
    "uint8": pa.array([255], pa.uint8()),
    "uint16": pa.array([2**16 - 1], pa.uint16()),
    "uint32": pa.array([2**32 - 1], pa.uint32()),
    "uint64": pa.array([2**64 - 1], pa.uint64()),
    "float16": pa.array([1.5]).cast(pa.float16()),
    "float32": pa.array([1.5], pa.float32()),
    "decimal": pa.array([Decimal("1.5")]),
    "date": pa.array([1], pa.date32()),
    "time": pa.array([1], pa.time64("us")),
    "nanoseconds of a day": pa.array([1], pa.time64("ns")),
    "duration": pa.array([1], pa.duration("us")),
    "timestamp": pa.array([1], pa.timestamp("us")),
    "utc": pa.array([1], pa.timestamp("us", "UTC")),
    "zoned": pa.array([1], pa.timestamp("us", "Europe/Berlin")),
    "list": pa.array([[1.5]]),
    "struct": pa.array([{"a": 1}]),
    "struct of uint64": pa.array([{"a": 2**64 - 1}], pa.struct([("a", pa.uint64())])),
    "struct that ends with uint64": pa.array([{"a": 1, "b": 2**64 - 1}], pa.struct([("a", pa.int8()), ("b", pa.uint64())])),
    "struct of a duration": pa.array([{"a": 1}], pa.struct([("a", pa.duration("s"))])),
}


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
@pytest.mark.parametrize("name", KEPT)
def test_kept_columns_are_refused_at_once_if_the_table_could_not_have_them(tmp_path, model, iceberg, kind, name):
    column = KEPT[name]
    wanted = {"format": kind} | ({"catalog": "night", "table": iceberg} if kind == "iceberg" else {})
    source = {"format": "parquet", "keep": ["extra"]}
    labels = Labels(job(tmp_path / "in", model, tmp_path / "out", input=source, publish=wanted), str(tmp_path / FINGERPRINT))
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"key": ["1"], "image": [b"x"], "extra": column}), tmp_path / "in/a.parquet")
    labels.put("a", parquet(["1"], extra=column))
    try:
        labels.publish()
        registered = read(labels).column("extra").to_pylist() == column.to_pylist()
    except (NightlabelError, pa.ArrowException):
        registered = False
    if registered:
        check_columns(labels.job)
        return
    with pytest.raises(JobError, match=re.escape(f"column extra of {tmp_path}/in is {column.type}, which {kind} has not")):
        check_columns(labels.job)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", [["run"], ["plan"], ["retry-failed", "--class", "CORRUPT"]], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("keep", "out", "words"),
    [(["taken"], "labels", "column taken of in is timestamp"), ([], "a%20b", "takes '%20' in it for something else")],
)
def test_a_run_that_no_table_could_be_made_of_starts_nothing(model, keep, out, words, command):
    table = pa.table({"key": ["1"], "image": [picture(1)], "taken": pa.array([1], pa.timestamp("us", "Europe/Berlin"))})
    Path("in").mkdir()
    pq.write_table(table, "in/a.parquet")
    path = write(Path(), job("in", model, out, input={"format": "parquet", "keep": keep}, publish={"format": "delta"}))
    done = CliRunner().invoke(app, [*command, str(path)])
    assert (type(done.exception), words in str(done.exception), Path(out).exists()) == (JobError, True, False), done.exception


def test_a_catalog_that_is_not_there_is_a_sentence(tmp_path):
    wanted = {"format": "iceberg", "catalog": "nowhere", "table": "a.b"}
    labels = Labels(job("in", "model", tmp_path, publish=wanted), str(tmp_path / FINGERPRINT))
    labels.put("a", parquet(["1"]))
    with pytest.raises(StoreError, match="The labels are complete"):
        labels.publish()


def output_in(folder: Path, name: str = FINGERPRINT) -> Labels:
    """Two units, one of which was retried, and a file without rows."""
    labels = Labels(job("in", "model", folder / "labels", publish={"format": "delta"}), str(folder / "labels" / name))
    labels.put("a", parquet(["1", "2"]))
    labels.put("b", parquet(["3"], label=None))
    labels.put("tombstone", parquet([]))
    labels.put("b", parquet(["3"], label="dog"), generation=1)
    labels.log.store.create(labels.log.run_key("000001", "plan.parquet"), parquet(["no labels"]))
    return labels


def test_the_one_liners_of_the_readme_read_the_files_as_they_are(tmp_path, monkeypatch):
    output_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "labels/*" in line]
    (sql,) = (shlex.split(line)[2] for line in lines if line.startswith("duckdb -c"))
    assert sorted(duckdb.sql(sql).fetchall(), key=str) == [("cat", 2), (None, 1)]
    scripts = [shlex.split(line) for line in lines if line.startswith("python -c")]
    assert len(scripts) == 2
    for words in scripts:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
        assert ("failed" in done.stdout and "ok" in done.stdout) or "FETCH_FAILED    1" in done.stdout, done.stdout


def test_the_newest_version_of_every_row_in_sql(tmp_path, monkeypatch):
    output_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"^    (select .*?)\n\n", (generation.__doc__ or "") + "\n\n", re.MULTILINE | re.DOTALL)
    rows = duckdb.sql(query.replace("<fingerprint>", FINGERPRINT)).fetchall()
    assert sorted(rows) == [("1", "cat"), ("2", "cat"), ("3", "dog")]


def test_the_hive_layout_makes_model_and_day_columns(tmp_path, monkeypatch):
    import polars

    for day in ("2026-11-01", "2026-11-02"):
        labels = output_in(tmp_path / day, f"date={day}/fingerprint={FINGERPRINT}")
    assert labels.log.fingerprint == FINGERPRINT
    assert (labels.publish().added, labels.publish().added) == (2, 0)
    files = f"{tmp_path}/*/labels/*/*/data/*.parquet"
    by_day = duckdb.sql(f"select date::text, fingerprint, count(*) from '{files}' group by all order by all").fetchall()
    assert by_day == [("2026-11-01", FINGERPRINT, 3), ("2026-11-02", FINGERPRINT, 3)]
    frame = polars.read_parquet(files, hive_partitioning=True).group_by("fingerprint").len()
    assert frame.rows() == [(FINGERPRINT, 6)]


def test_a_run_writes_where_the_layout_says(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    write_tars(tmp_path / "in", shards=1, images=3)
    for layout, prefix in (("plain", ""), ("hive", "fingerprint=")):
        wanted = job(tmp_path / "in", model, tmp_path / layout, output={"uri": str(tmp_path / layout), "layout": layout})
        receipt = label(wanted)
        artifact = load_model(wanted, weights=False)
        assert receipt.fingerprint == fingerprint(artifact, wanted)
        assert receipt.where == f"{tmp_path}/{layout}/{prefix}{receipt.fingerprint}"
        assert (receipt.ok, label(wanted).run, problems(wanted)) == (3, None, [])
