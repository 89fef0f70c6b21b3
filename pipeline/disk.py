"""The local disk as a store: plain paths and `file://`. `Object.uri` is an absolute path without a scheme, the etag the
modification time in nanoseconds."""

from __future__ import annotations

import errno
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from pipeline.errors import InputMissing, NightlabelError, PermissionDenied, StoreError, Temporary
from pipeline.names import WILDCARD, anything, from_here, glob_matcher, glob_prefix, on_disk, spelt
from pipeline.storage import Object, changed


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
        # No deeper than the glob: lost+found/ beside `*.tar` may be closed, raw/ hold a million files.
        deep = base == path or "**" in path or path.endswith("/")
        levels = math.inf if deep else path.removeprefix(folder.rstrip("/")).count("/")
        with _explained(folder):
            if not glob:
                _nearest(folder)
            found = sorted((item for item in _walk(folder, (), levels) if matches(item.uri)), key=lambda item: item.uri)
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
        with _explained(path), open(path, "rb", buffering=0, opener=_at_once) as file:
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


def _path(uri: str) -> str:
    """Absolute, no scheme. Nothing is percent-decoded: a URI of ours is a name, character by character. Only bytes that are not
    UTF-8 are spelt out, since no column holds them: `caf\\xe9.jpg`."""
    return on_disk(from_here(uri.removeprefix("file://"))) + ("/" if WILDCARD.search(uri) and uri.endswith("/") else "")


def _at_once(path: str, flags: int) -> int:
    """What has become a pipe since it was listed is opened without waiting for who writes into it, for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_writable(uri: str) -> None:
    """Raises StoreError where a file is in the way of the folder, PermissionDenied where nothing may be made in it."""
    there = _nearest(_path(uri).rstrip("/") or "/")
    if not os.access(there, os.W_OK | os.X_OK):
        got = f"{spelt(there)} cannot be written"
        raise PermissionDenied(got, need="the right to write there", do="Change the rights, or name another place")


def _nearest(folder: str) -> str:
    """The folder, or what there is above it. Raises StoreError where that is a file: such a folder is not just absent."""
    there = folder
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if os.path.isfile(there):
        raise StoreError(f"{spelt(there)} is a file", need="a folder, or nothing yet", do="Name another place, or move it away")
    return there


def _object(path: str, stat: os.stat_result) -> Object:
    return Object(spelt(path), stat.st_size, str(stat.st_mtime_ns))


def _walk(folder: str, above: tuple[tuple[int, int], ...], levels: float) -> Iterator[Object]:
    """All files below a folder, down to so many levels, in no order. Links are followed; a broken one is a file that cannot be
    read. What goes away meanwhile, as a file does that gets its final name, is left for the next listing."""
    try:
        stat, scanned = os.stat(folder), os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
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
                if len(above) < levels:
                    yield from _walk(entry.path, above, levels)
            elif entry.is_file():
                try:
                    yield _object(entry.path, entry.stat())
                except FileNotFoundError:
                    continue


#: Says nothing about the file: a failing or distant disk (ENOTCONN: what had mounted it is dead), no memory, too many open files.
_PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR),
        *(errno.EBUSY, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
#: Nothing to read has this name: ENXIO and ENODEV say that it is a socket, or a device that is not there.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})


@contextmanager
def _explained(path: str, *, writing: bool = False) -> Iterator[None]:
    """The operating system's errors, as ours."""
    try:
        yield
    except OSError as error:
        raise _explanation(error, path, writing) from error


def _explanation(error: OSError, path: str, writing: bool) -> NightlabelError:
    got = spelt(f"{error.filename or path}: {error.strerror or error}")
    if error.filename2 is not None and error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
        return StoreError(got, need="a file system with hard links", do="Write the output to another disk or to S3")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        right = "write" if writing else "read"
        return PermissionDenied(got, need=f"the right to {right} there", do="Change the rights, or name another place")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(got, need="room for the output", do="Free some space and run again; what is written stays valid")
    if error.errno in _PASSING:
        return Temporary(got, do="Check the disk and the limits of the process, then run again; what is done stays done")
    if not writing and error.errno in _ABSENT:
        return InputMissing(got, need="an existing file or folder", do="Check the path")
    return StoreError(got, need="a working disk and a path that can exist", do="Check the path and the disk")
