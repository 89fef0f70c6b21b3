"""JPEGs to crops on an NVIDIA GPU, with the bytes that the CPU makes of them: `jpeg.cu` and `pixels.cu` under NVRTC.

nvJPEG was tried: it fills what is missing of a file and says nothing, so that every file had to be walked beside it, and neither
its engine nor its kernels have libjpeg-turbo's pixels. These kernels have, and say what is whole; what is not is left to the CPU,
which says what is wrong with it, if anything is.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import local
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline.errors import ModelError, first_line
from pipeline.model.preprocessing import Preprocessing
from pipeline.rows import joined

_PIXELS: Final = 2**28  # decoded at a time, at most; a pixel takes 9 bytes, 2.4 GB
_SHARE: Final = 64  # a pixel for so many bytes that the GPU has: three threads take 0.4 of its memory
_IMAGES: Final = 2**15  # decoded at a time; a grid has 65,535 rows
_THREADS: Final = 256
_PIECES: Final = (
    128  # threads an image: jpeg.cu's. Of 32, 64, 128 and 256 an H200 reads 33, 57, 94 and 70 thousand images a second
)
_FRAME: Final = 5 * 4 + 3 * 64  # bytes, of jpeg.cu's
_MCU: Final = 16  # pixels, the largest
SOUND: Final = 0
#: Columns of `images`: jpeg.cu's.
WIDTH, HEIGHT, PLACE, TOP, ROWS, LEFT, COLUMNS, MIDDLE, ACROSS, DOWN = range(10)


def source() -> str:
    """Both halves, for one compilation."""
    return "".join(Path(__file__).with_name(f"{name}.cu").read_text() for name in ("jpeg", "pixels"))


class GpuDecoder:
    """A callable on encoded JPEGs, for any number of threads. Raises ModelError where CuPy is missing or cannot compile."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        do = "Install nightlabel[gpu-decode], or set decode_lane to cpu"
        try:
            import cupy
            import torch
        except ImportError as error:
            raise ModelError(f"decode_lane: {error}", need="CuPy", do=do) from None
        self._cupy, self._torch = cupy, torch
        self.preprocessing = preprocessing
        names = ("read_scans", "transform_blocks", "colour_pixels", "resize_rows", "resize_columns")
        try:
            module = cupy.RawModule(code=source())
            self._scans, self._blocks, self._colours, self._rows, self._columns = map(module.get_function, names)
        except RuntimeError as error:
            raise ModelError(f"decode_lane: no kernels ({first_line(error)})", need="NVRTC of CUDA 13", do=do) from error
        self._own = local()
        self._most = min(_PIXELS, cupy.cuda.runtime.memGetInfo()[1] // _SHARE)

    def __call__(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]:
        """(pixels uint8 [K, 3, S, S], a tensor on the GPU; which of the images these are, bool [N]) of N JPEGs of int64 [N, 2]
        width and height, as `lanes.plain` takes them. Those left out are for the CPU to decode: damaged, or odd. Raises
        ModelError where not even one image fits into the GPU's memory. A thread that calls again has waited for what reads these
        pixels: theirs and what they were copied from is memory that it may write over."""
        groups = _groups(np.maximum(_padded(sizes), self._most // _IMAGES), self._most)
        try:
            return self._all(encoded, sizes, groups)
        except (self._cupy.cuda.memory.OutOfMemoryError, self._torch.OutOfMemoryError):
            if len(groups) == len(sizes):
                width, height = sizes[_padded(sizes).argmax()]
                do = "Give predict a GPU of its own, one with more memory, or set decode_lane to cpu"
                raise ModelError(f"the GPU has no memory for an image of {width} × {height} pixels", do=do) from None
        # For good: the next block would fail the same way.
        self._most = min(self._most, int(_padded(sizes).sum())) // 2
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._torch.cuda.empty_cache()
        return self(encoded, sizes)

    def _all(self, encoded: pa.ChunkedArray, sizes: np.ndarray, groups: list[tuple[int, int]]) -> tuple[Any, np.ndarray]:
        done = [self._some(encoded.slice(at, end - at), sizes[at:end]) for at, end in groups]
        # Not group by group: torch copies on a stream of its own, and what a group sets free the next one may write over.
        pixels = [crops if ok.all() else crops[self._torch.from_numpy(np.flatnonzero(ok)).to(crops.device)] for crops, ok in done]
        return pixels[0] if len(pixels) == 1 else self._torch.cat(pixels), np.concatenate([ok for _, ok in done])

    def _some(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]:
        """(crops of them all, which are to be looked at)."""
        cupy, torch, size = self._cupy, self._torch, self.preprocessing.size
        if not len(sizes):
            return torch.empty((0, 3, size, size), dtype=torch.uint8, device="cuda"), np.empty(0, bool)
        if not hasattr(self._own, "stream"):  # of each thread
            self._own.stream, self._own.pinned = cupy.cuda.Stream(non_blocking=True), np.empty(0, np.uint8)
            self._own.done = cupy.cuda.Event(block=True, disable_timing=True)
        pieces = [joined(chunk) for chunk in encoded.chunks if len(chunk)]
        ends = np.cumsum([0, *(len(data) for data, _ in pieces)])
        starts = np.concatenate([[0], *(end + starts[1:] for end, (_, starts) in zip(ends, pieces, strict=False))])
        with self._own.stream:
            data = self._upload([piece for piece, _ in pieces], int(ends[-1]))
            out, verdicts = self._crops(data, cupy.asarray(starts), sizes)
            # Any stream may read the crops then. A copy into memory that is not pinned would wait too, inside the driver, where
            # it keeps other threads from launching anything.
            self._own.done.record()
            self._own.done.synchronize()
            ok = verdicts.get() == SOUND
        return torch.as_tensor(out, device="cuda"), ok

    def _upload(self, pieces: list[np.ndarray], count: int) -> Any:
        """These bytes on the GPU, one behind the other, and eight more, for whole words are read. By way of pinned memory: else
        the driver copies, while other threads cannot launch anything."""
        if len(self._own.pinned) < count:
            room = 1 << (count - 1).bit_length()
            self._own.pinned = np.frombuffer(self._cupy.cuda.alloc_pinned_memory(room), np.uint8, room)
        np.concatenate(pieces, out=self._own.pinned[:count])
        data = self._cupy.empty(count + 8, np.uint8)
        data[:count].set(self._own.pinned[:count])
        return data

    def _crops(self, data: Any, starts: Any, sizes: np.ndarray) -> tuple[Any, Any]:
        """(uint8 [N, 3, S, S]; N verdicts, of which all but SOUND mean that the crop is not to be looked at), not yet there."""
        cupy, size, count = self._cupy, self.preprocessing.size, len(sizes)
        plan, axes, needed = plan_crops(sizes, self.preprocessing)
        images, axes, padded = cupy.asarray(plan), cupy.asarray(axes), _padded(sizes)
        pixels = int(padded.sum())
        room = cupy.empty(6 * pixels, np.uint8)  # for coefficients, and then for the pixels made of them
        planes, frames = cupy.empty(3 * pixels, np.uint8), cupy.empty(count * _FRAME, np.uint8)
        middle, out = cupy.empty(needed, np.uint8), cupy.empty((count, 3, size, size), np.uint8)
        verdicts = cupy.empty(count, np.uint8)
        self._scans((count,), (_PIECES,), (data, starts, images, room, frames, verdicts))
        rows, columns = plan[:, ROWS], plan[:, COLUMNS]
        for kernel, items, arguments in (
            (self._blocks, padded.max() * 3 // 64, (images, room, frames, planes, verdicts)),
            (self._colours, (rows * columns).max(), (images, planes, frames, verdicts, room)),
            (self._rows, rows.max() * size, (images, axes, room, middle, np.int32(size))),
            (self._columns, size * size, (images, axes, middle, out, np.int32(size))),
        ):
            kernel((-(-int(items) // _THREADS), count), (_THREADS,), arguments)
        return out, verdicts


def _padded(sizes: np.ndarray) -> np.ndarray:
    """Pixels of images of these widths and heights, filled up to whole MCUs."""
    padded: np.ndarray = (-(-sizes // _MCU) * _MCU).prod(axis=1)
    return padded


def plan_crops(sizes: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray, int]:
    """What the kernels want to know of images of these widths and heights: `images` int64 [N, 10], `axes` int32, and the bytes of
    `middle`."""
    size, tables, places, end = preprocessing.size, list[np.ndarray](), dict[tuple[int, ...], int](), 0
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    plan = np.zeros((len(kinds), 10), np.int64)
    for kind, (width, height) in enumerate(kinds.tolist()):  # of a thousand photographs, some 200
        new_width, new_height, left, top = preprocessing.placement(width, height)
        for line, begin, field in (((width, new_width, left), LEFT, ACROSS), ((height, new_height, top), TOP, DOWN)):
            if line not in places:
                tables.append(axis(*line, size, preprocessing.resample))
                places[line], end = end, end + len(tables[-1])
            steps = axis(*line, size, preprocessing.resample)[2 : 2 + 2 * size]
            plan[kind, begin : begin + 2] = steps[0], (steps[0::2] + steps[1::2]).max() - steps[0]
            plan[kind, field] = places[line]
    plan = plan[which.reshape(-1)]
    plan[:, [WIDTH, HEIGHT]] = sizes
    plan[1:, PLACE] = np.cumsum(_padded(sizes))[:-1]
    ends = np.cumsum(3 * size * plan[:, ROWS])
    plan[1:, MIDDLE] = ends[:-1]
    return plan, np.concatenate(tables), int(ends[-1])


@lru_cache(4096)
def axis(length: int, whole: int, corner: int, size: int, resample: str) -> np.ndarray:
    """How a line of `length` pixels is resized to `whole` pixels, of which only the `size` from `corner` on are made.

    One array of int32, as `pixels.cu` reads it: the width of the table of weights, and by how many bits they are scaled up; for
    each new pixel the first old pixel that it is made of, and how many; the weights, [size, width of the table]. The filters are
    those of torch's interpolate for uint8 (ATen/native/cpu/UpSampleKernel.cpp) and of Pillow: weights as integers, the largest
    of which fits into 15 bits."""
    scale = length / whole
    reach = (1.0 if resample == "bilinear" else 2.0) * max(scale, 1.0)
    centre = scale * (np.arange(whole) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), length) - first
    at = np.arange(count.max())
    far = np.abs((at + first[:, None] - centre[:, None] + 0.5) / max(scale, 1.0))
    weights = np.where(at < count[:, None], _triangle(far) if resample == "bilinear" else _cubic(far), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    whole_numbers = np.trunc(weights * (1 << bits) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    crop = slice(corner, corner + size)
    steps = np.stack([first[crop], count[crop]], axis=1).astype(np.int32)
    return np.concatenate([np.array([len(at), bits], np.int32), steps.ravel(), whole_numbers[crop].ravel()])


def _triangle(far: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - far, 0.0)


def _cubic(far: np.ndarray) -> np.ndarray:
    """Keys' kernel with a of -0.5."""
    a = -0.5
    near = ((a + 2.0) * far - (a + 3.0)) * far * far + 1
    outer = (((far - 5.0) * far + 8.0) * far - 4.0) * a
    return np.where(far < 1.0, near, np.where(far < 2.0, outer, 0.0))


def _groups(pixels: np.ndarray, most: int) -> list[tuple[int, int]]:
    """(from, to) of runs of images of at most `most` pixels together, or of one image."""
    groups, start, total = [], 0, 0
    for row, count in enumerate(pixels.tolist()):
        if row > start and total + count > most:
            groups.append((start, row))
            start, total = row, 0
        total += count
    return [*groups, (start, len(pixels))]
