"""Objects by URI: list, ranged read pinned to one version, create if absent. `file://` and plain paths here, `s3://` in `s3`.

There is no overwrite and no delete, so nothing a run does can lose what stands there already. Every read can carry the etag
an object had when it was listed; another version is an error, never a mix of two. The price: an object is created from bytes
in memory, and a listing is sorted in memory (about 300 bytes an object; not every S3 server lists in byte order).

On disk `Object.uri` is an absolute path without a scheme, and the etag is the modification time in nanoseconds.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from pipeline.errors import InputChanged, InputMissing, NightlabelError, PermissionDenied, StoreError, Temporary
from pipeline.names import WILDCARD, anything, glob_matcher, glob_prefix, on_disk, spelt
from pipeline.spec import S3


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


def open_store(uri: str, s3: S3 | None = None) -> Store:
    """The store that serves `uri` and every other URI of its scheme. `s3` says how to reach it when it is S3."""
    if uri.startswith("s3://"):
        from pipeline.s3 import S3Store  # here, because S3 clients take a second to import

        return S3Store(s3 or S3())
    return Disk()


def join(uri: str, *parts: str) -> str:
    """`s3://b/x/` and `a`, `b/c` → `s3://b/x/a/b/c`; the same for paths."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@dataclass(frozen=True)
class Disk:
    """Local files. A create writes a temporary file beside the target and links it there: the link fails if the name is taken."""

    def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
        path = _path(uri) if glob else _path(uri).rstrip("/")
        base = glob_prefix(path) if glob else path
        if base == path and os.path.isfile(path) and not uri.endswith("/"):
            yield self.head(uri)
            return
        matches, folder = (anything, path) if base == path else (glob_matcher(path), os.path.dirname(base))
        with _explained(folder):
            found = sorted((item for item in _walk(folder, ()) if matches(item.uri)), key=lambda item: item.uri)
        for one, other in pairwise(found):
            if one.uri == other.uri:
                raise StoreError(f"{one.uri}: two files are spelt so, one in bytes that are not UTF-8", do="Rename one of them")
        yield from found

    def head(self, uri: str) -> Object:
        path = _path(uri)
        with _explained(path):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return _object(path, os.stat(path))

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Object | None = None) -> bytes:
        path = _path(uri)
        with _explained(path), open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if pinned is not None and (str(before.st_mtime_ns), before.st_size) != (pinned.etag, pinned.size):
                raise changed(path)  # by its size: `cp -p` and `rsync -t` give another file the same time
            end = before.st_size if stop is None else min(stop, before.st_size)
            file.seek(start)
            data = file.read(max(0, end - start))
            while len(data) < end - start and (chunk := file.read(end - start - len(data))):  # over 2 GiB
                data += chunk
            if len(data) < end - start or os.fstat(file.fileno()).st_mtime_ns != before.st_mtime_ns:  # written to while read
                raise changed(path)
            return data

    def create(self, uri: str, data: bytes) -> bool:
        path = _path(uri)
        folder = os.path.dirname(path)
        temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
        with _explained(path, writing=True):
            os.makedirs(folder, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                if os.path.lexists(temporary):
                    os.unlink(temporary)
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return True


def changed(uri: str) -> InputChanged:
    """The error for an object that is not the version that was pinned."""
    return InputChanged(
        f"{spelt(uri)} is not the version that was listed", need="inputs that stay as they are", do="Run again to take it up"
    )


def _path(uri: str) -> str:
    """Absolute, no scheme. Nothing is percent-decoded: a URI of ours is a name, character by character. Only bytes that are not
    UTF-8 are spelt out, since no column holds them: `caf\\xe9.jpg`."""
    return on_disk(os.path.abspath(uri.removeprefix("file://"))) + ("/" if WILDCARD.search(uri) and uri.endswith("/") else "")


def _object(path: str, stat: os.stat_result) -> Object:
    return Object(spelt(path), stat.st_size, str(stat.st_mtime_ns))


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Object]:
    """All files below a folder, in no order. Links are followed; a broken one is a file that whoever wants it cannot read. What
    goes away meanwhile, as a file does that gets its final name, is left for the next listing."""
    try:
        stat, scanned = os.stat(folder), os.scandir(folder)
    except FileNotFoundError:
        if not above:
            raise
        return
    if (stat.st_dev, stat.st_ino) in above:  # a link back to a folder that is being listed already
        scanned.close()
        return
    above = (*above, (stat.st_dev, stat.st_ino))
    with scanned as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                yield Object(spelt(entry.path), 0, "")
            elif entry.is_dir():
                yield from _walk(entry.path, above)
            elif entry.is_file():
                try:
                    yield _object(entry.path, entry.stat())
                except FileNotFoundError:
                    continue


#: Says nothing about the file: a failing or distant disk, no memory, too many open files.
_PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EBUSY}
)


@contextmanager
def _explained(path: str, *, writing: bool = False) -> Iterator[None]:
    """The operating system's errors, as ours."""
    try:
        yield
    except OSError as error:
        raise _explanation(error, path, writing) from error


def _explanation(error: OSError, path: str, writing: bool) -> NightlabelError:
    got = spelt(f"{error.filename or path}: {error.strerror or error}")
    if error.filename2 is not None and error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
        return StoreError(got, need="a file system with hard links", do="Write the output to another disk or to S3")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        right = "write" if writing else "read"
        return PermissionDenied(got, need=f"the right to {right} there", do="Change the rights, or name another place")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(got, need="room for the output", do="Free some space and run again; what is written stays valid")
    if error.errno in _PASSING:
        return Temporary(got, do="Check the disk and the limits of the process, then run again; what is done stays done")
    if not writing and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        return InputMissing(got, need="an existing file or folder", do="Check the path")
    return StoreError(got, need="a working disk and a path that can exist", do="Check the path and the disk")


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
