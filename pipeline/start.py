"""What a run starts from: the artifact, the fingerprint, the log of the output, the plan. Needs neither Ray nor torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from functools import cache, partial

import pyarrow as pa

from pipeline.artifact import Artifact, load_artifact
from pipeline.columns import kept_types
from pipeline.commit import Provenance, retire_unit
from pipeline.cut import Listing, check_inputs, count_suffixes, cut, list_inputs
from pipeline.engines.onnx_engine import check_int8
from pipeline.errors import InputMissing, ModelError, PermissionDenied, StoreError, Temporary, Unidentified
from pipeline.job.jobfile import dump_job
from pipeline.job.recipe import Start
from pipeline.log import Log
from pipeline.model.preprocessing import PREPROCESSING_VERSION
from pipeline.plan import Plan, make_plan
from pipeline.rows import OUTPUT_SCHEMA_VERSION, output_schema
from pipeline.spec import Job, ModelSource
from pipeline.storage import Object, Store, join, open_input, open_store
from pipeline.unit import Part, Unit

CODE_VERSION = importlib.metadata.version("nightlabel")


def fingerprint(artifact: Artifact, job: Job) -> str:
    """12 hex digits that name a way of labelling: another model, arithmetic, decoding, top-k or column, another output. Whatever
    changes here labels every archive again; tests/test_fingerprint.py holds it to what it is."""
    parts: list[object] = [artifact.digest, job.model.precision, PREPROCESSING_VERSION, OUTPUT_SCHEMA_VERSION, job.output.top_k]
    # What more the output schema has, and which column of a Parquet file is labelled: told only where it is not the default.
    parts += [name for name in ("embeddings", "probabilities") if getattr(job.output, name)]
    parts += [job.model.engine] if job.model.engine != "auto" else []  # engines differ in the last bits
    parts += [["decode", job.decode]] if job.decode != "exact" else []
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


def plan_job(
    job: Job, artifact: Artifact, *, write: bool = True, some: bool = True, tell: Callable[..., None] = lambda *_, **__: None
) -> tuple[Log, Plan]:
    """List, subtract, cut, store: the plan that a run of `job` works from; `tell` hears of objects that no reader takes, and of
    URIs that have no input. Without `some`, one such URI is InputMissing. Needs neither Ray nor torch."""
    log = open_log(job, artifact)
    store = open_input(job.input)
    listing = list_inputs(store, job.input, some=some)
    if listing.ignored:
        tell("ignored", suffixes=dict(listing.ignored), text=count_suffixes(listing.ignored))
    tell_missing(listing, tell)

    @cache
    def types() -> pa.Schema | None:  # of what was listed, whatever of it is new
        return kept_types(store, job.input, listing.inputs)

    def cutter(inputs: list[Object]) -> list[Unit]:
        if len(inputs) == len(listing.inputs):  # else other units are there, which these files must not hold back
            check_inputs(store, job.input, inputs)
        units, kept = cut(store, job.input, inputs, tasks=job.resources.read.tasks), types()
        return units if kept is None else [Unit(unit.parts, kept) for unit in units]

    def retire(unit: Unit) -> bool:
        return not write or split_unit(log, unit, job, artifact, why="one of its inputs was replaced or is gone")

    return log, make_plan(log, listing.inputs, cutter, present=partial(present, store), retire=retire, write=write)


def tell_missing(listing: Listing, tell: Callable[..., None]) -> None:
    """`tell` hears of the URIs that have no input, if there are any."""
    if listing.missing:
        errors = {uri: str(error) for uri, error in listing.missing.items()}
        tell("missing", errors=errors)


def split_unit(log: Log, unit: Unit, job: Job, artifact: Artifact, *, why: str) -> bool:
    """Gives the inputs of a unit free for other units, for good. False: it was committed before."""
    output, architecture = job.output, artifact.architecture
    kept = unit.kept
    if kept is None:
        kept = kept_types(open_input(job.input), job.input, [part.object for part in unit.parts])
    schema = output_schema(
        embedding=architecture.features if output.embeddings else None,
        probabilities=architecture.classes if output.probabilities else None,
        kept=kept if kept is not None else [pa.field(name, pa.string()) for name in job.input.keep],
    )
    return retire_unit(log, unit, schema=schema, why=why, provenance=Provenance(log.fingerprint, "", CODE_VERSION))


def begin(log: Log, run_id: str, job: Job) -> None:
    """Stores the job beside the plan, and sees at once that what is there is never written over: all that a run promises rests on
    that, and a server that does not know If-None-Match says nothing. Raises StoreError when it is not so."""
    key, content = log.run_key(run_id, "spec.yaml"), dump_job(job)
    if log.store.create(key, content) and log.store.create(key, content):
        where = (job.output.s3.server or "AWS S3") if key.startswith("s3://") else "the disk"
        need = "a store that creates an object only if it is absent (If-None-Match: *)"
        raise StoreError(f"{key}: {where} created it twice", need=need, do="Update the server, or write the output elsewhere")


def present(store: Store, part: Part) -> bool:
    """Is the input there, in the version that was planned? Where that cannot be told it is: its unit stays as it is, and whoever
    reads it says what is wrong."""
    try:
        return store.head(part.uri) == part.object
    except InputMissing:
        return False
    except Unidentified:
        raise
    except (PermissionDenied, Temporary):
        return True


def open_log(job: Job, artifact: Artifact) -> Log:
    """The runs and units that the job's output holds for this artifact."""
    folder = ("fingerprint=" if job.output.layout == "hive" else "") + fingerprint(artifact, job)
    return Log(open_store(job.output.uri, job.output.s3), join(job.output.uri, folder))
