"""The main job end to end: a real Ray, a real S3 server, real files. Every input ends as a row exactly once, whatever breaks."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from shards import picture, tar_bytes, write_parquet, write_tars
from typer.testing import CliRunner

from pipeline import run
from pipeline.cli import app
from pipeline.cluster import cluster, missing_from_cluster, start_ray
from pipeline.engines import cpu
from pipeline.errors import Conflict, InputMissing, Interrupted, JobError, ModelError, Temporary, UnfitError, UnitsLeft
from pipeline.label import Driver
from pipeline.report import Receipt
from pipeline.rows import PREDICTION, TIMINGS
from pipeline.spec import Input, Job
from pipeline.start import load_model, open_log
from pipeline.storage import open_store
from pipeline.unit import Unit
from pipeline.verify import validate

LIGHT = {
    "read": {"cpus_per_task": 0.1},
    "preprocess": {"actors": 0},
    "predict": {"cpus_per_actor": 0.5, "batch_size": 8},
}
#: Decoding in actors of its own, as a job has it that says nothing; another process that imports torch, 3 s a run.
APART = LIGHT | {"preprocess": {"cpus_per_actor": 0.2}}


def job(source: str | Path, artifact: str, out: str | Path, **fields: Any) -> Job:
    """A small job; `input` and other sections can be given."""
    content = {
        "name": "test",
        "model": {"uri": artifact},
        "output": {"uri": str(out)},
        "resources": LIGHT,
        "limits": {"max_failed": "100%"},
    }
    content |= {"input": {"uri": str(source), **fields.pop("input", {})}}
    return Job.model_validate(content | fields)


def label(wanted: Job) -> Receipt:
    return Driver(wanted, observe=lambda event, fields: None, started=time.perf_counter()).label()


def table(where: str | Path) -> pa.Table:
    """All rows of a local output."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(Path(where, "data").glob("*.parquet"))])


