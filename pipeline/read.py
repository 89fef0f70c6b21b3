"""One unit → image rows, with the key each image came with, closed by an end row that says how many there were.

What is wrong with a unit as a whole, a broken shard or a store that does not answer after all retries, travels in its end row:
it costs this unit and nothing else, and the driver decides from the class whether another pass can help.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.columns import UNREADABLE, check_columns, plain_type, unreadable, with_kept
from pipeline.cut import group_sizes, root_of
from pipeline.errors import (
    InputError,
    JobError,
    NightlabelError,
    PermissionDenied,
    Temporary,
    Unidentified,
    first_line,
)
from pipeline.names import spelt
from pipeline.rows import IMAGE, Failure
from pipeline.samples import Row, image_rows, too_large
from pipeline.spec import Input, Limits
from pipeline.storage import CONNECTIONS, RangeFile, Store
from pipeline.tar import Stream
from pipeline.unit import Part, Unit

BATCH_ROWS = 64
BATCH_BYTES = 16 * 2**20  # 64 photographs of 110 kB are 7 MB; larger images make smaller batches
MAX_BYTES = Limits().max_bytes


def read_unit(
    store: Store, unit: Unit, *, wanted: Input, only: list[int] | None = None, max_bytes: int = MAX_BYTES
) -> Iterator[pa.Table]:
    """Tables of rows.IMAGE plus the kept columns, at most BATCH_ROWS each and, but for Parquet, BATCH_BYTES; the last has the end
    row. With `only`, of these rows, ascending; no other loose images are fetched. Over `max_bytes` is TOO_LARGE, without bytes.

    Raises nothing a user could act on: such an error becomes the end row's `error_class` and `error`. An `error` without a class
    is JSON: `empty`, the inputs in which there is no row, and `imageless`, how many samples have no image, by suffix.
    """
    rows, schema = 0, IMAGE
    empty, imageless = list[str](), Counter[str]()
    error: NightlabelError | None = None
    try:
        if wanted.format == "images":
            numbers = range(len(unit.parts)) if only is None else only
            for table in _read_images(store, tuple(unit.parts[number] for number in numbers), wanted, max_bytes):
                yield _numbered(table, unit.id, numbers[rows : rows + table.num_rows])
                rows += table.num_rows
            rows = len(unit.parts)
        else:
            tar, parquet = partial(_read_tar, imageless=imageless), partial(_read_parquet, kept=unit.kept)
            read = tar if wanted.format == "webdataset" else parquet
            for part in unit.parts:
                before = rows
                for table in read(store, part, wanted, max_bytes):
                    if rows and not table.num_rows:  # a file without rows has its columns of any type
                        continue
                    _check_like(table.schema, schema if rows else table.schema, part.uri)
                    schema = table.schema
                    if table.num_rows:
                        yield _numbered(table, unit.id, range(rows, rows + table.num_rows), only)
                        rows += table.num_rows
                empty += [part.uri] if rows == before else []
    except NightlabelError as caught:
        error = caught
    except MemoryError:
        error = Temporary(f"{unit.parts[0].uri}: not enough memory to read it", do="Lower read.tasks, or take larger nodes")
    notes = json.dumps({"empty": empty, "imageless": imageless}) if empty or imageless else None
    said: Row = {"error": notes} if error is None else _failed(error.error_class, error)
    yield pa.Table.from_pylist([{"unit": unit.id, "index": rows} | said], schema=schema)


def _failed(error_class: str, error: NightlabelError) -> Row:
    """Its words may hold a name of any bytes, which no column does."""
    return {"error_class": error_class, "error": spelt(str(error))}


def _check_like(schema: pa.Schema, before: pa.Schema, uri: str) -> None:
    """Raises JobError when kept columns have other types than in the files before: the rows of a unit are one table."""
    for column, known in zip(schema, before, strict=True):
        if column.type != known.type:
            do = "Write the files alike, or leave the column out of input.keep"
            raise JobError(f"{uri}: column {column.name} is {column.type}", need=f"{known.type}, as in the file before", do=do)


def _numbered(table: pa.Table, unit_id: str, numbers: Sequence[int], only: list[int] | None = None) -> pa.Table:
    """With unit and row numbers; of the rows that are wanted."""
    table = table.set_column(0, IMAGE.field("unit"), pa.array([unit_id] * table.num_rows, pa.string()))
    table = table.set_column(1, IMAGE.field("index"), pa.array(numbers, pa.int64()))
    return table if only is None else table.filter(pc.is_in(table.column("index"), value_set=pa.array(only, pa.int64())))


def _table(rows: list[Row], keep: tuple[str, ...]) -> pa.Table:
    fields = [*IMAGE, *(pa.field(name, pa.string()) for name in keep)]
    columns = [
        _joined(rows) if field.name == "bytes" else pa.array([row.get(field.name) for row in rows], field.type)
        for field in fields
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _joined(rows: list[Row]) -> pa.Array:
    """Their `bytes` as one column, copied once: Arrow's own way grows its memory and copies it by and by, 84 us an image
    of 110 kB instead of 29."""
    parts = [data if isinstance(data := row.get("bytes"), (bytes, memoryview)) else None for row in rows]
    ends = np.cumsum([0, *(0 if part is None else len(part) for part in parts)], dtype=np.int64)
    valid = pa.array([part is not None for part in parts], pa.bool_())
    data = pa.allocate_buffer(int(ends[-1]))
    there = memoryview(data).cast("B")
    for part, start, stop in zip(parts, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if part:
            there[start:stop] = part
    return pa.Array.from_buffers(pa.large_binary(), len(rows), [valid.buffers()[1], pa.py_buffer(ends), data])


def _batches(rows: Iterator[Row], keep: tuple[str, ...]) -> Iterator[pa.Table]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        data = row.get("bytes")
        size += len(data) if isinstance(data, (bytes, memoryview)) else 0
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield _table(batch, keep)
            batch, size = [], 0
    yield _table(batch, keep)  # when it is empty it still tells the columns


def _read_tar(store: Store, part: Part, wanted: Input, max_bytes: int, *, imageless: Counter[str]) -> Iterator[pa.Table]:
    with Stream(store, part.object) as stream:
        yield from _batches(image_rows(stream, wanted.keep, max_bytes, imageless), wanted.keep)


def _read_parquet(store: Store, part: Part, wanted: Input, max_bytes: int, *, kept: pa.Schema | None) -> Iterator[pa.Table]:
    """A key that comes twice is seen within the part: for the keys before it, each part would read the file from its start."""
    columns = [wanted.image_column, *((wanted.key_column,) if wanted.key_column else ()), *wanted.keep]
    try:
        file = pq.ParquetFile(RangeFile(store, part.object), buffer_size=8 * 2**20, page_checksum_verification=True)
        check_columns(file.schema_arrow, wanted, part.uri)
        first, groups = _row_groups(file.metadata, part)
        image_table = partial(_image_table, uri=part.uri, wanted=wanted, seen=set(), max_bytes=max_bytes)
        beside = partial(with_kept, keep=wanted.keep, kept=kept, uri=part.uri)
        yield beside(image_table(table := file.schema_arrow.empty_table(), first=first), table)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(dict.fromkeys(columns))):
            yield beside(image_table(table := pa.Table.from_batches([batch]), first=first), table)
            first += batch.num_rows
        if first != (stop := file.metadata.num_rows if part.stop is None else part.stop):
            raise ValueError(f"row {first} is its last, the footer says {stop}")
    except UNREADABLE as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # of the machine, not of the file
            raise Temporary(f"{part.uri}: {error}", do="Run again, with fewer read.tasks or on larger nodes") from error
        raise unreadable(part.uri, first_line(error), store.read(part.uri, stop=64, pinned=part.object)) from error


def _row_groups(footer: pq.FileMetaData, part: Part) -> tuple[int, list[int]]:
    """(number of the first row, row groups) that make up the part's row range."""
    start, stop = part.start or 0, footer.num_rows if part.stop is None else part.stop
    groups, row = [], 0
    for group, size in enumerate(group_sizes(footer)):
        if start <= row < stop:
            groups.append(group)
        row += size
    return start, groups


