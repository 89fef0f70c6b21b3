"""Rows of a unit → one Parquet object by one conditional create. The create is the commit.

Serialised in memory first and put once: no rename, no marker, no lock, never an overwrite, never a delete. Whoever comes second
looks at what stands there; the same unit of another run is as good as ours, since both label the same pinned input.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import Conflict, InputMissing
from pipeline.plan import Log, Unit
from pipeline.rows import OUTPUT_SCHEMA_VERSION, PREDICTION
from pipeline.storage import RangeFile

_FOOTER = b"nightlabel"


@dataclass(frozen=True)
class Footer:
    """What the object of a unit says of itself, in its Parquet metadata. `rows_in = ok + failed`, or it was not written."""

    unit: str
    fingerprint: str
    rows_in: int
    ok: int
    failed: int
    failures: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[tuple[str, str, int], ...] = ()
    attempt: str = ""
    code: str = ""
    schema: int = OUTPUT_SCHEMA_VERSION


@dataclass(frozen=True)
class Provenance:
    """What a driver writes into every footer."""

    fingerprint: str
    attempt: str
    code: str


class UnitBuffer:
    """Collects the rows of one unit until all are there. Rows that come twice (a task that ran again) are the same rows."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._seen: set[int] = set()
        self.expected: int | None = None
        self.error: tuple[str, str] | None = None

    def add(self, table: pa.Table) -> None:
        """Takes prediction rows of the unit, the end row among them."""
        ends = pc.is_null(table.column("key"))
        if pc.any(ends).as_py():
            end = table.filter(ends).slice(0, 1).to_pylist()[0]
            self.expected = end["index"]
            if end["error_class"] is not None:
                self.error = (end["error_class"], end["error"])
            table = table.filter(pc.invert(ends))
        indexes = table.column("index").to_pylist()
        if not self._seen.isdisjoint(indexes):
            table = table.filter(pa.array([index not in self._seen for index in indexes]))
        self._seen.update(indexes)
        self._tables.append(table)

    @property
    def complete(self) -> bool:
        return self.expected is not None and (self.error is not None or len(self._seen) == self.expected)

    def table(self) -> pa.Table:
        """All rows in order, in the columns of rows.PREDICTION, then optional and kept ones."""
        whole = pa.concat_tables(
            [table for table in self._tables if table.num_rows] or self._tables[:1], promote_options="permissive"
        )
        whole = whole.sort_by("index")
        extra = [name for name in whole.column_names if name not in PREDICTION.names]
        schema = pa.schema([*PREDICTION, *(whole.schema.field(name) for name in extra)])
        return whole.select([*PREDICTION.names, *extra]).cast(schema)


def serialise(table: pa.Table, unit: Unit, provenance: Provenance) -> tuple[bytes, Footer]:
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
        inputs=tuple(dict.fromkeys(part.input for part in unit.parts)),
        attempt=provenance.attempt,
        code=provenance.code,
    )
    table = table.replace_schema_metadata({_FOOTER: json.dumps(asdict(footer))})
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue(), footer


def commit_unit(log: Log, unit: Unit, table: pa.Table, provenance: Provenance) -> tuple[Footer, bool]:
    """(what stands there now, whether it is ours). Raises Conflict: something else stands there; Temporary: try again."""
    data, footer = serialise(table, unit, provenance)
    key = log.data_key(unit.id)
    if log.store.create(key, data):
        return footer, True
    standing = read_footer(log, unit.id)
    if standing.unit != unit.id or standing.fingerprint != provenance.fingerprint or standing.rows_in != footer.rows_in:
        got = f"{key}: holds {standing.rows_in} rows of unit {standing.unit}, fingerprint {standing.fingerprint}"
        need = f"{footer.rows_in} rows of unit {unit.id}, fingerprint {provenance.fingerprint}"
        raise Conflict(got, need=need, do="Find out who wrote it and move it away")
    return standing, standing.attempt == provenance.attempt  # ours when a reply was lost on the way


