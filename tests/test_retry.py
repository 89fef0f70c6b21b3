"""retry-failed: what failed is read again, into a new generation; nothing that stands is touched, every image is there once."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from deltalake import DeltaTable
from inprocess import without_ray
from shards import picture, tar_bytes, write_tars
from test_nightly import invoke, write
from test_run import LIGHT, files, job, label
from typer.testing import CliRunner

from pipeline import label as driver
from pipeline import read, run
from pipeline.cli import app
from pipeline.disk import Disk
from pipeline.errors import Conflict, ExitCode, JobError, StoreError, Temporary, UnfitError
from pipeline.job.schedule import Schedule
from pipeline.log import Log
from pipeline.nights import lease
from pipeline.nights.generation import __doc__ as sql_doc
from pipeline.nights.generation import generations, open_retries, to_plan, validate_all
from pipeline.nights.retry import Retried, Retry, parse_classes
from pipeline.spec import Job, Publish
from pipeline.start import load_model, open_log
from pipeline.storage import open_store
from pipeline.unit import Part, Unit


def retry(wanted: Job, classes: str) -> Retried:
    return Retry(wanted, parse_classes(classes), observe=lambda event, fields: None, started=time.perf_counter()).retry()


def latest(wanted: Job) -> dict[str, tuple[str, str | None]]:
    """(status, error class) by key, by the SQL that the documentation gives."""
    log = open_log(wanted, load_model(wanted, weights=False))
    (query,) = re.findall(r"^    (select .*?)\n\n", sql_doc or "", re.MULTILINE | re.DOTALL)
    query = query.replace("labels/<fingerprint>", log.root).replace("key, label", "key, status, error_class")
    rows = duckdb.sql(query).fetchall()
    assert len({key for key, _, _ in rows}) == len(rows)
    return {key: (status, error_class) for key, status, error_class in rows}


def problems(wanted: Job) -> list[str]:
    return validate_all(open_log(wanted, load_model(wanted, weights=False)))[1]


def loose(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02d}.jpg").write_bytes(picture(number))


def guard(patch: pytest.MonkeyPatch) -> None:
    """Nothing beside which a file `.denied` lies can be fetched."""
    fetch = read._fetch

    def guarded(store: Any, part: Part, *, max_bytes: int) -> dict[str, object]:
        if Path(f"{part.uri}.denied").exists():
            return {"error_class": "FETCH_FAILED", "error": "denied"}
        return fetch(store, part, max_bytes=max_bytes)

    patch.setattr(read, "_fetch", guarded)


def stop(event: str, fields: dict[str, Any]) -> None:
    if event == "pass":
        raise KeyboardInterrupt


def output_of(wanted: Job) -> Log:
    return open_log(wanted, load_model(wanted, weights=False))


def test_only_the_chosen_rows_of_a_unit_are_read(tmp_path, monkeypatch):
    loose(tmp_path / "in", 6)
    store = open_store(str(tmp_path))
    parts = tuple(Part(item.uri, item.etag, item.size) for item in store.list(str(tmp_path / "in")))
    wanted = job(tmp_path / "in", "m", "o", input={"format": "images"}).input
    for part in parts[:2]:
        os.unlink(part.uri)
    tables = list(read.read_unit(store, Unit(parts), wanted=wanted, only=[2, 5]))
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["index"], row["key"], row["error_class"]) for row in rows] == [
        (2, "02.jpg", None),
        (5, "05.jpg", None),
        (6, None, None),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes({f"{number}.jpg": picture(number) for number in range(100)}))
    item = store.head(str(tmp_path / "a.tar"))
    unit = Unit((Part(item.uri, item.etag, item.size),))
    tables = list(read.read_unit(store, unit, wanted=job("in", "m", "o").input, only=[3, 99]))
    assert [index for table in tables for index in table.column("index").to_pylist()] == [3, 99, 100]


def test_a_retry_counts_the_images_that_come_and_not_those_that_stay(tmp_path, model, monkeypatch):
    """Or its screen would show fewer than none, on the way to a hundred times as many as there are."""
    without_ray(monkeypatch)
    guard(monkeypatch)
    loose(tmp_path / "in", 20)  # five a unit
    wanted = job(tmp_path / "in", model, tmp_path / "out", input={"format": "images"})
    denied = [tmp_path / f"in/0{number}.jpg.denied" for number in (1, 3)]
    for path in denied:
        path.touch()
    label(wanted)
    for path in denied:
        path.unlink()
    passes, told = run.run_pass, Counter[str]()

    def dies_once(*words: Any, **named: Any) -> Any:
        yield next(blocks := passes(*words, **named))
        if not told["trouble"]:
            raise Temporary("the raylet is dead")
        yield from blocks

    def observe(event: str, fields: dict[str, Any]) -> None:
        told[event] += fields.get("dropped", fields.get("images", fields.get("rows", 0)))

    monkeypatch.setattr(run, "run_pass", dies_once)
    assert Retry(wanted, ("FETCH_FAILED",), observe=observe, started=0.0).retry().mended == 2
    assert (told["rows"], told["trouble"], told["commit"]) == (4, 2, 2)


def test_what_could_not_be_fetched_is_labelled_in_a_new_generation(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    guard(monkeypatch)
    loose(tmp_path / "in", 20)  # five a unit
    more = {"input": {"format": "images"}, "publish": {"format": "delta"}}
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=LIGHT | {"read": {"tasks": 1}}, **more)
    denied = [tmp_path / f"in/0{number}.jpg.denied" for number in (1, 3)]
    for path in denied:
        path.touch()
    assert label(wanted).failures == {"FETCH_FAILED": 2}
    before = files(tmp_path / "out")
    assert retry(wanted, "DECODE_TIMEOUT").generation is None
    assert files(tmp_path / "out") == before, "nothing to retry writes nothing"
    denied[0].unlink()
    done = retry(wanted, "fetch_failed")
    assert (done.generation, done.retried, done.mended, done.failures, done.exit_code) == (1, 2, 1, {"FETCH_FAILED": 1}, 0)
    assert latest(wanted) == {f"{n:02d}.jpg": ("failed", "FETCH_FAILED") if n == 3 else ("ok", None) for n in range(20)}
    assert files(tmp_path / "out").items() >= before.items(), "what stood was touched"
    assert problems(wanted) == []
    denied[1].unlink()
    (tmp_path / "in/00.jpg").unlink()
    code, out, err = invoke("retry-failed", write(tmp_path, wanted), "--class", "FETCH_FAILED")
    assert code == 0, err
    assert "done: 1 images retried (FETCH_FAILED 1), 1 labelled now" in out, (
        "another input of the unit is gone, which is no matter"
    )
    registered = DeltaTable(open_log(wanted, load_model(wanted, weights=False)).root).file_uris()
    assert len(registered) == 4
    assert ["000002" in uri for uri in registered if "generations" in uri] == [True]
    assert all(status == "ok" for status, _ in latest(wanted).values())
    assert len(latest(wanted)) == 20
    assert retry(wanted, "FETCH_FAILED").generation is None
    assert label(wanted).run is None, "to a run everything is labelled"
    assert problems(wanted) == []
    (unit,) = Path(generations(open_log(wanted, load_model(wanted, weights=False)))[0].root, "data").iterdir()
    unit.write_bytes(b"")
    assert "not a unit of nightlabel" in problems(wanted)[0]


def with_too_many_failed(uri: str, folder: Path, model: str, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a job of 20 loose images in `uri` below the folder, of which 4 % may fail and one cannot be fetched, the file that denies
    it)."""
    without_ray(patch)
    guard(patch)
    images = folder / uri.replace("{date}", "2026-11-01")
    loose(images, 20)
    denied = images / "03.jpg.denied"
    denied.touch()
    more = {"input": {"format": "images"}, "limits": {"max_failed": "4%"}}
    wanted = job(folder / uri, model, folder / "out", resources=LIGHT | {"read": {"tasks": 1}}, **more)
    return write(folder, wanted), denied


