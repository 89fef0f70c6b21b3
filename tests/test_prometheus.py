"""What a run tells Prometheus: real HTTP, real files, the real promtool; and it never changes how the run ends."""

from __future__ import annotations

import http.server
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from programs import get, serving, wait_for
from prometheus_client.parser import text_string_to_metric_families
from shards import write_tars

from pipeline import prometheus
from pipeline.errors import Conflict, Interrupted, JobError
from pipeline.job.schedule import longest_gap
from pipeline.prometheus import Account, Metrics
from pipeline.spec import Job

JOB = Job.model_validate({"name": "nightly", "input": {"uri": "in"}, "model": {"uri": "m"}, "output": {"uri": "o"}})
ENDED = Account("nightly", 1.0, 2.0, 0.01, 5.0, ok=1, images_per_second=3.0, exit_code=0, ended=4.0)


def values(text: str) -> dict[str, float]:
    """Sample by name without prefix, the status behind it; a name that comes twice is an error."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["name"] == "nightly"
            key = sample.name.removeprefix("nightlabel_") + (f" {sample.labels['status']}" if "status" in sample.labels else "")
            assert key not in found
            found[key] = sample.value
    return found


class Gateway(http.server.ThreadingHTTPServer):
    """Takes what a Pushgateway takes and remembers it; answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.posts: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.posts.append((self.path, body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("cron", "hours"),
    [
        ("0 2 * * *", 24),
        ("*/10 * * * *", 1 / 6),
        ("0 9-17/4 * * mon-fri", 64),  # from Friday 17:00
        ("* * * * mon-fri", 48 + 1 / 60),
        ("30 2 * * 1", 7 * 24),
        ("0 2 * * 0,sun", 7 * 24),
        ("0 2 1 * *", 31 * 24),
        ("0 2 1 * MON", 7 * 24),  # either of them
        ("0 2 ? JAN,jul *", 154 * 24),  # from the last of July
        ("0 0 29 2 *", 1461 * 24),
        ("59 23/2 * * 4/2", 5 * 24),  # Thursday and Saturday
        ("0 2 * * 5/2", 7 * 24),  # Friday alone: the last day of a week is Saturday
        ("0 2 */2 * 1", 2 * 24),  # odd days and Mondays: only a plain star leaves it to the other field
        ("0 2 31 2 1", 350 * 24),  # Mondays in February
    ],
)
def test_the_longest_gap_of_a_schedule(cron, hours):
    assert longest_gap(cron) == pytest.approx(hours * 3600)


def test_only_a_scheduled_job_says_when_a_success_is_due():
    told = []
    queues = {"cron": "0 2 * * *", "if_running": "queue", "wait": "3h"}
    daily, weekly = {"schedule": {"cron": "0 2 * * *"}}, {"schedule": {"cron": "0 2 * * 1"}, "limits": {"deadline": "6h"}}
    for more in ({}, daily, weekly, {"schedule": queues}):
        account = Metrics(None, Job.model_validate(JOB.model_dump(mode="json") | more), say=silence).account
        told.append(values(account.text()).get("success_every_seconds"))
    assert told == [None, 26 * 3600, (7 * 24 + 6) * 3600, 29 * 3600]


def silence(_: str) -> None:
    raise AssertionError("nothing was to be said")


@pytest.mark.parametrize("account", [Account("nightly", 1.0, 2.0), ENDED], ids=["running", "ended"])
def test_promtool_has_no_objection(account):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is absent (Debian: prometheus)")
    done = subprocess.run(["promtool", "check", "metrics"], input=account.text(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_family_is_told_at_the_end():
    told = values(ENDED.text())
    assert {key.split()[0] for key in told} == set(prometheus._FAMILIES)
    assert (told["run_start_timestamp_seconds"], told["run_duration_seconds"]) == (1, 3)


def test_a_run_tells_a_pushgateway_from_start_to_end(gateway, monkeypatch):
    monkeypatch.setattr(prometheus, "EVERY_S", 0.01)
    with Metrics(gateway.url, JOB, say=silence) as telling:
        observe = telling.beside(lambda event, fields: seen.append(event))
        seen: list[str] = []
        assert wait_for(lambda: gateway.posts), "the first one is of a run of which nothing is known"
        observe("planned", {"units": 7, "done": 2})
        observe("rows", {"images": 10, "failed": 3})
        observe("commit", {})
        observe("replanned", {"units": 9, "done": 3})
        observe("commit", {})
        wait_for(lambda: len(gateway.posts) >= 3)
    assert seen == ["planned", "rows", "commit", "replanned", "commit"]
    assert {path for path, _ in gateway.posts} == {"/metrics/job/nightlabel/name/nightly"}
    first, last = values(gateway.posts[0][1]), values(gateway.posts[-1][1])
    assert first["running"] == 1
    assert "exit_code" not in first
    told = ("running", "exit_code", "units_planned", "units_done", "images_total ok", "images_total failed", "max_failed_ratio")
    assert [last[name] for name in told] == [0, 0, 9, 4, 7, 3, 0.01]
    assert first["progress_timestamp_seconds"] < last["progress_timestamp_seconds"], "or it looks stuck"
    assert first["run_start_timestamp_seconds"] <= last["progress_timestamp_seconds"] <= last["last_success_timestamp_seconds"]


def test_a_job_that_is_not_heard_of_before_its_end_never_looks_stuck(tmp_path):
    from pipeline.job.recipe import EvaluateJob

    content = {"kind": "evaluate", "name": "nightly", "model": {"uri": "m"}, "output": {"uri": "o"}}
    job = EvaluateJob.model_validate(content | {"data": {"input": {"uri": "in"}, "label": "cls"}})
    with Metrics(str(tmp_path), job, say=silence):
        pass
    told = values((tmp_path / "nightlabel_nightly.prom").read_text())
    assert told["exit_code"] == 0
    assert "progress_timestamp_seconds" not in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((Conflict("x"), 6), (Interrupted("x", signal_number=15), 143), (ZeroDivisionError(), 70)),
        *((SystemExit(4), 4), (SystemExit("a sentence"), 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_run_keeps_the_last_success(tmp_path, error, code):
    with Metrics(str(tmp_path), JOB, say=silence):
        pass
    path = tmp_path / "nightlabel_nightly.prom"
    before = values(path.read_text())
    with pytest.raises(type(error)), Metrics(str(tmp_path), JOB, say=silence):
        raise error
    after = values(path.read_text())
    assert after["exit_code"] == code
    assert after["last_success_timestamp_seconds"] == before["last_success_timestamp_seconds"]
    assert after["run_start_timestamp_seconds"] > before["run_start_timestamp_seconds"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.fixture(params=["prometheus-pushgateway", "prometheus-node-exporter"])
def collector(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A real one: (what a run tells, where Prometheus reads)."""
    textfiles = ("--collector.disable-defaults", "--collector.textfile", f"--collector.textfile.directory={tmp_path}")
    reads_files = request.param == "prometheus-node-exporter"
    with serving(request.param, *(textfiles if reads_files else ())) as address:
        wait_for(lambda: get(f"http://{address}/metrics"))
        yield str(tmp_path) if reads_files else f"http://{address}", f"http://{address}/metrics"


def scraped(url: str) -> dict[str, float]:
    return values("".join(re.findall(r"^(?:# \w+ )?nightlabel_.*\n", get(url), re.MULTILINE)))


def test_a_real_collector_keeps_what_a_failed_run_does_not_tell(collector):
    to, url = collector
    assert scraped(url) == {}
    nightly = Job.model_validate(JOB.model_dump(mode="json") | {"schedule": {"cron": "0 2 * * *"}})
    with Metrics(to, nightly, say=silence) as telling:
        telling.account.images_per_second = 3.0
        telling.observe("rows", {"images": 10, "failed": 3})
    before = scraped(url)
    with pytest.raises(Conflict), Metrics(to, nightly, say=silence):
        raise Conflict("x")
    after = scraped(url)
    assert set(before) == set(after) == set(values(ENDED.text()))
    assert (before["exit_code"], after["exit_code"]) == (0, 6)
    kept = ("last_success_timestamp_seconds", "images_per_second")
    assert [after[name] for name in kept] == [before[name] for name in kept]


def test_a_run_that_finds_nothing_to_do_keeps_what_was_told_of_the_images(collector):
    """Such as KubeRay's second attempt: what the first one found is to be seen all the same."""
    to, url = collector
    with Metrics(to, JOB, say=silence) as telling:
        telling.observe("rows", {"images": 10, "failed": 3})
    with Metrics(to, JOB, say=silence) as telling:
        telling.observe("planned", {"units": 0, "done": 0})
    told = scraped(url)
    assert (told["images_total ok"], told["images_total failed"], told["units_planned"]) == (7, 3, 0)


def test_what_cannot_be_told_is_a_line_and_no_error(gateway, tmp_path, monkeypatch):
    monkeypatch.setattr(prometheus, "_LAST_TRIES_S", (0.0, 0.01))
    monkeypatch.setattr(prometheus, "_PATIENCE_S", 0.05)
    gateway.status = 400
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        for to in (gateway.url, f"http://127.0.0.1:{deaf.getsockname()[1]}", "http://127.0.0.1:1", str(tmp_path / "absent")):
            said: list[str] = []
            with Metrics(to, JOB, say=said.append):
                pass
            assert [line.startswith(f"metrics: {to} was not told how the run ended (") for line in said] == [True]


def test_the_last_word_is_tried_again(gateway, monkeypatch):
    monkeypatch.setattr(prometheus, "_LAST_TRIES_S", (0.0,) * 1000)
    gateway.status = 503
    telling = Metrics(gateway.url, JOB, say=silence)

    def mend() -> None:
        wait_for(lambda: len(gateway.posts) >= 4)
        gateway.status = 200

    mending = threading.Thread(target=mend)
    mending.start()
    with telling:
        pass
    mending.join()
    assert values(gateway.posts[-1][1])["exit_code"] == 0


@pytest.mark.parametrize(
    "to", ["ftp://gateway", "http://", "https://me:secret@gateway:9091", "http://[::1", "http://me:secret@[::1"]
)
def test_a_destination_that_cannot_be_one_is_refused(to):
    with pytest.raises(JobError) as caught:
        Metrics(to, JOB, say=silence)
    assert "secret" not in str(caught.value)


def test_the_command_line_tells_and_ends_as_without(tmp_path, model, on_ray):
    write_tars(tmp_path / "in", shards=2, images=6)
    light = {"preprocess": {"cpus_per_actor": 0.2}, "predict": {"cpus_per_actor": 0.5}}
    content = {"name": "nightly", "input": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "out")}}
    codes = []
    for uri in (model, str(tmp_path / "absent")):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(content | {"model": {"uri": uri}, "resources": light}))
        command = [sys.executable, "-m", "pipeline", "run", str(path), "--metrics", str(tmp_path)]
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode)
    told = values(Path(tmp_path, "nightlabel_nightly.prom").read_text())
    assert codes == [0, 2]
    assert told["exit_code"] == 2
    assert told["images_total ok"] == 12  # of the first
    assert told["last_success_timestamp_seconds"] < told["run_start_timestamp_seconds"]
