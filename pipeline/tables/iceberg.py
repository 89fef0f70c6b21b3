"""An Iceberg table over the files of an output, in a catalog that pyiceberg knows by name (`.pyiceberg.yaml`, or
PYICEBERG_CATALOG__<NAME>__URI and its like in the environment, where the catalog's secrets belong too).

A change is one snapshot that adds and removes files; the catalog's own compare-and-swap decides between two writers, and the
slower one looks again. The snapshot's summary says of which run it is, `nightlabel.run`. Metadata lies in
`<output.uri>/<fingerprint>/iceberg/`.

The files are the only copy of the labels, and Trino's DROP TABLE and Spark's DROP TABLE PURGE and expire_snapshots remove those
of a table. `gc.enabled`, of a table that does not say, is therefore false: what a table drops stays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError, ValidationException
from pyiceberg.io.pyarrow import UnsupportedPyArrowTypeException, parquet_files_to_data_files
from pyiceberg.table import TableProperties, Transaction

from pipeline.errors import NightlabelError, StoreError, Temporary, first_line
from pipeline.spec import S3, Publish
from pipeline.storage import join
from pipeline.tables.published import Changed, File

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table


#: pyiceberg (0.12) takes them, and fails of the smallest and largest values that it writes down of every file's own columns.
_HALF_KNOWN = (pa.uint32(), pa.uint64(), pa.float16())


def lacks(field: pa.Field) -> bool:
    """Has Iceberg no type for it, or none that holds all of its values?"""
    try:
        Catalog._convert_schema_if_needed(pa.schema([field]))  # of format version 2, as tables are that are made here
    except (UnsupportedPyArrowTypeException, ValueError, TypeError):
        return True
    return field.type in _HALF_KNOWN


_KEPT = {"gc.enabled": "false"}


class _AsLookedAt(Transaction):
    """Committed on top of the snapshot that was looked at, or not at all. By itself pyiceberg (0.12) puts a change that came too
    late on top of what came in between: a unit's old version beside the retried one. Its retries stay on, for they find out
    whether a commit whose answer was lost is there, before they delete what it wrote."""

    def _rebuild_snapshot_updates(self) -> None:
        raise CommitFailedException("another snapshot came in between")


class Iceberg:
    """The table that `wanted` names, made when there is none; its metadata lies under `root`."""

    def __init__(self, wanted: Publish, table: str, root: str, s3: S3) -> None:
        self.where, self._root, self._catalog_name = table, root, wanted.catalog
        self._options = _options(s3) if root.startswith("s3://") else {}
        self._table: Table | None = None
        self._known: dict[str, DataFile] = {}

    def files(self) -> set[str]:
        """URIs of the files that the table has now."""
        try:
            self._catalog = load_catalog(self._catalog_name, **self._options)
            self._table = self._catalog.load_table(self.where)
            self._known = {task.file.file_path: task.file for task in self._table.scan().plan_files()}
        except NoSuchTableError:
            self._table = None
            return set()
        except Exception as error:  # pyiceberg's own have no root of their own, and catalogs raise what their drivers do
            raise self._explained(error) from error
        return set(self._known)

    def change(self, added: Sequence[File], removed: Sequence[str], *, run: str) -> None:
        """One snapshot. Raises Changed when another writer was faster, StoreError for columns that are not the table's."""
        try:
            table = self._table or self._create(added[0])
            with _AsLookedAt(table) as transaction:
                metadata = transaction.table_metadata
                names = metadata.schema().name_mapping.model_dump_json()  # the files carry names, no field ids
                wanted = {TableProperties.DEFAULT_NAME_MAPPING: names, **_KEPT}
                if missing := {name: value for name, value in wanted.items() if name not in metadata.properties}:
                    transaction.set_properties(missing)
                new = parquet_files_to_data_files(table.io, transaction.table_metadata, iter([file.uri for file in added]))
                with transaction.update_snapshot(snapshot_properties={"nightlabel.run": run}).overwrite() as snapshot:
                    for uri in removed:
                        snapshot.delete_data_file(self._known[uri])
                    for file in new:
                        snapshot.append_data_file(file)
        except (CommitFailedException, ValidationException, TableAlreadyExistsError) as error:
            raise Changed from error
        except Exception as error:  # as above
            raise self._explained(error) from error

    def _create(self, first: File) -> Table:
        namespace = self.where.rpartition(".")[0]
        try:
            self._catalog.create_namespace(namespace)
        except Exception:  # when another is making it at the same moment, whatever the catalog's driver raises
            if not self._catalog.namespace_exists(namespace):
                raise
        return self._catalog.create_table(self.where, first.schema, location=join(self._root, "iceberg"))

    def _explained(self, error: Exception) -> NightlabelError:
        """pyiceberg raises what its catalogs, its file systems and pydantic raise."""
        if isinstance(error, NightlabelError):
            return error
        got = f"the Iceberg table {self.where}: {first_line(error)}"
        if isinstance(error, (UnsupportedPyArrowTypeException, ValueError, TypeError)):
            need = f"a catalog {self._catalog_name} that pyiceberg can open, and columns that the table has"
            return StoreError(got, need=need, do="The labels are complete; mend it and run again to publish them")
        return Temporary(got, do="The labels are complete; run again to publish them")


def _options(s3: S3) -> dict[str, str]:
    endpoint, region = s3.server, s3.region or os.environ.get("AWS_REGION")
    return {name: value for name, value in {"s3.endpoint": endpoint, "s3.region": region}.items() if value}