def test_an_attempt_after_the_last_ends_as_that_one_did(tmp_path, model, monkeypatch):
    """KubeRay tries again after every exit code but 0; too many failures must not look like success for that."""
    path, _ = with_too_many_failed("in/{date}", tmp_path, model, monkeypatch)
    run_it = ("run", path, "--date", "2026-11-01")
    assert [invoke(*run_it, "--again", "--metrics", tmp_path)[0] for _ in range(2)] == [4, 4]
    metrics = (tmp_path / "nightlabel_test.prom").read_text()
    assert 'nightlabel_exit_code{name="test"} 4\n' in metrics
    assert 'nightlabel_images_total{name="test",status="failed"} 1\n' in metrics, "of the first"
    assert "last_success" not in metrics
    before = files(tmp_path / "out")
    assert invoke(*run_it)[0] == 0, "whoever runs it again has nothing to do"
    code, out, err = invoke(*run_it, "--again")
    assert (code, out.splitlines()[:2]) == (4, ["nothing to do: every input of test is labelled", "failed  FETCH_FAILED 1"]), err
    code, out, _ = invoke(*run_it, "--again", "--json")
    told = json.loads(out)
    assert (code, told["exit_code"], told["rows_in"], told["ok"], told["failed"]) == (4, 4, 20, 19, 1)
    loose(tmp_path / "in/2026-11-02", 3)
    assert invoke("run", path, "--date", "2026-11-02", "--again")[0] == 0
    assert invoke("run", path, "--date", "2026-11-01..2026-11-02", "--again")[0] == 4
    assert invoke("run", path, "--date", "2026-11-02", "--again")[0] == 0, "by its own images and not by another day's"
    assert files(tmp_path / "out").items() >= before.items()
    for number in range(20, 40):
        (tmp_path / f"in/2026-11-01/{number}.jpg").write_bytes(picture(number))
    assert invoke(*run_it)[0] == 0
    assert invoke(*run_it, "--again")[0] == 0, "as the last run over these images ended, which labelled what was new"


