"""WebDataset tars, read strictly and in one go: a tar that is cut anywhere is an error, never fewer images.

Python's tarfile stops without a word at a damaged header and at a missing end; here every header must be sound, the two zero
blocks must be there, and nothing may follow them. Only the arithmetic of a header's fields is taken from tarfile.
"""

from __future__ import annotations

import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipeline.errors import ShardError
from pipeline.names import spelt
from pipeline.rows import FETCH_LFS, LFS_POINTER, UnitError
from pipeline.storage import Object, Store

# One S3 connection carries about 87 MB/s and its first byte takes 100-200 ms: an 8 MiB range spends most of its time waiting, so
# four are under way at once. They cost a reader 40 MiB.
CHUNK = 8 * 2**20
AHEAD = 4
_BLOCK = 512
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_EMPTY = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)  # POSIX: any other type is a file
_UNREAD = (tarfile.GNUTYPE_SPARSE, b"M")
#: What a file that is called a tar may be instead, by its first bytes.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK": "zip"}
_PADDING = 2**20  # of zeros behind the end mark: tar fills up to 10 KiB, and a hundred times that when told to


_number: Callable[[bytes], int] = tarfile.nti  # type: ignore[attr-defined]  # octal, or base 256


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


@dataclass(slots=True)
class _Header:
    name: str
    type: bytes
    size: int


