"""What a run starts from: the artifact, the fingerprint, the log of the output, the plan. Needs neither Ray nor torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from functools import partial

from pipeline.artifact import Artifact, load_artifact
from pipeline.cut import cut, list_inputs
from pipeline.errors import InputMissing, ModelError
from pipeline.onnx_engine import check_int8
from pipeline.plan import Log, Part, Plan, make_plan
from pipeline.preprocessing import PREPROCESSING_VERSION
from pipeline.recipe import Start
from pipeline.rows import OUTPUT_SCHEMA_VERSION
from pipeline.spec import Job, ModelSource
from pipeline.storage import Object, Store, join, open_store

# Ray reads some of these when it is imported. What the user has set stays.
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # ray.init alone would turn token auth on and write to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a pass that was left must not bring Ray up again behind our back
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would build an environment per worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core cries wolf on stderr for every pool whose actors may restart
}

CODE_VERSION = importlib.metadata.version("nightlabel")


def set_ray_environment() -> None:
    """To be called before Ray is imported."""
    os.environ.update({name: value for name, value in _RAY_ENVIRONMENT.items() if name not in os.environ})


def fingerprint(artifact: Artifact, job: Job) -> str:
    """12 hex digits that name a way of labelling: another model, precision, preprocessing, schema or top-k, another output."""
    parts: list[object] = [artifact.digest, job.model.precision, PREPROCESSING_VERSION, OUTPUT_SCHEMA_VERSION, job.output.top_k]
    # What more the output schema has, and which column of a Parquet file is labelled: told only where it is not the default.
    parts += [name for name in ("embeddings", "probabilities") if getattr(job.output, name)]
    parts += [["keep", *job.input.keep]] if job.input.keep else []
    if job.input.format == "parquet" and (job.input.image_column, job.input.key_column) != ("image", "key"):
        parts.append(["columns", job.input.image_column, job.input.key_column])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def load_model(job: Job, *, weights: bool) -> Artifact:
    """The job's artifact. Raises ModelError when its digest or its precisions are not what the job wants."""
    return load_source(job.model, weights=weights)


def load_source(source: ModelSource | Start, *, weights: bool = True, field: str = "model") -> Artifact:
    """The artifact that the field of a job names. Raises ModelError when its digest is not the one wanted there,
    or it lacks what the precision wanted there needs."""
    artifact = load_artifact(source.uri, source.s3, weights=weights)
    if source.digest not in (None, artifact.digest):
        do = f"Set {field}.digest to it if the change is meant"
        raise ModelError(f"{source.uri}: digest {artifact.digest}", need=str(source.digest), do=do)
    if isinstance(source, ModelSource) and source.precision == "int8":
        check_int8(artifact, source.uri)
    return artifact


def plan_job(job: Job, artifact: Artifact, *, write: bool = True) -> tuple[Log, Plan]:
    """List, subtract, cut, store: the plan that a run of `job` works from. Needs neither Ray nor torch."""
    log = open_log(job, artifact)
    store = open_store(job.input.uris[0], job.input.s3)
    listing = list_inputs(store, job.input)
    cutter = partial(cut, store, job.input, tasks=job.resources.read.tasks)
    return log, make_plan(log, listing, cutter, present=partial(_present, store), write=write)


def _present(store: Store, part: Part) -> bool:
    try:
        return store.head(part.uri) == Object(part.uri, part.size, part.etag)
    except InputMissing:
        return False


def open_log(job: Job, artifact: Artifact) -> Log:
    """The runs and units that the job's output holds for this artifact."""
    return Log(open_store(job.output.uri, job.output.s3), join(job.output.uri, fingerprint(artifact, job)))
