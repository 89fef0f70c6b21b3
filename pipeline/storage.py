"""Objects by URI: list, ranged read pinned to one version, create if absent. What a store is; `disk` and `s3` are the two.

There is no overwrite and no delete, so nothing a run does can lose what stands there already. Every read can carry the etag
an object had when it was listed; another version is an error, never a mix of two. The price: an object is created from bytes
in memory, and a listing is sorted in memory (about 300 bytes an object; not every S3 server lists in byte order).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.errors import InputChanged, InputMissing
from pipeline.names import spelt
from pipeline.spec import S3, Input

T = TypeVar("T")
R = TypeVar("R")

CONNECTIONS = 16  # to a store at the same time: 100-200 ms to the first byte on each, on one 5-10 loose images a second
_AHEAD = 1_000  # results that wait to be taken: a million footers, with their inputs, would be gigabytes


@dataclass(frozen=True, slots=True)
class Object:
    """One version of a stored object. `size` in bytes; `etag` unquoted."""

    uri: str
    size: int
    etag: str


class Store(Protocol):
    """What a run needs of a store. Stores are small, picklable, and connect on first use, in whichever process that is.

    Beside the errors named below every method raises PermissionDenied, Temporary (retries are used up) and StoreError.
    """

    def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
        """Objects in byte order of their URIs. `uri` is an object, a folder (all below it) or a glob: `*`, `?` and `[..]` stay
        within one segment, `**` does not; a glob that ends with `/` means all below. No match is no error, a missing bucket
        or folder is InputMissing. Not listed: folder markers, and on disk names that begin with a dot. Without `glob` it is a
        folder, whatever its name looks like: one of ours may lie in somebody's `job[1]`."""

    def head(self, uri: str) -> Object:
        """The object as it is now. Raises InputMissing."""

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Object | None = None) -> bytes:
        """Bytes [start, stop), as in a slice. Raises InputMissing, and InputChanged when it is not the version `pinned`."""

    def create(self, uri: str, data: bytes) -> bool:
        """Create an object that is not there yet, whole or not at all. True: created. False: something stands there, which may
        be our own when a reply was lost; the caller looks."""


def open_store(uri: str, s3: S3 | None = None, *, silence: float = 60.0) -> Store:
    """The store that serves `uri` and every other URI of its scheme. `s3` says how to reach it when it is S3, `silence` after how
    many seconds without a byte it is asked again."""
    if uri.startswith("s3://"):
        from pipeline.s3 import S3Store  # here, because S3 clients take a second to import

        return S3Store(s3 or S3(), timeouts=(5.0, silence))
    from pipeline.disk import Disk

    return Disk()


def check_writable(uri: str) -> None:
    """Before hours of work, not after them: raises StoreError where a file on disk is in the way of the folder `uri`,
    PermissionDenied where it cannot be written. What a bucket allows is seen when something is written there."""
    if not uri.startswith("s3://"):
        from pipeline import disk

        disk.check_writable(uri)


def open_input(wanted: Input) -> Store:
    """The store that has the inputs, all of which are in one."""
    return open_store(wanted.uris[0], wanted.s3)


def join(uri: str, *parts: str) -> str:
    """`s3://b/x/` and `a`, `b/c` → `s3://b/x/a/b/c`; the same for paths."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def head_if_there(store: Store, uri: str) -> Object | None:
    """The object as it is now, None when there is none."""
    try:
        return store.head(uri)
    except InputMissing:
        return None


def read_if_there(store: Store, uri: str) -> bytes | None:
    """All of an object, None when there is none."""
    try:
        return store.read(uri)
    except InputMissing:
        return None


def below(store: Store, *folder: str) -> list[Object]:
    """Everything in a folder of ours, whose name is no glob; nothing when it is not there yet."""
    try:
        return list(store.list(join(*folder) + "/", glob=False))
    except InputMissing:
        return []


def side_by_side(call: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """What `call` gives for each of the items, in their order, some CONNECTIONS of them at a time."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for at in range(0, len(items), _AHEAD):
            yield from pool.map(call, items[at : at + _AHEAD])


def changed(uri: str) -> InputChanged:
    """The error for an object that is not the version that was pinned."""
    return InputChanged(
        f"{spelt(uri)} is not the version that was listed", need="inputs that stay as they are", do="Run again to take it up"
    )


class RangeFile(io.RawIOBase):
    """A seekable, read-only file over ranged reads of one pinned object, for `pyarrow.parquet`. Every read is a request: wrap it
    in `io.BufferedReader`, or let Arrow pre-buffer. Raises what `Store.read` raises."""

    def __init__(self, store: Store, pinned: Object) -> None:
        self._store, self._pinned, self._at = store, pinned, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._pinned.size}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}")
        self._at = at
        return at

    def readall(self) -> bytes:
        return self._take(self._pinned.size - self._at)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # the declared type is any buffer
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _take(self, size: int) -> bytes:
        stop = min(self._at + size, self._pinned.size)
        data = self._store.read(self._pinned.uri, start=self._at, stop=stop, pinned=self._pinned) if stop > self._at else b""
        self._at += len(data)
        return data
