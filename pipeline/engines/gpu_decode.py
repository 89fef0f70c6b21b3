"""JPEGs to crops on an NVIDIA GPU: nvJPEG decodes on the engine that the chip has for it, `jpeg.cu` checks and resizes.

That engine gave libjpeg-turbo's pixels to the bit for 4:4:4 and within one level for 4:2:0; nvJPEG's CUDA kernels were up to
three off, so a GPU without the engine is refused. The resize has torch's integers and equals the CPU's to the bit. nvJPEG fills
what is missing of a file and says nothing; therefore every file is walked to its last bit beside it, and what is not whole is
left to the CPU, which says what is wrong with it, if anything is.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock, local
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline.errors import ModelError, first_line
from pipeline.model.preprocessing import Preprocessing

_PIXELS: Final = 2**28  # decoded at a time, 800 MB
_IMAGES: Final = 2**15  # decoded at a time; a grid has 65,535 rows
_THREADS: Final = 256
_WALKERS: Final = 64  # threads an image: jpeg.cu's PIECES
_CPU_THREADS: Final = 2  # nvImageCodec's own; more only wait faster: 8,254, 9,586 and 11,173 img/s with 1, 2 and 16
SOUND: Final = 0


class _Streams(local):
    """Of each thread its own: for the walk, and for the decoding that goes on beside it."""

    def __init__(self, cupy: Any) -> None:
        self.walking, self.decoding = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))


class GpuDecoder:
    """A callable on encoded JPEGs, for any number of threads. Raises ModelError where a library or the chip's JPEG engine is
    missing."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        try:
            import cupy
            import torch
            from nvidia import nvimgcodec
        except ImportError as error:
            do = "Install nightlabel[gpu-decode], or set decode_lane to cpu"
            raise ModelError(f"decode_lane: {error}", need="nvImageCodec and CuPy", do=do) from None
        self._cupy, self._torch, self._codec = cupy, torch, nvimgcodec
        self.preprocessing = preprocessing
        try:
            hardware = [nvimgcodec.Backend(nvimgcodec.BackendKind.HW_GPU_ONLY)]
            self._decoder = nvimgcodec.Decoder(backends=hardware, max_num_cpu_threads=_CPU_THREADS)
        except RuntimeError as error:
            got = f"decode_lane: this GPU decodes no JPEG ({first_line(error)})"
            raise ModelError(got, need="one with a JPEG engine, A100, H100 or newer", do="Set decode_lane to cpu") from error
        self._wanted = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        kernels = cupy.RawModule(code=(Path(__file__).with_name("jpeg.cu")).read_text())
        try:
            self._judge, self._rows, self._columns = map(kernels.get_function, ("judge_all", "resize_rows", "resize_columns"))
        except RuntimeError as error:
            got = f"decode_lane: jpeg.cu cannot be compiled ({first_line(error)})"
            raise ModelError(
                got, need="NVRTC of CUDA 13", do="Install nightlabel[gpu-decode], or set decode_lane to cpu"
            ) from error
        self._streams, self._decoding = _Streams(cupy), Lock()

    def __call__(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]:
        """(pixels uint8 [K, 3, S, S], a tensor on the GPU; which of the images these are, bool [N]) of N JPEGs of int64 [N, 2]
        width and height, as `lanes.plain` takes them. Those left out are for the CPU to decode: damaged, or odd."""
        groups = _groups(np.maximum(sizes.prod(axis=1), _PIXELS // _IMAGES), _PIXELS)
        done: list[tuple[Any, np.ndarray]] = [self._some(encoded.slice(at, end - at), sizes[at:end]) for at, end in groups]
        pixels = [part for part, _ in done]
        return pixels[0] if len(pixels) == 1 else self._torch.cat(pixels), np.concatenate([ok for _, ok in done])

    def _some(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]:
        cupy, streams = self._cupy, self._streams
        pieces = [_bytes_of(chunk) for chunk in encoded.chunks if len(chunk)]
        ends = np.cumsum([0, *(len(data) for data, _ in pieces)])
        places = np.concatenate([[0], *(end + starts[1:] for end, (_, starts) in zip(ends, pieces, strict=False))])
        with streams.walking:
            there = cupy.empty(int(ends[-1]) + 8, np.uint8)  # whole words are read
            verdicts = cupy.full(len(encoded), 255, np.uint8)
            for end, (data, _) in zip(ends.tolist(), pieces, strict=False):
                there[end : end + len(data)].set(data)
            self._judge((len(encoded),), (_WALKERS,), (there, cupy.asarray(places), verdicts))
        files = [self._codec.CodeStream(data[at:end]) for data, starts in pieces for at, end in pairwise(starts.tolist())]
        with self._decoding:  # meanwhile, others bring their files and label
            images = self._decoder.decode(files, params=self._wanted, cuda_stream=streams.decoding.ptr)
        ok = verdicts.get(stream=streams.walking) == SOUND
        with streams.decoding:
            return self._kept(images, sizes, ok), ok

    def _kept(self, images: list[Any], sizes: np.ndarray, ok: np.ndarray) -> Any:
        """The crops of those that are `ok`, and of the size that they say; the others are not any more."""
        shapes = [None if image is None else tuple(image.shape) for image in images]
        ok &= [shape == (height, width, 3) for shape, (width, height) in zip(shapes, sizes.tolist(), strict=True)]
        kept = np.flatnonzero(ok)
        return self._torch.as_tensor(self._resized([images[row] for row in kept.tolist()], sizes[kept]), device="cuda")

    def _resized(self, images: list[Any], sizes: np.ndarray) -> Any:
        cupy, size = self._cupy, self.preprocessing.size
        out = cupy.empty((len(images), 3, size, size), np.uint8)
        if not images:
            return out
        addresses = [image.__cuda_array_interface__["data"][0] for image in images]
        plan, axes, needed = plan_resize(addresses, sizes, self.preprocessing)
        middle, plan_there, axes_there = cupy.empty(needed, np.uint8), cupy.asarray(plan), cupy.asarray(axes)
        rows = int(plan[:, 3].max())
        for kernel, buffers, items in ((self._rows, (middle,), rows * size), (self._columns, (middle, out), size * size)):
            grid = (-(-items // _THREADS), len(images))
            kernel(grid, (_THREADS,), (plan_there, axes_there, *buffers, np.int32(size)))
        cupy.cuda.get_current_stream().synchronize()  # what nvJPEG decoded into may go, and any stream may read what there is
        return out


def _bytes_of(array: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """(the values of an array without nulls, one behind the other; where each begins and the last one ends), views."""
    starts = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, 8 * array.offset)
    return np.frombuffer(array.buffers()[2], np.uint8)[starts[0] : starts[-1]], starts - starts[0]


def plan_resize(addresses: list[int], sizes: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray, int]:
    """What `jpeg.cu` wants to know: `images` int64 [N, 7], `axes` int32, and the bytes of `middle`. The images lie at
    `addresses`, uint8 [height, width, 3] without gaps."""
    size, tables, places, end = preprocessing.size, list[np.ndarray](), dict[tuple[int, ...], int](), 0
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    plan = np.zeros((len(kinds), 7), np.int64)
    for kind, (width, height) in enumerate(kinds.tolist()):  # of a thousand photographs, some 200
        new_width, new_height, left, top = preprocessing.placement(width, height)
        for line in ((width, new_width, left), (height, new_height, top)):
            if line not in places:
                tables.append(axis(*line, size, preprocessing.resample))
                places[line], end = end, end + len(tables[-1])
        steps = axis(height, new_height, top, size, preprocessing.resample)[2 : 2 + 2 * size]
        first, rows = int(steps[0]), int((steps[0::2] + steps[1::2]).max() - steps[0])
        plan[kind, 1:] = 3 * width, first, rows, 0, places[width, new_width, left], places[height, new_height, top]
    plan = plan[which.reshape(-1)]
    plan[:, 0] = addresses
    ends = np.cumsum(3 * size * plan[:, 3])
    plan[1:, 4] = ends[:-1]
    return plan, np.concatenate(tables), int(ends[-1])


@lru_cache(4096)
def axis(length: int, whole: int, corner: int, size: int, resample: str) -> np.ndarray:
    """How a line of `length` pixels is resized to `whole` pixels, of which only the `size` from `corner` on are made.

    One array of int32, as `jpeg.cu` reads it: the width of the table of weights, and by how many bits they are scaled up; for
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