def files(folder: str | Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def problems(wanted: Job) -> list[str]:
    return validate(open_log(wanted, load_model(wanted, weights=False)))[1]


def labels(rows: pa.Table) -> dict[str, str]:
    """Label by key without folder and suffix: what the formats have in common."""
    keys = [Path(key).stem for key in rows.column("key").to_pylist()]
    return dict(zip(keys, rows.column("label").to_pylist(), strict=True))


def test_disk_to_disk_and_again(tmp_path, model, on_ray):
    keys = write_tars(tmp_path / "in", shards=5, images=6)
    output = {"uri": str(tmp_path / "out"), "top_k": 3}
    wanted = job(tmp_path / "in", model, tmp_path / "out", input={"keep": ["cls"]}, output=output, resources=APART)
    receipt = label(wanted)
    assert (receipt.exit_code, receipt.rows_in, receipt.ok, receipt.failed, receipt.passes) == (0, 30, 30, 0, 1)
    rows = table(receipt.where)
    assert sorted(rows.column("key").to_pylist()) == sorted(keys)
    assert rows.schema.names == [*PREDICTION.names, "cls"]
    assert all(rows.schema.field(field.name).type == field.type for field in PREDICTION)
    first = rows.to_pylist()[0]
    assert next(item["label"] for item in first["topk"]) == first["label"]
    assert first["topk"][0]["score"] >= first["topk"][1]["score"] >= first["topk"][2]["score"]
    assert (first["width"], first["height"], first["status"], first["cls"]) == (40, 30, "ok", "0")
    assert len(set(rows.column("label").to_pylist())) > 1, "the model tells nothing apart, so equal labels would prove nothing"
    assert problems(wanted) == []
    manifest = json.loads(Path(receipt.where, "runs/000001/manifest.json").read_text())
    assert manifest["rows"] == {"in": 30, "ok": 30, "failed": 0}
    started, ended = (datetime.strptime(manifest[name], "%Y-%m-%dT%H:%M:%S%z") for name in ("started", "ended"))
    assert abs((ended - started).total_seconds() - manifest["seconds"]) < 2  # both are whole
    assert timedelta() <= datetime.now(UTC) - ended < timedelta(minutes=5)
    assert {path.name for path in Path(receipt.where, "runs/000001").iterdir()} == {
        "plan.parquet",
        "spec.yaml",
        "report.html",
        "events.jsonl",
        "manifest.json",
    }
    before = files(tmp_path / "out")
    again = label(wanted)
    assert (again.exit_code, again.run, again.passes) == (0, None, 0)
    assert files(tmp_path / "out") == before


def test_s3_to_s3_and_a_grown_prefix(tmp_path, model, s3, on_ray):
    bucket = s3.bucket()
    write_tars(tmp_path / "in", shards=4, images=5)
    for path in sorted((tmp_path / "in").iterdir()):
        s3.put(f"s3://{bucket}/in/{path.name}", path.read_bytes())
    wanted = job(f"s3://{bucket}/in/", model, f"s3://{bucket}/out")
    wanted = wanted.model_copy(update={"input": wanted.input.model_copy(update={"s3": s3.options})})
    receipt = label(wanted)
    assert (receipt.exit_code, receipt.rows_in, receipt.units) == (0, 20, 4)
    assert problems(wanted) == []
    assert label(wanted).run is None
    write_tars(tmp_path / "more", shards=1, images=7, first=2)
    s3.put(f"s3://{bucket}/in/001b.tar", (tmp_path / "more/002.tar").read_bytes())
    grown = label(wanted)
    assert (grown.run, grown.rows_in, grown.labelled_now, grown.units) == ("000002", 7, 7, 1)
    assert problems(wanted) == []
    store = open_store(f"s3://{bucket}/out")
    assert len(list(store.list(f"{grown.where}/data/"))) == 5


def test_all_formats_label_alike(tmp_path, model, on_ray):
    keys = write_tars(tmp_path / "tars", shards=4, images=4)
    pictures = {key: picture(1000 * int(key[:3]) + int(key[4:])) for key in keys}
    write_parquet(tmp_path / "parquet/a.parquet", list(pictures.values()), keys=list(pictures), rows_per_group=4)
    for key, data in pictures.items():
        (tmp_path / "loose" / key[:3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / key[:3] / f"{key}.jpg").write_bytes(data)
    results = []
    for source, kind in (("tars", "webdataset"), ("parquet", "parquet"), ("loose", "images")):
        receipt = label(job(tmp_path / source, model, tmp_path / f"out-{source}", input={"format": kind}))
        assert (receipt.exit_code, receipt.rows_in) == (0, 16)
        assert receipt.units >= 4
        results.append(labels(table(receipt.where)))
    assert results[0] == results[1] == results[2]
    assert set(results[0]) == set(keys)


def test_another_model_or_setting_is_another_output_and_touches_nothing_old(tmp_path, model, on_ray, tmp_path_factory):
    import models

    write_tars(tmp_path / "in", shards=1, images=3)
    first = label(job(tmp_path / "in", model, tmp_path / "out"))
    before = files(first.where)
    other = models.small_artifact(tmp_path_factory.mktemp("other"), seed=1)
    rich = {"uri": str(tmp_path / "out"), "probabilities": True, "embeddings": True}
    second = label(job(tmp_path / "in", other, tmp_path / "out", output=rich))
    assert first.fingerprint != second.fingerprint
    assert files(first.where) == before
    rows = table(second.where)
    assert rows.schema.field("embedding").type == pa.list_(pa.float32(), 512)
    assert rows.schema.field("probabilities").type == pa.list_(pa.float16(), 8)
    assert all(abs(sum(map(float, row)) - 1) < 5e-3 for row in rows.column("probabilities").to_pylist())
    with pytest.raises(ModelError, match="digest"):
        label(job(tmp_path / "in", model, tmp_path / "out", model={"uri": model, "digest": "sha256:" + "0" * 64}))


def broken_tars(folder: Path) -> None:
    write_tars(folder, shards=2, images=4)
    whole = (folder / "000.tar").read_bytes()
    (folder / "empty.tar").write_bytes(tar_bytes({}))
    (folder / "zero.tar").write_bytes(b"")
    (folder / "page.tar").write_bytes(b"<!doctype html><title>503</title>" + b" " * 2000)
    border = 512 + -(-len(picture(0)) // 512) * 512
    (folder / "border.tar").write_bytes(whole[:border])
    (folder / "inside.tar").write_bytes(whole[: border - 300])
    images = {
        "zero.jpg": b"",
        "cut.jpg": picture(1)[:-200],
        "page.jpg": b"<html>",
        "good.png": picture(2, kind="PNG"),
        "wrong.png": picture(3),
    }
    (folder / "images.tar").write_bytes(tar_bytes(images))


def test_broken_shards_and_images_cost_themselves_and_nothing_else(tmp_path, model, on_ray):
    broken_tars(tmp_path / "in")
    one_shard_a_unit = LIGHT | {"read": {"tasks": 2, "cpus_per_task": 0.1}}
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=one_shard_a_unit)
    receipt = label(wanted)
    assert receipt.exit_code == 3
    assert {(Path(item.inputs[0]).name, item.error_class) for item in receipt.trouble} == {
        ("zero.tar", "TAR_NO_EOF"),
        ("page.tar", "TAR_CORRUPT"),
        ("border.tar", "TAR_NO_EOF"),
        ("inside.tar", "TAR_TRUNCATED"),
    }
    assert (receipt.rows_in, receipt.ok, receipt.failures) == (13, 10, {"NOT_AN_IMAGE": 2, "TRUNCATED": 1})
    assert receipt.passes == 1, "what is wrong in itself is not read again"
    rows = {row["key"]: row for row in table(receipt.where).to_pylist()}
    assert (rows["zero"]["status"], rows["zero"]["error_class"], rows["zero"]["label"]) == ("failed", "NOT_AN_IMAGE", None)
    assert rows["wrong"]["status"] == "ok", "the content decides, not the name"
    assert not Path(receipt.where, "runs", receipt.run, "manifest.json").exists()
    before = files(tmp_path / "out")
    assert label(wanted).exit_code == 3
    assert files(tmp_path / "out") == before
    for name in ("zero", "page", "border", "inside"):
        (tmp_path / "in" / f"{name}.tar").write_bytes(tar_bytes({f"{name}-mended.jpg": picture(9)}))
    mended = label(wanted)
    assert (mended.exit_code, mended.rows_in, mended.labelled_now) == (0, 17, 4)
    assert problems(wanted) == []


def test_a_run_without_a_single_image_says_so_every_time(tmp_path, model, on_ray):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(tar_bytes({"a.txt": b"x", "a.cls": b"1"}))
    (tmp_path / "in/b.tgz").write_bytes(b"x")
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, model))
    code, out, err = cli("run", tmp_path / "job.yaml")
    assert (code, "none of them holds an image" in out) == (3, True), err
    assert "ignored: 1 object (1 .tgz)" in err
    assert cli("run", tmp_path / "job.yaml")[0] == 3
    code, out, _ = cli("plan", tmp_path / "job.yaml")
    assert (code, "ignored 1 object (1 .tgz), not of the input's format" in out) == (0, True), out
    write_tars(tmp_path / "in", shards=1, images=2)
    assert label(job(tmp_path / "in", model, tmp_path / "out")).exit_code == 0


