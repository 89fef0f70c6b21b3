"""What flows: one row per image, as Arrow tables, from the reader to the committed object.

A batch on its way is a `pyarrow.Table`, not a dict of arrays: kept columns keep their types and nulls, and a batch crosses a
process border without a copy. Pixels travel as `large_binary`, 3*S*S bytes in the rows that have some: uint8, channels first, no
extension type, no 2 GiB offset limit, nothing where a row has none, a zero-copy view in numpy (`pixels_view`).

A failed image is a row with `error_class` and `error`. A row whose `key` is null is not an image: it ends a unit, its `index`
is the number of rows the unit has, and its `error_class`, when set, is the unit's error.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

OUTPUT_SCHEMA_VERSION = 1

#: Image rows: what `read` yields and `preprocess` takes. Kept columns follow.
IMAGE = pa.schema(
    [
        pa.field("unit", pa.string()),
        pa.field("index", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),
        pa.field("bytes", pa.large_binary()),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
    ]
)

TOPK = pa.list_(pa.struct([("label_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())]))

#: Prediction rows: what is committed, in this order. Optional columns and kept columns follow.
PREDICTION = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("topk", TOPK),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)


def output_schema(*, embedding: int | None, probabilities: int | None, kept: Iterable[pa.Field]) -> pa.Schema:
    """The columns of a committed object; `embedding` and `probabilities` are the lengths of these vectors, or None."""
    optional = [] if embedding is None else [pa.field("embedding", pa.list_(pa.float32(), embedding))]
    optional += [] if probabilities is None else [pa.field("probabilities", pa.list_(pa.float16(), probabilities))]
    return pa.schema([*PREDICTION, *optional, *kept])


class Failure(enum.StrEnum):
    """Why one image has no label. The list is closed: users group by it."""

    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    TRUNCATED = "TRUNCATED"
    CORRUPT = "CORRUPT"
    TOO_LARGE = "TOO_LARGE"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    NULL_IMAGE = "NULL_IMAGE"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    DECODE_TIMEOUT = "DECODE_TIMEOUT"
    DECODER_CRASH = "DECODER_CRASH"
    NONFINITE = "NONFINITE"
    FETCH_FAILED = "FETCH_FAILED"


class UnitError(enum.StrEnum):
    """Why a whole unit has no rows yet."""

    TAR_TRUNCATED = "TAR_TRUNCATED"
    TAR_NO_EOF = "TAR_NO_EOF"
    TAR_CORRUPT = "TAR_CORRUPT"
    PARQUET_CORRUPT = "PARQUET_CORRUPT"
    INPUT_CHANGED = "INPUT_CHANGED"
    INPUT_MISSING = "INPUT_MISSING"


#: How the text begins that Git LFS has in the place of a file that nobody has fetched yet.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
FETCH_LFS = "Fetch the object with git lfs pull"

#: Seconds that a row took in each stage, on its way to the driver only.
TIMINGS = {seam: f"_{seam}_s" for seam in ("read", "preprocess", "predict")}
#: bool, on its way to the driver only: does the image keep its label when it is decoded the other way? Null where that was not
#: looked at.
SAME_LABEL = "_same_label"
#: string, on its way to the driver only: what is to be known of the CPU that labelled the row. Absent where there is nothing.
CAUTION = "_caution"
COMPARED_EVERY = 64  # where decoding may differ, one image of so many is decoded both ways: 1.5 % of the work
#: Columns that `preprocess` takes or adds: no column of labels can be named after one.
PREPARED = frozenset({*IMAGE.names, "pixels", "exact", "room", "width", "height"})
_IMAGES = frozenset({"bytes", "pixels", "room"})
#: Columns between the stages that `predict` uses up; it hands on all others, kept columns and seconds.
USED_UP = PREPARED | {*PREDICTION.names}
#: What a kept column cannot be named.
RESERVED = USED_UP | {*TIMINGS.values(), SAME_LABEL, CAUTION, "embedding", "probabilities"}


def check_kept(kept: Sequence[str], *, hive: bool, delta: bool) -> None:
    """Raises ValueError for kept columns whose names something else of the output has. `hive`: it has the fingerprint, as a
    folder's name, too. `delta`: it goes into a Delta table, to which `Label` and `label` are one."""
    if taken := sorted(RESERVED.intersection(kept)):
        raise ValueError(f"input.keep names {', '.join(taken)}, which the output has already. Rename or drop it")
    if hive and (taken := [name for name in kept if name.lower() == "fingerprint"]):
        raise ValueError(f"input.keep names {taken[0]}, which output.layout: hive makes a column of its own. Rename or drop it")
    known = {name.lower(): name for name in (*kept, *PREDICTION.names, "embedding")} if delta else {}
    for name in kept:
        if (other := known.get(name.lower(), name)) != name:
            raise ValueError(
                f"publish: input.keep names {name}, and {other} is there too; required: names that differ by more than case, "
                "for Delta. Rename or drop it"
            )


def handed_on(table: pa.Table) -> pa.Table:
    """The same rows for another process: each chunk of a column costs Ray 20 us and more, so what is small is in one piece."""
    images = [name for name in table.column_names if name in _IMAGES and table[name].null_count < table.num_rows]
    small = table.drop_columns(images).combine_chunks()
    return pa.table([(table if name in images else small)[name] for name in table.column_names], schema=table.schema)


def joined(array: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """(the values one behind the other, uint8, nulls as nothing; where each begins and the last one ends, int64): views."""
    if not len(array):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    starts = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, 8 * array.offset)
    return np.frombuffer(array.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]], starts - starts[0]


def pixels_array(pixels: np.ndarray, valid: Sequence[bool] | np.ndarray) -> pa.Array:
    """uint8 [K, 3, S, S], of the K rows that are true in `valid` [N], as one Arrow column of N, without copying the pixels."""
    pixels, mask = np.ascontiguousarray(pixels, dtype=np.uint8), np.asarray(valid, dtype=bool)
    width = int(np.prod(pixels.shape[1:]))
    ends = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)]) * width
    buffers = [pa.array(mask).buffers()[1] if len(mask) else None, pa.py_buffer(ends), pa.py_buffer(pixels)]
    return pa.Array.from_buffers(pa.large_binary(), len(mask), buffers)


def pixels_view(column: pa.ChunkedArray | pa.Array, size: int) -> np.ndarray:
    """The inverse of `pixels_array`: uint8 [K, 3, size, size] of the K rows that have pixels, a view where the column is one
    chunk. Raises ValueError for pixels of another size."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty column
        array = pa.array([], type=column.type)
    count, width = len(array) - array.null_count, 3 * size * size
    if count == 0:
        return np.empty((0, 3, size, size), dtype=np.uint8)
    ends = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, 8 * array.offset)
    if not np.array_equal(np.diff(ends), np.where(array.is_valid(), width, 0)):
        raise ValueError(f"{count} images have {ends[-1] - ends[0]:,} bytes of pixels, the model sees {size} × {size} × 3 bytes")
    return np.frombuffer(array.buffers()[2], np.uint8, count * width, int(ends[0])).reshape(count, 3, size, size)
