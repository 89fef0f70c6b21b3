"""Where the images of a training lie: in memory when they fit there with ease, else in a file beside the checkpoints that is
mapped into memory, so that the kernel keeps of it what it has room for.

A file that is whole serves again when the training goes on: nothing is fetched or decoded for a look a second time. Each worker
has one of its own, for they may be on machines of their own. It goes when the training is done.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pyarrow as pa
from pyarrow import ipc

from pipeline.prepare.checkpoint import explained, make_folder, open_part, replace
from pipeline.prepare.data import LeftOut
from pipeline.prepare.outcome import Say
from pipeline.prepare.room import Room
from pipeline.spec import Input
from pipeline.start import CODE_VERSION

_SCHEMA = pa.schema([("bytes", pa.large_binary()), ("label", pa.string())])


@dataclass(frozen=True)
class Found:
    """What was read: sound images, their labels as text, and those left out."""

    encoded: pa.ChunkedArray
    texts: list[str | None]
    left_out: LeftOut


@dataclass(frozen=True)
class Shelf:
    """For images of one `name`, and one worker of `beside` on this machine. Without a `folder` they are held in memory, however
    many there are."""

    folder: Path | None = None
    rank: int = 0
    beside: int = 1
    say: Say = field(default=lambda _: None)
    name: str = "train"

    def standing(self) -> Found | None:
        """What was put there, whole, by this version of the code."""
        images, record = self._places()
        if images is None or record is None or not (images.exists() and record.exists()):
            return None
        told = json.loads(record.read_text())
        if told["code"] != CODE_VERSION:
            return None
        self.say(f"images of before: {images}")
        return _mapped(images, LeftOut(Counter(told["left_out"]["counts"]), told["left_out"]["keys"]))

    def place(self, wanted: Input) -> Place:
        """For the images of `wanted`."""
        images, record = self._places()
        room = Room(wanted, folder=self.folder, beside=self.beside, say=self.say)
        if images is None or record is None or room.in_memory:
            return Place(room)
        self.say(f"the images go to {images}, for memory is short")
        return FilePlace(room, images, record)

    def _places(self) -> tuple[Path, Path] | tuple[None, None]:
        if self.folder is None:
            return None, None
        return self.folder / f"{self.name}-{self.rank}.arrow", self.folder / f"{self.name}-{self.rank}.json"


IN_MEMORY = Shelf()


class Place:
    """In memory. To be entered; what has failed leaves nothing behind."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._encoded: list[pa.ChunkedArray] = []
        self._texts: list[str | None] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failed: object) -> None: ...

    def add(self, source: str, encoded: pa.ChunkedArray, texts: list[str | None]) -> None:
        """Images of the shard `source` with their labels. Raises JobError when it is clear that they will not all fit."""
        self._put(encoded, texts)
        self._room.add(source, images=len(encoded), held=encoded.nbytes)

    def _put(self, encoded: pa.ChunkedArray, texts: list[str | None]) -> None:
        self._encoded.append(encoded)
        self._texts += texts

    def found(self, left_out: LeftOut) -> Found:
        """All of them, when there will be no more."""
        chunks = [chunk for array in self._encoded for chunk in array.chunks]
        return Found(pa.chunked_array(chunks, pa.large_binary()), self._texts, left_out)


class FilePlace(Place):
    """In a file, which has its name when it is whole: another run of this job may have the one of before mapped into its memory,
    or be writing its own. Raises StoreError where the disk does not take it."""

    def __init__(self, room: Room, images: Path, record: Path) -> None:
        super().__init__(room)
        self._images, self._record = images, record
        make_folder(images.parent)
        with explained(images):
            self._part, self._file = open_part(images)
        self._writer = ipc.new_file(self._file, _SCHEMA)

    def __exit__(self, *failed: object) -> None:
        with suppress(OSError):  # of a full disk, again; what is to be kept was flushed by `found`
            self._file.close()
        for path in (self._part, self._images, self._record) if failed[0] is not None else ():
            path.unlink(missing_ok=True)

    def _put(self, encoded: pa.ChunkedArray, texts: list[str | None]) -> None:
        with explained(self._images):
            self._writer.write_table(pa.table([encoded, pa.array(texts, pa.string())], schema=_SCHEMA))

    def found(self, left_out: LeftOut) -> Found:
        with explained(self._images):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._part, self._images)
        told = {"code": CODE_VERSION, "left_out": {"counts": left_out.counts, "keys": left_out.keys}}
        replace(self._record, json.dumps(told).encode())
        return _mapped(self._images, left_out)


def _mapped(images: Path, left_out: LeftOut) -> Found:
    table = ipc.open_file(pa.memory_map(str(images))).read_all()
    return Found(table["bytes"], table["label"].to_pylist(), left_out)
