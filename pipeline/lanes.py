"""Two lanes of decoding: the CPUs of the preprocess actors, and the GPU. Which image takes which, and in what proportion.

Only plain JPEGs may take the GPU's lane: grey or of three components, sequential, upright, of a usual subsampling and length,
whole to the eye. They pass the preprocess actor encoded, and `GpuLane` decodes them beside the model. One of 512 is decoded by
both, for `Predict` to compare the labels. What the GPU will not vouch for is decoded on the CPU after all, so a failure has the
same class and words in both lanes.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from threading import Lock
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.model.preprocessing import Preprocessing
from pipeline.orientation import jpeg_orientation
from pipeline.rows import joined

Stage = Callable[[pa.Table], pa.Table]
#: What was done: (images, seconds) by kind.
Measurements = dict[str, tuple[int, float]]
#: Which share of the plain JPEGs is the GPU's, given what was measured since it was last asked.
Share = Callable[[Measurements], float]

START: Final = 0.5  # of the plain JPEGs, before anything is measured
_MEMORY: Final = 5_000.0  # images after which a measurement counts half as much
_LONGEST: Final = 2**23  # bytes: a block waits for its longest, which 128 threads read in pieces
_COMPARED_EVERY: Final = 512  # both lanes have the same bytes, so what this would tell of is a GPU that computes wrongly
_APP1: Final = 0xE1
_SOF: Final = (0xC0, 0xC1)  # sequential, Huffman
_SKIPPED: Final = frozenset({0xC4, 0xDB, 0xDD, 0xEE, 0xFE, *range(0xE0, 0xF0)})
#: Across and down, by component: grey, where they mean nothing; 4:4:4, 4:2:2, 4:2:0.
_SAMPLINGS: Final = (b"\x11", b"\x21", b"\x22", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
_SLICES: Final = 32  # of a table; each is a chunk of the images, and copying instead would be 100 MB
_LEAST: Final = 0.02  # of the plain JPEGs for the GPU, or a slow first block would leave nothing to measure it by again


class Decoder(Protocol):
    """What `engines.gpu_decode.GpuDecoder` is."""

    def __call__(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]: ...


class Predicting(Protocol):
    """What `predict.Predict` is; for several threads."""

    def __call__(self, batch: pa.Table, on_device: Any = None) -> pa.Table: ...


def plain(data: memoryview, preprocessing: Preprocessing, max_pixels: int) -> tuple[int, int] | None:
    """Width and height of a JPEG that the GPU's lane may take, told from its header and its last bytes; None for any other."""
    data = data.cast("B")
    if len(data) > _LONGEST or bytes(data[:2]) != b"\xff\xd8" or bytes(data[-2:]) != b"\xff\xd9":
        return None
    at, size, told = 2, None, False
    while at + 16 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _SOF and size is None:
            size = _frame(bytes(data[at + 4 : at + 2 + length]))
        elif marker == 0xEE and bytes(data[at + 4 : at + 9]) == b"Adobe" and data[at + 15] != 1:  # no YCbCr
            return None
        elif marker == 0xDA:
            break
        elif marker not in _SKIPPED:
            return None
        told |= marker == _APP1
        at += 2 + length
    if size is None or size[0] * size[1] > max_pixels or preprocessing.is_strip(*size):
        return None
    from pipeline.decode import has_plain_header  # not above: the driver imports this too, and decodes nothing

    return size if has_plain_header(data, size) and not (told and jpeg_orientation(data) not in (None, 1)) else None


def _frame(segment: bytes) -> tuple[int, int] | None:
    """Width and height of a frame of one or three components, 8 bits each, in a usual subsampling."""
    if len(segment) < 9 or len(segment) != 6 + 3 * segment[5] or segment[0] != 8 or segment[6::3] != b"\1\2\3"[: segment[5]]:
        return None
    width, height = int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big")
    return (width, height) if segment[7::3] in _SAMPLINGS and width and height else None


class Lanes:
    """The preprocess stage of a job with a GPU lane: `preprocess` for one part of a batch, and the rest goes on encoded, as
    `bytes` of rows without pixels, with `width` and `height`."""

    def __init__(self, preprocess: Stage, preprocessing: Preprocessing, max_pixels: int, share: Share) -> None:
        self.preprocess, self.preprocessing, self.max_pixels, self.share = preprocess, preprocessing, max_pixels, share
        self._measured: Measurements = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """As `preprocess` puts it out, rows in another order, with the columns `bytes` and `exact` besides."""
        since = time.perf_counter()
        sizes = self._sizes(batch)
        able = np.flatnonzero([size is not None for size in sizes])
        taken = able[: math.ceil(self.share(self._measured) * len(able))]
        passed = time.perf_counter() - since
        taken, exact = self._compared(batch, taken)
        mask = np.zeros(batch.num_rows, bool)
        mask[taken] = True
        since = time.perf_counter()
        decoded = self.preprocess(_where(batch, ~mask))
        self._measured = {"pass": (batch.num_rows, passed), "decode": (decoded.num_rows, time.perf_counter() - since)}
        encoded = _where(batch, mask).append_column("pixels", pa.nulls(len(taken), pa.large_binary()))
        for axis, name in enumerate(("width", "height")):
            encoded = encoded.append_column(name, pa.array([(sizes[row] or (0, 0))[axis] for row in taken.tolist()], pa.int32()))
        encoded = encoded.append_column("exact", pa.array(exact, pa.large_binary()))
        return pa.concat_tables([_completed(decoded, encoded.schema), encoded])

    def _sizes(self, batch: pa.Table) -> list[tuple[int, int] | None]:
        """Of every plain JPEG."""
        broken = pc.or_(pc.is_null(batch["key"]), pc.is_valid(batch["error_class"])).to_pylist()
        return [
            None if is_broken else plain(data, self.preprocessing, self.max_pixels)
            for data, is_broken in zip(_views(batch["bytes"]), broken, strict=True)
        ]

    def _compared(self, batch: pa.Table, taken: np.ndarray) -> tuple[np.ndarray, list[bytes | None]]:
        """Every 512th image of the rows `taken` is decoded on the CPU too. Returns the rows that the GPU keeps, which are all but
        those that the CPU could not decode, and for each of them the CPU's crop, None where it was not looked at."""
        looked = np.flatnonzero(batch["index"].to_numpy()[taken] % _COMPARED_EVERY == 0)
        mask = np.zeros(batch.num_rows, bool)
        mask[taken[looked]] = True
        seen = self.preprocess(_where(batch, mask))  # not Arrow's take, which copies all 100 MB of a block of several chunks
        exact = pc.coalesce(seen["exact"], seen["pixels"]) if "exact" in seen.column_names else seen["pixels"]
        crops = dict(zip(looked.tolist(), exact.to_pylist(), strict=True))
        stay = [row for row in range(len(taken)) if crops.get(row, b"") is not None]
        return taken[stay], [crops.get(row) for row in stay]


