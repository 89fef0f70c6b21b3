"""`nightlabel apply` against an API server: it makes everything once, follows through whatever breaks, ends as the run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, FaultProxy, fault_proxy
from kube_server import ApiServer
from kubernetes.client.exceptions import ApiException
from test_render import DIGEST, GOLDEN, HEAD_ONLY, job_of

from pipeline.errors import Conflict, JobError, PermissionDenied, Temporary, UnfitError, UnitsLeft
from pipeline.kube.apiserver import Api
from pipeline.kube.apply import apply
from pipeline.kube.follow import Progress
from pipeline.kube.render import KubeObject, RenderOptions, render

NAME = "nightly-products"
RAYJOBS = "/apis/ray.io/v1/namespaces/labelling/rayjobs"
ENTRYPOINT = (
    "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\nthe end of the log"
)


def things(**wish: Any) -> list[KubeObject]:
    text, _ = GOLDEN["rayjob"]
    asked = RenderOptions(**{"target": "rayjob", "date": "2026-11-01", **wish})
    return render(job_of(text), text, asked)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", server.kubeconfig(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
def api(cluster: ApiServer) -> Api:
    return Api(patience=20.0, pause=0.02)


def start(api: Api, wanted: list[KubeObject], if_running: Any = "refuse") -> Any:
    return apply(api, wanted, if_running=if_running, say=lambda text: None)


def followed(api: Api, run: Any, *steps: Callable[[], None]) -> list[Progress]:
    """What following tells, while the steps happen, each after the one before it was told."""
    told: list[Progress] = []
    left = list(steps)
    for progress in api.follow(run):
        told.append(progress)
        if left:
            left.pop(0)()
    return told


def test_everything_is_made_once_and_followed_to_its_end(cluster: ApiServer, api: Api):
    run = start(api, things())
    assert set(cluster.objects()) == {("serviceaccounts", "nightlabel"), ("configmaps", NAME), ("rayjobs", NAME)}
    told = followed(
        api,
        run,
        lambda: cluster.status(NAME, "Initializing"),
        lambda: cluster.status(NAME, "Running", jobStatus="RUNNING"),
        lambda: cluster.status(NAME, "Retrying", jobStatus="FAILED", failed=1),
        lambda: cluster.status(NAME, "Running", jobStatus="RUNNING", failed=1),
        lambda: cluster.status(NAME, "Complete", jobStatus="SUCCEEDED", failed=1),
    )
    assert [progress.state for progress in told] == ["", "Initializing", "Running", "Retrying", "Running", "Complete"]
    assert told[-1].exit_code == 0
    assert told[4].line() == f"running, attempt 2, cluster {NAME}-abcde"


def test_the_same_command_follows_the_run_that_is_under_way(cluster: ApiServer, api: Api):
    start(api, things())
    cluster.status(NAME, "Running")
    said: list[str] = []
    assert apply(api, things(), if_running="refuse", say=said.append) is not None
    assert said == [f"RayJob labelling/{NAME} is under way already"]
    assert start(api, things(), "replace") is not None
    assert cluster.objects()["rayjobs", NAME]["status"]["jobDeploymentStatus"] == "Running"


def test_another_run_is_refused_skipped_queued_behind_or_replaced(cluster: ApiServer, api: Api):
    start(api, things())
    cluster.status(NAME, "Running")
    before = cluster.objects()
    with pytest.raises(Conflict, match=r"for another date or of another job file.*kubectl delete rayjob"):
        start(api, things(date="2026-11-02"))
    text = GOLDEN["rayjob"][0].replace("top_k: 5", "top_k: 3")
    with pytest.raises(Conflict, match="of another job file"):
        start(api, render(job_of(text), text, RenderOptions("rayjob", date="2026-11-01")))
    assert start(api, things(date="2026-11-02"), "skip") is None
    assert cluster.objects() == before
    threading.Timer(0.3, lambda: cluster.status(NAME, "Complete", jobStatus="SUCCEEDED")).start()
    start(api, things(date="2026-11-02"), "queue")
    assert "2026-11-02" in cluster.objects()["rayjobs", NAME]["spec"]["entrypoint"]
    cluster.status(NAME, "Running")
    start(api, things(date="2026-11-03"), "replace")
    assert "2026-11-03" in cluster.objects()["rayjobs", NAME]["spec"]["entrypoint"]
    assert "status" not in cluster.objects()["rayjobs", NAME]


CATCHING_UP = HEAD_ONLY.replace("s3://photos/", '"s3://photos/{date}/"').replace("queue}", "queue, catch_up: 3d}")


def test_the_run_of_another_day_is_another_where_the_entrypoint_keeps_the_word(monkeypatch: pytest.MonkeyPatch):
    """Of a job that catches up."""
    asked = set()
    for day in ("2026-11-01", "2026-11-02"):
        monkeypatch.setattr("pipeline.job.schedule.datetime", clock(day))
        (run,) = [
            thing
            for thing in render(job_of(CATCHING_UP), CATCHING_UP, RenderOptions("rayjob", "yesterday", DIGEST))
            if thing["kind"] == "RayJob"
        ]
        assert run["spec"]["entrypoint"].split()[4] == "yesterday"
        asked.add(run["metadata"]["annotations"]["nightlabel/asked"])
    assert len(asked) == 2


def clock(day: str) -> type[datetime]:
    """A datetime whose now is always noon of that day."""

    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromisoformat(f"{day}T12:00:00").replace(tzinfo=tz)

    return Noon


def tick(number: int) -> list[KubeObject]:
    """What the pod of a CronJob's tick wants to make, of a job without {date}: the same in every night."""
    made = render(job_of(HEAD_ONLY), HEAD_ONLY, RenderOptions("rayjob", image=DIGEST, tick=f"small-{number}"))
    return [thing for thing in made if thing["kind"] == "RayJob"]


