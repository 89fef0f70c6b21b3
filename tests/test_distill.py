"""A student and its teacher, on 16-pixel pictures: with labels, without, side by side, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from test_finetune import HERE, QUICK, job, make
from trainings import SIDES, SMALL, logits_of, picture, tiny_artifact, tiny_network, write_shards

from pipeline.artifact import build, load_artifact, save_artifact
from pipeline.errors import JobError
from pipeline.job.training import DistillJob
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.data import NO_LABEL
from pipeline.prepare.dataset import TrainingData
from pipeline.prepare.distill import DistillationLoss, _baseline, _numbers, _side_by_side, answers, run_job
from pipeline.prepare.epochs import Epoch
from pipeline.prepare.images import Images
from pipeline.prepare.learner import CrossEntropy
from pipeline.prepare.train import Result, Worker


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A wider network that knows the sides."""
    folder = tmp_path_factory.mktemp("teacher")
    save_artifact(tiny_artifact(SIDES, wide=24), str(folder / "start"))
    train = write_shards(folder / "in", 96, classes=3)
    make(job(train, folder / "out", model={"uri": str(folder / "start")}, data={"classes": SIDES}, training={"epochs": 4}))
    made = load_artifact(str(folder / "out"))
    assert made.origin.metrics["accuracy"] == 1.0
    return str(folder / "out")


@pytest.fixture
def student(tmp_path: Path) -> str:
    save_artifact(tiny_artifact(SIDES), str(tmp_path / "student"))
    return str(tmp_path / "student")


def distill_job(train: str, out: Path, teacher: str, **fields: Any) -> DistillJob:
    data = {"train": {"uri": train}, **fields.pop("data", {})}
    content = {"kind": "distill", "name": "test", "data": data, "teacher": {"uri": teacher}, "training": QUICK, "workers": HERE}
    return DistillJob.model_validate(content | {"output": {"uri": str(out)}} | fields)


def test_teacher_and_both_students_stand_side_by_side(tmp_path: Path, teacher: str, student: str):
    train = write_shards(tmp_path / "in", 96, classes=3)
    more = {"distillation": {"features": 0.5}, "training": QUICK | {"epochs": 8}}
    wanted = distill_job(train, tmp_path / "out", teacher, student={"uri": student}, **more)
    from transformers import AutoModelForImageClassification

    said: list[str] = []
    done = run_job(wanted, say=said.append, command="nightlabel run d.yaml")
    assert "training the student without the teacher" in said
    assert "training the student with the teacher" in said
    made = load_artifact(str(tmp_path / "out"))
    assert made.labels == SIDES
    assert made.origin.parents == (load_artifact(teacher).digest, load_artifact(student).digest)
    numbers = made.origin.metrics
    assert numbers["teacher_accuracy"] == 1.0
    assert numbers["accuracy"] > 0.9
    assert numbers["gain_points"] == pytest.approx(100 * (numbers["accuracy"] - numbers["baseline_accuracy"]))
    assert [line.split()[0] for line in done.lines[1:4]] == ["teacher", "student", "student"]
    assert said.index("the teacher is right on 100.00% of the validation images") < said.index(
        "training the student without the teacher"
    )
    assert not (tmp_path / "out.training").exists()
    theirs, images = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval(), torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(theirs(images).logits, build(made)(images), atol=1e-4)
    assert run_job(wanted, say=said.append, command="x").lines[0] == "nothing to do: the artifact is there"


def test_a_student_learns_from_unlabelled_images(tmp_path: Path, teacher: str, student: str):
    train, held = (
        write_shards(tmp_path / "in", 96, classes=3, label="none"),
        write_shards(tmp_path / "v", 30, classes=3, first=300),
    )
    said: list[str] = []
    data = {"validation": {"uri": held}}
    run_job(distill_job(train, tmp_path / "out", teacher, student={"uri": student}, data=data), say=said.append, command="x")
    numbers = load_artifact(str(tmp_path / "out")).origin.metrics
    assert numbers["accuracy"] > 0.9
    assert "baseline_accuracy" not in numbers
    assert "no student without the teacher: 0 images have a label, and a step has 8" in said
    with pytest.raises(JobError, match=r"no image has a label; required: labelled images .* or set data\.label to null"):
        run_job(distill_job(train, tmp_path / "other", teacher, student={"uri": student}), say=said.append, command="x")


def parquet(path: Path, count: int, *, labels: bool, first: int = 0) -> dict[str, str]:
    """The input of a job: pictures in a Parquet file, with a column of labels or without one."""
    numbers = range(first, first + count)
    columns = {"key": [str(n) for n in numbers], "image": pa.array([picture(n, classes=3) for n in numbers], pa.binary())}
    path.parent.mkdir()
    pq.write_table(pa.table(columns | ({"side": [n % 3 for n in numbers]} if labels else {})), path)
    return {"uri": str(path), "format": "parquet"}


