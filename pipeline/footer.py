"""What the object of a unit says of itself, in its Parquet metadata: the account of its rows, or that there are none and why.

An object without rows that says `split` is a tombstone: it stands where the unit would have been committed, so that nobody can
commit it any more and its inputs are free for other units. It has the columns of the rest, so whoever reads the folder passes
over it. Its size is a multiple of TOMBSTONE_BYTES: a listing tells which objects might be one, and only these are opened.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import Conflict, first_line
from pipeline.rows import OUTPUT_SCHEMA_VERSION
from pipeline.storage import RangeFile, Store
from pipeline.unit import Pin

TOMBSTONE_BYTES = 4096
#: A manifest says that all of a run stands, and nothing of it is looked at again.
MOVE = "Find out who wrote it, move it away, and the manifest of its run if there is one; then run again"
_KEY = b"nightlabel"
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Footer:
    """`rows_in = ok + failed`, or it was not written. `split`: why this is a tombstone, empty for a unit that is committed.
    `compared`: images that were decoded in two ways and labelled both times; `same_label` of them got the same label. `cautions`:
    what is to be known of the CPUs that labelled."""

    unit: str
    fingerprint: str
    rows_in: int = 0
    ok: int = 0
    failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[Pin, ...] = ()
    attempt: str = ""
    code: str = ""
    schema: int = OUTPUT_SCHEMA_VERSION
    split: str = ""
    compared: int = 0
    same_label: int = 0
    cautions: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[bytes, str]:
        """For `Table.replace_schema_metadata`."""
        return {_KEY: json.dumps(asdict(self))}


def tombstone(footer: Footer, schema: pa.Schema) -> bytes:
    """A Parquet file of no rows, padded behind its first four bytes, where without rows nothing points to."""
    sink = BytesIO()
    pq.ParquetWriter(sink, schema.with_metadata(footer.metadata)).close()
    data = sink.getvalue()
    return _MAGIC + bytes(-len(data) % TOMBSTONE_BYTES) + data[len(_MAGIC) :]


@contextmanager
def reading(key: str) -> Iterator[None]:
    """What shows that the object of a unit is none of ours, or has rotted, as Conflict."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        need = "a Parquet file with its account"
        raise Conflict(f"{key}: not a unit of nightlabel ({first_line(error)})", need=need, do=MOVE) from error


def parquet_file(data: bytes) -> pq.ParquetFile:
    """A file in memory, for `read_columns`."""
    return pq.ParquetFile(BytesIO(data), pre_buffer=False, page_checksum_verification=True)


def read_columns(file: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    """Not by Arrow's threads: one of them may hold bytes of Python's a little longer than it reads, and where it lets go of them
    when the command ends, the process is aborted (exit code 134, of 2 in 40 `validate` on a busy machine)."""
    return file.read(columns, use_threads=False)


def read_footer(store: Store, key: str) -> Footer:
    """What a unit's object says. Raises InputMissing when there is no object, Conflict when it is not one of ours."""
    with reading(key):
        metadata = pq.read_metadata(RangeFile(store, store.head(key)))
        fields = json.loads((metadata.metadata or {})[_KEY])
        fields["inputs"] = tuple((uri, etag, size) for uri, etag, size in fields["inputs"])
        fields["cautions"] = tuple(fields.get("cautions", ()))
        footer = Footer(**fields)
    if (
        metadata.num_rows != footer.rows_in
        or footer.ok + footer.failed != footer.rows_in
        or sum(footer.failures.values()) != footer.failed
        or (footer.split and footer.rows_in)
    ):
        said = f"{footer.rows_in:,} in = {footer.ok:,} ok + {footer.failed:,} failed"
        said += "".join(f", {name} {number:,}" for name, number in footer.failures.items())
        raise Conflict(f"{key}: {metadata.num_rows:,} rows, its account says {said}", need="an account that adds up", do=MOVE)
    return footer


def read_rows(store: Store, key: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a unit's object. Raises InputMissing, and Conflict when it is none of ours or has rotted."""
    data = store.read(key)
    with reading(key):
        rows = read_columns(parquet_file(data), columns)
        rows = rows if columns is None else rows.select(columns)
    return rows.replace_schema_metadata(None)


def read_types(store: Store, key: str, names: Sequence[str]) -> pa.Schema:
    """The types of these columns of a unit's object. Raises what `read_rows` raises."""
    with reading(key):
        schema = pq.read_schema(RangeFile(store, store.head(key)))
        return pa.schema([(name, schema.field(name).type) for name in names])


def check_rows(store: Store, key: str, footer: Footer) -> None:
    """Reads every page of a unit's object. Raises Conflict where a page has rotted, or the rows are not what its account says."""
    rows = read_rows(store, key)
    with reading(key):
        numbers, status, classes = (rows[name].to_pylist() for name in ("index", "status", "error_class"))
    failed = Counter(name for said, name in zip(status, classes, strict=True) if said == "failed")
    if status.count("ok") != footer.ok or failed != Counter(footer.failures) or numbers != list(range(footer.rows_in)):
        got = f"{key}: its rows are not those of its account"
        raise Conflict(got, need=f"{footer.ok:,} ok and {footer.failed:,} failed, numbered from 0", do=MOVE)


@dataclass
class Totals:
    """What the footers of several units say together."""

    units: int = 0
    rows_in: int = 0
    ok: int = 0
    failed: int = 0
    compared: int = 0
    same_label: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    cautions: set[str] = field(default_factory=set)

    @property
    def rows(self) -> dict[str, int]:
        """As a manifest states them."""
        return {"in": self.rows_in, "ok": self.ok, "failed": self.failed}


def totals(footers: Iterable[Footer]) -> Totals:
    """Takes one footer at a time: a million, with their inputs, are not to be held at once."""
    sums, failures = Totals(), Counter[str]()
    for footer in footers:
        sums.units += 1
        sums.rows_in += footer.rows_in
        sums.ok += footer.ok
        sums.failed += footer.failed
        sums.compared += footer.compared
        sums.same_label += footer.same_label
        sums.cautions.update(footer.cautions)
        failures.update(footer.failures)
    sums.failures = dict(sorted(failures.items()))
    return sums
