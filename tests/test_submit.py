"""Jobs sent to a cluster: what travels, what comes back, and a real cluster of separate raylets with a token in front of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from jobs_api import JobsApi, jobs_api
from raylets import Raylets, below
from shards import picture, tar_bytes, write_tars

from pipeline.commands.cluster import _find, _parcel, _truth
from pipeline.commands.cluster import _follow as follow
from pipeline.environment import Address, cluster_address
from pipeline.errors import JobError, PermissionDenied, Temporary, UnfitError
from pipeline.job import jobfile
from pipeline.job.jobfile import dump_job, load_template
from pipeline.job.schedule import days_of
from pipeline.ship import Parcel, number, pack
from pipeline.spec import Job

REMOTE = {
    "name": "nightly",
    "input": {"uri": "s3://photos/{date}/"},
    "model": {"uri": "/models/m/"},
    "output": {"uri": "s3://out/"},
}
LIGHT = {
    "read": {"cpus_per_task": 0.1},
    "preprocess": {"actors": 2, "cpus_per_actor": 0.2},
    "predict": {"actors": 2, "cpus_per_actor": 0.5, "batch_size": 8},
}


def job(**fields: Any) -> Job:
    return Job.model_validate(REMOTE | fields)


def packed(wanted: Job, **options: Any) -> Parcel:
    return pack(wanted, **{"file": "jobs/nightly.yaml", "date": "2026-11-25", "loopback": False, "code": True} | options)


def contents(parcel: Parcel) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(parcel.archive)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_parcel_holds_the_job_and_the_package():
    files = contents(packed(job()))
    assert files["pipeline/run.py"] == (ROOT / "pipeline/run.py").read_bytes()
    assert {name for name in files if "__pycache__" in name} == set()
    assert {"pipeline/report.html.j2", "pipeline/prepare/train.py"} <= set(files)
    assert set(contents(packed(job(), code=False))) == {"nightly.yaml"}
    with zipfile.ZipFile(BytesIO(packed(job()).archive)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}, "or every upload would be another"


def test_a_parcel_that_ray_would_refuse_is_not_sent(monkeypatch):
    monkeypatch.setattr("pipeline.ship.MAX_BYTES", 1000)
    with pytest.raises(JobError, match=r"^jobs/nightly\.yaml: job and package are [\d,]+ bytes; required: at most 1,000\. Put"):
        packed(job())
    packed(job(), code=False)


def test_a_parcel_runs_where_nothing_is_installed(tmp_path):
    with zipfile.ZipFile(BytesIO(packed(job()).archive)) as archive:
        archive.extractall(tmp_path)
    code = (
        "import pipeline, importlib.metadata as m; print(pipeline.__file__, m.distribution('nightlabel')._path.parent.resolve())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "pipeline/__init__.py"), str(tmp_path)]


LABELLING = [path for path in sorted((ROOT / "jobs").glob("*.yaml")) if "kind: label\n" in path.read_text()]


@pytest.mark.parametrize("path", LABELLING, ids=lambda path: path.stem)
def test_a_job_means_the_same_when_it_has_travelled(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    wanted = load_template(path)
    (tmp_path / "job.yaml").write_bytes(contents(packed(wanted, file=str(path), loopback=True))[path.name])
    arrived = load_template(tmp_path / "job.yaml")
    folder = f"{ROOT}/"
    assert arrived.output.uri.removeprefix(folder) == wanted.output.uri
    assert arrived.model.uri.removeprefix(folder) == wanted.model.uri
    assert [uri.removeprefix(folder) for uri in arrived.input.uris] == list(wanted.input.uris)
    same = {"exclude": {"input": {"uri"}, "model": {"uri"}, "output": {"uri"}}}
    assert arrived.model_dump(**same) == wanted.model_dump(**same)


def test_the_id_follows_from_the_job_and_its_day():
    monday = packed(job(), date="2026-11-23")
    assert monday.name.startswith("nightly-2026-11-23-")
    assert packed(job(), date="2026-11-23", code=False).name == monday.name
    assert packed(job(output={"uri": "s3://other/"}), date="2026-11-23").name != monday.name
    assert packed(job(), date="2026-11-23").archive == monday.archive
    assert packed(job(), date="2026-11-23..2026-11-25").name.startswith("nightly-2026-11-23-2026-11-25-")
    assert packed(job(input={"uri": "s3://photos/"}), date=None).name.count("-") == 1
    with pytest.raises(JobError, match=r"contains {date}, which needs a date"):
        packed(job(), date=None)
    assert number(f"{monday.name}-12", monday.name) == 12
    strange = (monday.name, "other-1", f"{monday.name}-x", "nightly-1", "nightly-2026-11-23-1")
    assert [number(name, monday.name) for name in strange] == [None] * len(strange)


@pytest.mark.parametrize("uri", ["photos/", "file://photos/", "file://./photos/"])
def test_a_path_of_this_machine_is_refused_elsewhere(uri):
    with pytest.raises(JobError, match=f"^jobs/nightly.yaml: {uri} is a path in this folder, which the cluster does not see"):
        packed(job(input={"uri": uri}))
    packed(job(input={"uri": "file:///photos/"}))


def test_the_day_travels_and_not_the_word_but_where_the_run_looks_back(one_day):
    """The driver may begin after midnight; what stands in the id is what is run."""
    catching_up = job(schedule={"cron": "0 2 * * *", "catch_up": "3d"})
    for wanted, date, travels in (
        (job(), "yesterday", False),
        (job(), "2026-11-01..yesterday", False),
        (catching_up, "2026-11-01..yesterday", False),
        (catching_up, "yesterday", True),
    ):
        parcel = packed(wanted, date=date)
        shipped = parcel.entrypoint.split("--date ")[1]
        assert ("yesterday" in shipped) is travels, (wanted.schedule, date)
        assert travels or shipped.split("..") == list(dict.fromkeys([days_of(date)[0], days_of(date)[-1]]))
        assert travels or all(day in parcel.name for day in shipped.split(".."))


def test_midnight_between_the_parcel_and_its_jobs_changes_no_day(monkeypatch, tmp_path):
    midnight = iter((("2026-11-25", "2026-11-26"), ("2026-11-26", "2026-11-27")))
    monkeypatch.setattr(jobfile, "days_of", lambda *_: next(midnight))
    (tmp_path / "job.yaml").write_bytes(dump_job(job()))
    jobs, parcel = _parcel(tmp_path / "job.yaml", "yesterday..today", loopback=True, code=False)
    assert [each.input.uri for each in jobs] == ["s3://photos/2026-11-25/", "s3://photos/2026-11-26/"]
    assert "--date 2026-11-25..2026-11-26" in parcel.entrypoint


def test_a_working_folder_that_no_uri_can_name_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "{project}").mkdir()
    monkeypatch.chdir(tmp_path / "{project}")
    with pytest.raises(JobError, match=r"^jobs/nightly.yaml: output\.uri is '.*/{project}/out/'; required: no other placeholder"):
        packed(job(output={"uri": "out/"}), loopback=True)


@pytest.mark.parametrize(
    ("text", "url", "loopback"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265", True),
        ("localhost:8265/", "http://localhost:8265", True),
        ("[::1]:8265", "http://[::1]:8265", True),
        ("https://ray.example/cluster/", "https://ray.example/cluster", False),
    ],
)
def test_addresses(text, url, loopback, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster_address(text, insecure=True) == Address(url, loopback)


@pytest.mark.parametrize(
    "text", ["ray://head:10001", "http://", "file:///tmp", "http://[::1", "head..example:8265", f"{'a' * 64}:8265"]
)
def test_what_is_no_address(text):
    with pytest.raises(JobError, match="required: that of a dashboard, such as http://head:8265"):
        cluster_address(text)


def test_another_machine_wants_a_token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UnfitError, match="there is no token; required: the cluster's token"):
        cluster_address("head:8265")
    assert not cluster_address("head:8265", insecure=True).loopback
    assert cluster_address("127.0.0.1:8265").loopback
    with monkeypatch.context() as patch:
        patch.delenv("HOME")
        patch.setattr(os, "getuid", lambda: 2**31 - 7)  # in no passwd, so that there is no home either
        assert cluster_address("127.0.0.1:8265").loopback
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    assert not cluster_address("head:8265").loopback
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UnfitError, match="RAY_AUTH_MODE is token and there is none"):
        cluster_address("127.0.0.1:8265")


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with jobs_api() as server:
        yield server


@pytest.fixture
def fake(api: JobsApi, monkeypatch):
    """A client of it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    from pipeline.submit import Connection

    monkeypatch.setattr("pipeline.submit.PAUSE_S", 0.01)
    return Connection(Address(api.url, loopback=True))