def _image_table(table: pa.Table, *, uri: str, wanted: Input, first: int, seen: set[str], max_bytes: int) -> pa.Table:
    images = table.column(wanted.image_column).combine_chunks()
    if pa.types.is_struct(images.type):
        images = images.field("bytes") if images.null_count == 0 else images.flatten()[images.type.get_field_index("bytes")]
    images = images.cast(pa.large_binary())
    numbers = range(first, first + table.num_rows)
    names = _texts(table.column(wanted.key_column)) if wanted.key_column else [None] * table.num_rows
    keys = [str(number) if name is None else name for number, name in zip(numbers, names, strict=True)]
    failed: list[Row] = []
    for name, size in zip(names, pc.binary_length(images).to_pylist(), strict=True):
        again: Row = {"error_class": Failure.DUPLICATE_KEY, "error": f"{name}: the file has this key already"}
        failed.append(again if name in seen else too_large(size, max_bytes))
        seen.update(() if name is None else (name,))  # its number is no key: the file may have it as one, and both are labelled
    fixed = [
        pa.nulls(table.num_rows, pa.string()),
        pa.nulls(table.num_rows, pa.int64()),
        pa.array(keys, pa.string()),
        pa.array([uri] * table.num_rows, pa.string()),
        pc.if_else(pa.array([bool(row) for row in failed], pa.bool_()), None, images) if any(failed) else images,
        *(pa.array([row.get(name) for row in failed], pa.string()) for name in ("error_class", "error")),
    ]
    return pa.table(fixed, names=IMAGE.names)


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """Keys as text; bytes that are not UTF-8 are spelt out."""
    column = column.cast(plain_type(column.type))
    binary = pa.types.is_binary(column.type) or pa.types.is_fixed_size_binary(column.type)
    if pa.types.is_string(column.type) or binary:  # text as bytes, since Arrow does not look at it
        raw = column.cast(pa.binary()).to_pylist()
        return [None if key is None else key.decode("utf-8", "backslashreplace") for key in raw]
    return [None if key is None else str(key) for key in column.to_pylist()]


