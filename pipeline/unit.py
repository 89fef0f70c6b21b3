"""What commits as one object: a unit, made of pinned inputs or of a row range of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

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
    """What commits as one object; its id follows from its parts alone."""

    parts: tuple[Part, ...]

    @cached_property
    def id(self) -> str:
        """32 hex digits of sha256(canonical JSON of the parts)."""
        parts = [[part.uri, part.etag, part.size, part.start, part.stop] for part in self.parts]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()[:32]

    def pieces(self) -> list[Unit]:
        """The units that this one is split into: at most PIECES, of one part each where it has no more parts than that."""
        step = -(-len(self.parts) // PIECES)
        return [Unit(self.parts[at : at + step]) for at in range(0, len(self.parts), step)]


def bytes_of(units: Iterable[Unit]) -> int:
    """Bytes of the inputs of these units, each counted once: a large Parquet file is in many."""
    return sum({part.uri: part.size for unit in units for part in unit.parts}.values())