def test_what_was_mended_since_is_no_failure_any_more(tmp_path, model, monkeypatch):
    path, denied = with_too_many_failed("in", tmp_path, model, monkeypatch)
    assert [invoke("run", path, "--again")[0] for _ in range(2)] == [4, 4]
    denied.unlink()
    assert invoke("retry-failed", path, "--class", "FETCH_FAILED")[0] == 0
    assert invoke("run", path, "--again")[0] == 0


def test_a_poison_image_is_retried_in_careful_mode_and_a_killed_retry_goes_on(tmp_path, model, on_ray, monkeypatch):
    import poison

    monkeypatch.setattr(run, "make_preprocess", poison.make_preprocess)
    write_tars(tmp_path / "in", shards=2, images=3)
    (tmp_path / "in/p.tar").write_bytes(tar_bytes({"a.jpg": picture(1), "abort.jpg": b"abort\n"}))
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=LIGHT | {"read": {"tasks": 2, "cpus_per_task": 0.1}})
    with monkeypatch.context() as quick:
        without_ray(quick)
        quick.setattr(driver, "TRIES", 1)  # careful at once
        assert label(wanted).failures == {"DECODER_CRASH": 1}

    with monkeypatch.context() as quick:
        without_ray(quick)
        with pytest.raises(KeyboardInterrupt):
            Retry(wanted, ("DECODER_CRASH",), observe=stop, started=0.0).retry()
    with pytest.raises(JobError, match="is not finished"):
        retry(wanted, "CORRUPT")
    seen: list[Any] = []
    done = Retry(wanted, ("DECODER_CRASH",), observe=lambda event, fields: seen.append((event, fields)), started=0.0).retry()
    assert (done.generation, done.retried, done.mended, done.failures) == (1, 1, 0, {"DECODER_CRASH": 1})
    (one,) = [fields for event, fields in seen if event == "pass"]
    assert one["careful"]
    assert [fields["images"] for event, fields in seen if event == "rows" and fields["images"]] == [1], "one image and no other"
    assert latest(wanted)["abort"] == ("failed", "DECODER_CRASH")
    assert len(latest(wanted)) == 8
    assert problems(wanted) == []
    log = open_log(wanted, load_model(wanted, weights=False))
    manifest = json.loads(Path(generations(log)[0].run_key("000001", "manifest.json")).read_text())
    assert manifest["rows"] == {"in": 2, "ok": 1, "failed": 1}
    started, ended = (datetime.strptime(manifest[name], "%Y-%m-%dT%H:%M:%S%z") for name in ("started", "ended"))
    assert started < ended
    assert timedelta() <= datetime.now(UTC) - ended < timedelta(minutes=5)