def test_a_tick_joins_the_run_that_it_made_itself_and_no_other(cluster: ApiServer, api: Api):
    """A pod that Kubernetes starts again follows its run; the next night's does what if_running says."""
    (run,) = tick(1)
    run["metadata"]["namespace"] = "labelling"
    start(api, [run])
    cluster.status("small", "Running")

    def joins(number: int, policy: Any) -> bool:
        (wanted,) = tick(number)
        wanted["metadata"]["namespace"] = "labelling"
        return start(api, [wanted], policy) is not None and "status" in cluster.objects()["rayjobs", "small"]

    assert joins(1, "replace")
    assert joins(1, "queue")
    assert not joins(2, "skip")
    assert not joins(2, "replace")
    assert cluster.objects()["rayjobs", "small"]["metadata"]["annotations"]["nightlabel/tick"] == "small-2"
    cluster.status("small", "Running")
    threading.Timer(0.3, lambda: cluster.status("small", "Complete", jobStatus="SUCCEEDED")).start()
    assert not joins(3, "queue")


def test_a_run_that_waited_does_not_end_the_one_that_was_faster(cluster: ApiServer, api: Api):
    start(api, things())
    cluster.status(NAME, "Running")
    said: list[str] = []

    def faster(text: str) -> None:
        said.append(text)
        if "complete" in text:
            start(api, things(date="2026-11-05"))
            cluster.status(NAME, "Running")
            threading.Timer(0.3, lambda: cluster.status(NAME, "Failed")).start()

    threading.Timer(0.3, lambda: cluster.status(NAME, "Complete", jobStatus="SUCCEEDED")).start()
    apply(api, things(date="2026-11-02"), if_running="queue", say=faster)
    assert [line for line in said if line.startswith("before  ")][-1] == "before  failed"
    assert "2026-11-02" in cluster.objects()["rayjobs", NAME]["spec"]["entrypoint"]