def read_footer(log: Log, unit_id: str) -> Footer:
    """The footer of a committed unit. Raises InputMissing when there is no object, Conflict when it is not one of ours."""
    key = log.data_key(unit_id)
    try:
        metadata = pq.read_metadata(RangeFile(log.store, log.store.head(key)))
        fields = json.loads((metadata.metadata or {})[_FOOTER])
        fields["inputs"] = tuple((uri, etag, size) for uri, etag, size in fields["inputs"])
        footer = Footer(**fields)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        do = "Find out who wrote it and move it away"
        raise Conflict(f"{key}: not a unit of nightlabel ({error})", need="a Parquet file with its account", do=do) from error
    if (
        metadata.num_rows != footer.rows_in
        or footer.ok + footer.failed != footer.rows_in
        or sum(footer.failures.values()) != footer.failed
    ):
        raise Conflict(
            f"{key}: {metadata.num_rows} rows, its account says {footer}", need="an account that adds up", do="Move it away"
        )
    return footer


def verify(log: Log, units: Iterable[Unit], *, fingerprint: str) -> Iterator[Footer]:
    """The footer of every unit, read back and held against the plan. Raises what `read_footer` raises, or Conflict."""
    with ThreadPoolExecutor(16) as pool:
        wanted = list(units)
        for unit, footer in zip(wanted, pool.map(lambda unit: read_footer(log, unit.id), wanted), strict=True):
            if footer.unit != unit.id or footer.fingerprint != fingerprint:
                got = f"{log.data_key(unit.id)}: holds unit {footer.unit}, fingerprint {footer.fingerprint}"
                raise Conflict(got, need=f"fingerprint {fingerprint}", do="Move it away and run again")
            yield footer


def validate(log: Log, *, fingerprint: str) -> tuple[list[Footer], list[str]]:
    """Does an output hold together? (footers of all units, what is wrong with them in sentences, nothing when all is well):
    every object is a sound unit, no input is in two of them, and every finished run's manifest says what its units say."""
    problems: list[str] = []
    footers: dict[str, Footer] = {}
    for unit_id in sorted(log.committed()):
        try:
            footers[unit_id] = read_footer(log, unit_id)
        except (Conflict, InputMissing) as error:  # anything else says nothing about the output
            problems.append(str(error))
            continue
        if footers[unit_id].unit != unit_id or footers[unit_id].fingerprint != fingerprint:
            problems.append(
                f"{log.data_key(unit_id)}: its account is of unit {footers[unit_id].unit}, {footers[unit_id].fingerprint}."
            )
    planned: dict[tuple[object, ...], str] = {}
    for run in log.runs():
        for unit in run.units:
            for part in unit.parts if unit.id in footers else ():
                other = planned.setdefault((*part.input, part.start), unit.id)
                if other != unit.id:
                    problems.append(f"{part.uri}: labelled twice, in units {other} and {unit.id}.")
        if run.finished:
            problems += _check_manifest(log, run.id, [footers.get(unit.id) for unit in run.units])
    unplanned = footers.keys() - set(planned.values())
    problems += [f"{log.data_key(unit_id)}: in no plan." for unit_id in sorted(unplanned)]
    return list(footers.values()), problems


def _check_manifest(log: Log, run_id: str, footers: list[Footer | None]) -> list[str]:
    key = log.run_key(run_id, "manifest.json")
    counts = json.loads(log.store.read(key))["rows"]
    missing = sum(footer is None for footer in footers)
    if missing:
        return [f"{key}: {missing} of its {len(footers)} units have no object."]
    sums = {
        name: sum(getattr(footer, field) for footer in footers)
        for name, field in (("in", "rows_in"), ("ok", "ok"), ("failed", "failed"))
    }
    stated = {name: counts[name] for name in sums}
    return [] if sums == stated else [f"{key}: states {stated}, its units hold {sums}."]