@pytest.fixture
def two_classes(tmp_path, model, monkeypatch) -> Job:
    """Eight images in four units: one that cannot be fetched in each folder, one that is no image in the second."""
    without_ray(monkeypatch)
    guard(monkeypatch)
    for folder in "ab":
        loose(tmp_path / "in" / folder, 4)
        Path(tmp_path / "in" / folder / "00.jpg.denied").touch()
    (tmp_path / "in/b/03.jpg").write_bytes(b"hello")
    resources = LIGHT | {"read": {"tasks": 1}}
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=resources, input={"format": "images"})
    assert label(wanted).failures == {"FETCH_FAILED": 2, "NOT_AN_IMAGE": 1}
    for path in tmp_path.rglob("*.denied"):
        path.unlink()
    return wanted


def test_of_two_retries_at_once_the_later_is_told_to_wait(two_classes, monkeypatch):
    create, begun = Disk.create, []

    def overtaken(store: Disk, uri: str, data: bytes) -> bool:
        if uri.endswith("/retry.json") and not begun:
            begun.append(uri)
            with pytest.raises(KeyboardInterrupt):
                Retry(two_classes, ("NOT_AN_IMAGE",), observe=stop, started=0.0).retry()
        return create(store, uri, data)

    monkeypatch.setattr(Disk, "create", overtaken)
    with pytest.raises(JobError, match="the retry of NOT_AN_IMAGE is not finished"):
        retry(two_classes, "FETCH_FAILED")
    log = open_log(two_classes, load_model(two_classes, weights=False))
    assert open_retries(log) == ["retry 000001 of NOT_AN_IMAGE: 0 of 1 units"]
    assert retry(two_classes, "NOT_AN_IMAGE").retried == 1
    assert open_retries(log) == []
    done = retry(two_classes, "FETCH_FAILED")
    assert (done.generation, done.retried, done.mended) == (2, 2, 2)


PACE = lease.LeaseTiming(beat=0.1, dead=60.0, grace=60.0, look=0.02)  # whoever is alive is heard, on a busy machine too

AT_IT = """
import sys, threading
import inprocess, pytest
from pipeline import cli, run
from pipeline.nights import lease
from test_retry import PACE
inprocess.without_ray(pytest.MonkeyPatch())
lease.LeaseTiming, enter, held, quick = lambda: PACE, lease.Lease.__enter__, [], run.run_pass
lease.Lease.__enter__ = lambda self: held.append(self) or enter(self)
def slow(*args, **kwargs):
    print("at it", flush=True)
    while not held[0]._end:
        threading.Event().wait(0.01)
    yield from quick(*args, **kwargs)
run.run_pass = slow
sys.argv = ["nightlabel", "retry-failed", sys.argv[1], "--class", "FETCH_FAILED"]
cli.main()
"""


