"""Inputs → units: list what the job names, pin it, cut it into pieces that commit as one.

Small shards are joined, large Parquet files split by row groups, loose images bundled. Tars are never split: finding a member's
border means reading the tar. Without opening shards the number of images is unknown, so sizes stand in for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow.parquet as pq

from pipeline.columns import UNREADABLE, check_columns
from pipeline.errors import InputError, InputMissing, JobError, NightlabelError, PermissionDenied, Temporary, Unidentified
from pipeline.job.uris import absolute, absolute_input
from pipeline.names import WILDCARD, glob_prefix
from pipeline.spec import Input
from pipeline.storage import Object, RangeFile, Store, side_by_side
from pipeline.unit import Part, Unit

UNIT_BYTES = 256 * 2**20  # about 2,400 photographs of 110 kB; a unit lost to a crash is a minute of one GPU at most
BUNDLE = 2_000  # loose images of a unit: at 100 ms for a first byte and 16 connections, 13 s of latency
#: What looks like an image by its name, and so becomes a row, in tars and loose. The content decides what becomes of it: what is
#: none of the six formats that `decode` reads is a failed row, UNSUPPORTED_FORMAT where the bytes are known.
IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "jif", "pjpeg", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "mpo"),
        *("heic", "heif", "hif", "avif", "jp2", "j2k", "jpf", "jpx", "j2c", "jxl", "psd", "svg", "ico", "icns"),
        *("ppm", "pgm", "pbm", "pnm", "pam", "pfm", "tga", "exr", "hdr", "dds", "qoi", "xcf"),
        *("dng", "cr2", "cr3", "crw", "nef", "arw", "orf", "rw2", "raf", "pef", "srw"),
    }
)
_BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")
_REMEDIES = {
    **dict.fromkeys(("gz", "tgz", "bz2", "xz", "zst"), "decompress them first: a tar is read as it is"),
    "zip": "unpack them: tars are read, and loose images",
    "arrow": "write them as Parquet first, as to_parquet() of datasets does",
}
_SUFFIX = {"webdataset": frozenset({"tar"}), "parquet": frozenset({"parquet", "pq"}), "images": IMAGE_SUFFIXES}


@dataclass(frozen=True)
class Listing:
    """The inputs of a job in byte order of their URIs; how many objects of each suffix stand beside them and are not read; what
    is wrong with a URI of the job that has no input while others have."""

    inputs: list[Object]
    ignored: Mapping[str, int]
    missing: Mapping[str, InputMissing] = field(default_factory=dict)


def root_of(uri: str) -> str:
    """The folder that a prefix, glob or single object starts from, spelt as in listed URIs: keys of images are relative to it."""
    base = glob_prefix(uri)
    if base != uri or _suffix(uri) in IMAGE_SUFFIXES:
        base = base.rpartition("/")[0]
    return absolute(base).rstrip("/") + "/"


def list_inputs(store: Store, wanted: Input, *, some: bool = False) -> Listing:
    """Every input once. Raises InputMissing: a prefix that is absent or holds nothing of the format, with `some` only when there
    is no input at all; JobError: see `absolute_input`."""
    found: dict[str, Object] = {}
    others: dict[str, str] = {}
    missing: dict[str, InputMissing] = {}
    for uri in wanted.uris:
        fitting: dict[str, Object] = {}
        other: dict[str, str] = {}
        place = absolute_input(uri)
        try:
            _sort(store, wanted, place, fitting, other)
            if [*other] == [place] and not fitting and place.startswith("s3://"):  # there a folder may be called like an object
                _sort(store, wanted, f"{place}/", fitting, other)
            if not fitting:
                raise _nothing(uri, wanted, other)
        except InputMissing as error:
            missing[uri] = _unexpanded(uri, error)
        found |= fitting
        others |= other
    if missing and not (some and found):
        raise next(iter(missing.values()))
    return Listing([found[uri] for uri in sorted(found)], _by_kind(others), missing)


def _sort(store: Store, wanted: Input, place: str, fitting: dict[str, Object], other: dict[str, str]) -> None:
    """Puts what is listed at `place` into `fitting`, or its kind into `other`."""
    named = frozenset(place.split("/"))
    for item in store.list(place):
        kind = (_writers_folder(item.uri, named) if wanted.format == "parquet" else "") or _kind(item.uri)
        if kind in _SUFFIX[wanted.format]:
            fitting[item.uri] = item
        else:
            other[item.uri] = kind


def _nothing(uri: str, wanted: Input, other: Mapping[str, str]) -> InputMissing:
    suffixes = _SUFFIX[wanted.format]
    there = f"{count_suffixes(_by_kind(other))}, no {wanted.format}" if other else "nothing there"
    need = f"names that end in .{' or .'.join(sorted(suffixes))}" if len(suffixes) < 5 else "names of images, such as .jpg"
    meant = next((name for name, others in _SUFFIX.items() if others & {*other.values()}), None)
    do = f"Set input.format: {meant}, or check input.uri" if meant else "Check input.uri and input.format"
    do = "; ".join([do, *_hints(uri, other)])
    return InputMissing(f"{uri}: {there}", need=need, do=do)


def _hints(uri: str, other: Mapping[str, str]) -> Iterator[str]:
    if "[" in uri:
        yield "a bracket in a name is written [[]"
    if WILDCARD.search(uri) and not uri.endswith("/"):
        yield "a glob names files, and folders with a / at its end"
    yield from dict.fromkeys(_REMEDIES[kind] for kind in _by_kind(other) if kind in _REMEDIES)


def _unexpanded(uri: str, error: InputMissing) -> InputMissing:
    """The error, with a word on braces, in which WebDataset writes a range of shards and a shell a choice."""
    if not _BRACES.search(uri):
        return error
    return InputMissing(error.got, need=error.need, do="Braces are not expanded: give a glob such as shard-*.tar, or a list")


def count_suffixes(counts: Mapping[str, int], what: str = "object") -> str:
    """`5 objects (3 .tgz, 1 .txt, 1 in _temporary/)`, the commonest first."""
    named = [f"{count:,} {_spoken(kind)}" for kind, count in list(counts.items())[:5]]
    rest = sum(list(counts.values())[5:])
    total = sum(counts.values())
    more = [f"{rest:,} others"] if rest else []
    return f"{total:,} {what if total == 1 else f'{what}s'} ({', '.join(named + more)})"


def _spoken(kind: str) -> str:
    return f"in {kind}" if kind.endswith("/") else f".{kind}" if kind else "without suffix"


def _by_kind(others: Mapping[str, str]) -> dict[str, int]:
    return dict(Counter(others.values()).most_common())


def _writers_folder(uri: str, named: frozenset[str]) -> str:
    """The folder that a file lies in and whose name begins with `_`: Spark's `_temporary/`, of what is not written yet, or
    Delta's `_delta_log/`. Spark and Arrow read nothing there. One with `=` is a partition; one in `named` is meant."""
    folders = uri.split("/")[:-1] if "/_" in uri else []
    return next((f"{name}/" for name in folders if name.startswith("_") and "=" not in name and name not in named), "")


