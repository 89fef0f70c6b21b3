"""What a worker builds of a job, once: the stages between reading and the driver. Nothing here knows Ray, and what is heavy is
imported by the worker that needs it.
"""

from __future__ import annotations

from pipeline.errors import ModelError
from pipeline.lanes import GpuLane, Lanes, Share, Stage
from pipeline.model.preprocessing import Preprocessing
from pipeline.spec import Job


def make_preprocess(job: Job, preprocessing: Preprocessing, careful: bool, share: Share | None) -> Stage:
    """The stage that decodes. With `share` it leaves some images to the GPU."""
    from pipeline.careful import CarefulLimits
    from pipeline.preprocess import Preprocess

    limits = CarefulLimits(job.limits.decode_timeout, job.limits.decode_memory) if careful else None
    pools, most = job.resources, job.limits.max_pixels
    threads = _threads(pools.preprocess.cpus_per_actor if pools.preprocess.actors else pools.predict.cpus_per_actor)
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