class GpuLane:
    """The predict stage of a job with a GPU lane: what comes encoded is decoded by `decoder`, or by `preprocess` where that does
    not vouch for it, and `predict` labels it all. For several threads: while one labels a block others decode the next."""

    def __init__(self, decoder: Decoder, preprocess: Stage, predict: Predicting, share: Share) -> None:
        self.decoder, self.preprocess, self.predict, self.share = decoder, preprocess, predict, share
        self._repairing, self._timing = Lock(), Lock()
        self._decoded_at = 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What `predict` makes of what `Lanes` puts out."""
        encoded = np.asarray(batch["bytes"].is_valid())
        ready, waiting = _where(batch, ~encoded).drop_columns("bytes"), _where(batch, encoded)
        rows, pixels, measured = ready, None, Measurements()
        if waiting.num_rows:
            since = time.perf_counter()
            done, pixels, repaired = self._decoded(waiting)
            with self._timing:
                now = time.perf_counter()
                # Without the time that it waited for others.
                measured["gpu"] = waiting.num_rows, now - max(since, self._decoded_at)
                self._decoded_at = now
            rows = pa.concat_tables([done, ready, *repaired])
        table = self.predict(rows, pixels)
        self.share(measured)
        return table

    def _decoded(self, waiting: pa.Table) -> tuple[pa.Table, Any, list[pa.Table]]:
        """The rows that the GPU vouches for, their pixels on it, and the others as `preprocess` puts them out."""
        sizes = np.stack([waiting[name].to_numpy() for name in ("width", "height")], axis=1).astype(np.int64)
        pixels, vouched = self.decoder(waiting["bytes"], sizes)
        done = _where(waiting, vouched).drop_columns("bytes")
        if vouched.all():
            return done, pixels, []
        rest = _where(waiting, ~vouched).drop_columns(["pixels", "width", "height", "exact"])
        with self._repairing:  # one image at a time in a process, see `decode`
            return done, pixels, [_completed(self.preprocess(rest), done.schema)]


def _where(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """The rows that are true in `mask`; as slices, where most lie side by side: Arrow's filter copies, 100 MB of a block."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    if len(edges) > _SLICES:
        return table.filter(pa.array(mask))
    return pa.concat_tables([table.slice(start, end - start) for start, end in edges.tolist()] or [table.slice(0, 0)])


def _views(column: pa.ChunkedArray) -> Iterator[memoryview]:
    """The values of a column of large_binary, nulls as nothing. Arrow's own way to one by one takes 20 us each."""
    for chunk in column.chunks:
        values, starts = joined(chunk)
        yield from (values.data[start:end] for start, end in pairwise(starts.tolist()))


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of `schema`, null where it has none."""
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names)


def all_on_gpu(_: Measurements) -> float:
    """All of them are the GPU's."""
    return 1.0


class Split:
    """How many of the plain JPEGs the GPU should take so that both sides are done at the same time, by what each has measured.
    `actors`: of preprocess for each of predict. Both kinds tell it what they have measured, the first
    asks for the share; it is a Ray actor of a pass."""

    def __init__(self, actors: float) -> None:
        self._actors = actors
        self._images: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)

    def share(self, measured: Measurements) -> float:
        """Adds what was measured to what is known; up to 1."""
        for kind, (images, seconds) in measured.items():
            fade = 0.5 ** (images / _MEMORY)
            self._images[kind] = self._images[kind] * fade + images
            self._seconds[kind] = self._seconds[kind] * fade + seconds
        if not all(self._images[kind] for kind in ("pass", "decode", "gpu")):
            return START
        passing, decode, gpu = (self._seconds[kind] / self._images[kind] for kind in ("pass", "decode", "gpu"))
        # An actor of predict has share × gpu for an image, and model beside it for another; its actors of preprocess have
        # (1 - share) × decode + passing. With these the share is right, or the model is what takes longest.
        share = (decode + passing) / (self._actors * gpu + decode)
        return min(1.0, max(_LEAST, share))
