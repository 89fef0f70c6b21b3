"""What a table's files are to `publish` and to the two formats it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa


@dataclass(frozen=True)
class File:
    """A Parquet file to register; `size` in bytes."""

    uri: str
    size: int
    rows: int
    schema: pa.Schema


class Changed(Exception):
    """Another writer was faster: look again."""


class Table(Protocol):
    """A table that files are registered in; nothing is copied."""

    where: str

    def files(self) -> set[str]:
        """URIs of the files that it has now; none when it is not there yet."""

    def change(self, added: Sequence[File], removed: Sequence[str], *, run: str) -> None:
        """Adds and removes files at once, and makes the table when there is none. Raises Changed, StoreError or Temporary."""