def test_a_broken_shard_in_a_joined_unit_holds_nothing_back(tmp_path, model, on_ray):
    write_tars(tmp_path / "in", shards=12, images=2)
    (tmp_path / "in/004.tar").write_bytes(b"<html>")
    wanted = job(tmp_path / "in", model, tmp_path / "out")
    receipt = label(wanted)
    assert (receipt.exit_code, receipt.rows_in, len(receipt.trouble)) == (3, 22, 1)
    assert len(set(table(receipt.where).column("key").to_pylist())) == 22
    (tmp_path / "in/004.tar").unlink()
    assert label(wanted).exit_code == 0
    assert problems(wanted) == []


def test_a_flipped_byte_in_parquet_is_that_file_alone(tmp_path, model, on_ray):
    for name in "ab":
        write_parquet(
            tmp_path / f"in/{name}.parquet", [picture(number) for number in range(6)], keys=[f"{name}{n}" for n in range(6)]
        )
    data = bytearray((tmp_path / "in/a.parquet").read_bytes())
    data[4] ^= 0xFF  # the first page's header
    (tmp_path / "in/a.parquet").write_bytes(data)
    receipt = label(job(tmp_path / "in", model, tmp_path / "out", input={"format": "parquet"}))
    assert (receipt.exit_code, receipt.rows_in) == (3, 6)
    assert [item.error_class for item in receipt.trouble] == ["PARQUET_CORRUPT"]


