"""Fine-tuning as a job: labelled shards in, an artifact with its origin out, here and on two workers, and through a kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import tar_bytes
from test_run import cli
from trainings import SIDES, SMALL, picture, tiny_artifact, write_shards

from pipeline.artifact import build, load_artifact, save_artifact
from pipeline.errors import InputMissing, JobError, ModelError
from pipeline.huggingface import Architecture
from pipeline.prepare.distill import accuracy
from pipeline.prepare.finetune import architecture_of, run_job, starting_network
from pipeline.prepare.images import labelled, read_images
from pipeline.preprocessing import Preprocessing
from pipeline.spec import Input
from pipeline.training import FinetuneJob, Random

QUICK = {"epochs": 3, "batch_size": 8, "learning_rate": 0.003, "augment": {"crop": [1, 1], "flip": False}}
HERE = {"cpus_per_worker": 1}


def job(train: str | Path, out: str | Path, **fields: Any) -> FinetuneJob:
    data = {"train": {"uri": str(train)}, **fields.pop("data", {})}
    training = QUICK | fields.pop("training", {})
    content = {"kind": "finetune", "name": "test", "data": data, "training": training, "workers": HERE}
    return FinetuneJob.model_validate(content | {"output": {"uri": str(out)}} | fields)


def make(wanted: FinetuneJob, said: list[str] | None = None):
    return run_job(wanted, say=([] if said is None else said).append, command="nightlabel run test.yaml")


@pytest.fixture
def start(tmp_path: Path) -> str:
    save_artifact(tiny_artifact(), str(tmp_path / "start"))
    return str(tmp_path / "start")


def test_an_artifact_with_its_origin(tmp_path: Path, start: str):
    train = write_shards(tmp_path / "in", 96, classes=3, label="name")
    (tmp_path / "in" / "broken.tar").write_bytes(tar_bytes({"x.png": b"<html>", "x.cls": b"left", "y.png": picture(1)}))
    said: list[str] = []
    done = make(job(train, tmp_path / "out", model={"uri": start}, data={"classes": SIDES}), said)
    assert said[0] == "87 images to train on, 9 to validate with, 3 classes, left out NOT_AN_IMAGE 1, NO_LABEL 1"
    made = load_artifact(str(tmp_path / "out"))
    assert (made.labels, made.architecture.classes, made.preprocessing) == (SIDES, 3, SMALL)
    assert made.digest == done.facts["digest"]
    assert made.origin.parents == (load_artifact(start).digest,)
    assert made.origin.command == "nightlabel run test.yaml"
    assert made.origin.data["images"] == {"train": 87, "validation": 9}
    assert [item["key"] for item in made.origin.data["left_out_images"]] == ["x", "y"]
    assert made.origin.data["training"]["seed"] == 0
    held = labelled(
        read_images(Input(uri=write_shards(tmp_path / "held", 30, classes=3, first=500)), label="cls"), SIDES, where="x"
    )
    assert accuracy(build(made), held, SMALL) > 0.9
    assert made.origin.metrics["accuracy"] > 0.9
    assert "right in epoch" in done.lines[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nightlabel run test.yaml" in card
    assert "| accuracy |" in card
    from transformers import AutoModelForImageClassification

    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(theirs(images).logits, build(made)(images), atol=1e-4)


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


def test_given_validation_images_and_another_size(tmp_path: Path, start: str):
    train, held = write_shards(tmp_path / "in", 40), write_shards(tmp_path / "held", 10, first=200)
    wanted = job(train, tmp_path / "out", model={"uri": start}, data={"validation": {"uri": held}}, preprocessing={"size": 24})
    make(wanted)
    made = load_artifact(str(tmp_path / "out"))
    assert made.preprocessing == Preprocessing(size=24, crop_pct=1.0)
    assert made.origin.data["images"] == {"train": 40, "validation": 10}
    assert made.origin.data["validation_uris"] == [held]


def test_a_model_keeps_its_head_when_the_classes_are_the_same():
    start = tiny_artifact()
    same, other = (starting_network(start, Random(), classes, seed=0) for classes in (SIDES[:2], SIDES))
    head = build(start).classifier[1].weight
    assert torch.equal(same.classifier[1].weight, head)
    assert other.classifier[1].weight.shape == (3, 16)
    assert torch.equal(next(other.parameters()), next(build(start).parameters()))
    reordered = starting_network(start, Random(), ("right", "left"), seed=0)
    assert not torch.equal(reordered.classifier[1].weight, head)


def test_random_starts_are_resnets_of_the_paper():
    assert architecture_of(None, Random(), 10) == Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), 10)
    fifty = architecture_of(None, Random(depth=50, stem="small"), 10)
    assert fifty == Architecture("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048), 10, stem="small")
    first, second, other = (starting_network(None, Random(), ("a", "b"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.classifier[1].weight, second.classifier[1].weight)
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)


def test_bad_input_is_one_sentence(tmp_path: Path, start: str):
    two, one = write_shards(tmp_path / "two", 40, classes=3), write_shards(tmp_path / "one", 40, classes=1)
    bare = write_shards(tmp_path / "bare", 8, label="none")
    cases = [
        (job(bare, tmp_path / "out", model={"uri": start}), JobError, "no sound image with a label"),
        (job(one, tmp_path / "out", model={"uri": start}), JobError, "every label is 0; required: two classes or more"),
        (
            job(two, tmp_path / "out", data={"classes": ["a", "b"]}),
            JobError,
            "cls: 2; required: one of 2 classes, a, b",
        ),
        (job(two, tmp_path / "out", training={"batch_size": 64}), JobError, "a batch of 64 and one. Give more images or lower"),
        (job(tmp_path / "absent", tmp_path / "out"), InputMissing, "absent"),
        (job(two, tmp_path / "out", model={"uri": start, "digest": "sha256:" + "0" * 64}), ModelError, "digest sha256:"),
        (job(two, tmp_path / "out", model={"uri": str(tmp_path / "none")}), ModelError, "has no config.json"),
        (job(two, tmp_path / "out", preprocessing={"std": [0, 1, 1]}), JobError, "preprocessing: std is"),
    ]
    for wanted, error, words in cases:
        with pytest.raises(error) as caught:
            make(wanted)
        assert words in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.timeout(200)
def test_kill_9_and_a_rerun_make_the_same_model(tmp_path: Path, start: str):
    train = write_shards(tmp_path / "in", 96)
    digests = []
    for name in ("whole", "killed"):
        path = tmp_path / f"{name}.yaml"
        training = QUICK | {"epochs": 6, "augment": {"crop": [0.5, 1]}, "mixup": 0.2, "patience": 6}
        path.write_text(json.dumps(job(train, tmp_path / name, model={"uri": start}, training=training).model_dump(mode="json")))
    code, out, err = cli("run", tmp_path / "whole.yaml", "--json")
    assert code == 0, err
    digests.append(json.loads(out)["digest"])
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "killed.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    code, out, err = cli("run", tmp_path / "killed.yaml", "--json")
    assert code == 0, err
    assert "resuming: " in err
    assert json.loads(out)["digest"] == digests[0]


@pytest.mark.timeout(200)
def test_two_workers_train_one_model(tmp_path: Path, start: str, on_ray: str):
    train = write_shards(tmp_path / "in", 96)
    workers = {"count": 2, "cpus_per_worker": 1}
    wanted = job(train, tmp_path / "out", model={"uri": start}, workers=workers, training={"freeze": 1, "unfreeze_epoch": 2})
    said: list[str] = []
    done = make(wanted, said)
    assert [line.split(":")[0] for line in said[1:]] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    made = load_artifact(str(tmp_path / "out"))
    assert made.digest == done.facts["digest"]
    assert made.origin.metrics["accuracy"] > 0.9
    assert make(wanted).lines[0] == "nothing to do: the artifact is there"
    broken = job(train, tmp_path / "other", model={"uri": start}, workers=workers, data={"classes": ["one"]})
    with pytest.raises(JobError, match="required: one of 1 classes"):
        make(broken)
    with pytest.raises(JobError, match=r"3 workers of 1 CPU each, the cluster has room for 2 on 1 nodes\. Lower"):
        make(job(train, tmp_path / "other", model={"uri": start}, workers={"count": 3}))