def test_parquet_without_a_column_of_labels(tmp_path: Path, teacher: str, student: str):
    bare, held = (
        parquet(tmp_path / "in/a.parquet", 96, labels=False),
        parquet(tmp_path / "held/a.parquet", 30, labels=True, first=300),
    )

    def distilled(out: str, **data: Any) -> tuple[dict[str, Any], dict[str, float], list[str]]:
        said: list[str] = []
        wanted = distill_job("", tmp_path / out, teacher, student={"uri": student}, data={"train": bare, **data})
        done = run_job(wanted, say=said.append, command="x")
        origin = load_artifact(str(tmp_path / out)).origin
        return dict(origin.data), dict(origin.metrics), [*said, *done.lines]

    facts, numbers, said = distilled("judged", label="side", validation=held)
    assert (facts["images"], facts["unlabelled"]) == ({"train": 96, "validation": 30}, 96)
    assert numbers["accuracy"] > 0.9
    assert "96 images to train on (96 without a label), 30 to validate with, 3 classes" in said
    facts, numbers, said = distilled("agreeing", label=None)
    assert facts["images"] == {"train": 86, "validation": 10}
    assert numbers["agreement"] > 0.9
    assert not {"accuracy", "teacher_accuracy", "baseline_accuracy"} & set(numbers)
    assert "no labels: the epoch is chosen by agreement with the teacher, and that is what counts as right" in said
    assert any("as the teacher says in epoch" in line for line in said)
    card = (tmp_path / "agreeing" / "README.md").read_text()
    assert "How often it is right is not known: it was judged by its agreement with its teacher" in card
    assert "metrics:" not in card
    with pytest.raises(JobError, match=r"no column side; required: one of key, image"):
        distilled("neither", label="side", validation=bare)
    with pytest.raises(ValidationError, match=r"data\.label is null, so there is nothing to learn; required: the name of the"):
        job("x", "y", data={"label": None})


def test_two_workers_distil_one_student(tmp_path: Path, teacher: str, student: str, on_ray: str):
    train = write_shards(tmp_path / "in", 96, classes=3)
    workers = {"count": 2, "cpus_per_worker": 1}
    wanted = distill_job(train, tmp_path / "out", teacher, student={"uri": student}, workers=workers)
    said: list[str] = []
    done = run_job(wanted, say=said.append, command="x")
    assert [line for line in said if line.startswith(("the teacher", "training"))] == [
        "the teacher is right on 100.00% of the validation images",
        "training the student without the teacher",
        "training the student with the teacher",
    ]
    made = load_artifact(str(tmp_path / "out"))
    assert made.digest == done.facts["digest"]
    assert made.origin.metrics["accuracy"] > 0.9
    assert not (tmp_path / "out.training").exists()


def test_the_teacher_answers_with_its_own_preprocessing_and_for_every_image():
    theirs = Preprocessing(size=16, crop_pct=0.8, mean=(0.9, 0.1, 0.5), std=(0.05, 0.9, 0.9))
    teacher = tiny_artifact(preprocessing=theirs)
    images = Images(pa.array([picture(number) for number in range(130)], pa.large_binary()), np.zeros(130, np.int64))
    said = answers(teacher, images, Worker())
    by_hand, otherwise = (
        logits_of(build(teacher), images, seen).argmax(dim=1).numpy()
        for seen in (theirs, replace(theirs, mean=SMALL.mean, std=SMALL.std))
    )
    assert said.tolist() == by_hand.tolist() != otherwise.tolist()
    assert answers(teacher, images.take(np.arange(0)), Worker()).tolist() == []


def test_what_the_teacher_was_worth_is_told():
    def result(accuracy: float) -> Result:
        epoch = Epoch(1, 0.5, 0.25, accuracy, 2.0)
        return Result((epoch,), epoch, {}, stopped_early=False, resumed=0)

    numbers = _numbers(result(0.75), result(0.5), {"teacher_accuracy": 0.875})
    assert numbers == {
        **{"accuracy": 0.75, "validation_loss": 0.25, "epoch": 1, "epochs": 1},
        **{"teacher_accuracy": 0.875, "baseline_accuracy": 0.5, "gain_points": 25},
    }
    assert list(_side_by_side(result(0.75), numbers)) == [
        "done: 75.00% right in epoch 1 of 1, all epochs done, 2 s of training",
        "teacher 87.50% right, on the same validation images",
        "student 50.00% without the teacher",
        "student 75.00% with the teacher, +25.00 points",
    ]
    assert _numbers(result(0.75), None, {}) == {"agreement": 0.75, "validation_loss": 0.25, "epoch": 1, "epochs": 1}


@pytest.mark.parametrize("step", [{"batch_size": 8}, {"batch_size": 2, "accumulate": 4}])
@pytest.mark.parametrize(("bare", "seen"), [(0, 20), (4, 16), (5, None)])
def test_the_student_without_the_teacher_sees_the_labels_alone(tmp_path: Path, bare: int, seen: int | None, step: dict[str, int]):
    """Of two workers with 8 images each, so that fewer than 16 are not a step."""
    labels = np.where(np.arange(20) < bare, NO_LABEL, np.arange(20) % 2)
    encoded = pa.array([b"%d" % number for number in range(20)], pa.large_binary())
    data = TrainingData((Images(encoded, labels), Images(encoded, labels)), SIDES[:2], {}, ())
    said, given = list[str](), list[tuple[str, list[int], int]]()

    def train(name: str, objective: object, images: TrainingData) -> None:
        given.append((name, [int(bytes(images.images[0][row])) for row in range(len(images.images[0]))], len(images.images[1])))

    wanted = distill_job("x", tmp_path, "t", training=QUICK | step)
    _baseline(wanted, data, train, CrossEntropy(0.0), workers=2, say=said.append)
    assert given == ([] if seen is None else [("without the teacher", list(range(bare, 20)), 20)])
    assert said == (["no student without the teacher: 15 images have a label, and a step has 16"] if seen is None else [])