@pytest.mark.parametrize("address", ["http://head:8265", "head", "head..example:6379", f"{'a' * 64}.example:6379"])
def test_what_is_no_address_of_a_ray(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UnfitError, match="required: host:port of a running Ray's head"):
        start_ray(object_store=2**27)


def test_more_shared_memory_than_the_machine_has(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = f"from pipeline.cluster import start_ray; start_ray(object_store={2**50})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert "JobError: resources: object_store is more than this machine's memory; required: room" in done.stderr


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("deep/" * 20, r"UnfitError: {}; required: .*a shorter path.*\. Set RAY_TMPDIR to such a folder, in place of \S+\."),
        ("/proc", r"Temporary: {}; required: room in .*\. Make some in /proc, or set RAY_TMPDIR to another; then run again\."),
    ],
)
def test_a_folder_that_ray_cannot_have_its_files_in_is_named(tmp_path, folder, said):
    """/proc is of those that have no room."""
    (place := tmp_path / folder).mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    code = f"from pipeline.cluster import start_ray; start_ray(object_store={2**27})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"TMPDIR": str(place)}, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert re.search(said.format(r"a Ray on this machine did not come up \(.+\)"), last), last


def test_a_limit_of_open_files_that_ray_would_die_of_is_named():
    """Its core ended the process with 1 and without a word."""
    code = f"from pipeline.cluster import start_ray; start_ray(object_store={2**27})"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = ["bash", "-c", 'ulimit -n 64; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = "UnfitError: 64 files may be open at a time; required: 256 for Ray, thousands on many CPUs. Raise it with ulimit -n"
    assert said in done.stderr.splitlines()[-1]


#: A task twice, while an actor has all CPUs; in between its worker is idle for longer than the second that Ray gives one.
TWICE = """
import os, time
from pipeline.environment import set_ray_environment
set_ray_environment()
import ray
from pipeline.cluster import start_ray
start_ray(object_store=2**27)
pid = ray.remote(num_cpus=0)(lambda: os.getpid())
pool = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
ray.get(pool.ready())
first = ray.get(pid.remote())
time.sleep(3)
print(first == ray.get(pid.remote()))
"""


def test_a_reader_that_waits_for_a_while_is_not_ended(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_worker_keeps_the_store_of_the_day_that_it_works_on_and_none_of_the_days_before():
    """On S3 each has a client of its own, and a backfill of a year has 365 days."""
    stores = [weakref.ref(run._store(Input(uri=f"s3://photos/2026-11-0{day}/"))) for day in (1, 1, 2, 3, 3)]
    gc.collect()
    assert [store() is not None for store in stores] == [False, False, False, True, True]


def test_a_pass_that_dies_without_a_word_is_told_by_its_kind():
    told = {"": "RuntimeError", "\nno room\nhere": "no room"}
    assert all(f"the pass ended early ({words})" in str(run._reason(RuntimeError(text))) for text, words in told.items())


def test_too_many_failures_are_committed_all_the_same(tmp_path, model, on_ray):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(tar_bytes({"a.jpg": picture(1), "b.jpg": b"", "c.jpg": picture(2) + bytes(20_000)}))
    receipt = label(job(tmp_path / "in", model, tmp_path / "out", limits={"max_failed": "10%", "max_bytes": "10KiB"}))
    assert (receipt.exit_code, receipt.rows_in, receipt.failed) == (4, 3, 2)
    assert receipt.failures == {"NOT_AN_IMAGE": 1, "TOO_LARGE": 1}
    assert Path(receipt.where, "runs/000001/manifest.json").exists()


@pytest.mark.parametrize("decoders", [1, 0], ids=["stages apart", "one stage"])
def test_a_poison_image_costs_one_row(tmp_path, model, on_ray, monkeypatch, decoders):
    import poison

    monkeypatch.setattr(run, "make_preprocess", poison.make_preprocess)
    write_tars(tmp_path / "in", shards=3, images=4)
    members = {f"p{number}.jpg": picture(number) for number in range(4)} | {"abort.jpg": b"abort\n"}
    (tmp_path / "in/poison.tar").write_bytes(tar_bytes(members))
    resources = LIGHT | {"preprocess": {"actors": decoders}}
    receipt = label(job(tmp_path / "in", model, tmp_path / "out", resources=resources))
    assert set(receipt.seam_seconds) == set(TIMINGS)
    assert min(receipt.seam_seconds.values()) > 0
    assert (receipt.exit_code, receipt.rows_in, receipt.ok) == (0, 17, 16)
    assert receipt.failures == {"DECODER_CRASH": 1}
    assert receipt.passes == 3, "two as they come, one in careful mode"


def test_a_cpu_that_the_model_is_not_made_for_is_told_of(tmp_path, model, on_ray, monkeypatch):
    import poison

    monkeypatch.setattr(run, "make_predict", poison.make_predict_elsewhere)
    write_tars(tmp_path / "in", shards=3, images=4)
    told: list[str] = []
    wanted = job(tmp_path / "in", model, tmp_path / "out", model={"uri": model, "precision": "bfloat16"})

    def observe(event: str, fields: dict[str, Any]) -> None:
        told.extend([fields["text"]] if event == "caution" else [])

    receipt = Driver(wanted, observe=observe, started=time.perf_counter()).label()
    text = f"model.precision is bfloat16 {cpu.SLOW}"
    assert (told, receipt.cautions, receipt.ok) == ([text], (text,), 12)
    assert f"caution {text}" in receipt.lines()
    assert text in receipt.page().decode()
    manifest = Path(receipt.where, "runs/000001/manifest.json")
    manifest.unlink()  # as after a kill just before the end: what the rows came from is still to be known
    again = label(wanted)
    assert (again.written, again.cautions) == (0, (text,))
    assert json.loads(manifest.read_text())["cautions"] == [text]
    assert table(receipt.where).column_names == PREDICTION.names


@pytest.mark.parametrize("way", [("both", 1), ("gpu", 1), ("gpu", 0)])
def test_images_that_take_two_lanes_are_rows_once(tmp_path, model, on_ray, monkeypatch, way):
    import standing

    keys = write_tars(tmp_path / "in", shards=3, images=70)
    odd = {"cut.jpg": picture(1)[:-40] + b"\xff\xd9", "no.jpg": b"no image", "other.png": picture(2, kind="PNG")}
    (tmp_path / "in/odd.tar").write_bytes(tar_bytes(odd))
    one = label(job(tmp_path / "in", model, tmp_path / "one"))
    monkeypatch.setattr(run, "make_predict", standing.make_predict)
    lane, actors = way
    resources = APART | {"preprocess": {"actors": actors, "cpus_per_actor": 0.2}}
    both = job(tmp_path / "in", model, tmp_path / "out", resources=resources)
    there = both.model.model_copy(update={"engine": "torch"})  # as on a GPU; none is asked for, which a job file cannot say
    receipt = label(both.model_copy(update={"decode_lane": lane, "model": there}))
    assert (receipt.exit_code, receipt.rows_in, receipt.ok, receipt.passes) == (0, 213, 211, 1)
    assert (receipt.failures, receipt.lane) == (one.failures, lane)
    rows, expected = (table(where).sort_by("key") for where in (receipt.where, one.where))
    assert sorted(rows["key"].to_pylist()) == sorted([*keys, "cut", "no", "other"])
    for name in ("label", "error_class", "error", "width", "height"):
        assert rows[name].equals(expected[name]), name
    assert receipt.compared == receipt.same_label > 0
    manifest = json.loads(Path(receipt.where, "runs/000001/manifest.json").read_bytes())
    assert manifest["decode"] == {"mode": "exact", "lane": lane, "compared": receipt.compared, "same_label": receipt.compared}


def test_what_steers_two_lanes_may_die(tmp_path, model, on_ray):
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=APART).model_copy(update={"decode_lane": "both"})
    ray.init(address=on_ray, log_to_driver=False)
    try:
        share = run._share(wanted)
        measured = {"pass": (100, 0.01), "decode": (100, 1.0), "gpu": (100, 0.1)}
        assert share(measured) == pytest.approx(0.92, abs=0.01)
        ray.kill(share.args[0])
        end = time.monotonic() + 60
        while share(measured) != 0.5:  # it may answer once more before it dies
            assert time.monotonic() < end
    finally:
        ray.shutdown()


def test_an_image_that_hangs_costs_one_row(tmp_path, model, on_ray, monkeypatch):
    import poison

    monkeypatch.setattr(run, "make_preprocess", poison.make_preprocess)
    monkeypatch.setattr(run, "STALL_S", 20.0)
    write_tars(tmp_path / "in", shards=1, images=4)
    sound = {f"{number}.jpg": picture(number) for number in range(20)}
    (tmp_path / "in/poison.tar").write_bytes(tar_bytes({"hang.jpg": b"hang\n", **sound}))
    limits = {"max_failed": "100%", "decode_timeout": "5s"}
    told: list[tuple[str, int]] = []
    driver = Driver(
        job(tmp_path / "in", model, tmp_path / "out", limits=limits, resources=APART),
        observe=lambda event, fields: told.append((event, fields.get("careful", fields.get("images", 0)))),
        started=time.perf_counter(),
    )
    receipt = driver.label()
    assert (receipt.exit_code, receipt.rows_in, receipt.failures) == (0, 25, {"DECODE_TIMEOUT": 1})
    assert receipt.passes >= 2
    blocks = [images for event, images in told[told.index(("pass", True)) :] if event == "rows" and images]
    assert max(blocks) <= 8, "a thousand hanging images in one block would look like a pass that hangs"


def test_an_image_that_kills_what_reads_costs_one_row(tmp_path, model, on_ray, monkeypatch):
    import poison
    import standing

    monkeypatch.setattr(run, "make_preprocess", poison.make_preprocess)
    monkeypatch.setattr(run, "make_predict", standing.make_predict)
    keys = write_tars(tmp_path / "in", shards=1, images=4)
    sound = {f"{number}.jpg": picture(number) for number in range(3)}
    (tmp_path / "in/poison.tar").write_bytes(tar_bytes({"abort.png": b"abort\n", **sound}))
    resources = APART | {"preprocess": {"actors": 0}}  # with the GPU's lane what reads decodes what is no plain JPEG
    wanted = job(tmp_path / "in", model, tmp_path / "out", limits={"max_failed": "100%"}, resources=resources)
    there = wanted.model.model_copy(update={"engine": "torch"})
    receipt = label(wanted.model_copy(update={"decode_lane": "gpu", "model": there}))
    assert (receipt.exit_code, receipt.rows_in, receipt.failures) == (0, 8, {"DECODER_CRASH": 1})
    assert receipt.passes >= 2
    assert sorted(table(receipt.where)["key"].to_pylist()) == sorted([*keys, "abort", "0", "1", "2"])


def test_what_ray_lost_a_unit_to_is_told(tmp_path, model, on_ray, monkeypatch):
    import poison

    monkeypatch.setattr(run, "make_predict", poison.make_predict)
    write_tars(tmp_path / "in", shards=2, images=3)
    (tmp_path / "in/bad.tar").write_bytes(tar_bytes({"cursed.jpg": picture(1), "sound.jpg": picture(2)}))
    receipt = label(job(tmp_path / "in", model, tmp_path / "out"))
    assert (receipt.exit_code, receipt.rows_in, receipt.passes) == (5, 6, 3)
    (left,) = receipt.trouble
    assert left.error.endswith("bad.tar: its rows did not all arrive; ValueError: cursed indeed.")


def test_two_drivers_share_the_work(tmp_path, model, on_ray):
    keys = write_tars(tmp_path / "in", shards=6, images=3)
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, model))
    both = [start_cli("run", tmp_path / "job.yaml", "--json") for _ in range(2)]
    outputs = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    receipts = [json.loads(out) for out, _ in outputs]
    where = receipts[0]["where"]
    assert sorted(table(where).column("key").to_pylist()) == sorted(keys)
    assert sum(receipt["written"] for receipt in receipts) == 6
    assert len(list(Path(where, "runs").iterdir())) == 1


