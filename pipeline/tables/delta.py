"""A Delta table over the files of one fingerprint: `_delta_log` lies beside them, in `<output.uri>/<fingerprint>/`.

A change is one transaction that adds and removes files. Delta names a file by its path, so two writers that add the same file at
once leave it in the table once. The run's number goes in as the version of the application `nightlabel`, so any reader of Delta
can ask which run the table has.

VACUUM removes what lies below a table and is not in its log: here plans, tombstones, and what was not published yet. It removes
nothing younger than `delta.deletedFileRetentionDuration`, so a table that does not say how long that is gets fifty years.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from pipeline.columns import leaves
from pipeline.errors import StoreError, Temporary, first_line
from pipeline.spec import S3
from pipeline.storage import join
from pipeline.tables.published import Changed, File

_APP = "nightlabel"
_RETENTION = "delta.deletedFileRetentionDuration"
_ONCE = CommitProperties(max_commit_retries=0)  # a retry makes version 1 where another made version 0 at the same moment
_MARKS = "deletionVectors"
_KEPT = {_RETENTION: "interval 2600 weeks"}  # Spark knows no years here, and reckons back from now: not to before 1970


class Delta:
    """The table at `root`, made when there is none."""

    def __init__(self, root: str, name: str, s3: S3) -> None:
        self.where, self._name = root, name
        self._options = _options(s3) if root.startswith("s3://") else None
        self._table: DeltaTable | None = None

    def files(self) -> set[str]:
        """URIs of the files that the table has now. Raises Changed when another writer was faster, StoreError for a table that
        somebody has partitioned."""
        try:
            self._table = table = DeltaTable(self.where, storage_options=self._options)
            if partitions := table.metadata().partition_columns:
                got, need = f"the Delta table {self.where} is partitioned by {', '.join(partitions)}", "one that is not"
                raise StoreError(got, need=need, do="Drop the table, its _delta_log, and run again to publish")
            if _RETENTION not in table.metadata().configuration:
                table.alter.set_table_properties(_KEPT, commit_properties=_ONCE)
            paths = pa.table(table.get_add_actions()).column("path").to_pylist()
        except TableNotFoundError:
            self._table = None
            return set()
        except CommitFailedError as error:
            raise Changed from error
        except (DeltaError, OSError, ValueError) as error:
            raise _explained(self.where, error) from error
        return {join(self.where, path) for path in paths}

    def change(self, added: Sequence[File], removed: Sequence[str], *, run: str) -> None:
        """One transaction. Raises Changed when another writer was faster, StoreError for columns that Delta does not know or that
        are not the table's, and where rows of a file may be marked as deleted, which a replaced file would leave in the table."""
        try:
            table = self._table or self._create(added[0])
            if removed and _MARKS in (table.protocol().reader_features or ()):
                got, need = f"the Delta table {self.where} has {_MARKS}", "one without, to replace files that were retried"
                raise StoreError(got, need=need, do="Drop the table, its _delta_log, and run again to publish")
            schema = self._schema(table, added)
            now = int(time.time() * 1000)
            adds = [
                AddAction(self._path(file.uri), file.size, {}, now, True, json.dumps({"numRecords": file.rows})) for file in added
            ]
            removes = [RemoveAction(self._path(uri), True, now) for uri in removed]
            properties = CommitProperties(app_transactions=[Transaction(_APP, int(run))], max_commit_retries=0)
            table.create_write_transaction([*adds, *removes], "append", schema, commit_properties=properties)
        except CommitFailedError as error:
            raise Changed from error
        except (DeltaError, OSError, ValueError) as error:
            raise _explained(self.where, error) from error

    def _create(self, first: File) -> DeltaTable:
        """Version 0, or nothing: on top of a table that was made after the look, a change would add what that one has already."""
        options, schema = self._options, _converted(first)
        try:
            return DeltaTable.create(
                self.where,
                schema,
                mode="error",
                name=self._name,
                configuration=_KEPT,
                storage_options=options,
                commit_properties=_ONCE,
            )
        except DeltaError as error:  # it has no kind of its own for a table that is there
            if DeltaTable.is_deltatable(self.where, options):
                raise Changed from error
            raise

    def _schema(self, table: DeltaTable, added: Sequence[File]) -> Schema:
        """The table's. It may have columns that the files have not, and words on those that they have: somebody's own."""
        schema = table.schema()
        known = {field.name: field for field in Schema.from_arrow(schema.to_arrow()).fields}
        needs = {name for name, field in known.items() if not field.nullable}
        for file in added:
            fields = {field.name: field for field in _converted(file).fields}
            same = all(name in known and known[name].type == field.type for name, field in fields.items())
            if not (same and needs <= {name for name, field in fields.items() if not field.nullable}):
                raise StoreError(
                    f"{file.uri}: its columns are not those of the table {self.where}",
                    need="the same columns with the same types in every file",
                    do="Keep columns of one type with input.keep, or label into another output",
                )
        return schema

    def _path(self, uri: str) -> str:
        return uri.removeprefix(self.where.rstrip("/") + "/")


def lacks(field: pa.Field) -> bool:
    """Has Delta no type for it? Unsigned integers count as such: deltalake calls them signed ones of the same width, and then it
    reads none from half of their range on, and polars none at all."""
    try:
        _converted(File("", 0, 0, pa.schema([field])))
    except StoreError:
        return True
    return any(pa.types.is_unsigned_integer(kind) for kind in leaves(field.type))


def _converted(file: File) -> Schema:
    try:
        return Schema.from_arrow(file.schema)
    except Exception as error:  # deltalake raises a bare Exception for a type that Delta does not have
        reason = first_line(error)
        raise StoreError(
            f"{file.uri}: {reason}", need="columns that Delta has a type for", do="Leave it out of input.keep"
        ) from error


def _options(s3: S3) -> dict[str, str]:
    """Credentials it finds by itself, as s3fs does: environment, profile, role."""
    endpoint = s3.server
    options = {"AWS_REGION": s3.region or os.environ.get("AWS_REGION") or "us-east-1"}
    options |= {"AWS_ENDPOINT_URL": endpoint} if endpoint else {}
    options |= {"AWS_ALLOW_HTTP": "true"} if endpoint and endpoint.startswith("http://") else {}
    options |= {"AWS_SERVER_SIDE_ENCRYPTION": s3.encryption} if s3.encryption else {}
    options |= {"AWS_SSE_KMS_KEY_ID": s3.kms_key} if s3.kms_key else {}
    return options | ({"AWS_REQUEST_PAYER": "true"} if s3.requester_pays else {})


def _explained(where: str, error: Exception) -> Temporary:
    return Temporary(f"the Delta table {where}: {first_line(error)}", do="The labels are complete; run again to publish them")
