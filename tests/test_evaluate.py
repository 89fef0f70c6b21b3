"""Evaluate jobs: figures that are known beforehand, a folder that is never overwritten, a page that a browser renders."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import poison
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from models import small_artifact
from PIL import Image
from shards import picture, tar_bytes, write_parquet
from test_metrics import predictions

from pipeline.artifact import build, load_artifact, make_artifact, save_artifact
from pipeline.careful import CarefulLimits
from pipeline.decode import decode
from pipeline.engines import cpu
from pipeline.errors import JobError, ModelError, NightlabelError, StoreError, UnfitError
from pipeline.job.jobfile import parse_job
from pipeline.job.recipe import EvaluateJob
from pipeline.prepare.answer import Clock
from pipeline.prepare.evaluate import run_job
from pipeline.prepare.evaluation import Images as EvaluatedImages
from pipeline.prepare.evaluation import lines, metrics_dict
from pipeline.prepare.evaluation_page import MATRIX, SHOWN, TABLE, THUMBNAIL, render, thumbnail
from pipeline.prepare.metrics import measure
from pipeline.prepare.outcome import Outcome
from pipeline.preprocess import resize_and_crop
from pipeline.spec import ModelSource
from pipeline.storage import open_store

LABELS = ["class 0", "1", "2", "class 3", "4", "5", "0", "7"]  # of the eight pictures; number 6 is class 6, so one is wrong
RIGHT = 7


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Knows the same pictures by heart with other weights."""
    return small_artifact(tmp_path_factory.mktemp("other"), seed=1)


def shard(folder: Path, labels: list[str | None], *, broken: Mapping[str, bytes] | None = None) -> str:
    """A tar of the pictures that `model` knows, with these labels, and broken ones with the label 0."""
    folder.mkdir(parents=True, exist_ok=True)
    members: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        members[f"p{number}.jpg"] = picture(number % 8)
        members |= {f"p{number}.cls": label.encode()} if label is not None else {}
    for name, data in (broken or {}).items():
        members |= {f"{name}.jpg": data, f"{name}.cls": b"0"}
    (folder / "0.tar").write_bytes(tar_bytes(members))
    return str(folder)


def job(model: str, shards: str, out: object, **more: object) -> EvaluateJob:
    content = {
        "kind": "evaluate",
        "name": "exam",
        "model": {"uri": model},
        "data": {"input": {"uri": shards}},
        "output": {"uri": str(out)},
    }
    parsed = parse_job(yaml.safe_dump(content | more).encode())
    assert isinstance(parsed, EvaluateJob)
    return parsed


def evaluate(wanted: EvaluateJob) -> Outcome:
    return run_job(wanted, say=lambda _: None, command="nightlabel run exam.yaml")


def refused(kind: type[NightlabelError], wanted: EvaluateJob) -> str:
    with pytest.raises(kind) as caught:
        evaluate(wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_this_cpu_is_not_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, other: str):
    monkeypatch.setattr("pipeline.engines.cpu.lacks", lambda *_: True)
    wanted = job(model, shard(tmp_path / "in", LABELS), tmp_path / "out", compare={"uri": other, "precision": "bfloat16"})
    said: list[str] = []
    run_job(wanted, say=said.append, command="x")
    assert [line for line in said if "caution" in line] == [
        f"caution: {load_artifact(other).digest}: model.precision is bfloat16 {cpu.SLOW}"
    ]


