"""What a worker builds of a job, once: the stages between reading and the driver. Nothing here knows Ray, and what is heavy is
imported by the worker that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pyarrow as pa

from pipeline.errors import ModelError
from pipeline.lanes import GpuLane, Lanes, Share, Stage
from pipeline.model.preprocessing import Preprocessing
from pipeline.rows import TIMINGS, handed_on
from pipeline.spec import Job

Seam = tuple[str, Callable[[], Stage]]


def make_preprocess(job: Job, preprocessing: Preprocessing, careful: bool, share: Share | None) -> Stage:
    """The stage that decodes. With `share` it leaves some images to the GPU."""
    from pipeline.careful import CarefulLimits
    from pipeline.preprocess import Preprocess

    limits = CarefulLimits(job.limits.decode_timeout, job.limits.decode_memory) if careful else None
    pools, most = job.resources, job.limits.max_pixels
    alone = pools.read.cpus_per_task if share else pools.predict.cpus_per_actor  # where it is done without actors of its own
    threads = _threads(pools.preprocess.cpus_per_actor if pools.preprocess.actors else alone)
    preprocess = Preprocess(preprocessing, max_pixels=most, threads=threads, careful=limits, fast=job.decode == "fast")
    return preprocess if share is None else Lanes(preprocess, preprocessing, most, share)


def make_predict(job: Job, digest: str, share: Share | None) -> Stage:
    """The stage that labels, and with `share` decodes what comes encoded. Raises ModelError when the artifact is not the one that
    was planned."""
    from pipeline.artifact import load_artifact
    from pipeline.predict import Predict

    artifact = load_artifact(job.model.uri, job.model.s3)
    if artifact.digest != digest:
        raise ModelError(f"{job.model.uri}: digest {artifact.digest}", need=f"{digest}, as it was planned", do="Run again")
    pool = job.resources.predict
    predict = Predict(
        artifact,
        job.model,
        device="cuda" if pool.gpus_per_actor else "cpu",
        batch_size=pool.batch_size,
        output=job.output,
        threads=_threads(pool.cpus_per_actor),
    )
    if share is None:
        return predict
    from pipeline.engines.gpu_decode import GpuDecoder

    preprocess = make_preprocess(job, artifact.preprocessing, careful=False, share=None)
    return GpuLane(GpuDecoder(artifact.preprocessing), preprocess, predict, share)


def _threads(cpus: float) -> int:
    return max(1, int(cpus + 0.5))


class Timed:
    """Stages, one after the other, whose seconds travel with the rows, in columns of rows.TIMINGS that the driver takes off.

    They get at most `most` rows at a time: a block of encoded thumbnails holds 15,000 images, whose pixels are 2.3 GB.
    """

    def __init__(self, seams: list[Seam], most: int | None) -> None:
        self.stages, self.most = [(seam, make()) for seam, make in seams], most

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        most = self.most or max(1, batch.num_rows)
        for at in range(0, max(1, batch.num_rows), most):
            table = batch.slice(at, most)
            for seam, stage in self.stages:
                since = time.perf_counter()
                table = _with_seconds(stage(table), seam, time.perf_counter() - since)
            yield handed_on(table)


def _with_seconds(table: pa.Table, seam: str, seconds: float) -> pa.Table:
    share = pa.array([seconds / max(1, table.num_rows)] * table.num_rows, pa.float32())
    return table.append_column(TIMINGS[seam], share)


def clocked(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """With the seconds that it took to read each."""
    since = time.perf_counter()
    for table in tables:
        yield _with_seconds(table, "read", time.perf_counter() - since)
        since = time.perf_counter()


def gathered(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """Together until they have `size` bytes: what is done to a table has a price of its own, and 64 photographs are few."""
    waiting, held = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        held += table.nbytes
        if held >= size:
            yield pa.concat_tables(waiting)
            waiting, held = [], 0
    if waiting:
        yield pa.concat_tables(waiting)