def script(name: str, shell: str = "true") -> Parcel:
    """A parcel whose driver is a line of shell: what the client does can be seen without waiting for Ray Data."""
    return Parcel(name, "nightly", packed(job(), code=False).archive, shell)


@pytest.mark.parametrize("answers", [[0, -1], [503, 500], [500, 0, -1]], ids=["lost", "refused twice", "refused, then lost"])
def test_a_lost_reply_runs_nothing_twice(fake, api, answers):
    api.fail["POST /api/jobs/"] = answers
    attempt, new = fake.submit(script("one"))
    assert (attempt.id, new) == ("one-1", True)
    assert list(api.jobs) == ["one-1"]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_proxy_that_is_busy_is_temporary(fake, api, status):
    from pipeline.submit import Connection

    told = rf"^{api.url}: the answer is {status} [A-Z].*; required: the dashboard of a Ray cluster"
    for path, ask in (
        ("/api/version", lambda: Connection(Address(api.url, loopback=True))),
        ("/api/version", fake.check_version),
        ("/api/jobs/", fake.attempts),
        ("/api/jobs/x", lambda: fake.attempt("x")),
    ):
        api.fail[f"GET {path}"] = [status]
        with pytest.raises(Temporary, match=told):
            ask()
    api.fail["POST /api/jobs/"] = [status, status]
    assert fake.submit(script("one"))[0].id == "one-1"


