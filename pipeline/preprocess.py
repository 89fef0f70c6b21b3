"""The stage between read and predict: encoded bytes → the uint8 square the model wants to see, or a row with a reason.

Pixels equal the training path in Pillow (open, upright, RGB, resize of the shortest edge, centre crop) within 2 of 255 levels,
0.002 on average (but for bicubic on pictures over twice as tall as wide: Pillow 13 may swap the two passes, torch never does).
torch resizes uint8 directly, antialiased, in a third of Pillow's time; its price is torch's import in every worker. torchvision
would double that price, and all it adds here is ten lines of geometry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.careful import CarefulDecoder, CarefulLimits
from pipeline.decode import BadImage, decode, decode_small
from pipeline.model.preprocessing import Preprocessing
from pipeline.rows import COMPARED_EVERY, Failure, pixels_array

Prepared = tuple[np.ndarray, int, int]
Decode = Callable[..., np.ndarray]


class Preprocess:
    """Decode, resize and crop a batch.

    `max_pixels` limits an image before it is decoded; `threads` are torch's in this process; with `careful` every image is
    prepared in a killable child process; `decode` stands in for `decode.decode`, and is pickled by its name for that child.
    `fast` decodes large JPEGs at a half, a quarter or an eighth, and some of them exactly too, for `Predict` to compare.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        max_pixels: int,
        threads: int = 1,
        careful: CarefulLimits | None = None,
        decode: Decode = decode,
        fast: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self._size = preprocessing.size
        prepare = Prepare(preprocessing, max_pixels, decode, fast)
        self._exact = replace(prepare, fast=False) if fast and careful is None else None
        self._prepare = prepare if careful is None else CarefulDecoder(prepare, careful)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """rows.IMAGE and kept columns in; out the same without `bytes`, and with `pixels` (rows.pixels_array), `width`,
        `height` int32 of the upright image. All three are null where a row failed, failed before, or ends a unit (key null).
        When fast, also `exact` large_binary: every 64th image as exact decoding has it, where that is not the same. In careful
        mode a column `room` pads each row without pixels to the size of one with pixels: Ray closes blocks by their bytes, so a
        run of hanging images would otherwise never fill one.
        """
        pixels, done = np.empty((batch.num_rows, 3, self._size, self._size), dtype=np.uint8), 0
        sizes: list[tuple[int | None, int | None]] = [(None, None)] * batch.num_rows
        keys, classes, errors = (batch.column(name).to_pylist() for name in ("key", "error_class", "error"))
        for row, data in enumerate(batch.column("bytes")):
            if keys[row] is None or classes[row] is not None:
                continue
            try:
                if not data.is_valid:
                    raise BadImage(Failure.NULL_IMAGE, "no bytes")
                pixels[done], width, height = self._prepare(memoryview(data.as_buffer()))
                sizes[row], done = (width, height), done + 1
            except BadImage as bad:
                classes[row], errors[row] = str(bad.failure), bad.message
        columns = {
            "error_class": pa.array(classes, pa.string()),
            "error": pa.array(errors, pa.string()),
            "pixels": pixels_array(pixels[:done], [width is not None for width, _ in sizes]),
            "width": pa.array([width for width, _ in sizes], pa.int32()),
            "height": pa.array([height for _, height in sizes], pa.int32()),
        }
        if isinstance(self._prepare, CarefulDecoder):
            columns["room"] = pa.array(
                [bytes(pixels[0].nbytes) if width is None else None for width, _ in sizes], pa.large_binary()
            )
        if self._exact is not None:
            columns["exact"] = pa.array(self._exactly(batch, pixels, sizes), pa.large_binary())
        return _with_columns(batch.drop_columns("bytes"), columns)

    def _exactly(self, batch: pa.Table, pixels: np.ndarray, sizes: list[tuple[int | None, int | None]]) -> list[bytes | None]:
        exact: list[bytes | None] = [None] * batch.num_rows
        where = np.cumsum([width is not None for width, _ in sizes]) - 1
        assert self._exact is not None
        for row, index in enumerate(batch.column("index").to_pylist()):
            if index % COMPARED_EVERY == 0 and sizes[row] != (None, None):
                try:
                    crop = self._exact(memoryview(batch.column("bytes")[row].as_buffer()))[0]
                except BadImage:  # only when it is decoded at its full size, as when memory is short
                    continue
                exact[row] = None if np.array_equal(crop, pixels[where[row]]) else crop.tobytes()
        return exact


@dataclass(frozen=True, slots=True)
class Prepare:
    """One encoded image → (pixels uint8 [3, S, S], width, height of the upright image). Raises BadImage."""

    preprocessing: Preprocessing
    max_pixels: int
    decode: Decode = decode
    fast: bool = False

    def __call__(self, data: bytes | memoryview) -> Prepared:
        if self.fast:
            small = decode_small(data, edge=self.preprocessing.resize_edge, max_pixels=self.max_pixels)
            if small is not None:
                image, width, height = small
                return resize_and_crop(image, self.preprocessing, (height, width)), width, height
        image = self.decode(data, max_pixels=self.max_pixels)
        height, width, _ = image.shape
        return resize_and_crop(image, self.preprocessing), width, height


def resize_and_crop(image: np.ndarray, preprocessing: Preprocessing, whole: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [3, S, S] (a view): shortest edge to `resize_edge`, centre crop, antialiased. `whole`: height and
    width of the image that `image` is a smaller copy of; rounded from the copy's own, the crop would lie a pixel beside.
    """
    size = preprocessing.size
    full_height, full_width = whole or image.shape[:2]
    new_width, new_height, left, top = preprocessing.placement(full_width, full_height)
    height, width, _ = image.shape
    if preprocessing.is_strip(full_width, full_height):
        # Pillow resizes just the crop, to the same pixels; per pixel it takes three times as long as torch.
        scale_y, scale_x = height / new_height, width / new_width
        box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
        resample = Image.Resampling[preprocessing.resample.upper()]
        return np.asarray(Image.fromarray(image).resize((size, size), resample, box=box)).transpose(2, 0, 1)
    if (new_height, new_width) == (height, width):  # a resize would give the same, and takes 40 us of 32 x 32 pixels
        return image[top : top + size, left : left + size].transpose(2, 0, 1)
    # Channels last with an explicit batch stride: without it torch takes one image for contiguous and repacks it (1.8 x as long).
    pixels = torch.from_numpy(image).as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))
    resized = torch.nn.functional.interpolate(pixels, (new_height, new_width), mode=preprocessing.resample, antialias=True)
    crop: np.ndarray = resized[0, :, top : top + size, left : left + size].numpy()
    return crop


def _with_columns(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """Columns of the table replaced in place, new ones appended."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    return table
