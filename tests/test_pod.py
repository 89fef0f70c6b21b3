"""Rendered pods, run: as nobody, on a read-only root, with their own volumes and nothing else, they do their work."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kube_server import ApiServer
from kuberay import KubeRay
from kubeschema import templates
from programs import wait_for
from sandbox import Pod, Sandbox, without_namespaces
from seaweed import Seaweed
from shards import write_tars
from test_render import DIGEST, GOLDEN, rendered, with_kind

from pipeline.kube.render import RenderOptions
from pipeline.storage import open_store

pytestmark = pytest.mark.skipif(bool(why := without_namespaces()), reason=why or "there are namespaces")

JOB = """
name: small
input: {{uri: s3://{bucket}/photos/}}
model: {{uri: {model}}}
output: {{uri: s3://{bucket}/labels/}}
resources:
  read: {{cpus_per_task: 0.1}}
  preprocess: {{cpus_per_actor: 0.2}}
  predict: {{cpus_per_actor: 0.5, batch_size: 8}}
  object_store: 128MiB
cluster:
  head: {{cpus: 2, memory: 4GiB}}{workers}
  kubernetes: {{secrets: [s3-keys]}}
schedule: {{cron: "0 2 * * *"}}
"""
WORKERS = "\n  workers: {count: 1, cpus: 2, memory: 4GiB}"
PROBE = """
import json, os
def tried(do):
    try:
        do()
    except OSError as error:
        return error.strerror
    return "done"
status = dict(line.rstrip().split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "writes": {folder: tried(lambda: open(folder + "/x", "w").close()) for folder in
               ("/", "/var/tmp", "/etc", "/dev", "/job", "/tmp", "/dev/shm")},
    "root again": tried(lambda: os.setuid(0)),
    "ids": [os.getuid(), os.getgid(), os.getpid()],
    "powers": {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16} and status["NoNewPrivs"].strip(),
}))
"""


@pytest.fixture(scope="module")
def stored(s3: Seaweed, model: str) -> str:
    """The model, in a bucket."""
    uri = f"s3://{s3.bucket()}/model"
    store = open_store("s3://", s3.options)  # which tries again where a busy server hangs up over 45 MB
    for path in (path for path in Path(model).rglob("*") if path.is_file()):
        store.create(f"{uri}/{path.relative_to(model)}", path.read_bytes())
    return uri


class Cluster:
    """A bucket with photographs, a job for them, and what a node needs to run its pods."""

    def __init__(self, s3: Seaweed, model: str, folder: Path, *, workers: str = "", endpoint: str = "") -> None:
        self.s3, self.bucket = s3, s3.bucket()
        self.keys = write_tars(folder / "in", shards=3, images=4)
        for path in (folder / "in").iterdir():
            s3.put(f"s3://{self.bucket}/photos/{path.name}", path.read_bytes())
        self.job = JOB.format(bucket=self.bucket, model=model, workers=workers)
        keys = s3.env | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})
        self.box = Sandbox(folder, secrets={"s3-keys": keys}, files={"small": {"job.yaml": self.job}})

    def pod(self) -> Pod:
        """Of a night that is one pod."""
        (template,) = templates(with_kind(rendered(self.job, RenderOptions("cronjob", image=DIGEST)), "CronJob"))
        return template["spec"]

    def labelled(self) -> dict[str, str]:
        """Status by key."""
        store = open_store("s3://", self.s3.options)
        uris = [item.uri for item in store.list(f"s3://{self.bucket}/labels/") if "/data/" in item.uri]
        rows = pa.concat_tables([pq.read_table(pa.BufferReader(store.read(uri))) for uri in uris])
        assert rows.num_rows == len(set(rows.column("key").to_pylist()))
        return dict(zip(rows.column("key").to_pylist(), rows.column("status").to_pylist(), strict=True))

    def kept(self) -> set[str]:
        """Suffixes of the logs beside the run's papers."""
        listed = open_store("s3://", self.s3.options).list(f"s3://{self.bucket}/labels/")
        return {Path(item.uri).suffix for item in listed if "/logs/" in item.uri}


def test_a_night_in_one_pod_labels_everything(s3, stored, tmp_path):
    cluster = Cluster(s3, stored, tmp_path)
    code, said = cluster.box.run(cluster.pod())
    assert code == 0, said
    assert cluster.labelled() == dict.fromkeys(cluster.keys, "ok")
    assert cluster.kept() == {".jsonl", ".gz"}


def test_the_sandbox_is_one(s3, stored, tmp_path):
    cluster = Cluster(s3, stored, tmp_path)
    code, said = cluster.box.run(cluster.pod(), ["python", "-c", PROBE])
    assert code == 0, said
    found = json.loads(said)
    read_only = "Read-only file system"
    assert {folder: answer for folder, answer in found["writes"].items() if answer != "done"} == {
        "/": read_only,
        "/var/tmp": read_only,  # where everybody might write, were it not for that
        "/etc": read_only,
        "/dev": read_only,
        "/job": read_only,
    }
    assert found["root again"] == "Operation not permitted"
    assert found["ids"] == [1000, 1000, 1], "the first process of the pod, as it was told"
    assert found["powers"] == "1"


def test_a_pod_without_its_volume_does_not_run(s3, stored, tmp_path):
    cluster = Cluster(s3, stored, tmp_path)
    pod = cluster.pod()
    mounts = pod["containers"][0]["volumeMounts"]
    pod["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["mountPath"] != "/tmp"]
    code, said = cluster.box.run(pod)
    assert (code, "Read-only file system: '/tmp" in said) == (2, True), said


def test_a_ray_job_of_three_pods_labels_everything(s3, stored, tmp_path):
    """Under a number that nobody on this machine has, as some clusters give them out."""
    cluster = Cluster(s3, stored, tmp_path, workers=WORKERS)
    spec = with_kind(rendered(cluster.job, RenderOptions("rayjob", image=DIGEST)), "RayJob")["spec"]
    for template in templates(spec):
        template["spec"]["securityContext"]["runAsUser"] = 54321
    with KubeRay(cluster.box, spec) as kuberay:
        kuberay.head()
        kuberay.worker()
        submitter = kuberay.submitter()
        said, _ = submitter.communicate(timeout=240)
    assert (submitter.returncode, "succeeded" in said) == (0, True), said
    assert cluster.labelled() == dict.fromkeys(cluster.keys, "ok")
    assert cluster.kept() == {".jsonl", ".gz"}


def test_a_pod_that_applies_does_so(tmp_path):
    text, wish = GOLDEN["cronjob"]
    (template,) = templates(with_kind(rendered(text, wish), "CronJob"))
    with ApiServer() as server:
        server.kubeconfig(tmp_path / "kubeconfig")  # for the account's token, which is only taken over TLS
        files = {"job.yaml": text, "kubeconfig": (tmp_path / "kubeconfig").read_text()}
        box = Sandbox(tmp_path, secrets={}, files={"nightly-products": files})
        with box.running(template["spec"], KUBECONFIG="/job/kubeconfig", NIGHTLABEL_TICK="tick-1") as applying:
            wait_for(lambda: ("rayjobs", "nightly-products") in server.objects(), seconds=120.0)

            def ended() -> bool:  # told again: without resource versions, what comes between a look and a watch is not heard
                server.status("nightly-products", "Complete", jobStatus="SUCCEEDED")
                return applying.poll() is not None

            wait_for(ended, seconds=120.0)
            said = applying.stdout.read()
            made = server.objects()["rayjobs", "nightly-products"]
    assert applying.returncode == 0, said
    assert made["metadata"]["annotations"]["nightlabel/tick"] == "tick-1"