def test_two_who_submit_at_once_run_it_once(fake, api, monkeypatch):
    fake.submit(script("one"))
    monkeypatch.setattr(fake, "attempts", lambda name: [])  # looked a moment before the other's request came
    attempt, new = fake.submit(script("one"))
    assert (attempt.id, new, list(api.jobs)) == ("one-1", False, ["one-1"])


def test_a_running_job_is_joined_and_an_ended_one_followed_by_the_next(fake, api):
    parcel = script("one")
    assert fake.submit(parcel)[1]
    assert fake.submit(parcel) == (fake.attempt("one-1"), False)
    for tried in range(1, 11):
        api.end(f"one-{tried}", status="FAILED", driver_exit_code=3)
        attempt, new = fake.submit(parcel)
        assert (attempt.id, new) == (f"one-{tried + 1}", True)
        assert fake.submit(parcel) == (attempt, False), "the one that runs, not the one that ended"
    ours = [f"one-{tried}" for tried in range(1, 12)]
    assert [attempt.id for attempt in fake.attempts("one")] == ours
    fake.submit(script("a"))
    api.jobs["one-12"] = api.jobs["a-1"] | {"submission_id": "one-12", "metadata": {}}
    assert [attempt.id for attempt in fake.attempts()] == [*ours, "a-1"], "oldest first, and what is not ours left out"