def test_a_retry_holds_the_lease_that_nights_and_other_retries_respect(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LeaseTiming", lambda: PACE)
    path = write(tmp_path, two_classes.model_copy(update={"schedule": Schedule(cron="0 2 * * *", wait="0.2s")}))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command, env = [sys.executable, "-c", AT_IT, str(path)], {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "at it\n"
        before = {name for name in files(tmp_path / "out") if "/leases/" not in name}
        for words in (["retry-failed", path, "--class", "NOT_AN_IMAGE"], ["run", path]):
            code, out, err = invoke(*words)
            assert (code, out.split(":")[0]) == (0, "skipped"), err
            assert f"process {first.pid} holds this output" in err
        again = ["retry-failed", path, "--class", "FETCH_FAILED"]
        code, out, _ = invoke(*again, "--json")
        assert (code, json.loads(out)) == (0, {"skipped": True, "exit_code": 0})
        with pytest.raises(Temporary, match="still runs after"):
            CliRunner().invoke(app, [*map(str, again), "--if-running", "queue"], catch_exceptions=False)
        assert {name for name in files(tmp_path / "out") if "/leases/" not in name} == before
        code, out, err = invoke(*again, "--if-running", "replace")
        assert (code, out.splitlines()[0]) == (0, "done: 2 images retried (FETCH_FAILED 2), 2 labelled now"), err
        _, said = first.communicate(timeout=240)
    assert (first.returncode, "asked this run to stop" in said) == (5, True), said
    assert len(latest(two_classes)) == 8
    assert problems(two_classes) == []


def test_a_retry_whose_table_fails_is_told_all_the_same(two_classes, tmp_path):
    path = write(tmp_path, two_classes.model_copy(update={"publish": Publish(format="delta")}))
    assert invoke("run", path)[0] == 0, "labels nothing, and makes the table"
    DeltaTable(output_of(two_classes).root).optimize.compact()
    done = CliRunner().invoke(app, ["retry-failed", str(path), "--class", "FETCH_FAILED"])
    assert done.stdout.splitlines()[0] == "done: 2 images retried (FETCH_FAILED 2), 2 labelled now"
    assert isinstance(done.exception, StoreError)
    code, out, _ = invoke("retry-failed", path, "--class", "NOT_AN_IMAGE", "--json")
    told = json.loads(out)
    assert (code, told["exit_code"], told["generation"], told["retried"]) == (2, 2, 2, 1)
    assert "Compact a copy instead" in told["table"]["error"]


def test_a_retry_looks_for_its_publisher_before_the_images(two_classes, tmp_path, monkeypatch):
    path = write(tmp_path, two_classes.model_copy(update={"publish": Publish(format="delta")}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["retry-failed", str(path), "--class", "FETCH_FAILED"])
    assert isinstance(done.exception, UnfitError)
    assert generations(output_of(two_classes)) == []


def test_a_retry_that_ends_with_4_says_why():
    done = Retried("test", "out", ("CORRUPT",), "", "", 1, units=1, units_done=1, retried=1, failures={"CORRUPT": 1})
    over = "over    more of all images failed than limits.max_failed allows: exit code 4"
    assert [over in lines for lines in (done.lines(), replace(done, exit_code=ExitCode.TOO_MANY_FAILED).lines())] == [False, True]


def test_a_retry_without_a_schedule_takes_no_lease(two_classes, tmp_path):
    code, out, err = invoke("retry-failed", write(tmp_path, two_classes), "--class", "FETCH_FAILED")
    assert (code, out.splitlines()[0]) == (0, "done: 2 images retried (FETCH_FAILED 2), 2 labelled now"), err
    assert not (tmp_path / "out/leases").exists()


def test_a_retry_that_was_killed_before_its_plan_keeps_nobody_from_another(two_classes, tmp_path, monkeypatch):
    create = Disk.create

    def killed(store: Disk, uri: str, data: bytes) -> bool:
        if "/generations/" in uri and uri.endswith("/plan.parquet"):
            raise KeyboardInterrupt
        return create(store, uri, data)

    with monkeypatch.context() as quick:
        quick.setattr(Disk, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            retry(two_classes, "FETCH_FAILED")
    for folder in "ab":
        (tmp_path / "in" / folder / "00.jpg").unlink()
    assert retry(two_classes, "FETCH_FAILED").generation is None
    late = to_plan(output_of(two_classes), ("FETCH_FAILED",))
    done = retry(two_classes, "NOT_AN_IMAGE")
    assert (done.generation, done.retried, done.exit_code) == (2, 1, 0)
    assert late.number == 1
    assert not late.begin(("FETCH_FAILED",), []), "whoever was not killed, but slow, cannot plan it any more"
    assert problems(two_classes) == []


def test_a_retry_that_dies_after_everything_it_writes_ends_with_every_image_once(two_classes, tmp_path, monkeypatch):
    path = write(tmp_path, two_classes.model_copy(update={"publish": Publish(format="delta")}))
    assert invoke("run", path)[0] == 0, "labels nothing, and makes the table"
    create, written = Disk.create, list[str]()

    def killed(store: Disk, uri: str, data: bytes) -> bool:
        if create(store, uri, data):
            written.append(uri.rpartition("/")[2])
            raise KeyboardInterrupt
        return False

    attempts = 0
    with monkeypatch.context() as quick:
        quick.setattr(Disk, "create", killed)
        while CliRunner().invoke(app, ["retry-failed", str(path), "--class", "FETCH_FAILED"]).exit_code:
            attempts += 1
            assert attempts <= len(written) < 10, "two units may be under way when the first one is the last straw"
    assert written[:2] == ["retry.json", "plan.parquet"]
    assert (len(written), written[-1]) == (5, "manifest.json")
    table = DeltaTable(output_of(two_classes).root).to_pyarrow_table()
    rows = zip(*(table.column(name).to_pylist() for name in ("key", "status", "error_class")), strict=True)
    assert {key: (status, failure) for key, status, failure in rows} == latest(two_classes)
    assert (table.num_rows, [status for status, _ in latest(two_classes).values()].count("ok")) == (8, 7)
    assert problems(two_classes) == []


def test_a_job_that_lists_less_goes_on_with_the_whole_retry(two_classes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Retry(two_classes, ("FETCH_FAILED",), observe=stop, started=0.0).retry()
    (tmp_path / "in/b/00.jpg").write_bytes(picture(77))
    less = two_classes.model_copy(update={"input": two_classes.input.model_copy(update={"uri": str(tmp_path / "in/b")})})
    done = retry(less, "FETCH_FAILED")
    assert (done.units, done.units_done, done.retried, done.mended) == (2, 2, 1, 1), (
        "of what was replaced nothing, of the other one"
    )
    assert latest(two_classes).items() >= {"a/00.jpg": ("ok", None), "b/00.jpg": ("failed", "FETCH_FAILED")}.items()


def test_a_unit_whose_object_is_gone_since_the_retry_was_planned_is_named(two_classes):
    with pytest.raises(KeyboardInterrupt):
        Retry(two_classes, ("FETCH_FAILED",), observe=stop, started=0.0).retry()
    log = output_of(two_classes)
    unit, _ = to_plan(log, ("FETCH_FAILED",)).runs()[0].units
    gone = Path(log.data_key(unit.id))
    gone.unlink()
    with pytest.raises(Conflict, match=f"{gone}: gone since the retry was planned; .*Restore it"):
        retry(two_classes, "FETCH_FAILED")


def with_broken_images(folder: Path, model: str, *, tars: int) -> Job:
    """Labelled: `tars` shards of two images, of which one is none; two shards a unit when there are eight."""
    folder.joinpath("in").mkdir()
    for number in range(tars):
        members = {"a.jpg": picture(number), "b.jpg": b"hello %d" % number}
        (folder / f"in/{number}.tar").write_bytes(tar_bytes(members))
    wanted = job(folder / "in", model, folder / "out", resources=LIGHT | {"read": {"tasks": 1}})
    assert label(wanted).failures == {"NOT_AN_IMAGE": tars}
    return wanted


@pytest.mark.parametrize(("change", "words"), [("replace", "is not the version"), ("remove", "No such file")])
def test_a_shard_that_changes_during_a_retry_is_named_and_the_next_one_leaves_it_as_it_is(
    tmp_path, model, change, words, monkeypatch
):
    without_ray(monkeypatch)
    wanted = with_broken_images(tmp_path, model, tars=2)
    shard, passes = tmp_path / "in/1.tar", []

    def meddle(event: str, fields: dict[str, Any]) -> None:
        if event == "pass":
            passes.append(fields)
            shard.unlink(missing_ok=True)
            if change == "replace":
                shard.write_bytes(tar_bytes({"a.jpg": picture(7)}))

    done = Retry(wanted, ("NOT_AN_IMAGE",), observe=meddle, started=0.0).retry()
    assert (done.units, done.units_done, done.exit_code, len(passes)) == (2, 1, 3, 1)
    (line,) = [line for line in done.lines() if line.startswith("left ")]
    assert words in line
    assert str(shard) in line
    again = retry(wanted, "NOT_AN_IMAGE")
    assert (again.generation, again.units, again.units_done, again.exit_code) == (1, 2, 2, 0)
    assert problems(wanted) == []


def test_a_retry_leaves_a_unit_of_which_a_shard_is_gone(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    wanted = with_broken_images(tmp_path, model, tars=8)
    (tmp_path / "in/0.tar").unlink()
    done = retry(wanted, "NOT_AN_IMAGE")
    assert (done.units, done.units_done, done.retried, done.exit_code) == (3, 3, 6, 0)
    assert problems(wanted) == []


def test_a_uri_without_input_is_told_and_the_others_are_retried(two_classes, tmp_path):
    without_input = [two_classes.input.uri, str(tmp_path / "gone")]
    wanted = two_classes.model_copy(update={"input": two_classes.input.model_copy(update={"uri": without_input})})
    for failure, retried in (("NOT_AN_IMAGE", 1), ("TRUNCATED", 0)):
        done = retry(wanted, failure)
        assert (done.retried, done.exit_code) == (retried, 3)
        (line,) = [line for line in done.lines() if line.startswith("left ")]
        assert "INPUT_MISSING" in line
        assert str(tmp_path / "gone") in line


def test_rows_wait_in_the_store_for_their_turn_and_rotten_ones_are_a_conflict(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    (tmp_path / "in").mkdir()
    for number in range(4):
        rows = {"key": ["a", "b"], "image": pa.array([picture(number), None], pa.binary()), "caption": ["x" * 2**21] * 2}
        pq.write_table(pa.table(rows), tmp_path / f"in/{number}.parquet")
    more = {"input": {"format": "parquet", "keep": ["caption"]}}
    wanted = job(tmp_path / "in", model, tmp_path / "out", **more)
    label(wanted)
    held = []

    def look(event: str, fields: dict[str, Any]) -> None:
        if event == "planned":
            held.append(pa.total_allocated_bytes() - before)

    before = pa.total_allocated_bytes()
    done = Retry(wanted, ("NULL_IMAGE",), observe=look, started=0.0).retry()
    assert (done.retried, done.failures) == (4, {"NULL_IMAGE": 4})
    assert max(held) < 2**20, "rows of all units at once"
    path = next(Path(generations(output_of(wanted))[0].root, "data").iterdir())
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(32)
    path.write_bytes(data)
    with pytest.raises(Conflict, match="not a unit of nightlabel"):
        retry(wanted, "NULL_IMAGE")


def test_a_retry_without_classes_says_which_failed_and_one_with_them_which_it_took(two_classes, tmp_path):
    path, before = write(tmp_path, two_classes), files(tmp_path / "out")
    refused = CliRunner().invoke(app, ["retry-failed", str(path)]).exception
    assert isinstance(refused, JobError)
    assert str(refused) == (
        "no --class is given, and of test there failed FETCH_FAILED 2, NOT_AN_IMAGE 1; required: with commas between, "
        "the classes of failure to label again. Add --class FETCH_FAILED,NOT_AN_IMAGE, or some of them."
    )
    assert files(tmp_path / "out") == before, "it wrote something"
    assert retry(two_classes, "CORRUPT").lines()[1:] == ["failed  FETCH_FAILED 2, NOT_AN_IMAGE 1"]
    done = retry(two_classes, "FETCH_FAILED,CORRUPT,NOT_AN_IMAGE")
    assert done.lines()[:2] == [
        "done: 3 images retried (CORRUPT 0, FETCH_FAILED 2, NOT_AN_IMAGE 1), 2 labelled now",
        "failed  NOT_AN_IMAGE 1",
    ]
    assert done.taken == {"FETCH_FAILED": 2, "NOT_AN_IMAGE": 1}
    refused = CliRunner().invoke(app, ["retry-failed", str(path)]).exception
    assert "of test there failed NOT_AN_IMAGE 1;" in str(refused), "what was labelled since has not failed"


def test_where_nothing_failed_a_retry_without_classes_says_so(tmp_path, model):
    loose(tmp_path / "in", 2)
    wanted = job(tmp_path / "in", model, tmp_path / "out", input={"format": "images"})
    refused = CliRunner().invoke(app, ["retry-failed", str(write(tmp_path, wanted))]).exception
    assert str(refused) == "no --class is given, and no image of test has failed. There is nothing to retry."


def test_a_wrong_class_is_a_sentence():
    assert parse_classes("truncated, CORRUPT") == ("CORRUPT", "TRUNCATED")
    for text in ("", "FETCH"):
        with pytest.raises(JobError, match="some of NOT_AN_IMAGE"):
            parse_classes(text)
