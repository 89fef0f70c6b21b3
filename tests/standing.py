"""What stands in the place of a GPU's decoder where there is no GPU: the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.model.preprocessing import Preprocessing

SMALL = Preprocessing(size=32)
MAX_PIXELS = 10**7


class Standing:
    """In the GPU decoder's place: vouches for what the CPU decodes, but not for the rows `doubted` of a batch."""

    def __init__(self, doubted: slice = slice(0)) -> None:
        self.doubted, self.seen = doubted, 0

    def __call__(self, encoded: pa.ChunkedArray, sizes: np.ndarray) -> tuple[Any, np.ndarray]:
        import torch

        from pipeline.decode import BadImage
        from pipeline.preprocess import Prepare

        prepare, crops, vouched = Prepare(SMALL, MAX_PIXELS), [], np.ones(len(encoded), bool)
        vouched[self.doubted] = False
        self.seen += len(encoded)
        for row, data in enumerate(encoded):
            try:
                pixels, *size = prepare(memoryview(data.as_buffer()))
            except BadImage:
                vouched[row] = False
                continue
            assert size == sizes[row].tolist()
            crops += [pixels] if vouched[row] else []
        return torch.from_numpy(np.stack(crops) if crops else np.empty((0, 3, 32, 32), np.uint8)), vouched


def make_predict(job, digest, share):
    """Stands in for `stages.make_predict`: the lane is a GPU's by name only, and vouches for all but the last of a batch. In
    careful mode there is none."""
    from pipeline import stages
    from pipeline.lanes import GpuLane

    predict = stages.make_predict(job, digest, None)
    if share is None:
        return predict
    return GpuLane(Standing(slice(-1, None)), stages.make_preprocess(job, SMALL, False, None), predict, share)