def test_a_log_that_breaks_off_is_told_once(fake, api):
    fake.submit(script("one"))
    api.log = "".join(f"line {line}\n" for line in range(100))
    api.breaks = [0, 50, 333, 333]
    assert "".join(fake.follow("one-1")) == api.log
    assert fake.attempt("one-1").exit_code() == 0


def test_a_cluster_that_comes_back_each_time_is_followed(fake, api, monkeypatch):
    """Its absences are not added up."""
    fake.submit(script("one"))
    api.log, api.breaks = "much to say", [3] * 60
    monkeypatch.setattr("pipeline.submit._PATIENCE_S", 0.3)
    api.fail["GET /api/jobs/one-1"] = [0, *[503, 0] * 30]
    assert "".join(fake.follow("one-1")) == api.log


def test_a_cluster_that_goes_away_for_good_is_temporary(fake, api, monkeypatch):
    fake.submit(script("one"))
    api.log, api.breaks = "much to say", [3] * 100
    monkeypatch.setattr("pipeline.submit._PATIENCE_S", 0.2)
    api.fail["GET /api/jobs/one-1"] = [0, *[503] * 100]
    with pytest.raises(Temporary, match="The job may go on: nightlabel wait joins it again"):
        list(fake.follow("one-1"))


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 75)])
def test_a_head_that_has_started_anew_has_lost_the_driver_and_not_what_it_did(fake, api, monkeypatch, complete, code):
    """Such a head knows no job, and answers 404."""
    fake.submit(script("one"))
    api.log, api.breaks, attempt = "much to say", [3], fake.attempt

    def anew(submission_id: str) -> Any:
        known = attempt(submission_id)
        api.jobs.clear()
        return known

    monkeypatch.setattr(fake, "attempt", anew)
    monkeypatch.setattr("pipeline.commands.cluster._complete", lambda _: complete)
    with pytest.raises((SystemExit, Temporary)) as caught:
        follow(fake, "one-1", (job(),))
    assert code == (caught.value.code if complete else caught.value.exit_code)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 4}, 4),
        ({"status": "FAILED", "driver_exit_code": -9}, 137),
        ({"status": "STOPPED"}, 143),
        ({"status": "FAILED", "message": "the head is gone", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, Temporary),
        ({"status": "FAILED", "message": "no such file", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}, UnfitError),
    ],
)
def test_the_drivers_exit_code(fake, api, fields, code):
    fake.submit(script("one"))
    assert (fake.attempt("one-1").over, fake.attempt("one-1").started) == (False, 1.0)
    api.end("one-1", **fields)
    assert fake.attempt("one-1").over
    if isinstance(code, int):
        assert fake.attempt("one-1").exit_code() == code
        return
    with pytest.raises(code, match=f"^one-1: {fields['message']}. "):
        fake.attempt("one-1").exit_code()


def test_what_the_client_may_meet(fake, api):
    with pytest.raises(JobError, match=r"Job none-1 does not exist\. nightlabel list"):
        fake.attempt("none-1")
    api.ray_version = "2.49.1"
    with pytest.raises(UnfitError, match=r"runs Ray 2\.49\.1; required: Ray 2\.60"):
        fake.check_version()
    api.fail["GET /api/jobs/"] = [401, 403, 502]
    for error in (PermissionDenied, PermissionDenied, Temporary):
        with pytest.raises(error):
            fake.attempts()


@pytest.fixture(scope="module")
def raylets(s3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    """A head and two workers of one CPU each."""
    cluster = Raylets(tmp_path_factory.mktemp("home"), s3.env)
    try:
        cluster.add()
        cluster.add()
        cluster.wait_for(3)
        yield cluster
    finally:
        cluster.stop()


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(raylets: Raylets, tmp_path) -> Cli:
    def call(*words: str, check: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*words, address=raylets.dashboard), cwd=tmp_path, env=raylets.env | PYTHON | env, check=False, **TEXT
        )
        assert check is None or done.returncode == check, (done.returncode, done.stdout, done.stderr)
        return done

    return call