class Stream:
    """A pinned object from front to back in ranged reads, `ahead` of them under way. Use as a context manager."""

    def __init__(self, store: Store, item: Object, *, chunk: int = CHUNK, ahead: int = AHEAD) -> None:
        self._store, self.item = store, item
        self._pool = ThreadPoolExecutor(ahead)
        self._chunk, self._ahead = chunk, ahead
        self._flying: deque[Future[bytes]] = deque()
        self._begin(0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, at: int) -> None:
        self.at, self._buffer = at, memoryview(b"")
        # One range of an empty object too: on disk it may be a link to nothing.
        self._starts = iter(range(at, self.item.size, self._chunk) or [at])
        for _ in range(self._ahead):
            self._fetch()

    def _fetch(self) -> None:
        start = next(self._starts, None)
        if start is not None:
            stop = min(start + self._chunk, self.item.size)
            read = partial(self._store.read, self.item.uri, start=start, stop=stop, pinned=self.item)
            self._flying.append(self._pool.submit(read))

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, fewer only at the end of the object; a view where they lie in one range."""
        pieces, self.at = [], self.at + count
        while count > len(self._buffer) and self._flying:
            pieces.append(self._buffer)
            count -= len(self._buffer)
            self._buffer = memoryview(self._flying.popleft().result())
            self._fetch()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return memoryview(b"".join([*pieces, taken])) if any(pieces) else taken

    def go_on(self, at: int) -> None:
        """To byte `at`; what lies before it and is not under way is not fetched."""
        if at - self.at <= len(self._buffer) + len(self._flying) * self._chunk:
            self.take(at - self.at)
            return
        while self._flying:
            self._flying.pop().cancel()
        self._begin(at)


@dataclass(frozen=True)
class Member:
    """A file in a tar. `size` is None for a link: what it points at may have passed, and is not kept."""

    name: str
    size: int | None
    stream: Stream

    def read(self) -> memoryview:
        """Its bytes; once, and before the next member is asked for."""
        return self.stream.take(self.size or 0)


def members(stream: Stream) -> Iterator[Member]:
    """Every file, in order; long names of GNU and PAX resolved. Raises ShardError: TAR_TRUNCATED, TAR_NO_EOF (cut at a border),
    TAR_CORRUPT (not a tar, a damaged or unsupported header)."""
    uri, name, count = stream.item.uri, "", 0
    override: dict[str, str] = {}
    while (header := _header(stream, count)) is not None:
        header.name = spelt(override.get("path") or name or header.name)
        if header.type in _UNREAD or any(key.startswith("GNU.sparse.") for key in override):
            what = f"{header.name} is a sparse file, or goes on in another volume"
            raise _corrupt(uri, what, do="Pack it without --sparse, in one volume")
        size = _size(stream, header, override, count) if header.type not in _EMPTY else None
        end = stream.at + -(-(size or 0) // _BLOCK) * _BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = bytes(stream.take(size or 0)).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            override = _pax(bytes(stream.take(size or 0)), uri)
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            count += 1
            if size is not None or header.type in _LINKS:
                yield Member(header.name, size, stream)
            name, override = "", {}
        stream.go_on(end)


def _size(stream: Stream, header: _Header, override: dict[str, str], count: int) -> int:
    stated = override.get("size", str(header.size))
    if not (stated.isascii() and stated.isdigit()):  # PAX says nonsense, or a base-256 field is negative
        raise _corrupt(stream.item.uri, f"{header.name} has {stated[:40]!r} bytes")
    if len(stated) > 19 or int(stated) > stream.item.size - stream.at:
        got = f"{stream.item.uri}: ends inside member {count + 1} ({header.name})"
        raise ShardError(UnitError.TAR_TRUNCATED, got, need="a whole tar", do="Upload the shard again")
    return int(stated)


def _header(stream: Stream, count: int) -> _Header | None:
    """The next header, or None at the end that a tar must have."""
    uri = stream.item.uri
    block = bytes(stream.take(_BLOCK))
    if 0 < len(block) < _BLOCK:
        if count == 0:
            raise _no_tar(uri, block)
        got = f"{uri}: ends inside the header of member {count + 1}"
        raise ShardError(UnitError.TAR_TRUNCATED, got, need="a whole tar", do="Upload the shard again")
    if block and any(block):
        try:
            return _parsed(block)
        except tarfile.HeaderError as error:
            raise (_corrupt(uri, f"damaged header after {count} members") if count else _no_tar(uri, block)) from error
    if block and bytes(stream.take(_BLOCK)) == bytes(_BLOCK):
        _check_end(stream, count)
        return None
    if block:
        got = f"{uri}: one zero block at the end, after {count} members"
    else:
        got = f"{uri}: no end mark after {count} members, so it may have been cut" if stream.item.size else f"{uri}: 0 bytes"
    raise ShardError(UnitError.TAR_NO_EOF, got, need="two zero blocks at the end of a tar", do="Upload the shard again")


def _check_end(stream: Stream, count: int) -> None:
    """Two blocks of zeros are the end of a tar, and the middle of two that were joined by `cat`, or of one with a hole."""
    left = stream.item.size - stream.at
    if left > _PADDING:
        raise _corrupt(stream.item.uri, f"{left:,} bytes behind the end mark after {count} members")
    if any(bytes(stream.take(left))):
        raise _corrupt(stream.item.uri, f"goes on behind the end mark after {count} members, as two tars in one file do")


def _parsed(block: bytes) -> _Header:
    """What a header of 512 bytes says of name, type and size, and nothing else: TarInfo.frombuf reads ten fields more, 20 us of
    the 107 that a member took. Raises tarfile.HeaderError."""
    stated = _number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stated != total and stated not in tarfile.calc_chksums(block):  # type: ignore[attr-defined]  # some sum up signed bytes
        raise tarfile.HeaderError("bad checksum")
    name, prefix, kind = _text(block[:100]), _text(block[345:500]), block[156:157]
    if kind == tarfile.AREGTYPE and name.endswith("/"):  # how tars of old say folder
        kind = tarfile.DIRTYPE
    if prefix and kind not in tarfile.GNU_TYPES and block[257:265] != tarfile.GNU_MAGIC:  # which has times in its place
        name = f"{prefix}/{name}"
    return _Header(name, kind, _number(block[124:136]))


def _no_tar(uri: str, block: bytes) -> ShardError:
    """What is said of a file that begins with `block`."""
    if block.startswith(LFS_POINTER):
        return _corrupt(uri, "a Git LFS pointer in place of the shard", do=FETCH_LFS)
    packed = next((name for start, name in _PACKED.items() if block.startswith(start)), None)
    return _corrupt(uri, f"packed with {packed}", do="Decompress it first") if packed else _corrupt(uri, "not a tar")


def _corrupt(uri: str, what: str, *, do: str = "Replace the shard") -> ShardError:
    return ShardError(UnitError.TAR_CORRUPT, f"{uri}: {what}", need="an uncompressed POSIX or GNU tar", do=do)


def _pax(content: bytes, uri: str) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n` of a PAX header."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 19 or not 0 < int(digits) <= len(content):
            raise _corrupt(uri, "damaged PAX header")
        record, content = content[len(digits) + 1 : int(digits) - 1], content[int(digits) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