def test_what_does_not_go_together_is_one_sentence(tmp_path: Path, teacher: str, student: str):
    train = write_shards(tmp_path / "in", 32, classes=2)
    other = distill_job(train, tmp_path / "out", teacher, student={"uri": student}, data={"classes": ["cat", "dog"]})
    with pytest.raises(
        JobError, match=r"data\.classes has 2 classes.*required: the 3 of the teacher in its order, left, right, top"
    ):
        run_job(other, say=print, command="x")
    smaller = distill_job(train, tmp_path / "out", teacher, student={"uri": student}, preprocessing={"size": 8})
    with pytest.raises(JobError, match="the student sees 8 pixels, the teacher 16; required: the same size"):
        run_job(smaller, say=print, command="x")
    assert not (tmp_path / "out").exists()


def test_the_loss_is_that_of_the_paper_and_the_teacher_sees_its_own_normalisation(tmp_path: Path):
    import torch.nn.functional as F

    from pipeline.prepare.learner import Normalise

    theirs = Preprocessing(size=16, crop_pct=1.0, mean=(0.1, 0.2, 0.3), std=(0.3, 0.4, 0.5))
    teacher = tiny_artifact(SIDES[:2], preprocessing=theirs)
    wanted = distill_job("x", tmp_path, "t", distillation={"temperature": 3.0, "alpha": 0.7})
    objective = DistillationLoss(wanted, teacher, SMALL, 16)
    assert objective.state_dict() == {}, "the teacher is no part of a checkpoint"
    network, pixels = tiny_network(seed=1).eval(), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    targets = F.one_hot(torch.tensor([0, 1, 0, 1, 0, 1]), 2).float()
    targets[3:] = 0  # without a label
    loss = objective(network, Normalise(SMALL)(pixels), targets)
    ours, answers = network(Normalise(SMALL)(pixels)), build(teacher)(Normalise(theirs)(pixels))
    soft = (F.softmax(answers / 3, 1) * (F.log_softmax(answers / 3, 1) - F.log_softmax(ours / 3, 1))).sum(1).mean()
    hard = F.cross_entropy(ours[:3], targets[:3], label_smoothing=0.1) / 2  # half of the images have a label
    assert loss.item() == pytest.approx((0.7 * 9 * soft + 0.3 * hard).item(), rel=1e-4)
    for wide in (16, 24):  # as long as the student's, and longer
        teacher = tiny_artifact(SIDES[:2], preprocessing=theirs, wide=wide)
        parts = [
            DistillationLoss(distill_job("x", tmp_path, "t", distillation={"features": features}), teacher, SMALL, 16)
            for features in (0, 0.25)
        ]
        without, whole = (part(network, Normalise(SMALL)(pixels), targets) for part in parts)
        mine = parts[1].project(network.features(Normalise(SMALL)(pixels)))
        his = build(teacher).features(Normalise(theirs)(pixels))
        distance = (mine / mine.norm(dim=1, keepdim=True) - his / his.norm(dim=1, keepdim=True)).norm(dim=1).square().mean()
        assert (whole - without).item() == pytest.approx(0.25 * distance.item(), rel=1e-3)


def test_the_map_of_the_features_is_the_same_whatever_was_drawn_before(tmp_path: Path):
    """Else a kill while the student without the teacher is trained would change the one with it."""
    wanted, teacher = distill_job("x", tmp_path, "t", distillation={"features": 0.5}), tiny_artifact(SIDES, wide=24)
    first = DistillationLoss(wanted, teacher, SMALL, 16)
    torch.rand(1)
    again = DistillationLoss(wanted, teacher, SMALL, 16)
    other = DistillationLoss(
        wanted.model_copy(update={"training": wanted.training.model_copy(update={"seed": 1})}), teacher, SMALL, 16
    )
    assert torch.equal(first.project.weight, again.project.weight)
    assert not torch.equal(first.project.weight, other.project.weight)


def test_both_answers_are_float32_in_half_precision(tmp_path: Path):
    """What the loss compares would tie in bfloat16's 8 bits."""
    objective, network = DistillationLoss(distill_job("x", tmp_path, "t"), tiny_artifact(), SMALL, 16), tiny_network(seed=1)
    seen: list[torch.dtype] = []
    for model in (network, objective.teacher[0]):
        model.classifier.register_forward_hook(lambda _, given, logits: seen.extend([given[0].dtype, logits.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective(network, torch.rand(4, 3, 16, 16), torch.zeros(4, 2))
    assert seen == [torch.float32] * 4
