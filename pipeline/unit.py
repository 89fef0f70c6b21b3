"""What commits as one object: a unit, made of pinned inputs or of a row range of one."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa

from pipeline.storage import Object

Pin = tuple[str, str, int]  # one version of an input: URI, etag, size

PIECES = 16  # of a unit that is split: 2,000 loose images are down to the culprit in three rounds and 48 objects, not in 2,000


@dataclass(frozen=True, slots=True)
class Part:
    """One pinned input of a unit, or the rows [start, stop) of it (Parquet; both None: all of it)."""

    uri: str
    etag: str
    size: int
    start: int | None = None
    stop: int | None = None

    @staticmethod
    def of(item: Object, start: int | None = None, stop: int | None = None) -> Part:
        return Part(item.uri, item.etag, item.size, start, stop)

    @property
    def pin(self) -> Pin:
        return self.uri, self.etag, self.size

    @property
    def object(self) -> Object:
        """The input in the version that was listed."""
        return Object(self.uri, self.size, self.etag)


@dataclass(frozen=True)
class Unit:
    """What commits as one object; its id follows from its parts alone. `kept`: names and types of its kept columns, which its
    plan says; None: each is as its file has it."""

    parts: tuple[Part, ...]
    kept: pa.Schema | None = field(default=None, compare=False, repr=False)

    @cached_property
    def id(self) -> str:
        """32 hex digits of sha256(canonical JSON of the parts)."""
        parts = [[part.uri, part.etag, part.size, part.start, part.stop] for part in self.parts]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()[:32]

    def pieces(self) -> list[Unit]:
        """The units that this one is split into: at most PIECES, of one part each where it has no more parts than that."""
        step = -(-len(self.parts) // PIECES)
        return [Unit(self.parts[at : at + step], self.kept) for at in range(0, len(self.parts), step)]


def dump_types(kept: pa.Schema | None) -> str | None:
    """Names and types as text: Arrow's own bytes of a schema, in base64."""
    return None if kept is None else b64encode(kept.serialize()).decode()


def parse_types(text: str | bytes | None) -> pa.Schema | None:
    """The inverse of `dump_types`. Raises ValueError or pa.ArrowException."""
    return None if text is None else pa.ipc.read_schema(pa.py_buffer(b64decode(text, validate=True)))


def bytes_of(units: Iterable[Unit]) -> int:
    """Bytes of the inputs of these units, each counted once: a large Parquet file is in many."""
    return sum({part.uri: part.size for unit in units for part in unit.parts}.values())
