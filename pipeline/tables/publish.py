"""After the manifest: the files of an output registered as a Delta or Iceberg table, as they lie, nothing copied or rewritten.

What the table should have is the newest version of every unit (`generation`); what it has is asked; the difference is one
transaction. So a second time changes nothing, a publish that failed is made up for by the next run, and a retry replaces files.
A file without rows (a tombstone, an empty shard) is not registered. A table in which somebody else has put or rewritten files is
refused, since nobody could say then which images it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.columns import kept_types
from pipeline.cut import list_inputs
from pipeline.errors import JobError, StoreError, Temporary, first_line
from pipeline.extras import check_installed
from pipeline.footer import reading
from pipeline.job.uris import absolute
from pipeline.log import Log
from pipeline.names import spelt
from pipeline.nights.generation import newest
from pipeline.spec import Job, Publish
from pipeline.start import load_model, open_log
from pipeline.storage import Object, RangeFile, Store, below, open_input, side_by_side
from pipeline.tables.published import Changed, File, Table

ATTEMPTS = 5
_OURS = re.compile(r"[/=]([0-9a-f]{12})/(generations/\d+/)?data/[0-9a-f]{32}\.parquet$")
#: What deltalake (1.6) makes another path of, and finds no table there, for ever: it reads paths as URLs, and does so twice. On
#: S3 it and pyiceberg leave out what stands behind a `#`.
_MISREAD = r"%[0-9A-Fa-f]{2}|\\|[\x00-\x1f\x7f]"


@dataclass(frozen=True)
class Published:
    """The table, and what this run changed in it."""

    format: str
    table: str
    added: int
    removed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        what = f"{self.added:,} files added" + (f", {self.removed:,} replaced" if self.removed else "")
        return f"table   {self.format} {self.table}: {what if self.added or self.removed else 'has everything'}"


def check_publisher(job: Job) -> None:
    """Raises UnfitError when what the job's table needs is not installed, or the table cannot lie where the output does: better
    before the images than after them."""
    if job.publish is None:
        return
    check_installed(job.publish.format)
    place = spelt(absolute(job.output.uri))
    misread = [*([_MISREAD] if job.publish.format == "delta" else []), *(["#"] if place.startswith("s3://") else [])]
    if misread and (found := re.search("|".join(misread), place)):
        got = f"publish: the output lies in {place}, and {job.publish.format} takes {found[0]!r} in it for something else"
        raise JobError(got, need="a path without it", do="Change output.uri, or leave publish out")


def check_columns(job: Job) -> None:
    """Raises JobError for a kept column that the job's table has no type for. What the output has counts, whatever has become of
    the inputs since; a new output would have the types of these."""
    if job.publish is None or job.input.format != "parquet" or not job.input.keep:
        return
    if job.publish.format == "delta":
        from pipeline.tables.delta import lacks
    else:
        from pipeline.tables.iceberg import lacks
    log = open_log(job, load_model(job, weights=False))
    kept, where, way = log.kept(), log.root, "label into another output"
    if kept is None:
        store, where, way = open_input(job.input), job.input.uris[0], "write it as another type"
        kept = kept_types(store, job.input, list_inputs(store, job.input, some=True).inputs)
    for field in kept or ():
        if lacks(field):
            got = f"publish: column {field.name} of {where} is {field.type}, which {job.publish.format} has not"
            need = "columns that go into the table as they are"
            raise JobError(got, need=need, do=f"Leave it out of input.keep, or {way}")


def publish(job: Job, log: Log) -> Published | None:
    """Brings the job's table up to date; None when it wants none. The transaction says which run was the last.

    Raises UnfitError: not installed, columns or a table that cannot be; Conflict: a file is none of ours; Temporary: run again.
    """
    wanted = job.publish
    if wanted is None:
        return None
    check_publisher(job)
    table = _table(wanted, job, log)
    why = ""
    for _ in range(ATTEMPTS):
        try:
            return _bring_up_to_date(wanted, table, log)
        except Changed as error:
            why = first_line(error.__cause__ or error)
    raise Temporary(f"the table {table.where} took no change, {ATTEMPTS} times: {why}", do="Run again to publish")


def _table(wanted: Publish, job: Job, log: Log) -> Table:
    if wanted.format == "delta":
        from pipeline.tables.delta import Delta

        return Delta(log.root, job.name, job.output.s3)
    from pipeline.tables.iceberg import Iceberg

    return Iceberg(wanted, wanted.table.replace("{fingerprint}", log.fingerprint), log.root, job.output.s3)


def _bring_up_to_date(wanted: Publish, table: Table, log: Log) -> Published:
    has = table.files()
    foreign = [uri for uri in has if not _is_ours(uri, log)]
    if foreign:
        raise StoreError(
            f"the table {table.where} holds {foreign[0]}",
            need=f"nothing but the files under {log.root}"
            + (", or its like of other days" if wanted.format == "iceberg" else ""),
            do="Compact a copy instead, and name another table for another model"
            + (", with {fingerprint} in publish.table" if wanted.format == "iceberg" else ""),
        )
    should = {item.uri: item for item in newest(log).values()}
    added = _look(log.store, [item for uri, item in should.items() if uri not in has])
    removed = sorted(uri for uri in has if uri.startswith(log.root.rstrip("/") + "/") and uri not in should)
    if added or removed:
        runs = (item.uri.rpartition("/runs/")[2].partition("/")[0] for item in below(log.store, log.root, "runs"))
        table.change(added, removed, run=max(runs, default="0"))
    return Published(wanted.format, table.where, len(added), len(removed))


def _is_ours(uri: str, log: Log) -> bool:
    """Of this fingerprint; under another day's root when the output's URI has a date."""
    found = _OURS.search(uri)
    return found is not None and found[1] == log.fingerprint


def _look(store: Store, objects: Sequence[Object]) -> list[File]:
    def look(item: Object) -> File:
        with reading(item.uri):
            metadata = pq.read_metadata(RangeFile(store, item))
            return File(item.uri, item.size, metadata.num_rows, metadata.schema.to_arrow_schema().remove_metadata())

    return [file for file in side_by_side(look, objects) if file.rows]
