"""The state of a training on a real S3 server: another machine goes on from it, nothing is left of it, none fails for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from seaweed import NOBODIES, Seaweed
from trainings import SMALL, picture, tiny_network, write_shards

from pipeline.errors import PermissionDenied, StoreError, Unidentified
from pipeline.job.training import Augment, FinetuneJob, Training
from pipeline.prepare import afar
from pipeline.prepare.afar import Checkpoints, Scratch
from pipeline.prepare.checkpoint import BEST, LAST, read
from pipeline.prepare.finetune import run_job
from pipeline.prepare.images import Images
from pipeline.prepare.learner import CrossEntropy, Learner
from pipeline.prepare.train import Result, Worker, fit
from pipeline.storage import below, head_if_there, open_store

HOW = Training(epochs=4, batch_size=8, learning_rate=3e-3, augment=Augment(crop=(1, 1), flip=False))


class Killed(BaseException):
    pass


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "EVERY_S", 0.0)


@pytest.fixture
def copies(s3: Seaweed) -> str:
    return f"s3://{s3.bucket()}/model.training/key"


def pictures(count: int, *, first: int = 0) -> Images:
    encoded = pa.array([picture(number) for number in range(first, first + count)], pa.large_binary())
    return Images(encoded, np.arange(first, first + count) % 2)


def trained(place: Checkpoints, say: Callable[[str], None] = lambda _: None) -> Result:
    learner = Learner(tiny_network(), CrossEntropy(0.0), SMALL, HOW)
    data = pictures(64), pictures(16, first=64)
    return fit(learner, data, preprocessing=SMALL, worker=Worker(), place=place, say=say)


def killed(place: Checkpoints) -> None:
    """In epoch 3."""

    def kill(line: str) -> None:
        if line.startswith("epoch 3"):
            raise Killed

    with pytest.raises(Killed):
        trained(place, kill)


@pytest.mark.usefixtures("often")
def test_another_machine_goes_on_and_ends_with_the_same_model(tmp_path: Path, s3: Seaweed, copies: str):
    whole = trained(Checkpoints(tmp_path / "whole"))
    killed(Checkpoints(tmp_path / "a", copies, s3.options))
    said: list[str] = []
    result = trained(Checkpoints(tmp_path / "b", copies, s3.options), said.append)
    assert said[:2] == [f"going on from the checkpoints in {copies}", "resuming: 2 of at most 4 epochs done"]
    assert (result.resumed, len(result.epochs)) == (2, 4)
    assert all(torch.equal(result.weights[name], whole.weights[name]) for name in whole.weights)
    for name in (BEST, LAST):
        assert open_store(copies, s3.options).read(f"{copies}/{name}") == (tmp_path / "b" / name).read_bytes()


def test_a_machine_goes_on_from_the_later_epoch(tmp_path: Path, s3: Seaweed, copies: str, monkeypatch: pytest.MonkeyPatch):
    """The copy, made after the first epoch and not again within two minutes, is older than what is in the folder."""
    here = Checkpoints(tmp_path / "a", copies, s3.options)
    killed(here)
    store, said = Scratch(s3.options), list[str]()
    assert afar._epoch(afar.parsed(store.read(f"{copies}/{LAST}"), "")) == 0
    here.fetch(said.append)
    assert (said, read(here.folder / LAST)["epoch"]) == ([], 1)
    monkeypatch.setattr(afar, "EVERY_S", 0.0)
    trained(Checkpoints(tmp_path / "b", copies, s3.options))
    here.fetch(said.append)
    assert (said, read(here.folder / LAST)["epoch"]) == ([f"going on from the checkpoints in {copies}"], 3)
    (here.folder / BEST).unlink()
    here.fetch(said.append)
    assert (here.folder / BEST).exists(), "without it the last epoch is of no use"


def test_copies_of_half_a_state_are_none(tmp_path: Path, s3: Seaweed, copies: str):
    store, said = Scratch(s3.options), list[str]()
    store.write(f"{copies}/{BEST}", b"x")
    Checkpoints(tmp_path / "a", copies, s3.options).fetch(said.append)
    assert not said
    assert not (tmp_path / "a").exists()
    store.write(f"{copies}/{LAST}", b"y")
    with pytest.raises(StoreError, match=rf"^{copies}/{LAST}: cannot be read .* Remove {copies} and begin anew"):
        Checkpoints(tmp_path / "a", copies, s3.options).fetch(said.append)


@pytest.mark.usefixtures("often")
def test_what_cannot_be_copied_is_told_and_the_training_goes_on(tmp_path: Path, s3: Seaweed, copies: str, monkeypatch):
    """As somebody whom the server knows, and allows nothing."""
    place, said = Checkpoints(tmp_path / "a", copies, s3.options), list[str]()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", NOBODIES[0])
    result = trained(place, said.append)
    assert len(result.epochs) == 4
    told = [line for line in said if line.startswith("the checkpoints are not copied: ")]
    assert len(told) == 4, "after every epoch"
    assert f"{copies}/{BEST}" in told[0]
    assert any(line.startswith("no copies of the checkpoints: ") for line in said)


def test_a_copy_that_comes_late_has_the_best_epoch_too(tmp_path: Path, s3: Seaweed, copies: str, monkeypatch: pytest.MonkeyPatch):
    """Which a start before this one may have made, and nobody has copied."""
    place, store = Checkpoints(tmp_path, copies, s3.options), Scratch(s3.options)
    (tmp_path / BEST).write_bytes(b"best")
    (tmp_path / LAST).write_bytes(b"last")
    kept = place.copying(lambda _: None)
    kept(LAST)
    assert store.read(f"{copies}/{BEST}") == b"best"
    (tmp_path / BEST).write_bytes(b"better")
    kept(BEST)
    kept(LAST)
    assert store.read(f"{copies}/{BEST}") == b"best", "two minutes have not gone by"
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    kept(LAST)
    assert (store.read(f"{copies}/{BEST}"), store.read(f"{copies}/{LAST}")) == (b"better", b"last")
    store.remove(f"{copies}/{BEST}")
    monkeypatch.setattr("time.monotonic", lambda: 2e9)
    kept(LAST)
    assert head_if_there(store, f"{copies}/{BEST}") is None, "it was not copied again, for it is no other"


def test_keys_that_nobody_knows_end_a_training_before_it_begins(tmp_path: Path, s3: Seaweed, copies: str, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "expired")
    with pytest.raises(Unidentified):
        trained(Checkpoints(tmp_path, copies, s3.options))


@pytest.mark.usefixtures("often")
def test_a_finished_job_leaves_no_copies_and_half_a_model_beside_them_is_completed(tmp_path: Path, s3: Seaweed, monkeypatch):
    bucket, options, said = f"s3://{s3.bucket()}", s3.options.model_dump(), list[str]()
    wanted = FinetuneJob(
        kind="finetune",
        name="test",
        data={"train": {"uri": write_shards(tmp_path / "in", 40)}},
        preprocessing={"size": 16},
        training=HOW,
        output={"uri": f"{bucket}/out/", "s3": options},
        workers={"cpus_per_worker": 1},
    )
    monkeypatch.chdir(tmp_path)

    def kill(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Killed

    with pytest.raises(Killed):
        run_job(wanted, say=kill, command="")
    shutil.rmtree(tmp_path / "test.training")
    s3.put(f"{bucket}/out/README.md", b"of a kill while it was saved")

    def refuse(_: Scratch, uri: str) -> None:
        raise PermissionDenied(f"{uri}: no", do="Allow it")

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "remove", refuse)
        done = run_job(wanted, say=said.append, command="")
    copies = f"{bucket}/out.training/{done.facts['data']['job']}"
    assert f"going on from the checkpoints in {copies}" in said
    assert any(line.endswith("until the model is saved; the same command goes on from them") and copies in line for line in said)
    assert f"copies of the checkpoints, if there are any, are left: {copies}/{BEST}: no. Allow it." in done.lines
    assert not (tmp_path / "test.training").exists()
    assert len(below(open_store(bucket, s3.options), copies)) == 2
    assert run_job(wanted, say=said.append, command="").lines[0] == "nothing to do: the artifact is there"
    assert below(open_store(bucket, s3.options), copies) == []