def job_text(folder: Path, model: str, *, tasks: int = 1) -> str:
    """A job of at least 4 × `tasks` units."""
    resources = LIGHT | {"read": {"tasks": tasks, "cpus_per_task": 0.1}}
    places = {"input": {"uri": str(folder / "in")}, "model": {"uri": model}, "output": {"uri": str(folder / "out")}}
    return json.dumps({"name": "test", **places, "resources": resources})  # JSON is YAML


def start_cli(*words: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def cli(*words: object, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    process = start_cli(*words, **environment)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def wait_for_units(where: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(where.rglob("data/*.parquet"))) >= count:
            return
        threading.Event().wait(0.02)


def test_sigkill_at_five_moments_loses_nothing_and_repeats_nothing(tmp_path, model, on_ray):
    rng = random.Random(7)
    keys = write_tars(tmp_path / "in", shards=40, images=10)
    path = tmp_path / "job.yaml"
    path.write_text(job_text(tmp_path, model, tasks=5))
    written: dict[str, int] = {}
    for count in (0, *(rng.randint(1, 2) for _ in range(4))):
        process = start_cli("run", path)
        wait_for_units(tmp_path / "out", len(written) + count, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Not the hidden temporary file that a kill in the middle of a create leaves.
        now = {name: stamp for name, stamp in files(tmp_path / "out").items() if name.endswith(".parquet") and "/data/" in name}
        assert now.items() >= written.items(), "a committed unit was written again"
        written = now
    assert 0 < len(written) < 20, "nothing was committed before a kill, or nothing was left"
    code, out, err = cli("run", path)
    assert code == 0, err
    assert f"resuming: {len(written)} of 20 units done" in err, err
    (where,) = (tmp_path / "out").iterdir()
    query = f"select count(*), count(distinct key), count(*) filter (status = 'ok') from '{where}/data/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(400, 400, 400)]
    assert sorted(table(where).column("key").to_pylist()) == sorted(keys)
    assert files(where).items() >= written.items()
    assert "400 in = 400 ok + 0 failed" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(tmp_path, model, on_ray, number, code):
    write_tars(tmp_path / "in", shards=24, images=10)
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, model, tasks=3))
    process = start_cli("run", tmp_path / "job.yaml")
    wait_for_units(tmp_path / "out", 1, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "goes on from there" in err
    assert "Traceback" not in err


#: Among the imports of the command line somebody presses Ctrl-C.
PRESSED = """
import os, signal, sys

class Pressed:
    def find_spec(self, name, *_):
        if name == "pipeline.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Pressed())
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="nightlabel")
command.load()()
"""


def test_an_early_signal_leaves_no_traceback():
    command = [sys.executable, "-c", PRESSED, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_run_outlives_who_reads_what_it_says(tmp_path, model, on_ray):
    keys = write_tars(tmp_path / "in", shards=2, images=10)
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, model))
    process = start_cli("run", tmp_path / "job.yaml")
    assert "run 000001" in process.stderr.readline()
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=500) == 0
    (where,) = (tmp_path / "out").iterdir()
    assert sorted(table(where).column("key").to_pylist()) == sorted(keys)
    assert (where / "runs/000001/manifest.json").exists()