def test_figures_that_are_known_beforehand(tmp_path: Path, model: str, other: str):
    broken = {"cut": picture(1)[:400], "text": b"hello"}
    data = shard(tmp_path / "in", [*LABELS, None, " "], broken=broken)
    outcome = evaluate(job(model, data, tmp_path / "out", compare={"uri": other}))
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    failed = {"NOT_AN_IMAGE": 1, "TRUNCATED": 1}
    assert record["images"] == {"read": 12, "measured": 8, "unlabelled": 2, "failed": failed}
    assert record["top1"] == RIGHT / 8
    assert (record["compare"]["agreement"], record["compare"]["top1"]) == (1, RIGHT / 8)
    assert (record["compare"]["only_it_right"], record["compare"]["only_model_right"]) == (0, 0)
    expected = np.eye(8, dtype=int)
    expected[6, 6], expected[0, 6] = 0, 1
    assert record["confusion"] == expected.tolist()
    classes = {one["label"]: one for one in record["classes"]}
    assert classes["class 0"] == {"label": "class 0", "images": 2, "precision": 1, "recall": 0.5}
    assert classes["class 6"] == {"label": "class 6", "images": 0, "precision": 0, "recall": None}
    (mistake,) = record["mistakes"]
    assert (mistake["key"], mistake["truth"], mistake["answer"]) == ("p6", "class 0", "class 6")
    assert 0 < mistake["truth_score"] < mistake["score"] <= 1
    assert sum(part["images"] for part in record["reliability"]) == 8
    assert outcome.exit_code == 0
    assert outcome.facts["subject"]["model"]["digest"] == load_artifact(model).digest
    assert "confusion" not in outcome.facts
    assert "picture" not in outcome.facts["mistakes"][0]
    text = "\n".join(outcome.lines)
    for words in (
        "top-1   87.50%",
        "images  8 measured of 12; left out: 2 NO_LABEL (p8, p9), 1 NOT_AN_IMAGE (text), 1 TRUNCATED (cut)",
        "agrees  100.00% with sha256:",
        "class 0     50.0%     100.0%        2",
        "and 1 more class;",
    ):
        assert words in text
    assert re.search(r"img/s   [\d,.]+ decode, [\d,.]+ predict; each alone, in one process", text)


def test_an_image_that_kills_or_hangs_its_decoder_is_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str):
    """The process that measures never sees it."""
    monkeypatch.setattr("pipeline.prepare.data.see", poison.see)
    monkeypatch.setattr("pipeline.prepare.data._PATIENCE", CarefulLimits(6.0, 2**28))
    data = shard(tmp_path / "in", [*LABELS, None], broken={"bad": b"abort", "slow": b"hang", "odd": b"hog"})
    outcome = evaluate(job(model, data, tmp_path / "out"))
    failed = {"DECODER_CRASH": 2, "DECODE_TIMEOUT": 1}
    assert outcome.facts["images"] == {"read": 12, "measured": 8, "unlabelled": 1, "failed": failed}
    assert outcome.facts["left_out_images"] == {"NO_LABEL": ["p8"], "DECODER_CRASH": ["bad", "odd"], "DECODE_TIMEOUT": ["slow"]}
    assert outcome.facts["top1"] == RIGHT / 8


@pytest.mark.parametrize(("batch_size", "shown"), [(6, SHOWN), (20, 3)])
def test_answers_are_those_of_a_plain_loop(
    tmp_path: Path, model: str, batch_size: int, shown: int, monkeypatch: pytest.MonkeyPatch
):
    """Twenty strange images, of several batches or one, in another order than the classes."""
    monkeypatch.setattr("pipeline.prepare.evaluate.SHOWN", shown)
    folder = tmp_path / "in"
    folder.mkdir()
    members: dict[str, bytes] = {}
    for number in range(20):
        members |= {f"k{number}.png": picture(100 + number, size=(32, 32), kind="PNG"), f"k{number}.cls": b"%d" % (number % 8)}
    (folder / "0.tar").write_bytes(tar_bytes(members))
    evaluate(job(model, str(folder), tmp_path / "out", batch_size=batch_size))
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    artifact = load_artifact(model)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (artifact.preprocessing.mean, artifact.preprocessing.std))
    pixels = [np.array(Image.open(io.BytesIO(members[f"k{number}.png"]))) for number in range(20)]
    crops = [torch.tensor(resize_and_crop(image, artifact.preprocessing).copy()) for image in pixels]
    with torch.inference_mode():
        probabilities = build(artifact)(torch.stack([(crop / 255 - mean) / std for crop in crops])).softmax(dim=1).numpy()
    truth = np.arange(20) % 8
    wanted = measure(predictions(probabilities, truth), 8)
    assert record["top1"] == pytest.approx(wanted.top1)
    assert record["top5"] == pytest.approx(wanted.top5)
    assert record["ece"] == pytest.approx(wanted.ece, abs=1e-4)
    assert record["nll"] == pytest.approx(wanted.nll, rel=1e-2)
    assert record["confusion"] == wanted.confusion.tolist()
    wrong = sorted(np.flatnonzero(probabilities.argmax(axis=1) != truth), key=lambda row: -probabilities[row].max())
    assert len(wrong) > 5
    assert [one["key"] for one in record["mistakes"]] == [f"k{row}" for row in wrong[:shown]]
    for row, one in zip(wrong, record["mistakes"], strict=False):
        assert (one["truth"], one["answer"]) == (f"class {row % 8}", f"class {probabilities[row].argmax()}")
        assert one["score"] == pytest.approx(probabilities[row].max(), abs=1e-3)
        assert one["truth_score"] == pytest.approx(probabilities[row, row % 8], abs=1e-3)
        assert one["picture"] == thumbnail(crops[row].numpy())


