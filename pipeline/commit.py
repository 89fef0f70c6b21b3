"""Rows of a unit → one Parquet object by one conditional create. The create is the commit.

Serialised in memory first and put once: no rename, no marker, no lock, never an overwrite, never a delete. Whoever comes second
looks at what stands there; the same unit of another run is as good as ours, since both label the same pinned input. A unit that
is given up gets a tombstone by the same create, so it is either committed or split, and never both.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import Conflict, InputMissing, JobError, Temporary
from pipeline.footer import Footer, tombstone
from pipeline.log import Log
from pipeline.rows import CAUTION, PREDICTION, SAME_LABEL, TIMINGS
from pipeline.unit import Unit

_SORTED_AT_ONCE = 2**28  # bytes: Arrow joins a column to sort it, and 2 GiB of text in one array are more than its offsets hold


@dataclass(frozen=True)
class Provenance:
    """What a driver writes into every footer."""

    fingerprint: str
    attempt: str
    code: str


@dataclass(frozen=True)
class Seen:
    """What workers saw of a unit's rows that no column keeps, as Footer has it."""

    compared: int = 0
    same_label: int = 0
    cautions: tuple[str, ...] = ()


class UnitBuffer:
    """Collects the rows of one unit until all are there. Of rows that come twice (a task that ran again) the first stays."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._seen: set[int] = set()
        self.expected: int | None = None
        self.error: tuple[str, str] | None = None
        self.empty: list[str] = []  # inputs in which there was nothing to label
        self.imageless: dict[str, int] = {}  # samples without an image, by suffix

    def add(self, table: pa.Table) -> None:
        """Takes prediction rows of the unit, the end row among them, with the columns of rows.TIMINGS."""
        ends = pc.is_null(table.column("key"))
        if pc.any(ends).as_py():
            end = table.filter(ends).slice(0, 1).to_pylist()[0]
            self.expected = end["index"]
            if end["error_class"] is not None:
                self.error = (end["error_class"], end["error"])
            elif end["error"] is not None:
                notes = json.loads(end["error"])
                self.empty, self.imageless = notes["empty"], notes["imageless"]
            table = table.filter(pc.invert(ends))
        indexes = table.column("index").to_pylist()
        if not self._seen.isdisjoint(indexes):
            table = table.filter(pa.array([index not in self._seen for index in indexes]))
        self._seen.update(indexes)
        self._tables.append(table)

    def __len__(self) -> int:
        """Rows that have come so far."""
        return len(self._seen)

    @property
    def complete(self) -> bool:
        return self.expected is not None and (self.error is not None or len(self._seen) == self.expected)

    def failed(self) -> int:
        """How many of them failed."""
        return sum(pc.sum(pc.equal(table.column("status"), "failed")).as_py() or 0 for table in self._tables)

    def seconds(self) -> dict[str, float]:
        """By seam, what these rows took, once each."""
        sums = dict.fromkeys(TIMINGS, 0.0)
        for table in self._tables:
            for seam, name in TIMINGS.items():
                sums[seam] += pc.sum(table.column(name)).as_py() or 0.0
        return sums

    def seen(self) -> Seen:
        same, cautions = (
            [value for table in self._tables if name in table.column_names for value in table[name].drop_null().to_pylist()]
            for name in (SAME_LABEL, CAUTION)
        )
        return Seen(len(same), sum(same), tuple(sorted(set(cautions))))

    def table(self) -> pa.Table:
        """All rows in order, in the columns of rows.PREDICTION, then optional and kept ones. Raises JobError when kept columns
        have types that do not go together."""
        tables = [table for table in self._tables if table.num_rows] or self._tables[:1]
        try:
            whole = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            need, do = "one type for each kept column of a unit", "Write the files alike, or leave the column out of input.keep"
            raise JobError(f"inputs of one unit differ: {error}", need=need, do=do) from error
        whole = _in_order(whole)
        passing = {*PREDICTION.names, *TIMINGS.values(), SAME_LABEL, CAUTION}
        extra = [name for name in whole.column_names if name not in passing]
        schema = pa.schema([*PREDICTION, *(whole.schema.field(name) for name in extra)])
        return whole.select([*PREDICTION.names, *extra]).cast(schema)


def _in_order(table: pa.Table) -> pa.Table:
    """The rows by their `index`."""
    index, pieces = table.column("index"), 1 + table.nbytes // _SORTED_AT_ONCE
    rows = 1 + table.num_rows // pieces
    starts = range(0, 1 + (pc.max(index).as_py() or 0), rows)
    wanted = (pc.and_(pc.greater_equal(index, start), pc.less(index, start + rows)) for start in starts)
    return pa.concat_tables([table.filter(those).sort_by("index") for those in wanted])


def serialise(table: pa.Table, unit: Unit, provenance: Provenance, seen: Seen = Seen()) -> tuple[bytes, Footer]:
    """The Parquet file of a unit, pages checksummed, the account in its footer. Raises AssertionError when it does not add up."""
    failed = table.filter(pc.equal(table.column("status"), "failed"))
    ok = pc.sum(pc.equal(table.column("status"), "ok")).as_py() or 0
    indexes = table.column("index").to_pylist()
    if indexes != list(range(table.num_rows)) or ok + failed.num_rows != table.num_rows:
        raise AssertionError(f"unit {unit.id}: {table.num_rows} rows, {ok} ok, {failed.num_rows} failed do not add up")
    footer = Footer(
        unit=unit.id,
        fingerprint=provenance.fingerprint,
        rows_in=table.num_rows,
        ok=ok,
        failed=failed.num_rows,
        failures=dict(sorted(Counter(failed.column("error_class").to_pylist()).items())),
        inputs=tuple(dict.fromkeys(part.pin for part in unit.parts)),
        attempt=provenance.attempt,
        code=provenance.code,
        **asdict(seen),
    )
    sink = BytesIO()
    pq.write_table(table.replace_schema_metadata(footer.metadata), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue(), footer


def commit_unit(log: Log, unit: Unit, table: pa.Table, provenance: Provenance, seen: Seen = Seen()) -> tuple[Footer, bool]:
    """(what stands there now, whether it is ours); what stands may be a tombstone. Raises Conflict: something else stands there;
    Temporary: try again."""
    data, footer = serialise(table, unit, provenance, seen)
    key = log.data_key(unit.id)
    if log.store.create(key, data):
        return footer, True
    standing = _standing(log, unit)
    told = (standing.unit, standing.fingerprint, footer.rows_in if standing.split else standing.rows_in)
    if told != (unit.id, provenance.fingerprint, footer.rows_in):
        got = f"{key}: holds {standing.rows_in} rows of unit {standing.unit}, fingerprint {standing.fingerprint}"
        need = f"{footer.rows_in} rows of unit {unit.id}, fingerprint {provenance.fingerprint}"
        raise Conflict(got, need=need, do="Find out who wrote it and move it away")
    return standing, standing.attempt == provenance.attempt  # ours when a reply was lost on the way


def retire_unit(log: Log, unit: Unit, *, schema: pa.Schema, why: str, provenance: Provenance) -> bool:
    """Puts a tombstone where `unit` would be committed, so that its inputs can go into other units. False: it was committed
    before. Raises what `commit_unit` raises."""
    inputs = tuple(part.pin for part in unit.parts)
    footer = Footer(unit.id, provenance.fingerprint, inputs=inputs, attempt=provenance.attempt, code=provenance.code, split=why)
    return log.store.create(log.data_key(unit.id), tombstone(footer, schema)) or bool(_standing(log, unit).split)


def _standing(log: Log, unit: Unit) -> Footer:
    """What stands where a create was refused. That nothing does is no word on an input: replicas may differ."""
    try:
        return log.footer(unit.id)
    except InputMissing as error:
        key = log.data_key(unit.id)
        raise Temporary(f"{key}: was there when it was to be created, and is not when looked at", do="Run again") from error