def test_deadline_stops_resumably(tmp_path, model, on_ray):
    write_tars(tmp_path / "in", shards=4, images=4)
    with pytest.raises(UnitsLeft, match="deadline") as caught:
        label(job(tmp_path / "in", model, tmp_path / "out", limits={"deadline": "0.1s"}))
    assert caught.value.exit_code == 5
    assert label(job(tmp_path / "in", model, tmp_path / "out")).exit_code == 0


def test_demand_beyond_the_machine_is_refused(tmp_path, model, on_ray):
    write_tars(tmp_path / "in", shards=1, images=1)
    with pytest.raises(JobError, match="asks for 1 GPUs"):
        label(job(tmp_path / "in", model, tmp_path / "out", resources={"predict": {"gpus_per_actor": 1}}))
    with pytest.raises(JobError, match="the cluster has 2 on this machine"):
        label(job(tmp_path / "in", model, tmp_path / "out", resources={"preprocess": {"actors": 9}}))


def test_a_job_that_this_machine_cannot_hold_starts_no_ray(model, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.cluster.connect", lambda _: pytest.fail("Ray was started"))
    wanted = job("in", model, "out", resources={"preprocess": {"actors": 10_000}})
    with pytest.raises(JobError, match=r"asks for .* CPUs .* on this machine\. Lower the actors"), cluster(wanted, tell=print):
        pass


def test_the_days_of_a_backfill_share_one_ray_but_for_one_that_fails(model, on_ray, tmp_path, monkeypatch):
    starts: list[bool] = []
    monkeypatch.setattr("pipeline.cluster.start_ray", lambda **named: (starts.append(ray.is_initialized()), start_ray(**named)))
    for day in (1, 2, 3, 4):
        (tmp_path / f"in/2026-11-0{day}").mkdir(parents=True)
        (tmp_path / f"in/2026-11-0{day}/a.tar").write_bytes(tar_bytes({"1.jpg": picture(day)}))
    passes = run.run_pass

    def dies_once(units: list[Unit], **named: Any) -> Any:
        if "2026-11-02" in units[0].parts[0].uri:
            raise Temporary("the raylet is dead", do="Run again")
        return passes(units, **named)

    monkeypatch.setattr(run, "run_pass", dies_once)
    path = tmp_path / "job.yaml"
    path.write_text(job(tmp_path / "in/{date}", model, tmp_path / "out/{date}").model_dump_json(exclude_defaults=True))
    done = CliRunner().invoke(app, ["run", str(path), "--date", "2026-11-01..2026-11-04", "--json"])
    assert done.stdout, (done.exception, done.stderr)
    assert [day["exit_code"] for day in json.loads(done.stdout)["days"]] == [0, 75, 0, 0]
    assert starts == [False, False], "for the first day, and after the second"
    assert not ray.is_initialized()


def test_a_run_that_waits_for_nodes_goes_on_telling(model, on_ray, monkeypatch):
    """Else metrics take it for one that hangs, and a run that is to take over is not seen."""
    monkeypatch.setattr("pipeline.cluster.FREE_S", 0)
    monkeypatch.setattr("pipeline.cluster.TELL_S", 1)
    told: list[str] = []
    wanted = job("in", model, "out", resources={"preprocess": {"actors": 9}}, cluster={"workers": {"cpus": 8}, "wait": "5s"})
    with (
        pytest.raises(Temporary, match=r"waited 5 s in vain: resources: the job asks for .* CPUs"),
        cluster(wanted, tell=lambda event, **_: told.append(event)),
    ):
        pass
    assert told[0] == "waiting"
    assert told[1:] == ["still_waiting"] * (len(told) - 1)
    assert 1 <= len(told[1:]) <= 4


def test_an_actor_that_fits_on_no_live_node_is_refused(monkeypatch):
    dead = {"Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}}
    small = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, small, small])
    assert missing_from_cluster(job("in", "model", "out", resources={"predict": {"gpus_per_actor": 1, "actors": 2}})) is None
    sentence = missing_from_cluster(job("in", "model", "out", resources={"predict": {"gpus_per_actor": 2}}))
    assert "predict actor asks for 2 GPUs and 1 CPUs of one node, the largest has 1 and 4 (2 nodes)" in (sentence or "")


