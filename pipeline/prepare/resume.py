"""A training that is run again: done already, stopped half-way, or new; and what it leaves when it is done.

A finished job finds its artifact and does nothing; one that was killed finds its checkpoints, beside the artifact, and goes on.
They are removed once the artifact is saved. What else stands in the output's folder is found before the training, not after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.artifact import RECORD, Artifact, save_artifact
from pipeline.errors import JobError
from pipeline.job.training import TrainingJob
from pipeline.model.describe import file_sizes
from pipeline.model.preprocessing import PREPROCESSING_VERSION
from pipeline.prepare.afar import EVERY_S, Checkpoints
from pipeline.prepare.card import folder_name, model_card
from pipeline.prepare.data import listing
from pipeline.prepare.epochs import TABLE
from pipeline.prepare.outcome import Outcome, made_before
from pipeline.prepare.train import Worker
from pipeline.storage import check_writable, head_if_there, join, open_store


def job_key(job: TrainingJob, parents: list[str]) -> str:
    """12 hex digits that name a training: the job but for names, places and who trains, the inputs as they are, the parents. What
    is left as it is by default is not in it: a field that is new in a later version makes no other training of an old job."""
    what = job.model_dump(
        mode="json", exclude_defaults=True, exclude={"name", "output", "workers", "model", "teacher", "student"}
    )
    inputs = [input_ for input_ in (job.data.train, job.data.validation) if input_ is not None]
    listed = [item for input_ in inputs for item in listing(input_)]
    whole = [what, listed, parents, job.workers.count, PREPROCESSING_VERSION]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def finished(job: TrainingJob, key: str, worker: Worker) -> Outcome | None:
    """What to say when this very job is done already. The first worker looks, for all: they must not find different things.

    Raises JobError when something else stands in the artifact's place, and what `check_writable` does.
    """
    there = _standing(job, key) if worker.rank == 0 else None
    if not worker.broadcast(there is not None):
        return None
    place = checkpoints(job, key)
    left = place.remove_copies() if worker.rank == 0 else ()  # a kill may have left them
    place.remove()
    return Outcome(()) if there is None else outcome(there, job, ("nothing to do: the artifact is there", *left))


def _standing(job: TrainingJob, key: str) -> Artifact | None:
    uri, s3 = job.output.uri, job.output.s3
    if head_if_there(open_store(uri, s3), join(uri, RECORD)) is None:
        names = file_sizes(uri, s3)
        if names and not checkpoints(job, key).stand():  # else a kill while saving may have left them; saving compares
            got = f"output.uri {uri} holds {', '.join(names)} without {RECORD}"
            raise JobError(got, need="an empty folder, or the artifact of this very job", do="Give another output.uri")
        check_writable(uri)
        return None
    found = made_before(job.output)
    if found.origin.data.get("job") != key:
        got = f"output.uri {uri} holds another artifact, {found.digest[:19]}…"
        raise JobError(got, need="an empty folder, or the artifact of this very job", do="Give another output.uri")
    return made_before(job.output, weights=True)


def checkpoints(job: TrainingJob, key: str) -> Checkpoints:
    """Where the state of an unfinished training lies."""
    uri = job.output.uri.removeprefix("file://").rstrip("/")
    if not uri.startswith("s3://"):
        return Checkpoints(Path(f"{uri}.training", key).absolute())
    return Checkpoints(Path(f"{job.name}.training", key).absolute(), join(f"{uri}.training", key), job.output.s3)


def checkpoint_line(place: Checkpoints) -> str:
    copies = f", and copied to {place.afar} after an epoch, at most every {EVERY_S / 60:.0f} minutes," if place.afar else ""
    return f"checkpoints and {TABLE} in {place.folder}{copies} until the model is saved; the same command goes on from them"


def close(job: TrainingJob, key: str, worker: Worker, *, made: Callable[[], Artifact], lines: tuple[str, ...]) -> Outcome:
    """The first worker makes and saves the artifact, with its card, and says so; then all remove their checkpoints."""
    done, place = Outcome(()), checkpoints(job, key)
    if worker.rank == 0:
        artifact, uri = made(), job.output.uri
        saved = save_artifact(artifact, uri, job.output.s3, card=model_card(artifact, name=folder_name(uri)))
        done = outcome(saved, job, (*lines, *place.remove_copies()))
    worker.broadcast(None)  # on a shared disk the first worker has read from theirs until here
    place.remove()
    return done


def outcome(artifact: Artifact, job: TrainingJob, lines: tuple[str, ...]) -> Outcome:
    """The receipt of a training job."""
    facts = {"where": job.output.uri, "digest": artifact.digest, **asdict(artifact.origin)}
    tail = (f"where   {job.output.uri}", f"digest  {artifact.digest}", f"next    nightlabel model show {job.output.uri}")
    return Outcome((*lines, *tail), facts)
