"""Labelled shards → artifact: read the way the main job reads, train from a model or a random start, keep what it came from.

Images that cannot be decoded or carry no label are left out, counted and listed; an image with an unknown label is an error: the
one is how collections are, the other a mistake. A finished job that is run again finds its artifact and does nothing; one that
was killed finds its checkpoints, beside the artifact or in the working folder when that is on S3, and goes on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pipeline.artifact import RECORD, Artifact, Origin, build, load_artifact, make_artifact, save_artifact
from pipeline.cut import list_inputs
from pipeline.errors import InputMissing, JobError
from pipeline.huggingface import Architecture, write_preprocessor
from pipeline.prepare.card import folder_name, model_card
from pipeline.prepare.data import NO_LABEL
from pipeline.prepare.images import Found, Images, find_classes, labelled, read_images, seeded, split
from pipeline.prepare.learner import CrossEntropy, Learner, balanced_weights
from pipeline.prepare.outcome import Outcome, Say
from pipeline.prepare.train import Place, Result, fit
from pipeline.preprocessing import PREPROCESSING_VERSION, Preprocessing
from pipeline.resnet import ResNet
from pipeline.spec import Input
from pipeline.start import load_source
from pipeline.storage import join, open_store
from pipeline.training import Data, DistillJob, FinetuneJob, Random

_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # arXiv 1512.03385
_LISTED = 50  # images left out that the artifact names; all are counted


@dataclass(frozen=True)
class TrainingData:
    """(training, validation) images and what there is to say of them."""

    images: tuple[Images, Images]
    classes: tuple[str, ...]
    facts: dict[str, Any]


def run_job(job: FinetuneJob, *, say: Say, command: str) -> Outcome:
    """Train as the job says, here or on Ray Train, and save the artifact."""
    if job.workers.count > 1:
        from pipeline.prepare.workers import together

        return together(job, say=say, command=command)
    return train_job(job, place=Place.here(job.workers), say=say, command=command)


def train_job(job: FinetuneJob, *, place: Place, say: Say, command: str) -> Outcome:
    """The part of one worker; the first one saves the artifact."""
    start = None if job.model is None else load_source(job.model)
    key = job_key(job, [] if start is None else [start.digest])
    if (there := finished(job, key)) is not None:
        return outcome(there, job, ("nothing to do: the artifact is there",))
    data = read_data(job.data, seed=job.training.seed)
    say(told(data))
    preprocessing = seen(job, start)
    network = starting_network(start, job.network, data.classes, seed=job.training.seed)
    objective = CrossEntropy(job.training.label_smoothing, class_weights(job, data))
    learner = Learner(network, objective, preprocessing, job.training)
    result = fit(learner, data.images, preprocessing=preprocessing, place=place, folder=checkpoints(job, key), say=say)
    if place.rank:
        return Outcome(())
    made = make_artifact(
        architecture_of(start, job.network, len(data.classes)),
        result.weights,
        labels=data.classes,
        preprocessing=preprocessing,
        origin=Origin(
            parents=() if start is None else (start.digest,),
            data=data.facts | {"job": key, "training": job.training.model_dump(mode="json")},
            metrics=metrics(result),
            command=command,
        ),
    )
    return outcome(save(made, job), job, epoch_lines(result))


def class_weights(job: FinetuneJob | DistillJob, data: TrainingData) -> Tensor | None:
    """Of the classes in the training images, when the job wants them balanced."""
    if job.training.class_weights == "none":
        return None
    labels = data.images[0].labels
    return balanced_weights(np.bincount(labels[labels != NO_LABEL], minlength=len(data.classes)))


def save(made: Artifact, job: FinetuneJob | DistillJob) -> Artifact:
    """Write the artifact with its card; as it stands there now."""
    uri = job.output.uri
    return save_artifact(made, uri, job.output.s3, card=model_card(made, name=folder_name(uri)))


def job_key(job: FinetuneJob | DistillJob, parents: list[str]) -> str:
    """12 hex digits that name a training: the job but for names, places and who trains, the inputs as they are, the parents."""
    what = job.model_dump(mode="json", exclude={"name", "output", "workers", "model", "teacher", "student"})
    inputs = [input_ for input_ in (job.data.train, job.data.validation) if input_ is not None]
    listed = [item for input_ in inputs for item in _listing(input_)]
    whole = [what, listed, parents, job.workers.count, PREPROCESSING_VERSION]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def _listing(wanted: Input) -> list[list[Any]]:
    return [[item.uri, item.size, item.etag] for item in list_inputs(open_store(wanted.uris[0], wanted.s3), wanted)]


def finished(job: FinetuneJob | DistillJob, key: str) -> Artifact | None:
    """The artifact that this very job has made. Raises JobError when another one stands in its place."""
    store = open_store(job.output.uri, job.output.s3)
    try:
        record = json.loads(store.read(join(job.output.uri, RECORD)))
    except InputMissing:
        return None
    if record.get("data", {}).get("job") != key:
        got = f"output.uri {job.output.uri} holds another artifact, {str(record.get('digest'))[:19]}…"
        raise JobError(got, need="an empty folder, or the artifact of this very job", do="Give another output.uri")
    return load_artifact(job.output.uri, job.output.s3)


def checkpoints(job: FinetuneJob | DistillJob, key: str) -> Path:
    """Where the state of an unfinished training lies."""
    uri = job.output.uri.removeprefix("file://").rstrip("/")
    base = Path(f"{job.name}.training") if uri.startswith("s3://") else Path(f"{uri}.training")
    folder = base / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_data(wanted: Data, *, seed: int, classes: tuple[str, ...] = (), unlabelled: bool = False) -> TrainingData:
    """Read, find the classes (or take those given), split where there are no validation images."""
    where = f"{', '.join(wanted.train.uris)}, {wanted.label}"
    train = read_images(wanted.train, label=wanted.label, unlabelled=unlabelled)
    held = None if wanted.validation is None else read_images(wanted.validation, label=wanted.label)
    classes = find_classes(train.texts, classes or wanted.classes, where=where)
    images = labelled(train, classes, where=where)
    if held is not None:
        parts = images, labelled(held, classes, where=f"{', '.join(held_uris(wanted))}, {wanted.label}")
    else:
        parts = split(images, wanted.validation_share, seed=seed)
    facts = {
        "uris": list(wanted.train.uris),
        "validation_uris": list(held_uris(wanted)),
        "images": {"train": len(parts[0]), "validation": len(parts[1])},
        "left_out": train.counts,
        "left_out_images": _listed(train),
    }
    if held is not None:
        facts |= {"left_out_of_validation": held.counts, "left_out_validation_images": _listed(held)}
    return TrainingData(parts, classes, facts)


def held_uris(wanted: Data) -> tuple[str, ...]:
    return () if wanted.validation is None else wanted.validation.uris


def _listed(found: Found) -> list[dict[str, str]]:
    return [{"key": key, "error_class": failure, "error": error} for key, failure, error in found.left_out[:_LISTED]]


def told(data: TrainingData) -> str:
    """One line about what was read."""
    images, left_out = data.facts["images"], data.facts["left_out"]
    left = f", left out {', '.join(f'{name} {number:,}' for name, number in left_out.items())}" if left_out else ""
    return f"{images['train']:,} images to train on, {images['validation']:,} to validate with, {len(data.classes)} classes{left}"


def seen(job: FinetuneJob | DistillJob, start: Artifact | None) -> Preprocessing:
    """The preprocessing of the new model. Raises JobError for values no image can be prepared with."""
    try:
        wanted = job.preprocessing.over(Preprocessing() if start is None else start.preprocessing)
    except ValueError as error:
        raise JobError(f"preprocessing: {error}") from None
    write_preprocessor(wanted, "preprocessing")  # now, not after the training
    return wanted


def architecture_of(start: Artifact | None, wanted: Random, classes: int) -> Architecture:
    """Of the network to train."""
    if start is not None:
        return replace(start.architecture, classes=classes)
    basic = wanted.depth < 50
    sizes, kind = (_BASIC, "basic") if basic else (_BOTTLENECK, "bottleneck")
    return Architecture(kind, _DEPTHS[wanted.depth], sizes, classes, stem=wanted.stem)


def starting_network(start: Artifact | None, wanted: Random, classes: tuple[str, ...], *, seed: int) -> ResNet:
    """The network to train: `start` with its own classifier or a fresh one, or a random one."""
    with seeded(seed):
        if start is None:
            return _initialised(ResNet(architecture_of(None, wanted, len(classes))))
        network = build(start)
        if start.labels != classes:
            network.classifier[1] = nn.Linear(start.architecture.features, len(classes))
        return network


def _initialised(model: ResNet) -> ResNet:
    """He's initialisation for ReLU, fan out (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def metrics(result: Result) -> dict[str, float]:
    """Of the best epoch, for the artifact."""
    best = result.best
    return {
        "accuracy": best.accuracy,
        "validation_loss": best.validation_loss,
        "epoch": best.number,
        "epochs": len(result.epochs),
    }


def epoch_lines(result: Result) -> tuple[str, ...]:
    """How it went, for the receipt."""
    best, why = result.best, "stopped early" if result.stopped_early else "all epochs done"
    seconds = sum(epoch.seconds for epoch in result.epochs)
    return (
        f"done: {best.accuracy:.2%} right in epoch {best.number} of {len(result.epochs)}, {why}, {seconds:.0f} s of training",
    )


def outcome(artifact: Artifact, job: FinetuneJob | DistillJob, lines: tuple[str, ...]) -> Outcome:
    """The receipt of a training job."""
    facts = {"where": job.output.uri, "digest": artifact.digest, **asdict(artifact.origin)}
    tail = (f"where   {job.output.uri}", f"digest  {artifact.digest}", f"next    nightlabel model show {job.output.uri}")
    return Outcome((*lines, *tail), facts)
