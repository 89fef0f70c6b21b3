"""Labelled shards → artifact: read the way the main job reads, train from a model or a random start, keep what it came from."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
from torch import Tensor, nn

from pipeline.artifact import EPOCHS, Artifact, Origin, build, make_artifact
from pipeline.errors import JobError
from pipeline.job.training import FinetuneJob, RandomNetwork, TrainingJob
from pipeline.model.huggingface import Architecture, resnet, write_preprocessor
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet
from pipeline.prepare.data import NO_LABEL
from pipeline.prepare.dataset import TrainingData, read_data
from pipeline.prepare.images import seeded
from pipeline.prepare.learner import CrossEntropy, Learner, balanced_weights
from pipeline.prepare.outcome import Outcome, Say
from pipeline.prepare.resume import checkpoint_line, checkpoints, close, finished, job_key
from pipeline.prepare.shelf import Shelf
from pipeline.prepare.train import Result, Worker, fit
from pipeline.prepare.workers import on_workers
from pipeline.start import load_source


def run_job(job: FinetuneJob, *, say: Say, command: str) -> Outcome:
    """Train as the job says, here or on Ray Train, and save the artifact."""
    return on_workers(job, train_job, say=say, command=command)


def train_job(job: FinetuneJob, *, worker: Worker, say: Say, command: str) -> Outcome:
    """The part of one worker; the first one saves the artifact."""
    start = None if job.model is None else load_source(job.model)
    parents = () if start is None else (start.digest,)
    key = job_key(job, list(parents))
    if (done := finished(job, key, worker)) is not None:
        return done
    preprocessing = seen(job, start)
    known = () if start is None else start.labels
    place = checkpoints(job, key)
    shelf = Shelf(place.folder, worker.rank, worker.beside, say)
    data = read_data(job.data, seed=job.training.seed, known=known, shelf=shelf)
    for line in (*data.lines, classifier_line(start, data.classes), checkpoint_line(place)):
        say(line)
    network = starting_network(start, job.network, data.classes, seed=job.training.seed)
    objective = CrossEntropy(job.training.label_smoothing, class_weights(job, data))
    learner = Learner(network, objective, preprocessing, job.training)
    result = fit(learner, data.images, preprocessing=preprocessing, worker=worker, place=place, say=say)

    def made() -> Artifact:
        facts = data.facts | {"job": key, "training": job.training.model_dump(mode="json"), EPOCHS: told(result)}
        origin = Origin(parents, facts, metrics(result), command)
        architecture = architecture_of(start, job.network, len(data.classes))
        return make_artifact(architecture, result.weights, labels=data.classes, preprocessing=preprocessing, origin=origin)

    return close(job, key, worker, made=made, lines=(epoch_line(result),))


def class_weights(job: TrainingJob, data: TrainingData) -> Tensor | None:
    """Of the classes in the training images, when the job wants them balanced."""
    if job.training.class_weights == "none":
        return None
    labels = data.images[0].labels
    return balanced_weights(np.bincount(labels[labels != NO_LABEL], minlength=len(data.classes)))


def seen(job: TrainingJob, start: Artifact | None) -> Preprocessing:
    """The preprocessing of the new model. Raises JobError for values no image can be prepared with."""
    try:
        wanted = job.preprocessing.over(Preprocessing() if start is None else start.preprocessing)
    except ValueError as error:
        raise JobError(f"preprocessing: {error}") from None
    write_preprocessor(wanted, "preprocessing")  # now, not after the training
    return wanted


def architecture_of(start: Artifact | None, wanted: RandomNetwork, classes: int) -> Architecture:
    """Of the network to train."""
    if start is not None:
        return replace(start.architecture, classes=classes)
    return resnet(wanted.depth, classes, stem=wanted.stem)


def starting_network(start: Artifact | None, wanted: RandomNetwork, classes: tuple[str, ...], *, seed: int) -> ResNet:
    """The network to train: `start` with its own classifier or a fresh one, or a random one."""
    with seeded(seed):
        if start is None:
            return _initialised(ResNet(architecture_of(None, wanted, len(classes))))
        network = build(start)
        if start.labels != classes:
            network.classifier[1] = nn.Linear(start.architecture.features, len(classes))
        return network


def classifier_line(start: Artifact | None, classes: tuple[str, ...]) -> str:
    """Whether what the model to begin from has learned of its classes is of use."""
    if start is None:
        return f"random start: {len(classes):,} classes"
    if start.labels == classes:
        return f"classifier kept: {len(classes):,} classes"
    if len(start.labels) != len(classes):
        return f"classifier replaced: {len(classes):,} classes instead of {len(start.labels):,}"
    if sorted(start.labels) == sorted(classes):
        return f"classifier replaced: {len(classes):,} classes in another order"
    return f"classifier replaced: {len(classes):,} classes, {_some(classes)}, instead of {_some(start.labels)}"


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:3]) + (", …" if len(labels) > 3 else "")


def _initialised(model: ResNet) -> ResNet:
    """He's initialisation for ReLU, fan out (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def metrics(result: Result, *, judge: str = "accuracy") -> dict[str, float]:
    """Of the best epoch, for the artifact. `judge` is what chose it."""
    best = result.best
    return {
        judge: best.accuracy,
        "validation_loss": best.validation_loss,
        "epoch": best.number,
        "epochs": len(result.epochs),
    }


def told(result: Result) -> list[dict[str, float]]:
    """Every epoch, for the artifact: what curves are drawn from."""
    return [asdict(epoch) for epoch in result.epochs]


def epoch_line(result: Result, *, right: str = "right") -> str:
    """How it went, for the receipt."""
    best, why = result.best, "stopped early" if result.stopped_early else "all epochs done"
    seconds = sum(epoch.seconds for epoch in result.epochs)
    return f"done: {best.accuracy:.2%} {right} in epoch {best.number} of {len(result.epochs)}, {why}, {seconds:.0f} s of training"