def test_only_the_run_that_was_looked_at_is_deleted(cluster: ApiServer, api: Api):
    run = start(api, things())
    api.delete(run, {"metadata": {"uid": "1-2"}})
    (sent,) = cluster.server[f"delete {RAYJOBS}/{NAME}"][:1]
    assert sent.data["preconditions"] == {"uid": "1-2"}


def test_a_finished_run_makes_room_and_the_job_file_is_the_new_one(cluster: ApiServer, api: Api):
    start(api, things())
    cluster.status(NAME, "Failed", message=ENTRYPOINT.format(5))
    text = GOLDEN["rayjob"][0].replace("top_k: 5", "top_k: 3")
    start(api, render(job_of(text), text, RenderOptions("rayjob", date="2026-11-01")))
    assert "status" not in cluster.objects()["rayjobs", NAME]
    assert "top_k: 3" in cluster.objects()["configmaps", NAME]["data"]["job.yaml"]


def test_what_is_not_ours_is_not_touched(cluster: ApiServer, api: Api):
    stranger = {"metadata": {"name": NAME, "namespace": "labelling"}, "data": {"mine": "1"}}
    cluster.server.objects["v1/configmaps", "labelling", NAME] = stranger
    with pytest.raises(Conflict, match=f"ConfigMap labelling/{NAME} stands there and is not of nightlabel"):
        start(api, things())
    assert cluster.objects()["configmaps", NAME]["data"] == {"mine": "1"}
    assert ("rayjobs", NAME) not in cluster.objects()


def test_what_others_have_set_beside_ours_stays(cluster: ApiServer, api: Api):
    start(api, things(target="raycronjob", date="today"))
    standing = cluster.server.objects["v1/serviceaccounts", "labelling", "nightlabel"]
    standing.patch({"metadata": {"annotations": {"theirs": "1"}}, "imagePullSecrets": [{"name": "pull"}]})
    assert start(api, things(target="raycronjob", date="today")) is None
    account = cluster.objects()["serviceaccounts", "nightlabel"]
    assert account["imagePullSecrets"] == [{"name": "pull"}]
    assert set(account["metadata"]["annotations"]) == {"theirs", "eks.amazonaws.com/role-arn"}
    assert ("raycronjobs", NAME) in cluster.objects()


def test_what_changes_or_goes_between_a_look_and_a_change_is_looked_at_again(api: Api, monkeypatch: pytest.MonkeyPatch):
    """409 says so: the controller of a CronJob writes down when it ran."""
    job, call, asked = things(target="cronjob", date="today"), api._call, list[str]()
    start(api, job)

    def conflicting(verb: str, thing: KubeObject, *rest: Any, **more: Any) -> dict[str, Any]:
        if verb == "replace":
            asked.append(name := f"{thing['kind']} {thing['metadata']['name']}")
            if asked.count(name) == 1:
                raise ApiException(status=409, reason="Conflict")
        return call(verb, thing, *rest, **more)

    monkeypatch.setattr(api, "_call", conflicting)
    start(api, job)
    assert set(Counter(asked).values()) == {2}
    monkeypatch.setattr(api, "find", lambda _: None)  # gone again, each time
    with pytest.raises(Temporary, match="is changed by others all the time"):
        start(api, job)


def test_a_cron_job_brings_its_rights(cluster: ApiServer, api: Api):
    start(api, things(target="cronjob", date="today"))
    made = {plural for plural, _ in cluster.objects()}
    assert made == {"serviceaccounts", "configmaps", "roles", "rolebindings", "cronjobs"}


def test_watches_that_end_at_once_or_expire_are_begun_again(cluster: ApiServer, api: Api):
    watches = iter(["", '{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}\n', "", ""])
    cluster.server["watch"] << (lambda: next(watches, "").encode())
    run = start(api, things())
    told = followed(api, run, lambda: cluster.status(NAME, "Running"), lambda: cluster.status(NAME, "Complete"))
    assert [progress.state for progress in told] == ["", "Running", "Complete"]