def test_what_one_of_two_models_cannot_score_is_compared_by_neither(tmp_path: Path, model: str, other: str):
    """The other one's first logit is more than a float32 holds for one image, and decides for all others."""
    known, broken = load_artifact(model), build(load_artifact(other))
    images = [decode(picture(number), max_pixels=10**6) for number in range(8)]
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (known.preprocessing.mean, known.preprocessing.std))
    crops = torch.stack([(torch.tensor(resize_and_crop(image, known.preprocessing)) / 255 - mean) / std for image in images])
    with torch.inference_mode():
        sums = broken.features(crops).sum(dim=1)
    last = int(sums.argmax())
    state = broken.state_dict()
    between = (sums.topk(2).values.mean() / torch.finfo(torch.float32).max).item()
    state["classifier.1.weight"], state["classifier.1.bias"] = torch.zeros(8, known.architecture.features), torch.zeros(8)
    state["classifier.1.weight"][0] = 1 / between
    save_artifact(
        make_artifact(known.architecture, state, labels=known.labels, preprocessing=known.preprocessing), str(tmp_path / "broken")
    )
    data = shard(tmp_path / "in", [str(number) for number in range(8)])
    done = evaluate(job(model, data, tmp_path / "out", compare={"uri": str(tmp_path / "broken")}))
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (record["images"]["measured"], record["top1"]) == (8, 1)
    zeros = int(last != 0)  # the one image of class 0, if it can be scored
    compared = {name: record["compare"][name] for name in ("images", "agreement", "top1", "only_model_right", "only_it_right")}
    share = round(zeros / 7, 6)
    assert compared == {"images": 7, "agreement": share, "top1": share, "only_model_right": 7 - zeros, "only_it_right": 0}
    assert any(line.endswith(", float32, on the 7 images that both could score") for line in done.lines)
    page = (tmp_path / "out/evaluation.html").read_text()
    assert "of 7 images, those that both could score; the other model's figures are of these.</p>" in page


