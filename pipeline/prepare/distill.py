"""A student learns the answers of a teacher, on images with or without labels, and the report says what the teacher was worth.

The teacher sees the very pixels that the student sees, random changes included, and answers anew every time: that is the point of
distilling (arXiv 2106.05237), and its price, a forward pass of the teacher for each image of each epoch. The student is trained a
second time without the teacher, unless the job says otherwise, so that teacher, plain student and distilled student stand side by
side, measured on the same validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.artifact import EPOCHS, Artifact, Origin, build, make_artifact
from pipeline.errors import JobError
from pipeline.job.training import Distillation, DistillJob
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet
from pipeline.prepare.data import MAX_PIXELS, NO_LABEL
from pipeline.prepare.dataset import TrainingData, read_taught
from pipeline.prepare.finetune import (
    architecture_of,
    class_weights,
    classifier_line,
    epoch_line,
    metrics,
    seen,
    starting_network,
    told,
)
from pipeline.prepare.images import Images, seeded
from pipeline.prepare.learner import CrossEntropy, Learner, Normalise, Objective
from pipeline.prepare.outcome import Outcome, Say
from pipeline.prepare.resume import checkpoint_line, checkpoints, close, finished, job_key
from pipeline.prepare.shelf import Shelf
from pipeline.prepare.train import Result, Worker, fit
from pipeline.prepare.workers import on_workers
from pipeline.preprocess import Prepare
from pipeline.start import load_source

Fit = Callable[[str, Objective, TrainingData], Result]


def run_job(job: DistillJob, *, say: Say, command: str) -> Outcome:
    """Train as the job says, here or on Ray Train, and save the student."""
    return on_workers(job, train_job, say=say, command=command)


def train_job(job: DistillJob, *, worker: Worker, say: Say, command: str) -> Outcome:
    """The part of one worker; the first one saves the student. Raises JobError when teacher and student do not go together."""
    teacher = load_source(job.teacher, field="teacher")
    start = None if job.student is None else load_source(job.student, field="student")
    parents = (teacher.digest,) if start is None else (teacher.digest, start.digest)
    key = job_key(job, list(parents))
    if (done := finished(job, key, worker)) is not None:
        return done
    preprocessing = seen(job, start)
    _check(job, teacher, preprocessing)
    root = checkpoints(job, key)
    shelf = Shelf(root.folder, worker.rank, worker.beside, say)
    data = read_taught(job.data, seed=job.training.seed, classes=teacher.labels, shelf=shelf)
    for line in (*data.lines, classifier_line(start, data.classes), checkpoint_line(root)):
        say(line)
    data, known = _judged(
        job, data, worker.broadcast(answers(teacher, data.images[1], worker) if worker.rank == 0 else None), say
    )
    architecture = architecture_of(start, job.network, len(teacher.labels))

    def train(name: str, objective: Objective, images: TrainingData) -> Result:
        say(f"training the student {name}")
        network = starting_network(start, job.network, teacher.labels, seed=job.training.seed)
        learner = Learner(network, objective, preprocessing, job.training)
        place = root / name.replace(" ", "-")
        return fit(learner, images.images, preprocessing=preprocessing, worker=worker, place=place, say=say)

    weights = class_weights(job, data)
    plain = _baseline(job, data, train, CrossEntropy(job.training.label_smoothing, weights), workers=worker.world, say=say)
    result = train("with the teacher", DistillationLoss(job, teacher, preprocessing, architecture.features, weights), data)
    numbers = _numbers(result, plain, known)

    def made() -> Artifact:
        settings = {"training": job.training.model_dump(mode="json"), "distillation": job.distillation.model_dump(mode="json")}
        epochs = {EPOCHS: told(result)} | ({f"baseline_{EPOCHS}": told(plain)} if plain is not None else {})
        origin = Origin(parents, data.facts | {"job": key, **settings, **epochs}, numbers, command)
        return make_artifact(architecture, result.weights, labels=teacher.labels, preprocessing=preprocessing, origin=origin)

    return close(job, key, worker, made=made, lines=tuple(_side_by_side(result, numbers)))


def _judged(job: DistillJob, data: TrainingData, said: np.ndarray, say: Say) -> tuple[TrainingData, dict[str, float]]:
    """The validation images with what counts as right, labels or, when none are named, what the teacher `said`; and what is
    known of the teacher."""
    training, validation = data.images
    if job.data.label is None:
        say("no labels: the epoch is chosen by agreement with the teacher, and that is what counts as right")
        return replace(data, images=(training, replace(validation, labels=said))), {}
    right = float((said == validation.labels).mean())
    say(f"the teacher is right on {right:.2%} of the validation images")
    return data, {"teacher_accuracy": right}


def _numbers(result: Result, plain: Result | None, known: dict[str, float]) -> dict[str, float]:
    numbers = metrics(result, judge="accuracy" if known else "agreement") | known
    if plain is not None:
        numbers |= {"baseline_accuracy": plain.best.accuracy, "gain_points": 100 * (result.best.accuracy - plain.best.accuracy)}
    return numbers


def _baseline(job: DistillJob, data: TrainingData, train: Fit, objective: Objective, *, workers: int, say: Say) -> Result | None:
    """The student that sees the labels alone; none when the job wants none, or fewer images have labels than a step of so many
    `workers` takes."""
    training = job.training
    where, least = (data.images[0].labels != NO_LABEL).nonzero()[0], training.batch_size * training.accumulate * workers
    if not job.distillation.baseline:
        return None
    if len(where) < least:
        say(f"no student without the teacher: {len(where):,} images have a label, and a step has {least}")
        return None
    images = data.images[0] if len(where) == len(data.images[0]) else data.images[0].take(where)
    return train("without the teacher", objective, replace(data, images=(images, data.images[1])))


def _check(job: DistillJob, teacher: Artifact, preprocessing: Preprocessing) -> None:
    if job.data.classes and job.data.classes != teacher.labels:
        got = f"data.classes has {len(job.data.classes)} classes, {', '.join(job.data.classes[:3])}, …"
        need = f"the {len(teacher.labels)} of the teacher in its order, {', '.join(teacher.labels[:3])}, …"
        raise JobError(got, need=need, do="Leave data.classes out, or fine-tune the teacher on these classes first")
    if teacher.preprocessing.size != preprocessing.size:
        got = f"the student sees {preprocessing.size} pixels, the teacher {teacher.preprocessing.size}"
        raise JobError(got, need="the same size", do="Set preprocessing.size to the teacher's, or fine-tune the teacher")


class DistillationLoss(nn.Module):
    """alpha · T² · KL(teacher ‖ student) at temperature T, plus (1 - alpha) · cross entropy over the images that have a label,
    plus the weighted squared distance of the normalised embeddings, the student's through a linear map where lengths differ."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self, job: DistillJob, teacher: Artifact, preprocessing: Preprocessing, features: int, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.wanted: Distillation = job.distillation
        self.hard = CrossEntropy(job.training.label_smoothing, weights)
        self.teacher = (build(teacher).to(memory_format=torch.channels_last),)  # in a tuple: no part of the checkpoint
        theirs = teacher.architecture.features
        self.project: nn.Module = nn.Identity()
        if self.wanted.features and features != theirs:  # only then: several workers cannot have a parameter that nothing uses
            with seeded(job.training.seed):  # what was drawn before depends on whether a kill came in between
                self.project = nn.Linear(features, theirs, bias=False)
        ours, other = (Normalise(p) for p in (preprocessing, teacher.preprocessing))
        self.register_buffer("scale", ours.std / other.std, persistent=False)
        self.register_buffer("shift", (ours.mean - other.mean) / other.std, persistent=False)

    def forward(self, network: ResNet, images: Tensor, targets: Tensor) -> Tensor:
        features = network.features(images)
        logits = network.classify(features)
        with torch.no_grad():
            teacher = self.teacher[0].to(images.device)
            their_features = teacher.features(images * self.scale + self.shift)
            answers = teacher.classify(their_features)
        temperature = self.wanted.temperature
        soft = F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            F.log_softmax(answers / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.wanted.alpha * temperature**2 * soft
        if self.wanted.alpha < 1:
            loss = loss + (1 - self.wanted.alpha) * self.hard.of(logits, targets)
        if self.wanted.features:
            ours = F.normalize(self.project(features).float(), dim=1)
            distance = (ours - F.normalize(their_features.float(), dim=1)).square().sum(dim=1).mean()
            loss = loss + self.wanted.features * distance
        return loss


def answers(teacher: Artifact, images: Images, worker: Worker) -> np.ndarray:
    """The teacher's best class of every image, int64 [N], in float32, on the device of the training."""
    device = "cuda" if worker.accelerator == "gpu" else "cpu"
    prepare, normalise = Prepare(teacher.preprocessing, MAX_PIXELS), Normalise(teacher.preprocessing).to(device)
    network = build(teacher).to(device).to(memory_format=torch.channels_last)
    best = [np.empty(0, np.int64)]
    with torch.inference_mode():
        for at in range(0, len(images), 64):
            batch = [torch.tensor(prepare(images[row])[0]) for row in range(at, min(at + 64, len(images)))]
            best.append(network(normalise(torch.stack(batch).to(device))).argmax(dim=1).cpu().numpy())
    return np.concatenate(best)


def _side_by_side(result: Result, numbers: dict[str, float]) -> Iterator[str]:
    if "teacher_accuracy" not in numbers:
        yield epoch_line(result, right="as the teacher says")
        return
    yield epoch_line(result)
    yield f"teacher {numbers['teacher_accuracy']:.2%} right, on the same validation images"
    if "baseline_accuracy" in numbers:
        yield f"student {numbers['baseline_accuracy']:.2%} without the teacher"
    gain = f", {numbers['gain_points']:+.2f} points" if "gain_points" in numbers else ""
    yield f"student {numbers['accuracy']:.2%} with the teacher{gain}"