def test_an_api_server_that_is_away_for_a_while_is_waited_for(cluster: ApiServer, api: Api):
    run = start(api, things())

    def upgrade() -> None:
        cluster.status(NAME, "Complete", jobStatus="SUCCEEDED")
        cluster.away()
        threading.Timer(0.5, cluster.back).start()

    assert [progress.state for progress in followed(api, run, upgrade)][-1] == "Complete"


def test_an_api_server_that_stays_away_ends_the_following_and_not_the_run(cluster: ApiServer):
    api = Api(patience=0.2, pause=0.02)
    run = start(api, things())
    with pytest.raises(Temporary, match="The run goes on without us"):
        followed(api, run, cluster.away)
    cluster.back()
    assert ("rayjobs", NAME) in cluster.objects()


WATCH = "/rayjobs?"


def page(code: int, body: str, kind: str = "text/plain", *headers: str) -> Fault:
    """What stands before an API server answers to a look at the run, in place of it."""
    lines = [f"HTTP/1.1 {code} x", "Connection: close", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return Fault("raw", "GET", f"/rayjobs/{NAME}", answer="\r\n".join([*lines, "", body]).encode())


def status(code: int, message: str) -> Fault:
    return page(code, json.dumps({"kind": "Status", "code": code, "message": message}), "application/json")


def end_watches(proxy: FaultProxy) -> None:
    """At once, all of them, so that the run is looked at again and again."""
    nothing = b"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    proxy.script(*[Fault("raw", "GET", WATCH, answer=nothing)] * 99)


@pytest.fixture
def behind(cluster: ApiServer, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Api, FaultProxy]]:
    """(an API server behind a proxy, the proxy); the run is made already."""
    start(api, things())
    with fault_proxy(cluster.port) as proxy:
        far = tmp_path / "far"
        far.write_text(Path(cluster.kubeconfig(far)).read_text().replace(f"http://127.0.0.1:{cluster.port}", proxy.endpoint))
        monkeypatch.setenv("KUBECONFIG", str(far))
        end_watches(proxy)
        yield Api(patience=20.0, pause=0.02), proxy


def lines(text: str) -> Fault:
    """A watch that says these lines and ends."""
    head = f"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return Fault("raw", "GET", WATCH, answer=(head + text).encode())


@pytest.mark.parametrize(
    "trouble",
    [
        status(404, "the server could not find the requested resource"),  # one that does not know all kinds yet
        page(404, "404 page not found\n"),
        page(200, "<html>log in</html>\n", "text/html"),
        page(429, "Too many requests", "text/plain", "Retry-After: 1"),
        page(502, "<html>bad gateway</html>\n", "text/html"),
        status(409, "try again"),
        Fault("reset", "GET", f"/rayjobs/{NAME}"),
        Fault("reset", "GET", WATCH),
        Fault("status", "GET", WATCH, status=500),
        Fault("raw", "GET", WATCH, answer=b'HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"typ'),
        page(200, '{"error": "log in"}', "application/json"),
        lines("<html>\n\n"),
        lines("[]\n"),
        lines('{"type": "MODIFIED"}\n'),
        lines('{"type": "ERROR", "object": "gone"}\n'),
        lines('{"type": "MODIFIED", "object": {"metadata": 5}}\n'),
        lines('{"type": "MODIFIED", "object": {"metadata": {}, "status": "x"}}\n'),
    ],
    ids=[
        *("404", "no-page", "login", "429", "502", "409", "reset", "watch-reset", "watch-500", "watch-cut", "json"),
        *("watch-html", "watch-list", "watch-half", "watch-error", "watch-metadata", "watch-status"),
    ],
)
def test_what_passes_does_not_end_the_following(cluster: ApiServer, behind: tuple[Api, FaultProxy], trouble: Fault):
    api, proxy = behind

    def begin() -> None:
        proxy.forget()
        proxy.script(trouble)
        end_watches(proxy)
        cluster.status(NAME, "Complete", jobStatus="SUCCEEDED")

    assert [progress.state for progress in followed(api, things()[-1], begin)][-1] == "Complete"
    assert trouble not in proxy.pending


