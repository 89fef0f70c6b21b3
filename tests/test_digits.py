"""The packed digits: the same bytes every time, nothing lost, and every broken image refused for the reason it was made for."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.cut import cut, list_inputs
from pipeline.decode import BadImage, decode
from pipeline.demo import job_text, model_text, run_demo
from pipeline.errors import Interrupted, JobError, UnfitError
from pipeline.job.jobfile import parse_job
from pipeline.prepare import finetune
from pipeline.prepare.digits import CLASSES, EDGE, Digits, pack_digits
from pipeline.read import read_unit
from pipeline.spec import Input
from pipeline.storage import open_store


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return pack_digits(tmp_path_factory.mktemp("digits"))


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.tar")}


def members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                assert info.name not in found
                found[info.name] = tar.extractfile(info).read()
    return found


def test_same_seed_same_bytes(digits: Digits, tmp_path: Path):
    pack_digits(tmp_path / "again")
    pack_digits(tmp_path / "other", seed=1)
    assert sums(digits.train.parent) == sums(tmp_path / "again")
    assert sums(digits.train.parent) != sums(tmp_path / "other")


def test_every_digit_once_and_the_truth_beside_it(digits: Digits):
    train, label = members(digits.train), members(digits.label)
    images = [name for name in (*train, *label) if not name.endswith(".cls")]
    assert len(images) == len({name.partition(".")[0] for name in images}) == 1797 + len(digits.broken)
    assert digits.train_images == len(train) // 2 == 898
    assert digits.label_images == 899 + len(digits.broken)
    truths = [data.decode() for name, data in (*train.items(), *label.items()) if name.endswith(".cls")]
    assert len(truths) == 1797
    assert set(truths) == set(CLASSES)
    assert len(list(digits.label.glob("*.tar"))) == 6


def test_the_reader_sees_images_with_truth_and_broken_ones_without(digits: Digits):
    wanted = Input(uri=str(digits.label), keep=("cls",))
    store = open_store(str(digits.label))
    tables = [
        table
        for unit in cut(store, wanted, list_inputs(store, wanted).inputs, tasks=1)
        for table in read_unit(store, unit, wanted=wanted)
    ]
    rows = [row for table in tables for row in table.to_pylist() if row["key"] is not None]
    assert len(rows) == digits.label_images
    assert {row["key"] for row in rows if row["cls"] is None} == digits.broken.keys()


def test_sound_images_decode_and_broken_ones_fail_as_announced(digits: Digits):
    failures = {}
    for name, data in members(digits.label).items():
        if name.endswith(".cls"):
            continue
        try:
            pixels = decode(data, max_pixels=10**8)
        except BadImage as bad:
            failures[name.partition(".")[0]] = bad.failure
        else:
            assert pixels.shape == (EDGE, EDGE, 3)
            assert np.ptp(pixels) > 100
    assert failures == digits.broken


def test_broken_images_are_spread_over_the_shards(digits: Digits):
    holding = []
    for path in digits.label.glob("*.tar"):
        with tarfile.open(path) as tar:
            holding.append(sum(name.startswith("broken-") for name in tar.getnames()))
    assert sum(holding) == len(digits.broken)
    assert max(holding) <= 2


@pytest.mark.parametrize(
    "name", ["demo #1", "a: b", "it's", 'the "best"', "x, y", "a}", "- a", "über", "\U0001f600", "a\tb", "& %", "1"]
)
def test_the_demo_stands_in_a_folder_of_any_name(name: str):
    label, model = (parse_job(text(Path(name)).encode()) for text in (job_text, model_text))
    assert (label.input.uri, label.model.uri) == (f"{name}/digits/label/", f"{name}/model/")
    assert label.output.uri == f"{name}/labels/"
    assert (model.data.train.uri, model.output.uri) == (f"{name}/digits/train/", f"{name}/model/")


@pytest.mark.parametrize("name", ["x{date}", "a*", "a?", "out[1]", "s3://bucket/x", "file:///x"])
def test_the_demo_refuses_what_a_job_takes_for_more_than_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError) as caught:
        run_demo(Path(name), say=print, observe=lambda *_: None)
    words = f"--out is {Path(name)}; required: a folder of this machine, without {{, *, ? and [. Give another one."
    assert str(caught.value) == words
    assert not list(tmp_path.iterdir())


def test_the_demo_refuses_a_file_and_a_folder_of_something_else(tmp_path: Path):
    (tmp_path / "mine").write_text("x")
    for out, got in (
        (tmp_path / "mine", "mine: File exists; required: a folder"),
        (tmp_path, "is not empty; required: a new folder"),
    ):
        with pytest.raises(JobError, match=got):
            run_demo(out, say=print, observe=lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_demo_that_was_killed_while_it_packed_packs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(folder: Path) -> Digits:
        (folder / "train").mkdir(parents=True)
        raise Interrupted("stopped by SIGINT")

    def train(*_: object, **__: object) -> None:
        raise UnfitError("far enough")

    monkeypatch.setattr(finetune, "run_job", train)
    for pack, error in ((killed, Interrupted), (pack_digits, UnfitError)):
        monkeypatch.setattr("pipeline.demo.pack_digits", pack)
        with pytest.raises(error):
            run_demo(tmp_path / "out", say=print, observe=lambda *_: None)
    assert len(members(tmp_path / "out/digits/train")) == 2 * 898
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digits", "job.yaml", "model.yaml"]
