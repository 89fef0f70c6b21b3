"""A student and its teacher, on 16-pixel pictures: with labels, without, side by side, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import HERE, QUICK, job, make
from trainings import SIDES, SMALL, tiny_artifact, tiny_network, write_shards

from pipeline.artifact import load_artifact, save_artifact
from pipeline.errors import JobError
from pipeline.prepare.distill import Distil, run_job
from pipeline.preprocessing import Preprocessing
from pipeline.training import DistillJob


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
    assert run_job(wanted, say=said.append, command="x").lines[0] == "nothing to do: the student is there"


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
    with pytest.raises(JobError, match=r"has a label; required: labelled images to choose the best epoch by"):
        run_job(distill_job(train, tmp_path / "other", teacher, student={"uri": student}), say=said.append, command="x")


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

    from pipeline.artifact import build
    from pipeline.prepare.learner import Normalise

    theirs = Preprocessing(size=16, crop_pct=1.0, mean=(0.1, 0.2, 0.3), std=(0.3, 0.4, 0.5))
    teacher = tiny_artifact(SIDES[:2], preprocessing=theirs)
    wanted = distill_job("x", tmp_path, "t", distillation={"temperature": 3.0, "alpha": 0.7})
    objective = Distil(wanted, teacher, SMALL, 16)
    assert objective.state_dict() == {}, "the teacher is no part of a checkpoint"
    network, pixels = tiny_network(seed=1).eval(), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    targets = F.one_hot(torch.tensor([0, 1, 0, 1, 0, 1]), 2).float()
    targets[3:] = 0  # without a label
    loss = objective(network, Normalise(SMALL)(pixels), targets)
    ours, answers = network(Normalise(SMALL)(pixels)), build(teacher)(Normalise(theirs)(pixels))
    soft = (F.softmax(answers / 3, 1) * (F.log_softmax(answers / 3, 1) - F.log_softmax(ours / 3, 1))).sum(1).mean()
    hard = F.cross_entropy(ours[:3], targets[:3], label_smoothing=0.1) / 2  # half of the images have a label
    assert loss.item() == pytest.approx((0.7 * 9 * soft + 0.3 * hard).item(), rel=1e-4)