@pytest.mark.parametrize("body", ["<html>log in</html>\n", "{}", "[]", '{"items": [{"metadata": null}]}'])
def test_pods_that_make_no_sense_are_a_sentence(behind: tuple[Api, FaultProxy], body: str):
    api, proxy = behind
    head = f"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    proxy.script(Fault("raw", "GET", "/pods", answer=(head + body).encode()))
    with pytest.raises(Temporary, match=rf"^cannot read the log of RayJob labelling/{NAME}: the answer makes no sense; required"):
        list(api.logs(things()[-1]))


@pytest.mark.parametrize(("code", "told"), [(401, "Unauthorized"), (403, "rayjobs is forbidden")])
def test_who_may_not_look_any_more_hears_that_the_run_goes_on(behind: tuple[Api, FaultProxy], code: int, told: str):
    api, proxy = behind
    said = rf"{told}\. Log in, or ask for a role that may\. The run goes on without us; the same command follows it again\.$"
    with pytest.raises(PermissionDenied, match=said):
        followed(api, things()[-1], lambda: proxy.script(status(code, told)))


def test_another_run_under_the_same_name_is_not_followed(cluster: ApiServer, behind: tuple[Api, FaultProxy]):
    """Somebody has deleted ours and made another while the API server was not to be heard."""
    api, _ = behind
    standing = cluster.server.objects["ray.io/v1/rayjobs", "labelling", NAME]
    standing.patch({"metadata": {"uid": "1"}})
    with pytest.raises(UnitsLeft, match="was deleted"):
        followed(
            api,
            things()[-1],
            lambda: cluster.status(NAME, "Running"),
            lambda: (standing.patch({"metadata": {"uid": "2"}}), cluster.status(NAME, "Complete", jobStatus="SUCCEEDED")),
        )


def test_a_run_that_somebody_deletes_ends_the_following(cluster: ApiServer, api: Api):
    run = start(api, things())
    with pytest.raises(UnitsLeft, match="was deleted"):
        followed(api, run, lambda: cluster.status(NAME, "Running"), lambda: api.delete(run, cluster.objects()["rayjobs", NAME]))


@pytest.mark.parametrize(
    ("progress", "code"),
    [
        (Progress("Complete", "SUCCEEDED"), 0),
        (Progress("Complete", "STOPPED"), 143),
        (Progress("Failed", "FAILED", "AppFailed", ENTRYPOINT.format(4)), 4),
        (Progress("Failed", "FAILED", "AppFailed", "Job entrypoint command failed with exit code -9. No logs available."), 137),
        (Progress("Failed", "RUNNING", "DeadlineExceeded", "The RayJob has passed the activeDeadlineSeconds."), 5),
        (Progress("Failed", "", "PreRunningDeadlineExceeded", "The RayJob has passed the preRunningDeadlineSeconds."), 75),
        (Progress("Failed", "FAILED", "JobStatusCheckTimeoutExceeded", "no answer"), 75),
        (Progress("ValidationFailed", "", "ValidationFailed", "wrong"), 2),
        (Progress("ValidationFailed"), 2),
    ],
)
def test_exit_codes(progress: Progress, code: int):
    assert progress.ended
    assert progress.exit_code == code
    last = replace(progress, cluster="small-abcde", failed=1).line()
    assert "attempt" not in last, "of a run that has ended its attempts are no news"
    assert "small-abcde" not in last


def refuse(cluster: ApiServer, request: str, code: int, message: str) -> None:
    answer = {"kind": "Status", "status": "Failure", "code": code, "message": message}
    cluster.server[request] << code << answer