def test_a_rate_leaves_the_first_block_out_and_images_that_have_failed(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    for images, seconds, rate in ((10, 5.0, 2), (20, 1.0, 20), (10, 2.0, 10)):

        def work(block: pa.Table, seconds: float = seconds) -> pa.Table:
            nonlocal now
            now += seconds
            return block

        clock(work, pa.table({"error_class": [None] * images + ["CORRUPT"] * 30}))
        assert clock.rate == rate


def test_the_classes_with_the_lowest_recall_are_on_top():
    truth = np.repeat(np.arange(12), 12)
    answers = np.where(np.tile(np.arange(12), 12) < truth, (truth + 1) % 12, truth)  # `truth` of 12 are wrong
    shares = np.full((len(truth), 14), 0.01)
    shares[np.arange(len(truth)), answers] = 0.87
    record = {
        **metrics_dict(measure(predictions(shares, truth), 14), tuple(f"c{number}" for number in range(14))),
        "images": EvaluatedImages(147, 144, 1, {"CORRUPT": 2}).as_dict(),
        "left_out_images": {"NO_LABEL": ["x"], "CORRUPT": ["y", "z"]},
        "throughput": {"decode": 100.0, "predict": 99.96, "how": "alone"},
        "compare": {
            **{"digest": "sha256:0123456789abcdef", "precision": "int8", "images": 144, "agreement": 0.5, "top1": 0.25},
            **{"only_it_right": 3, "only_model_right": 1_204},
        },
    }
    with pytest.raises(AssertionError, match="do not add up"):
        EvaluatedImages(147, 144, 1, {"CORRUPT": 1}).as_dict()
    said = list(lines(record, "out"))
    assert "images  144 measured of 147; left out: 1 NO_LABEL (x), 2 CORRUPT (y, z)" in said
    assert "img/s   100 decode, 100.0 predict; alone" in said
    assert "agrees  50.00% with sha256:0123456789ab…, int8" in said
    assert "        its top-1 25.00%; right alone on 3 images, this model on 1,204" in said
    assert said[0] == "top-1   54.17%"
    assert "classes" not in said[1]
    table = [line.split() for line in said[said.index("") + 1 : -3]]
    assert [row[0] for row in table] == ["class", *(f"c{number}" for number in range(11, 1, -1)), "and"]
    assert table[1][1:] == ["8.3%", "9.1%", "12"], "1 of 12 of them, and of 11 that were taken for it"
    assert table[-1][:4] == ["and", "4", "more", "classes;"]
    assert [part["from"] < part["to"] for part in record["reliability"]] == [True] * 15


def test_a_number_of_images_from_a_parquet_file_and_another_precision(tmp_path: Path, model: str, other: str):
    write_parquet(tmp_path / "in/a.parquet", [picture(number) for number in range(8)])
    data = {"input": {"uri": str(tmp_path / "in"), "format": "parquet"}, "label": "label", "images": 5}
    wanted = job(model, "unused", tmp_path / "out", compare={"uri": other, "precision": "bfloat16"}, data=data)
    facts = evaluate(wanted).facts
    assert (facts["images"]["measured"], facts["top1"], facts["compare"]["precision"]) == (5, 1, "bfloat16")
    assert ", labels from label, at most 5 images</td>" in (tmp_path / "out/evaluation.html").read_text()


def test_at_int8(tmp_path: Path, model: str):
    from test_quantize import quantize_job, write

    from pipeline.prepare.quantize import run_job as quantize

    known = {f"k{number}": picture(number) for number in range(8)}
    labelled = write(tmp_path / "in/a.tar", known, {f"k{number}": str(number) for number in range(8)})
    wanted = quantize_job(model, {"some": labelled, "data": labelled}, tmp_path / "int8")
    quantize(wanted, say=lambda _: None, command="x")

    def at_int8(folder: str, out: str) -> EvaluateJob:
        whole = job(model, labelled, tmp_path / out, compare={"uri": model})
        return whole.model_copy(update={"model": ModelSource(uri=folder, precision="int8")})

    facts = evaluate(at_int8(str(tmp_path / "int8"), "out")).facts
    assert (facts["top1"], facts["compare"]["agreement"], facts["subject"]["model"]["precision"]) == (1, 1, "int8")
    assert facts["compare"]["nll"] != facts["nll"], "float32 is surer or less sure"
    sentence = refused(ModelError, at_int8(model, "other"))
    assert "has no model.int8.onnx; required: one, for precision int8" in sentence


def test_the_same_job_measures_once_and_another_finds_the_folder_taken(tmp_path: Path, model: str, other: str):
    data = shard(tmp_path / "in", LABELS)
    times = os.stat(tmp_path / "in/0.tar")
    first = evaluate(job(model, data, tmp_path / "out"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"evaluation.json", "evaluation.html"}
    again = evaluate(job(model, data, tmp_path / "out"))
    assert again.facts == first.facts
    assert again.lines == ("nothing to do: exam is evaluated already", *first.lines[1:])
    sentence = refused(StoreError, job(other, data, tmp_path / "out"))
    assert sentence.startswith(f"output.uri {tmp_path}/out holds an evaluation with other model; required: an empty folder")
    assert "with other compare" in refused(StoreError, job(model, data, tmp_path / "out", compare={"uri": other}))
    shard(tmp_path / "in", LABELS[:7])
    assert "with other data" in refused(StoreError, job(model, data, tmp_path / "out"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    page = (tmp_path / "out/evaluation.html").read_bytes()
    (tmp_path / "out/evaluation.html").unlink()  # as a kill between the two leaves it
    shard(tmp_path / "in", LABELS)
    os.utime(tmp_path / "in/0.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert evaluate(job(model, data, tmp_path / "out")).lines[0] == "nothing to do: exam is evaluated already"
    assert (tmp_path / "out/evaluation.html").read_bytes() == page
    (tmp_path / "out/evaluation.json").unlink()
    assert "holds evaluation.html without evaluation.json" in refused(StoreError, job(model, data, tmp_path / "out"))
    (tmp_path / "out/evaluation.json").write_text("[]")
    assert "is not an evaluation of ours" in refused(StoreError, job(model, data, tmp_path / "out"))


def test_another_engine_or_column_finds_the_folder_taken(tmp_path: Path, model: str, other: str):
    write_parquet(tmp_path / "in/a.parquet", [picture(number) for number in range(8)])
    columns = pq.read_table(tmp_path / "in/a.parquet")
    pq.write_table(columns.append_column("again", columns["image"]), tmp_path / "in/a.parquet")

    def wanted(*, engine: str = "auto", its: str = "auto", **columns: str | None) -> EvaluateJob:
        data = {"input": {"uri": str(tmp_path / "in"), "format": "parquet", **columns}, "label": "label"}
        found = job(model, "unused", tmp_path / "out", data=data, compare={"uri": other, "engine": its})
        return found.model_copy(update={"model": ModelSource.model_validate({"uri": model, "engine": engine})})

    evaluate(wanted())
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert record["subject"]["model"]["engine"] == "onnxruntime"
    assert ", float32 on onnxruntime</td>" in (tmp_path / "out/evaluation.html").read_text()
    assert evaluate(wanted(engine="onnxruntime")).lines[0] == "nothing to do: exam is evaluated already", "what auto is"
    assert "with other model;" in refused(StoreError, wanted(engine="torch"))
    assert "with other compare;" in refused(StoreError, wanted(its="torch"))
    assert "with other data;" in refused(StoreError, wanted(image_column="again"))
    assert "with other data;" in refused(StoreError, wanted(key_column=None))


def test_a_file_in_the_place_of_the_folder_is_found_before_the_images_are_read(tmp_path: Path, model: str):
    (tmp_path / "out").write_bytes(b"somebody's")
    unlabelled = job(model, shard(tmp_path / "none", [None]), tmp_path / "out")
    assert f"{tmp_path}/out is a file; required: a folder, or nothing yet." in refused(StoreError, unlabelled)


def test_bad_input_is_one_sentence(tmp_path: Path, model: str):
    unlabelled = job(model, shard(tmp_path / "none", [None, None]), tmp_path / "out")
    assert refused(JobError, unlabelled) == (
        f"{tmp_path}/none, cls: none of 2 images has a label; required: labels to measure with. "
        "Set data.label to the sidecar or column that holds the class."
    )
    strange = job(model, shard(tmp_path / "strange", ["0", "zebra"]), tmp_path / "out")
    assert refused(JobError, strange).startswith(
        f"{tmp_path}/strange/0.tar: cls of p1 is zebra; required: one of 8 classes, class 0, "
    )
    broken = job(model, shard(tmp_path / "broken", [], broken={"a": b"x"}), tmp_path / "out")
    assert "no labelled image can be measured: 1 NOT_AN_IMAGE (a)" in refused(JobError, broken)
    digest = "sha256:" + "0" * 64
    elsewhere = job(model, str(tmp_path / "none"), tmp_path / "out", compare={"uri": model, "digest": digest})
    assert "Set compare.digest to it" in refused(ModelError, elsewhere)
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_classes_cannot_be_compared_with(tmp_path: Path, model: str):
    known = load_artifact(model)
    data = shard(tmp_path / "in", LABELS)
    state = build(known).state_dict()
    renamed = make_artifact(known.architecture, state, labels=("cat", *known.labels[1:]), preprocessing=known.preprocessing)
    save_artifact(renamed, str(tmp_path / "renamed"))
    sentence = refused(ModelError, job(model, data, tmp_path / "out", compare={"uri": str(tmp_path / "renamed")}))
    assert sentence == (
        f"{tmp_path}/renamed: has 'cat' as class 0; required: 'class 0', as in the model. "
        "Compare with a model of the same classes."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_absent_is_one_sentence(tmp_path: Path, model: str):
    assert "torch sees no CUDA device" in refused(UnfitError, job(model, "in/", tmp_path / "out", gpus=1))


def test_to_s3_through_the_command_line(tmp_path: Path, model: str, s3):
    out = f"s3://{s3.bucket()}/exam"
    content = job(model, shard(tmp_path / "in", LABELS), out).model_dump(mode="json", exclude_unset=True)
    content["output"] = {"uri": f"{out}/{{date}}", "s3": s3.options.model_dump()}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "job.yaml"), "--json", "--date", "yesterday"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    day = facts["where"].removeprefix(f"{out}/")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert facts["top1"] == RIGHT / 8
    out += f"/{day}"
    record = json.loads(open_store(out, s3.options).read(f"{out}/evaluation.json"))
    assert record["command"] == f"nightlabel run {tmp_path}/job.yaml --date {day}"
    assert b"<!doctype html>" in open_store(out, s3.options).read(f"{out}/evaluation.html")


def made_up(classes: int, mistakes: int) -> bytes:
    """The page of a random evaluation."""
    rng = np.random.default_rng(0)
    labels = tuple(f"<b>class & {number}</b>" for number in range(classes))
    found = measure(predictions(rng.dirichlet(np.ones(classes) / 5, 2000), rng.integers(0, classes, 2000)), classes)
    picture = thumbnail(rng.integers(0, 256, (3, 224, 224), dtype=np.uint8))
    facts = {"key": "k", "source": "s", "truth": labels[0], "answer": labels[1], "score": 0.9, "truth_score": 0.1}
    facts["picture"] = picture
    images = {"read": 2003, "measured": 2000, "unlabelled": 1, "failed": {"CORRUPT": 2}}
    record = {
        "name": "exam",
        "command": "nightlabel run exam.yaml",
        "images": images,
        "subject": {
            "model": {"digest": "sha256:0", "precision": "float32", "engine": "onnxruntime"},
            "data": {"uris": ["in/"], "label": "cls", "images": None},
        },
        **metrics_dict(found, labels),
        "throughput": {"decode": 800.0, "predict": 40.5, "how": "alone"},
        "compare": None,
        "mistakes": [facts] * mistakes,
    }
    return render(record)


@pytest.mark.parametrize("classes", [2, 30, 150])
def test_the_page_stands_alone(classes: int):
    page = made_up(classes, SHOWN).decode()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page), "nothing is loaded from elsewhere"
    assert "<b>class" not in page, "names are escaped"
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) == SHOWN == page.count("<img ")
    assert max(Image.open(io.BytesIO(base64.b64decode(image))).size for image in images) == (THUMBNAIL, THUMBNAIL)
    assert (f"the {MATRIX} most confused of {classes} classes" in page) == (classes > MATRIX)
    assert (f"the {TABLE} with the lowest recall of {classes} that have images" in page) == (classes > TABLE)
    assert "1 without a label, 2 CORRUPT" in page
    assert len(page) < 400_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_renders_the_page(tmp_path: Path):
    (tmp_path / "page.html").write_bytes(made_up(12, 5))
    quiet = [
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [*words, "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, text=True, check=True, timeout=240
    )
    dom = done.stdout
    matrix = re.search(r'<svg class="matrix".*?</svg>', dom, re.DOTALL)
    reliability = re.search(r'<svg class="reliability".*?</svg>', dom, re.DOTALL)
    assert matrix is not None
    assert reliability is not None
    assert matrix[0].count("<text") >= 24
    assert "taken for" in matrix[0]
    assert "mean score" in reliability[0]
    assert dom.count("<figure") == 5
    assert "nan" not in matrix[0] + reliability[0]