def test_missing_inputs_and_wrong_places(tmp_path, model):
    with pytest.raises(InputMissing):
        label(job(tmp_path / "absent/", model, tmp_path / "out"))
    write_tars(tmp_path / "in", shards=1, images=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(Exception, match="file") as caught:
        label(job(tmp_path / "in", model, tmp_path / "file/out"))
    assert caught.value.exit_code == 2
    with pytest.raises(ModelError):
        label(job(tmp_path / "in", str(tmp_path / "no-model"), tmp_path / "out"))


def test_no_permission_is_a_sentence_and_exit_77(tmp_path, model, s3):
    write_tars(tmp_path / "in", shards=1, images=1)
    wanted = json.loads(job_text(tmp_path, model)) | {"output": {"uri": f"s3://{s3.bucket()}/out"}}
    (tmp_path / "job.yaml").write_text(json.dumps(wanted))
    code, out, err = cli("run", tmp_path / "job.yaml", "--json", AWS_SECRET_ACCESS_KEY="wrong")
    assert (code, json.loads(out)["exit_code"]) == (77, 77), err
    assert "Traceback" not in err


def test_a_stranger_in_a_units_place_is_a_conflict(tmp_path, model, on_ray):
    write_tars(tmp_path / "in", shards=2, images=2)
    wanted = job(tmp_path / "in", model, tmp_path / "out")
    from pipeline.start import plan_job

    log, plan = plan_job(wanted, load_model(wanted, weights=False))
    stranger = Path(log.data_key(plan.units[0].id))
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"not ours")
    with pytest.raises(Conflict):
        label(wanted)
    assert stranger.read_bytes() == b"not ours"
    assert Interrupted("x").exit_code == 130