@pytest.mark.parametrize(
    ("code", "message", "error", "words"),
    [
        (401, "Unauthorized", PermissionDenied, "Log in"),
        (403, 'rayjobs.ray.io is forbidden: User "x" cannot create resource', PermissionDenied, "cannot create resource"),
        (404, "the server could not find the requested resource", UnfitError, "Install KubeRay"),
        (404, 'namespaces "labelling" not found', UnfitError, "kubectl create namespace labelling"),
        (422, "spec.suspend: Invalid value", JobError, "spec.suspend: Invalid value"),
        (429, "slow down", Temporary, "slow down. Try again"),
        (500, "etcd is down", Temporary, "etcd is down"),
    ],
)
def test_refusals(cluster: ApiServer, api: Api, *, code: int, message: str, error: type[Exception], words: str):
    refuse(cluster, f"post {RAYJOBS}", code, message)
    with pytest.raises(error, match=words) as caught:
        start(api, things())
    assert type(caught.value) is error


# The command itself


@pytest.fixture
def command(cluster: ApiServer, tmp_path: Path) -> list[str]:
    job = tmp_path / "job.yaml"
    job.write_text(HEAD_ONLY.replace("memory: 8GiB}", "memory: 8GiB}, kubernetes: {namespace: labelling}"))
    return [sys.executable, "-m", "pipeline", "apply", str(job), "--image", DIGEST]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def play(cluster: ApiServer) -> None:
    """The operator: the submitter's pod is up some time after the run is said to be, and its log breaks off once."""
    pods = "/api/v1/namespaces/labelling/pods"
    until(lambda: ("rayjobs", "small") in cluster.objects())
    cluster.status("small", "Running")
    until(lambda: len(cluster.server[f"get {pods}"]))
    pod = {"metadata": {"name": "small-xyz", "namespace": "labelling", "labels": {"job-name": "small"}}}
    cluster.server.objects["v1/pods", "labelling", "small-xyz"] = pod
    until(lambda: len(cluster.server[f"get {pods}/small-xyz/log"]))
    cluster.status("small", "Failed", message=ENTRYPOINT.format(5))


def test_the_command_prints_the_drivers_log_and_ends_with_its_code(cluster: ApiServer, command: list[str]):
    logs = iter([b"run 000001: 4 units to do\n"])
    whole = b"run 000001: 4 units to do\nunits left\n"
    cluster.server["get /api/v1/namespaces/labelling/pods/small-xyz/log"] << (lambda: next(logs, whole))
    operator = threading.Thread(target=play, args=(cluster,))
    operator.start()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    operator.join()
    assert done.returncode == 5, done.stderr
    assert done.stdout == "run 000001: 4 units to do\nunits left\n"
    assert done.stderr.splitlines()[-1].endswith("failed: Job entrypoint command failed with exit code 5")


def test_the_command_without_rights_or_server(cluster: ApiServer, command: list[str]):
    refuse(cluster, f"get {RAYJOBS}/small", 403, "rayjobs.ray.io is forbidden")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr.count("\n")) == (77, 1), done.stderr
    cluster.away()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr
    cluster.back()


@pytest.mark.parametrize("content", ["", "a: [", "text", "current-context: x\ncontexts: []\n", None])
def test_a_kubeconfig_that_leads_nowhere(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(UnfitError, match="no way to a Kubernetes cluster") as caught:
        Api()
    assert "\n" not in str(caught.value)


def test_ctrl_c_leaves_the_run_and_says_how_to_go_on(cluster: ApiServer, command: list[str]):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "created" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "The run goes on; the same command follows it again, kubectl delete rayjob small -n labelling ends it." in said
    assert ("rayjobs", "small") in cluster.objects()


def test_the_pod_of_a_cron_job_makes_the_run_and_nothing_else(cluster: ApiServer, command: list[str]):
    env = os.environ | {"NIGHTLABEL_TICK": "small-29"}
    done = subprocess.run(
        [*command, "--scheduled", "--detach"], capture_output=True, text=True, check=False, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr
    assert set(cluster.objects()) == {("rayjobs", "small")}
    assert cluster.objects()["rayjobs", "small"]["metadata"]["annotations"]["nightlabel/tick"] == "small-29"
