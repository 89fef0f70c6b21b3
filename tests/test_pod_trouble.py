"""A RayJob's pods in trouble, as nodes and KubeRay make it: what each new pod does is what its forerunner did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import TimeoutExpired

import pytest
from faults import Fault, FaultProxy, fault_proxy
from kuberay import KubeRay, kill, terminate
from programs import wait_for
from sandbox import without_namespaces
from seaweed import Seaweed
from test_pod import WORKERS, Cluster, stored
from test_render import DIGEST, rendered, with_kind

from pipeline.kube.render import RenderOptions

pytestmark = pytest.mark.skipif(bool(why := without_namespaces()), reason=why or "there are namespaces")
__all__ = ["stored"]  # the fixture


@contextmanager
def begun(s3: Seaweed, model: str, folder: Path) -> Iterator[tuple[Cluster, KubeRay, FaultProxy]]:
    """A cluster with its head up, whose run will wait for one of its three shards for 12 s."""
    with fault_proxy(s3.port) as proxy:
        proxy.script(Fault("delay", "GET", "/photos/002.tar", seconds=12.0))
        cluster = Cluster(s3, model, folder, workers=WORKERS, endpoint=proxy.endpoint)
        with KubeRay(
            cluster.box, with_kind(rendered(cluster.job, RenderOptions("rayjob", image=DIGEST)), "RayJob")["spec"]
        ) as pods:
            yield cluster, pods, proxy


def in_the_middle(proxy: FaultProxy) -> None:
    """The run has begun to read the shard that it waits for."""
    assert wait_for(lambda: not proxy.pending, seconds=240.0)


def test_a_submitter_that_begins_again_follows_and_a_worker_that_is_evicted_is_made_up_for(s3, stored, tmp_path):
    with begun(s3, stored, tmp_path) as (cluster, pods, proxy):
        pods.head()
        worker, first = pods.worker(), pods.submitter()
        in_the_middle(proxy)
        kill(first)
        second = pods.submitter()
        terminate(worker)
        try:
            worker.wait(timeout=10)  # it drains for 30 s, which a spot node does not give
        except TimeoutExpired:
            kill(worker)
        pods.worker(4)
        said, _ = second.communicate(timeout=240)
        assert (second.returncode, "12 in = 12 ok + 0 failed" in said) == (0, True), said
        assert [status for _, status in pods.jobs()] == ["SUCCEEDED"], "once submitted"
    assert cluster.labelled() == dict.fromkeys(cluster.keys, "ok")


def test_a_head_that_begins_again_is_given_the_job_by_the_next_submitter(s3, stored, tmp_path):
    with begun(s3, stored, tmp_path) as (cluster, pods, proxy):
        head = pods.head()
        worker, first = pods.worker(), pods.submitter()
        in_the_middle(proxy)
        kill(head)
        said, _ = first.communicate(timeout=120)
        assert first.returncode != 0, f"else KubeRay would take it for done: {said}"
        kill(worker)  # Ray's own gives up after a minute without a head
        second = pods.submitter()
        pods.head()
        pods.worker(4)
        said, _ = second.communicate(timeout=240)
        assert (second.returncode, "12 in = 12 ok + 0 failed" in said) == (0, True), said
        assert [status for _, status in pods.jobs()] == ["SUCCEEDED"]
    assert cluster.labelled() == dict.fromkeys(cluster.keys, "ok")


@pytest.mark.parametrize(
    ("left", "code", "told"), [(0, 75, "No space left on device"), (2**20, 0, "12 in = 12 ok + 0 failed")], ids=["full", "nearly"]
)
def test_a_full_volume_is_said_or_done_without(s3, stored, tmp_path, *, left: int, code: int, told: str):
    cluster = Cluster(s3, stored, tmp_path)
    pod = cluster.pod()
    (scratch,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "scratch")
    scratch["sizeLimit"] = "64Mi"
    fill = f"head -c {2**26 - left} /dev/zero >/tmp/full; exec nightlabel run /job/job.yaml"
    ended, said = cluster.box.run(pod, ["sh", "-c", fill])
    assert (ended, told in said) == (code, True), said
    assert code or cluster.labelled() == dict.fromkeys(cluster.keys, "ok")
