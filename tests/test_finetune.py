"""Fine-tuning as a job: labelled shards in, an artifact with its origin out, here and on two workers, and through a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from shards import tar_bytes
from test_run import cli
from trainings import SIDES, SMALL, accuracy, loss_of, picture, tiny_artifact, write_shards

from pipeline.artifact import Artifact, build, load_artifact, save_artifact
from pipeline.errors import InputMissing, JobError, ModelError, PermissionDenied, StoreError
from pipeline.job.recipe import EvaluateJob
from pipeline.job.training import DistillJob, FinetuneJob, RandomNetwork, Training
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.data import NO_LABEL
from pipeline.prepare.dataset import TrainingData
from pipeline.prepare.distill import run_job as run_distill
from pipeline.prepare.evaluate import run_job as evaluate
from pipeline.prepare.finetune import architecture_of, class_weights, classifier_line, run_job, starting_network
from pipeline.prepare.images import Images, labelled, read_images
from pipeline.prepare.learner import Learner
from pipeline.prepare.resume import finished, job_key
from pipeline.prepare.train import Worker
from pipeline.spec import Input
from pipeline.storage import open_store

if TYPE_CHECKING:
    from seaweed import Seaweed

QUICK = {"epochs": 3, "batch_size": 8, "learning_rate": 0.003, "augment": {"crop": [1, 1], "flip": False}}
HERE = {"cpus_per_worker": 1}


def job(train: str | Path, out: str | Path, **fields: Any) -> FinetuneJob:
    data = {"train": {"uri": str(train)}, **fields.pop("data", {})}
    training = QUICK | fields.pop("training", {})
    content = {"kind": "finetune", "name": "test", "data": data, "training": training, "workers": HERE}
    return FinetuneJob.model_validate(content | {"output": {"uri": str(out)}} | fields)


def make(wanted: FinetuneJob, said: list[str] | None = None):
    return run_job(wanted, say=([] if said is None else said).append, command="nightlabel run test.yaml")


def made_key(folder: Path) -> str:
    """The training that made the artifact."""
    return load_artifact(str(folder)).origin.data["job"]


@pytest.fixture
def start(tmp_path: Path) -> str:
    save_artifact(tiny_artifact(), str(tmp_path / "start"))
    return str(tmp_path / "start")


def test_an_artifact_with_its_origin(tmp_path: Path, start: str):
    train = write_shards(tmp_path / "in", 96, classes=3, label="name")
    (tmp_path / "in" / "broken.tar").write_bytes(tar_bytes({"x.png": b"<html>", "x.cls": b"left", "y.png": picture(1)}))
    said: list[str] = []
    done = make(job(train, tmp_path / "out", model={"uri": start}, data={"classes": SIDES}), said)
    checkpoints = tmp_path / "out.training" / made_key(tmp_path / "out")
    assert said[:4] == [
        "86 images to train on, 10 to validate with, 3 classes",
        "left out of the training images: 1 NOT_AN_IMAGE (x), 1 NO_LABEL (y)",
        "classifier replaced: 3 classes instead of 2",
        f"checkpoints and epochs.csv in {checkpoints} until the model is saved; the same command goes on from them",
    ]
    assert not checkpoints.parent.exists()
    made = load_artifact(str(tmp_path / "out"))
    assert (made.labels, made.architecture.classes, made.preprocessing) == (SIDES, 3, SMALL)
    assert made.digest == done.facts["digest"]
    assert made.origin.parents == (load_artifact(start).digest,)
    assert made.origin.command == "nightlabel run test.yaml"
    assert made.origin.data["images"] == {"train": 86, "validation": 10}
    assert made.origin.data["left_out"] == {"train": {"NOT_AN_IMAGE": 1, "NO_LABEL": 1}}
    assert made.origin.data["left_out_images"] == {"train": {"NOT_AN_IMAGE": ["x"], "NO_LABEL": ["y"]}}
    assert made.origin.data["training"]["seed"] == 0
    epochs = made.origin.data["epochs"]
    assert [(epoch["number"], set(epoch)) for epoch in epochs] == [
        (number, {"number", "loss", "validation_loss", "accuracy", "seconds"}) for number in (1, 2, 3)
    ]
    assert made.origin.metrics["accuracy"] == max(epoch["accuracy"] for epoch in epochs)
    held = labelled(read_images(Input(uri=write_shards(tmp_path / "held", 30, classes=3, first=500)), label="cls"), SIDES)
    assert accuracy(build(made), held) > 0.9
    assert made.origin.metrics["accuracy"] > 0.9
    assert "right in epoch" in done.lines[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nightlabel run test.yaml" in card
    assert "| accuracy |" in card
    assert "* epochs: 3 in artifact.json" in card
    assert "* left_out_images: train NOT_AN_IMAGE x, NO_LABEL y" in card
    from transformers import AutoModelForImageClassification

    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(theirs(images).logits, build(made)(images), atol=1e-4)


def test_a_field_that_a_later_version_adds_makes_no_other_training_of_an_old_job(tmp_path: Path):
    class LaterTraining(Training):
        fresh: float = 0.5

    class Later(FinetuneJob):
        training: LaterTraining = LaterTraining()

    old = job(write_shards(tmp_path / "in", 4), tmp_path / "out")
    content = old.model_dump(mode="json")
    assert job_key(Later.model_validate(content), []) == job_key(old, [])
    content["training"]["fresh"] = 0.7
    assert job_key(Later.model_validate(content), []) != job_key(old, [])


def test_a_training_is_named_by_what_it_is_made_of_and_by_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train, held = write_shards(tmp_path / "in", 4), write_shards(tmp_path / "held", 4)

    def key(parents: tuple[str, ...] = ("sha256:1",), **fields: Any) -> str:
        return job_key(job(train, tmp_path / "out", **fields), list(parents))

    usual = key()
    elsewhere = {"name": "other", "output": {"uri": "elsewhere"}, "model": {"uri": "moved"}, "workers": {"cpus_per_worker": 2}}
    assert key(**elsewhere) == usual
    others = [
        key(parents=("sha256:2",)),
        key(training={"seed": 1}),
        key(network={"depth": 34}),
        key(preprocessing={"size": 24}),
        key(workers={"count": 2}),
        key(data={"label": "json"}),
        key(data={"classes": ["a", "b"]}),
        key(data={"validation": {"uri": held}}),
    ]
    Path(held, "0000.tar").write_bytes(b"other images")
    others.append(key(data={"validation": {"uri": held}}))
    os.utime(Path(held, "0000.tar"), ns=(1, 1))  # of the same size, written at another time
    others.append(key(data={"validation": {"uri": held}}))
    monkeypatch.setattr("pipeline.prepare.resume.PREPROCESSING_VERSION", 2)
    others.append(key())
    assert len({usual, *others}) == 1 + len(others)


def test_rare_classes_count_as_much_where_the_job_says_so(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch):
    """12 of one side, 4 of the other and one without a label."""
    members: dict[str, bytes] = {"none.png": picture(0)}
    for number in range(16):
        members |= {f"{number}.png": picture(number % 2), f"{number}.cls": b"%d" % (number % 4 == 3)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(tar_bytes(members))

    class Seen(Exception):
        pass

    def seen(learner: Learner, *_: object, **__: object) -> None:
        raise Seen(learner.objective)

    monkeypatch.setattr("pipeline.prepare.finetune.fit", seen)
    monkeypatch.setattr("pipeline.prepare.distill.fit", seen)
    held = {"validation": {"uri": write_shards(tmp_path / "held", 4)}}
    distilled = {"kind": "distill", "teacher": {"uri": start}, "student": {"uri": start}}
    for balanced, weights in (("balanced", [16 / 24, 16 / 8]), ("none", None)):
        training = {"class_weights": balanced, "label_smoothing": 0.2}
        fields = {"data": held, "training": training}
        for more in ({}, {"distillation": {"baseline": True}}, {"distillation": {"baseline": False}}):
            plain = job(tmp_path / "in", tmp_path / "out", **fields)
            content = plain.model_dump(mode="json", exclude_unset=True) | distilled | more
            wanted, run = (DistillJob.model_validate(content), run_distill) if more else (plain, run_job)
            with pytest.raises(Seen) as caught:
                run(wanted, say=print, command="x")
            objective = getattr(caught.value.args[0], "hard", caught.value.args[0])
            assert objective.smoothing == 0.2
            assert (objective.weights is None) if weights is None else objective.weights.tolist() == pytest.approx(weights)


def test_a_class_without_images_has_a_weight_too():
    images = Images(pa.array([b""] * 4, pa.large_binary()), np.array([0, 0, 1, NO_LABEL]))
    data = TrainingData((images, images), ("a", "b", "c"), {}, ())
    weights = class_weights(job("in", "out", training={"class_weights": "balanced"}), data)
    assert weights.tolist() == pytest.approx([3 / 4, 3 / 2, 0])


def test_a_finished_job_does_nothing_and_another_one_is_refused(tmp_path: Path, start: str):
    train = write_shards(tmp_path / "in", 40)
    make(job(train, tmp_path / "out", model={"uri": start}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert make(job(train, tmp_path / "out", model={"uri": start})).lines[0] == "nothing to do: the artifact is there"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(JobError, match=r"holds another artifact.*Give another output\.uri"):
        make(job(train, tmp_path / "out", model={"uri": start}, training={"seed": 1}))
    write_shards(tmp_path / "in", 8, first=400)
    with pytest.raises(JobError, match="holds another artifact"):
        make(job(train, tmp_path / "out", model={"uri": start}))


def test_no_place_for_a_model_is_found_before_the_training(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch):
    train, said = write_shards(tmp_path / "in", 40), []
    (tmp_path / "file").write_bytes(b"somebody's")
    for out in ("file", "file/model"):
        with pytest.raises(StoreError, match=r"file is a file; required: a folder, or nothing yet\. Name another place"):
            make(job(train, tmp_path / out, model={"uri": start}), said)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs as root may write everywhere
    with pytest.raises(PermissionDenied, match=r"cannot be written; required: the right to write there\."):
        make(job(train, tmp_path / "out", model={"uri": start}), said)
    assert said == []
    assert not list(tmp_path.glob("*.training"))


def test_a_folder_that_is_taken_is_found_before_the_training(tmp_path: Path, start: str):
    train, out = write_shards(tmp_path / "in", 40), tmp_path / "out"
    wanted, said = job(train, out, model={"uri": start}), []
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(JobError, match=r"out holds model\.safetensors without artifact\.json; required: an empty folder"):
        make(wanted, said)
    (out / "artifact.json").write_text('{"digest": "sha')
    record = r"output\.uri .*/out/artifact\.json: is not an artifact's record; required: .*\. Give another output\.uri, or remove"
    with pytest.raises(ModelError, match=record):
        make(wanted, said)
    save_artifact(load_artifact(start), str(tmp_path / "half"))
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"^output\.uri .*/half: has no model\.safetensors; .*\. Give another output\.uri, or remove"
    ):
        make(job(train, tmp_path / "half", model={"uri": start}), said)
    assert said == []
    (tmp_path / "out.training").write_text("a file where the checkpoints belong")
    for path in out.iterdir():
        path.unlink()
    with pytest.raises(StoreError, match=r"out\.training/.*: Not a directory; required: a place for checkpoints"):
        make(wanted)


def test_a_kill_while_saving_costs_nothing(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch):
    train, out = write_shards(tmp_path / "in", 40), tmp_path / "out"
    wanted, said = job(train, out, model={"uri": start}), []

    def killed(artifact: Artifact, uri: str, *_: object, **__: object) -> None:
        Path(uri).mkdir()
        Path(uri, "config.json").write_bytes(artifact.files["config.json"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.resume.save_artifact", killed)
        with pytest.raises(KeyboardInterrupt):
            make(wanted)
    assert not (out / "artifact.json").exists()
    done = make(wanted, said)
    assert "resuming: 3 of at most 3 epochs done" in said
    assert load_artifact(str(out)).digest == done.facts["digest"]
    left = tmp_path / "out.training" / made_key(out)  # by a kill right after
    left.mkdir(parents=True)
    make(wanted)
    assert not left.parent.exists()


def test_the_first_worker_decides_for_all_whether_the_job_is_done(tmp_path: Path, start: str):
    train = write_shards(tmp_path / "in", 40)
    wanted = job(train, tmp_path / "out", model={"uri": start})
    make(wanted)
    key = made_key(tmp_path / "out")

    def second(told: bool) -> Worker:
        return Worker(rank=1, world=2, broadcast=lambda value: told)

    assert finished(wanted, key, second(False)) is None, "although it sees the artifact itself"
    elsewhere = job(train, tmp_path / "not-seen", model={"uri": start})
    assert finished(elsewhere, key, second(True)).lines == ()


def test_what_is_left_out_of_the_validation_is_told(tmp_path: Path, start: str):
    train, held = write_shards(tmp_path / "in", 40), write_shards(tmp_path / "held", 10, first=200)
    (tmp_path / "held" / "broken.tar").write_bytes(tar_bytes({"x.png": b"<html>", "x.cls": b"0", "y.png": picture(1)}))
    said: list[str] = []
    make(job(train, tmp_path / "out", model={"uri": start}, data={"validation": {"uri": held}}), said)
    assert "left out of the validation images: 1 NOT_AN_IMAGE (x), 1 NO_LABEL (y)" in said
    facts = load_artifact(str(tmp_path / "out")).origin.data
    assert facts["left_out"] == {"train": {}, "validation": {"NOT_AN_IMAGE": 1, "NO_LABEL": 1}}
    assert "validation NOT_AN_IMAGE x, NO_LABEL y" in (tmp_path / "out" / "README.md").read_text()


def test_from_s3_to_s3(tmp_path: Path, start: str, s3: Seaweed, monkeypatch: pytest.MonkeyPatch):
    bucket = f"s3://{s3.bucket()}"
    for shard in Path(write_shards(tmp_path / "in", 40)).iterdir():
        s3.put(f"{bucket}/in/{shard.name}", shard.read_bytes())
    save_artifact(load_artifact(start), f"{bucket}/start", s3.options)
    options, said = s3.options.model_dump(), []
    wanted = job(
        f"{bucket}/in/",
        f"{bucket}/out/",
        model={"uri": f"{bucket}/start", "s3": options},
        data={"train": {"uri": f"{bucket}/in/", "s3": options}},
        output={"uri": f"{bucket}/out/", "s3": options},
    )
    monkeypatch.chdir(tmp_path)
    done = make(wanted, said)
    made = load_artifact(f"{bucket}/out/", s3.options)
    assert (made.digest, made.labels) == (done.facts["digest"], SIDES[:2])
    assert any(line.startswith(f"checkpoints and epochs.csv in {tmp_path}/test.training/") for line in said)
    assert not (tmp_path / "test.training").exists()
    assert b"| accuracy |" in open_store(bucket, s3.options).read(f"{bucket}/out/README.md")
    assert make(wanted).lines[0] == "nothing to do: the artifact is there"
    with pytest.raises(JobError, match="holds another artifact"):
        make(wanted.model_copy(update={"training": wanted.training.model_copy(update={"seed": 1})}))


def test_an_averaged_model_says_so_on_its_card_and_is_as_good_as_it_says(tmp_path: Path, start: str):
    train, held = write_shards(tmp_path / "in", 40), write_shards(tmp_path / "held", 10, first=200)
    wanted = {"model": {"uri": start}, "data": {"validation": {"uri": held}}}
    make(job(train, tmp_path / "out", training={"ema": 0.9}, **wanted))
    made = load_artifact(str(tmp_path / "out"))
    make(job(train, tmp_path / "plain", **wanted))
    assert made.origin.metrics["validation_loss"] != load_artifact(str(tmp_path / "plain")).origin.metrics["validation_loss"]
    images = labelled(read_images(Input(uri=held), label="cls"), ("0", "1"))
    assert loss_of(build(made), images) == pytest.approx(made.origin.metrics["validation_loss"], abs=1e-5)
    assert "ema 0.9" in (tmp_path / "out" / "README.md").read_text()


def test_labels_under_a_key_are_trained_on_and_measured(tmp_path: Path, start: str):
    members: dict[str, bytes] = {}
    for number in range(40):
        told = {"caption": f"the {number}th", "side": SIDES[number % 2]}
        members |= {f"{number}.png": picture(number), f"{number}.json": json.dumps(told).encode()}
    (tmp_path / "in.tar").write_bytes(tar_bytes(members))
    where = {"label": "json", "label_key": "side"}
    make(job(tmp_path / "in.tar", tmp_path / "out", model={"uri": start}, data=where))
    made = load_artifact(str(tmp_path / "out"))
    assert made.labels == SIDES[:2]
    assert (made.origin.data["label"], made.origin.data["label_key"]) == ("json", "side")
    content = {"name": "exam", "model": {"uri": str(tmp_path / "out")}, "output": {"uri": str(tmp_path / "report")}}
    measured = {"input": {"uri": str(tmp_path / "in.tar")}, **where}
    wanted = EvaluateJob.model_validate({"kind": "evaluate", "data": measured, **content})
    assert evaluate(wanted, say=lambda _: None, command="x").facts["images"]["measured"] == 40
    with pytest.raises(JobError, match=r"json: a label is \{.*Set data\.label_key to the key of the class in it"):
        make(job(tmp_path / "in.tar", tmp_path / "other", model={"uri": start}, data={"label": "json"}))
    classes = {"label": "json", "label_key": "caption", "classes": SIDES[:2]}
    with pytest.raises(JobError, match=r"in\.tar: json of 0 has the 0th as caption, others are .*required: one of 2 classes"):
        make(job(tmp_path / "in.tar", tmp_path / "other", model={"uri": start}, data=classes))
    for wrong in ({"label": None}, {"label": "folder", "train": {"uri": "x", "format": "images"}}):
        with pytest.raises(ValidationError, match=r"label_key is side, and label is .* Leave label_key out"):
            job("x", "y", data={"label_key": "side", **wrong})


def test_given_validation_images_and_another_size(tmp_path: Path, start: str):
    train, held = write_shards(tmp_path / "in", 40), write_shards(tmp_path / "held", 10, first=200)
    wanted = job(train, tmp_path / "out", model={"uri": start}, data={"validation": {"uri": held}}, preprocessing={"size": 24})
    make(wanted)
    made = load_artifact(str(tmp_path / "out"))
    assert made.preprocessing == Preprocessing(size=24, crop_pct=1.0)
    assert made.origin.data["images"] == {"train": 40, "validation": 10}
    assert made.origin.data["validation_uris"] == [held]


def test_validation_images_that_are_trained_on_are_counted(tmp_path: Path, start: str):
    train, held = write_shards(tmp_path / "in", 40), write_shards(tmp_path / "held", 10, first=37)
    said: list[str] = []
    make(job(train, tmp_path / "out", model={"uri": start}, data={"validation": {"uri": held}}), said)
    assert "3 of 10 validation images are trained on too, others would judge better" in said
    assert load_artifact(str(tmp_path / "out")).origin.data["validation_also_trained_on"] == 3
    assert "* 3 of the validation images were trained on, so it may be" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("size", [1, 31])
def test_odd_sizes_train_too(tmp_path: Path, size: int):
    """Every convolution is padded and the last pooling takes what there is, so a ResNet takes every size."""
    train, training = write_shards(tmp_path / "in", 40), {"epochs": 1}
    make(job(train, tmp_path / "out", network={"depth": 18}, preprocessing={"size": size}, training=training))
    assert load_artifact(str(tmp_path / "out")).preprocessing.size == size


@pytest.mark.parametrize("size", [0, 4097, 100_000])
def test_sizes_that_are_refused(size: int):
    with pytest.raises(ValidationError, match="size"):
        job("x", "y", preprocessing={"size": size})


def test_a_model_keeps_its_head_when_the_classes_are_the_same():
    start = tiny_artifact()
    same, other = (starting_network(start, RandomNetwork(), classes, seed=0) for classes in (SIDES[:2], SIDES))
    head = build(start).classifier[1].weight
    assert torch.equal(same.classifier[1].weight, head)
    assert other.classifier[1].weight.shape == (3, 16)
    assert torch.equal(next(other.parameters()), next(build(start).parameters()))
    reordered = starting_network(start, RandomNetwork(), ("right", "left"), seed=0)
    assert not torch.equal(reordered.classifier[1].weight, head)
    lines = [classifier_line(start, classes) for classes in (SIDES[:2], SIDES, ("right", "left"), ("cat", "dog"))]
    assert lines == [
        "classifier kept: 2 classes",
        "classifier replaced: 3 classes instead of 2",
        "classifier replaced: 2 classes in another order",
        "classifier replaced: 2 classes, cat, dog, instead of left, right",
    ]


def test_labels_that_are_numbers_of_the_models_classes_keep_its_names_and_classifier(tmp_path: Path, start: str):
    said: list[str] = []
    make(job(write_shards(tmp_path / "in", 40), tmp_path / "out", model={"uri": start}), said)
    assert "classifier kept: 2 classes" in said
    assert load_artifact(str(tmp_path / "out")).labels == SIDES[:2]


def test_random_starts_are_resnets_of_the_paper():
    assert architecture_of(None, RandomNetwork(), 10) == Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), 10)
    fifty = architecture_of(None, RandomNetwork(depth=50, stem="small"), 10)
    assert fifty == Architecture("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048), 10, stem="small")
    first, second, other = (starting_network(None, RandomNetwork(), ("a", "b"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.classifier[1].weight, second.classifier[1].weight)
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)
    for convolution in (module for module in first.modules() if isinstance(module, torch.nn.Conv2d)):
        outputs, _, *kernel = convolution.weight.shape
        assert convolution.weight.std().item() == pytest.approx((2 / (outputs * kernel[0] * kernel[1])) ** 0.5, rel=0.05)


def test_bad_input_is_one_sentence(tmp_path: Path, start: str):
    two, one = write_shards(tmp_path / "two", 40, classes=3), write_shards(tmp_path / "one", 40, classes=1)
    bare = write_shards(tmp_path / "bare", 8, label="none")
    cases = [
        (job(bare, tmp_path / "out", model={"uri": start}), JobError, "no sound image with a label"),
        (job(one, tmp_path / "out", model={"uri": start}), JobError, "every label is 0; required: two classes or more"),
        (
            job(two, tmp_path / "out", data={"classes": ["a", "b"]}),
            JobError,
            f"{two}/0000.tar: cls of 0002 is 2; required: one of 2 classes, a, b",
        ),
        (job(two, tmp_path / "out", training={"batch_size": 64}), JobError, "a step of 64 and one. Give more images or lower"),
        (job(tmp_path / "absent", tmp_path / "out"), InputMissing, "absent"),
        (job(two, tmp_path / "out", model={"uri": start, "digest": "sha256:" + "0" * 64}), ModelError, "digest sha256:"),
        (job(two, tmp_path / "out", model={"uri": str(tmp_path / "none")}), ModelError, "has no config.json"),
        (job(two, tmp_path / "out", preprocessing={"std": [0, 1, 1]}), JobError, "preprocessing: std is"),
        (job(two, tmp_path / "out", preprocessing={"size": 400}), ModelError, "warps instead of cropping; required: below 384"),
        (
            job(two, tmp_path / "out", preprocessing={"size": 4096, "crop_pct": 1e-9}),
            JobError,
            "preprocessing: crop_pct is 1e-09, so images are resized to 4,096,000,000,000 pixels, required: at most 8,192",
        ),
    ]
    for wanted, error, words in cases:
        with pytest.raises(error) as caught:
            make(wanted)
        assert words in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.training").exists()


def test_kill_9_and_a_rerun_make_the_same_model(tmp_path: Path, start: str):
    """The undisturbed one decodes between its steps, the killed one in a DataLoader's process."""
    train = write_shards(tmp_path / "in", 96)
    training = QUICK | {"epochs": 6, "augment": {"crop": [0.5, 1]}, "mixup": 0.2, "ema": 0.9, "patience": 6}
    whole = make(job(train, tmp_path / "whole", model={"uri": start}, training=training))
    path, workers = tmp_path / "killed.yaml", HERE | {"loaders": 1}
    wanted = job(train, tmp_path / "killed", model={"uri": start}, training=training, workers=workers)
    path.write_text(json.dumps(wanted.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipeline", "run", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    code, out, err = cli("run", path, "--json")
    assert code == 0, err
    assert "resuming: " in err
    assert json.loads(out)["digest"] == whole.facts["digest"]


def test_two_workers_train_one_model(tmp_path: Path, start: str, on_ray: str, monkeypatch: pytest.MonkeyPatch):
    """URIs are relative: to where the command is run, and not to where Ray's workers stand."""
    train = write_shards(tmp_path / "in", 96)
    monkeypatch.chdir(tmp_path)
    workers = {"count": 2, "cpus_per_worker": 1}
    training = {"freeze": 1, "unfreeze_epoch": 2, "ema": 0.9, "accumulate": 2}
    wanted = job("in", "out", model={"uri": "start"}, workers=workers, training=training)
    said: list[str] = []
    done = make(wanted, said)
    assert [line.split(":")[0] for line in said if line.startswith("epoch")] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    made = load_artifact(str(tmp_path / "out"))
    assert made.digest == done.facts["digest"]
    assert made.origin.metrics["accuracy"] > 0.9
    broken = job(train, tmp_path / "other", model={"uri": start}, workers=workers, data={"classes": ["one"]})
    with pytest.raises(JobError, match="required: one of 1 classes"):
        make(broken)
    with pytest.raises(JobError, match=r"3 workers of 1 CPU each, the cluster has room for 2 on 1 nodes\. Lower"):
        make(job(train, tmp_path / "other", model={"uri": start}, workers={"count": 3}))