def _read_images(store: Store, parts: tuple[Part, ...], wanted: Input, max_bytes: int) -> Iterator[pa.Table]:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        roots = sorted((root_of(uri) for uri in wanted.uris), key=len, reverse=True)
        fetch = partial(_fetch, store, max_bytes=max_bytes)
        yield from _batches(_fetched(parts, roots, lambda part: pool.submit(fetch, part)), ())


def _fetched(parts: tuple[Part, ...], roots: list[str], submit: Callable[[Part], Future[Row]]) -> Iterator[Row]:
    flying: deque[tuple[Part, Future[Row]]] = deque()
    for number in count():
        while len(flying) < 2 * CONNECTIONS and number + len(flying) < len(parts):
            part = parts[number + len(flying)]
            flying.append((part, submit(part)))
        if not flying:
            return
        part, future = flying.popleft()
        root = next((root for root in roots if part.uri.startswith(root)), "")
        yield {"key": part.uri.removeprefix(root), "source": part.uri, **future.result()}


def _fetch(store: Store, part: Part, *, max_bytes: int) -> Row:
    try:
        return too_large(part.size, max_bytes) or {"bytes": store.read(part.uri, pinned=part.object)}
    except Unidentified:  # the others would fail like it, and be failed rows for good
        raise
    # Gone or replaced since the plan, or not ours to read: this image has no bytes, and the others of its unit have theirs.
    except (InputError, PermissionDenied) as error:
        return _failed(Failure.FETCH_FAILED, error)