def _kind(uri: str) -> str:
    """The suffix, or `_*` for what macOS puts beside a file on a foreign disk: `._a.jpg` is no image, `._0.tar` no tar."""
    return "_*" if uri.rpartition("/")[2].startswith("._") else _suffix(uri)


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower() if "." in uri.rpartition("/")[2] else ""


def check_inputs(store: Store, wanted: Input, inputs: Sequence[Object]) -> None:
    """Raises JobError where none of the Parquet files has the columns that the job names: better said now than by every unit,
    after Ray has started. As a rule the first one has them, and no other is opened."""
    look = partial(_complaint, store, wanted)
    complaints: list[Exception] = []
    for some in (inputs[:1], inputs[1:]) if wanted.format == "parquet" else ():
        for complaint in side_by_side(look, some):
            if complaint is None:
                return
            complaints.append(complaint)
    if unfit := next((error for error in complaints if isinstance(error, JobError)), None):
        raise unfit


def _complaint(store: Store, wanted: Input, item: Object) -> Exception | None:
    try:
        check_columns(pq.read_schema(RangeFile(store, item)), wanted, item.uri)
    except Unidentified:
        raise
    except (NightlabelError, *UNREADABLE) as error:
        return error
    return None


def cut(store: Store, wanted: Input, listing: Sequence[Object], *, tasks: int) -> list[Unit]:
    """Units of about 2,000 to 20,000 images, but not fewer than 4 × `tasks` while there are inputs enough, so that every task has
    work to the end."""
    pieces = 4 * tasks
    if wanted.format == "parquet":
        return _cut_parquet(store, wanted, listing, pieces=pieces)
    most = max(1, len(listing) // pieces)
    if wanted.format == "images":
        most = min(most, BUNDLE)
    return _join([Part.of(item) for item in listing], most=most, size=UNIT_BYTES)


def _join(parts: Sequence[Part], *, most: int, size: int) -> list[Unit]:
    units: list[Unit] = []
    bundle: list[Part] = []
    total = 0
    for part in parts:
        if bundle and (len(bundle) >= most or total + part.size > size):
            units.append(Unit(tuple(bundle)))
            bundle, total = [], 0
        bundle.append(part)
        total += part.size
    return [*units, Unit(tuple(bundle))] if bundle else units


def _cut_parquet(store: Store, wanted: Input, listing: Sequence[Object], *, pieces: int) -> list[Unit]:
    size = min(UNIT_BYTES, max(1, sum(item.size for item in listing) // pieces))
    small = [Part.of(item) for item in listing if item.size <= 2 * size]
    units = _join(small, most=max(1, len(listing) // pieces), size=size)
    large = [item for item in listing if item.size > 2 * size]
    for ranges in side_by_side(partial(_split_rows, store, wanted, size=size), large):
        units += ranges
    return units


def _split_rows(store: Store, wanted: Input, item: Object, *, size: int) -> list[Unit]:
    """Row groups of one file joined to about `size` bytes each."""
    try:
        footer = pq.read_metadata(RangeFile(store, item))
        check_columns(footer.schema.to_arrow_schema(), wanted, item.uri)
        sizes = group_sizes(footer)
    except Unidentified:
        raise
    except (InputError, PermissionDenied, Temporary, JobError, *UNREADABLE):
        return [Unit((Part.of(item),))]  # whose reading says what is wrong while the rest is labelled
    together = max(1, footer.num_row_groups // -(-item.size // size))
    parts: list[Part] = []
    stop = 0
    for first in range(0, footer.num_row_groups, together):
        start, stop = stop, stop + sum(sizes[first : first + together])
        if stop > start:  # row groups may be empty, and two empty ranges at the same row would be one unit twice
            parts.append(Part.of(item, start, stop))
    return [Unit((part,)) for part in (parts if len(parts) > 1 else [Part.of(item)])]


def group_sizes(footer: pq.FileMetaData) -> list[int]:
    """Rows of each row group. Raises ValueError where they do not add up: a footer has no checksum, and with one bit of it wrong
    a file has fewer rows."""
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if sum(sizes) != footer.num_rows or min(sizes, default=0) < 0:
        raise ValueError(f"{footer.num_rows} rows in row groups of {sum(sizes)}")
    return sizes
