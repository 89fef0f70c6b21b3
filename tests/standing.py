"""What stands in the place of a GPU's decoder where there is no GPU: the CPU's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.model.preprocessing import Preprocessing

SMALL = Preprocessing(size=32)
MAX_PIXELS = 10**7


class Standing:
    """In the GPU decoder's place: vouches for what the CPU decodes, but not for the first `shy` of a batch."""

    def __init__(self, shy: int = 0) -> None:
        self.shy, self.seen = shy, 0

    def __call__(self, encoded: pa.Array, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from pipeline.decode import BadImage
        from pipeline.preprocess import Prepare

        prepare, crops, vouched = Prepare(SMALL, MAX_PIXELS), [], np.zeros(len(encoded), bool)
        self.seen += len(encoded)
        for row, data in enumerate(encoded):
            try:
                pixels, *size = prepare(memoryview(data.as_buffer()))
            except BadImage:
                continue
            assert size == sizes[row].tolist()
            vouched[row] = row >= self.shy
            crops += [pixels] if vouched[row] else []
        return np.stack(crops) if crops else np.empty((0, 3, 32, 32), np.uint8), vouched


def make_predict(job, digest, share):
    """Stands in for `stages.make_predict`: the lane is a GPU's by name only, and vouches for all but the first of a batch."""
    from pipeline import stages
    from pipeline.lanes import GpuLane

    predict = stages.make_predict(job, digest, None)
    return GpuLane(Standing(shy=1), stages.make_preprocess(job, SMALL, False, None), predict, share)