PYTHON = {"PYTHONPATH": str(ROOT)}
TEXT: dict[str, Any] = {"capture_output": True, "text": True}


def command(*words: str, address: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", words[0], "--address", address, *words[1:]]


def submit_script(raylets: Raylets, name: str, shell: str) -> str:
    """The id of a submitted line of shell. By a process of its own: Ray reads the token once, and other tests have none."""
    code = (
        "import sys\nfrom pipeline.environment import cluster_address, set_ray_environment\nset_ray_environment(cluster=True)\n"
        "from pipeline.ship import Parcel, _zip\nfrom pipeline.submit import Connection\nurl, name, shell = sys.argv[1:]\n"
        "print(Connection(cluster_address(url)).submit(Parcel(name, name, _zip({'note': b''}), shell))[0].id)"
    )
    words = [sys.executable, "-c", code, raylets.dashboard, name, shell]
    return subprocess.run(words, env=raylets.env | PYTHON, check=True, **TEXT).stdout.strip()


def test_how_a_driver_ends(cli, raylets):
    assert submit_script(raylets, "killed", "kill -9 $$") == "killed-1"
    cli("wait", "killed-1", check=137)
    submit_script(raylets, "stopped", "exec sleep 100")
    assert "STOPPED" in cli("stop", "stopped-1").stdout
    cli("wait", "stopped-1", check=143)


def test_strangers_are_refused(cli, raylets):
    done = cli("list", check=77, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert done.stderr.startswith(f"nightlabel: {raylets.dashboard} does not accept a request without token")
    assert cli("list", check=77, RAY_AUTH_TOKEN="0" * 32).stderr.startswith(
        f"nightlabel: {raylets.dashboard} does not accept this token"
    )
    assert cli("status", "nobody-1", check=2).stderr.count("\n") == 1


def photographs(s3, *, shards: int, images: int, broken: int = 0) -> str:
    """A new bucket with tars of large pictures, which take a while to decode; its URI."""
    bucket, image = s3.bucket(), picture(1, size=(1600, 1200))
    for shard in range(shards):
        members = {f"{shard:03d}-{number:03d}.jpg": image if shard or number >= broken else b"no" for number in range(images)}
        s3.put(f"s3://{bucket}/in/{shard:03d}.tar", tar_bytes(members))
    return f"s3://{bucket}"


def job_file(folder: Path, bucket: str, model: str, **fields: Any) -> Path:
    path = folder / "job.yaml"
    content = {
        "name": "photographs",
        "input": {"uri": f"{bucket}/in/"},
        "model": {"uri": model},
        "output": {"uri": f"{bucket}/out/"},
    }
    path.write_text(json.dumps({"resources": LIGHT} | content | fields))
    return path


def keys(s3, bucket: str) -> Counter[str]:
    """How often each key was labelled."""
    objects = units(s3, bucket)
    tables = [s3.client.get_object(Bucket=bucket.removeprefix("s3://"), Key=key)["Body"].read() for key in objects]
    return Counter(key for table in tables for key in pq.read_table(BytesIO(table), columns=["key"]).column("key").to_pylist())


def units(s3, bucket: str) -> list[str]:
    found = s3.client.list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="out/").get("Contents", [])
    return [item["Key"] for item in found if "/data/" in item["Key"]]


def test_a_job_is_submitted_followed_and_told_by_its_manifest(cli, s3, model, tmp_path):
    bucket = photographs(s3, shards=2, images=4, broken=3)
    path = str(job_file(tmp_path, bucket, model))
    done = cli("submit", path, check=4)  # 3 of 8 have failed: the driver's own code
    assert "done: 8 in = 5 ok + 3 failed" in done.stdout
    assert "Traceback" not in done.stdout
    assert len(keys(s3, bucket)) == 8
    status = cli("status", path, **s3.env).stdout.splitlines()
    assert "FAILED, exit code 4" in status[0]
    assert status[1] == "output  complete, every input is part of a run with its manifest"
    attempt = json.loads(cli("list", "--json").stdout)["jobs"][-1]
    assert attempt["id"].startswith("photographs-")
    assert cli("logs", attempt["id"]).stdout == done.stdout
    again = cli("wait", path, check=4)
    assert again.stdout == done.stdout


def test_a_job_file_that_is_not_there_is_no_submission():
    with pytest.raises(JobError, match=r"^absent\.yaml: No such file or directory; required: a job file in YAML"):
        _find(Address("http://127.0.0.1:1", loopback=True), "absent.yaml", None)


def test_an_output_without_a_run_is_said_to_have_none(model, tmp_path):
    write_tars(tmp_path / "in", shards=2, images=1)
    wanted = Job.model_validate(
        {"name": "new", "input": {"uri": f"{tmp_path}/in"}, "model": {"uri": model}, "output": {"uri": f"{tmp_path}/out"}}
    )
    assert _truth(wanted) == "no run has begun with what is not labelled, 0 of 2 units are there"


def test_ctrl_c_leaves_the_job_running(cli, raylets, tmp_path):
    submit_script(raylets, "left", f"echo up; while ! test -e {tmp_path}/go; do sleep 0.1; done; exit 5")
    waiting = subprocess.Popen(
        command("wait", "left-1", address=raylets.dashboard),
        env=raylets.env | PYTHON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    assert "up\n" in iter(waiting.stdout.readline, "")
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=240)
    assert waiting.returncode == 130
    assert said.startswith("nightlabel: stopped by SIGINT. The job goes on: nightlabel wait left-1 --address http://127.0.0.1:")
    assert "RUNNING" in cli("status", "left-1").stdout
    (tmp_path / "go").touch()
    assert "\nup\n" in cli("wait", "left-1", check=5).stdout


def test_more_than_the_cluster_has_is_one_sentence_and_exit_2(cli, s3, model, tmp_path):
    resources = LIGHT | {"preprocess": {"actors": 7, "cpus_per_actor": 0.5}}
    done = cli("submit", str(job_file(tmp_path, photographs(s3, shards=1, images=1), model, resources=resources)), check=2)
    assert done.stdout.splitlines()[-1].startswith("nightlabel: resources: the job asks for 4.6 CPUs")


def run(raylets: Raylets, s3, path: Path, **env: str) -> tuple[int, str]:
    """(exit code, last line) of a driver on this machine."""
    words = [sys.executable, "-m", "pipeline", "run", str(path)]
    done = subprocess.run(words, env=raylets.env | s3.env | PYTHON | env, check=False, **TEXT)
    return done.returncode, done.stderr.splitlines()[-1]


def grown(cpus: int, wait: str) -> dict[str, Any]:
    """Fields of a job that takes nearly all of so many nodes with one CPU each, and waits for them."""
    predict = {"actors": cpus, "cpus_per_actor": 0.6, "batch_size": 8}
    return {"resources": LIGHT | {"predict": predict}, "cluster": {"workers": {"count": cpus, "cpus": 1}, "wait": wait}}


def test_a_node_that_is_to_come_is_waited_for(raylets, s3, model, tmp_path):
    bucket = photographs(s3, shards=2, images=4)
    words = [sys.executable, "-m", "pipeline", "run", str(job_file(tmp_path, bucket, model, **grown(3, "300s")))]
    env = raylets.env | s3.env | PYTHON | {"RAY_ADDRESS": raylets.gcs}
    waiting = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    said = iter(waiting.stderr.readline, "")
    awaited = next(line for line in said if line.startswith("waiting"))
    assert awaited.startswith("waiting up to 300 s: resources: the job asks for 2.3 CPUs"), awaited
    raylets.add()
    out, rest = waiting.communicate(timeout=400)
    assert waiting.returncode == 0, rest
    assert "done: 8 in = 8 ok + 0 failed" in out


def test_a_node_that_does_not_come_is_exit_75(raylets, s3, model, tmp_path):
    path = job_file(tmp_path, photographs(s3, shards=1, images=1), model, **grown(5, "1s"))
    code, said = run(raylets, s3, path, RAY_ADDRESS=raylets.gcs)
    assert code == 75
    assert said.startswith("nightlabel: waited 1 s in vain: resources: the job asks for 3.5 CPUs")


def test_two_jobs_share_a_cluster(cli, s3, model, tmp_path):
    buckets = [photographs(s3, shards=4, images=10) for _ in range(2)]
    names = []
    for bucket in buckets:
        path = job_file(tmp_path, bucket, model)
        names.append(cli("submit", str(path), "--no-wait").stdout.strip())
    for name in names:
        cli("wait", name)
    assert [sum(keys(s3, bucket).values()) for bucket in buckets] == [40, 40]


def test_a_worker_that_is_killed_in_the_middle_costs_nothing(cli, raylets, s3, model, tmp_path):
    bucket = photographs(s3, shards=20, images=30, broken=2)
    resources = LIGHT | {"read": {"tasks": 4, "cpus_per_task": 0.05}}  # a unit of every tar
    path = str(job_file(tmp_path, bucket, model, limits={"max_failed": "0.1%"}, resources=resources))
    name = cli("submit", path, "--no-wait").stdout.strip()
    deadline = time.monotonic() + 240
    while not units(s3, bucket):
        assert time.monotonic() < deadline, cli("logs", name).stdout
        time.sleep(0.1)
    assert len(units(s3, bucket)) < 15
    raylets.kill(raylets.nodes[-1])
    done = cli("wait", name, check=4)  # the driver's own code: 2 of 600 are broken, more than 0.1 %
    assert set(keys(s3, bucket).values()) == {1}
    assert len(keys(s3, bucket)) == 600
    assert "done: 600 in = 598 ok + 2 failed" in done.stdout


def test_a_cluster_that_is_gone_or_was_never_there_is_one_sentence(raylets, s3, model, tmp_path):
    path = job_file(tmp_path, photographs(s3, shards=1, images=1), model)

    assert run(raylets, s3, path, RAY_ADDRESS="127.0.0.1:1") == (
        75,
        "nightlabel: RAY_ADDRESS is 127.0.0.1:1, where nothing answers (Connection refused). "
        "Bring the cluster up, or unset RAY_ADDRESS for a Ray on this machine.",
    )
    code, said = run(raylets, s3, path, RAY_ADDRESS=raylets.dashboard)
    assert (code, said.startswith("nightlabel: RAY_ADDRESS is http://127.0.0.1:")) == (2, True)
    code, said = run(raylets, s3, path, RAY_ADDRESS=raylets.gcs, RAY_AUTH_TOKEN="0" * 32)
    assert code == 75
    assert said.startswith(f"nightlabel: something answers at {raylets.gcs} and does not let us in. Check that")
    assert "RAY_AUTH_TOKEN" in said


def test_a_signal_while_ray_comes_up_says_how_to_go_on(raylets, s3, model, tmp_path):
    path = job_file(tmp_path, photographs(s3, shards=1, images=1), model)
    words = [sys.executable, "-m", "pipeline", "run", str(path)]
    starting = subprocess.Popen(
        words, env=raylets.env | s3.env | PYTHON | {"RAY_AUTH_MODE": "disabled"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not any("gcs_server" in name for name in commands(starting.pid)):  # Ray is half up
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starting.send_signal(signal.SIGTERM)
    _, said = starting.communicate(timeout=240)
    assert (starting.returncode, said.splitlines()[-1]) == (
        143,
        "nightlabel: stopped by SIGTERM. What is committed stays; the same command goes on from there.",
    )


def commands(pid: int) -> list[str]:
    """Command lines of a process and of all below it."""
    found = []
    for process in below(pid):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{process}/cmdline").read_text())
    return found
