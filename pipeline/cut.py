"""Inputs → units: list what the job names, pin it, cut it into pieces that commit as one.

Small shards are joined, large Parquet files split by row groups, loose images bundled. Tars are never split: finding a member's
border means reading the tar. Without opening shards the number of images is unknown, so sizes stand in for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, InputMissing, JobError, NightlabelError, PermissionDenied
from pipeline.spec import Input
from pipeline.storage import Object, RangeFile, Store, glob_prefix
from pipeline.unit import Part, Unit

UNIT_BYTES = 256 * 2**20  # about 2,400 photographs of 110 kB; a unit lost to a crash is a minute of one GPU at most
BUNDLE = 2_000  # loose images of a unit: at 100 ms for a first byte and 16 connections, 13 s of latency
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_SUFFIX = {"webdataset": ("tar",), "parquet": ("parquet", "pq"), "images": IMAGE_SUFFIXES}


def root_of(uri: str) -> str:
    """The folder that a prefix, glob or single object starts from, spelt as in listed URIs: keys of images are relative to it."""
    base = glob_prefix(uri)
    if base != uri or uri.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
        base = base.rpartition("/")[0]
    if not base.startswith("s3://"):
        base = os.path.abspath(base.removeprefix("file://"))
    return base.rstrip("/") + "/"


def list_inputs(store: Store, wanted: Input) -> list[Object]:
    """Every input once, in byte order of its URI. Raises InputMissing: a prefix that is absent or holds nothing of the format."""
    found: dict[str, Object] = {}
    suffixes = _SUFFIX[wanted.format]
    for uri in wanted.uris:
        everything = list(store.list(uri))
        fitting = [item for item in everything if item.uri.rpartition(".")[2].lower() in suffixes]
        if not fitting:
            kinds = ", ".join(f".{suffix}" for suffix in suffixes)
            raise InputMissing(
                f"{uri}: {len(everything)} objects, none {kinds}",
                need=f"{wanted.format} input",
                do="Check input.uri and input.format",
            )
        found.update((item.uri, item) for item in fitting)
    return [found[uri] for uri in sorted(found, key=str.encode)]


def cut(store: Store, wanted: Input, listing: Sequence[Object], *, tasks: int) -> list[Unit]:
    """Units of about 2,000 to 20,000 images, but not fewer than 4 × `tasks` while there are inputs enough, so that every task has
    work to the end. Raises JobError for columns that cannot be read."""
    pieces = 4 * tasks
    if wanted.format == "parquet":
        return _cut_parquet(store, wanted, listing, pieces=pieces)
    most = max(1, len(listing) // pieces)
    if wanted.format == "images":
        most = min(most, BUNDLE)
    return _join([Part(item.uri, item.etag, item.size) for item in listing], most=most, size=UNIT_BYTES)


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
    small = [Part(item.uri, item.etag, item.size) for item in listing if item.size <= 2 * size]
    units = _join(small, most=max(1, len(listing) // pieces), size=size)
    large = [item for item in listing if item.size > 2 * size]
    unfit: list[JobError] = []
    for item in large:
        try:
            units += _split_rows(store, wanted, item, size=size)
        except (InputError, PermissionDenied, JobError, pa.ArrowException, OSError) as error:
            # One unit, whose reading says what is wrong while the rest is labelled.
            units.append(Unit((Part(item.uri, item.etag, item.size),)))
            unfit += [error] if isinstance(error, JobError) else []
    if unfit and len(unfit) == len(large):
        raise unfit[0]  # no file is as the job says: better said now than after Ray has started
    return units


def _split_rows(store: Store, wanted: Input, item: Object, *, size: int) -> list[Unit]:
    """Row groups of one file joined to about `size` bytes each."""
    footer = pq.read_metadata(RangeFile(store, item))
    check_columns(footer.schema.to_arrow_schema(), wanted, item.uri)
    together = max(1, footer.num_row_groups // -(-item.size // size))
    units: list[Unit] = []
    stop = 0
    for first in range(0, footer.num_row_groups, together):
        groups = range(first, min(first + together, footer.num_row_groups))
        start, stop = stop, stop + sum(footer.row_group(group).num_rows for group in groups)
        units.append(Unit((Part(item.uri, item.etag, item.size, start, stop),)))
    return units if len(units) > 1 else [Unit((Part(item.uri, item.etag, item.size),))]


def check_columns(schema: pa.Schema, wanted: Input, uri: str) -> None:
    """Raises JobError when the columns that the job names are not there or not images."""
    for name in (wanted.image_column, *((wanted.key_column,) if wanted.key_column else ()), *wanted.keep):
        if name not in schema.names:
            do = "Set image_column, key_column, keep or, where images are to have labels, label"
            raise JobError(f"{uri}: no column {name}", need=f"one of {', '.join(schema.names)}", do=do)
    kind = schema.field(wanted.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        need = "encoded images as binary or struct<bytes: binary, path: string>"
        raise JobError(
            f"{uri}: column {wanted.image_column} is {kind}", need=need, do="Name another image_column, or encode the images"
        )


def kept_fields(store: Store, wanted: Input, inputs: Iterable[Object]) -> list[pa.Field]:
    """Name and type of the kept columns, as the first of the Parquet files that can be read has them; text in tars."""
    for item in inputs if wanted.format == "parquet" and wanted.keep else ():
        try:
            schema = pq.read_schema(RangeFile(store, item))
            return [schema.field(name) for name in wanted.keep]
        except (NightlabelError, pa.ArrowException, OSError, KeyError):
            continue  # it may be the broken one
    return [pa.field(name, pa.string()) for name in wanted.keep]
