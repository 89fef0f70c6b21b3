"""The first look at images to train on or to measure with: which can be decoded, by several processes, none of them this one.

A block of images is looked at in a child that can be killed, as in careful mode; where that dies or is not done in time, each
image of the block alone. So an image that hangs or kills its decoder is one that is left out. The price is a copy of the bytes
into the child, and 0.25 s of a core for every child.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from queue import SimpleQueue

import pyarrow as pa
from pyarrow import ipc

from pipeline.careful import CarefulDecoder, CarefulLimits
from pipeline.decode import BadImage, decode
from pipeline.rows import Failure

Seen = tuple[str | None, str | None]
"""Failure class and reason; None for an image that can be decoded."""
Look = Callable[[bytes | memoryview], list[Seen]]


def see(block: bytes | memoryview, *, max_pixels: int) -> list[Seen]:
    """Of each image of a block, as `_packed` makes it, what labelling would say."""
    return [_see(image, max_pixels) for image in ipc.open_stream(block).read_all()["bytes"]]


def _see(image: pa.Scalar, max_pixels: int) -> Seen:
    if not image.is_valid:
        return str(Failure.NULL_IMAGE), "no bytes"
    try:
        decode(memoryview(image.as_buffer()), max_pixels=max_pixels)
    except BadImage as bad:
        return str(bad.failure), bad.message
    return None, None


def looked_at(
    tables: Iterable[pa.Table], look: Look, limits: CarefulLimits, *, processes: int, quiet: bool = False
) -> Iterator[pa.Table]:
    """Tables of rows.IMAGE as they come, with `error_class` and `error` as `look`, which is pickled, finds them. With `quiet` no
    process works while the caller has a table: somebody takes the time. Raises UnfitError when none can be started."""
    most = processes if quiet else 2 * processes + 1
    with ExitStack() as stack:
        free: SimpleQueue[CarefulDecoder[list[Seen]]] = SimpleQueue()
        for _ in range(processes):
            free.put(stack.enter_context(closing(CarefulDecoder(look, limits))))
        pool = ThreadPoolExecutor(processes)
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[tuple[pa.Table, Future[list[Seen]]]] = deque()
        for table in tables:
            waiting.append((table, pool.submit(_seen, table.select(["bytes"]), free)))
            if len(waiting) == most:
                yield from [_told(*waiting.popleft()) for _ in range(most if quiet else 1)]
        yield from [_told(*waiting.popleft()) for _ in range(len(waiting))]


def _seen(images: pa.Table, free: SimpleQueue[CarefulDecoder[list[Seen]]]) -> list[Seen]:
    decoder = free.get()
    try:
        return decoder(_packed(images))
    except BadImage as bad:
        if images.num_rows == 1:
            return [(str(bad.failure), bad.message)]
    finally:
        free.put(decoder)
    return [seen for row in range(images.num_rows) for seen in _seen(images.slice(row, 1), free)]


def _packed(images: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, images.schema) as writer:
        writer.write_table(images)
    return memoryview(sink.getvalue())


def _told(table: pa.Table, seen: Future[list[Seen]]) -> pa.Table:
    before = zip(table["error_class"].to_pylist(), table["error"].to_pylist(), strict=True)
    found = [was if was[0] is not None else now for was, now in zip(before, seen.result(), strict=True)]
    for place, name in enumerate(("error_class", "error")):
        column = pa.array([each[place] for each in found], pa.string())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table
