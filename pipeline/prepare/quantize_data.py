"""The images of a quantization: those to calibrate with and those to measure with, prepared as labelling does it.

Images that cannot be decoded or carry no label are left out and counted; a label that is no class is an error, for it is a
mistake. All labels are looked at before the work: to read the images once more takes 0.2 ms of a core each from a disk, of the 50
and more that measuring with a photograph takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.errors import JobError
from pipeline.job.recipe import QuantizeJob
from pipeline.prepare.data import MAX_PIXELS, NO_LABEL, LeftOut, class_index, image_rows, with_failures
from pipeline.prepare.gate import BATCH, Batch
from pipeline.preprocess import Preprocess
from pipeline.rows import pixels_view


@dataclass
class QuantizeData:
    """What the job's shards give, BATCH images at a time; and what was left out, by reason."""

    job: QuantizeJob
    source: Artifact
    threads: int
    calibrated: set[tuple[str, str]] = field(default_factory=set)
    """(source, key) of the images."""
    measured: int = 0
    overlap: int = 0
    """Measured images that were calibrated with, which flatters a little."""
    left_out: dict[str, LeftOut] = field(default_factory=lambda: {"calibration": LeftOut(), "measured": LeftOut()})

    def check_labels(self) -> None:
        """Raises JobError for a label that is no class, and when there is none at all."""
        found = [(self._classes(table) != NO_LABEL).any() for table in image_rows(**self._labelled())]
        if not any(found):
            got = f"{self.job.data.where}: no image has a label"
            raise JobError(got, need="some, to measure with", do="Check the label's name")

    def calibration(self) -> Iterator[np.ndarray]:
        """Raises JobError when not one image is sound."""
        rows = image_rows(self.job.calibration, most=self.job.calibration_images)
        for table in self._sound(rows, self.left_out["calibration"]):
            self.calibrated |= _names(table)
            yield self._pixels(table)
        if not self.calibrated:
            got = f"{', '.join(self.job.calibration.uris)}: no sound image to calibrate with"
            raise JobError(got, need="some, a few hundred that look like those to label", do="Check the URI and the format")

    def labelled(self) -> Iterator[Batch]:
        """Raises JobError for a label that is no class."""
        left_out = self.left_out["measured"]
        for table in self._sound(image_rows(**self._labelled()), left_out):
            labels = self._classes(table)
            told = labels != NO_LABEL
            left_out.add("NO_LABEL", table["key"].filter(pa.array(~told)).to_pylist())
            self.measured += int(told.sum())
            self.overlap += len(self.calibrated & _names(table.filter(pa.array(told))))
            if told.any():
                yield self._pixels(table)[told], labels[told]

    def facts(self) -> dict[str, Any]:
        return {
            "calibration": {"uris": list(self.job.calibration.uris), "images": len(self.calibrated)},
            "measured": {"uris": list(self.job.data.input.uris), "images": self.measured, "calibrated": self.overlap},
            "left_out": {name: dict(part.counts) for name, part in self.left_out.items()},
            "left_out_images": {name: part.keys for name, part in self.left_out.items()},
        }

    def warnings(self) -> Iterator[str]:
        for name, part in self.left_out.items():
            if part.counts:
                yield f"left out of the {name} images: {part}"
        if self.overlap:
            yield f"{self.overlap} of {self.measured} measured images were calibrated with, others would judge better"

    def _labelled(self) -> dict[str, Any]:
        """What `image_rows` is to read."""
        data = self.job.data
        return {"wanted": data.input, "label": data.label, "label_key": data.label_key, "most": data.images}

    def _classes(self, images: pa.Table) -> np.ndarray:
        return class_index(images, self.job.data.label, self.source.labels, key=self.job.data.label_key)

    def _sound(self, images: Iterator[pa.Table], left_out: LeftOut) -> Iterator[pa.Table]:
        """Images of `image_rows`, prepared, BATCH at most at a time."""
        prepare = Preprocess(self.source.preprocessing, max_pixels=MAX_PIXELS, threads=self.threads)
        for table in map(prepare, with_failures(images, processes=self.threads, quiet=True)):
            left_out.add_failed(table)
            sound = table.filter(pc.is_valid(table["pixels"]))
            yield from (sound.slice(at, BATCH) for at in range(0, sound.num_rows, BATCH))

    def _pixels(self, table: pa.Table) -> np.ndarray:
        return pixels_view(table["pixels"], self.source.preprocessing.size)


def _names(table: pa.Table) -> set[tuple[str, str]]:
    return set(zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True))
