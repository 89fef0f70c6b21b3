"""Kubernetes objects: as they were, as the API servers take them, restricted, and right for every job."""

from __future__ import annotations

import copy
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kubernetes.utils import parse_quantity
from kubeschema import check, check_kuberay, templates, unrestricted

from pipeline.errors import JobError
from pipeline.job.jobfile import load_label_template, parse_job
from pipeline.job.schedule import TICK
from pipeline.kube.pods import object_name
from pipeline.kube.render import RenderOptions, render, to_yaml
from pipeline.spec import Job

NIGHTLY = (ROOT / "jobs/nightly-products.yaml").read_text()
HEAD_ONLY = """
name: small
input: {uri: s3://photos/}
model: {uri: s3://models/m/}
output: {uri: s3://labels/}
cluster: {head: {cpus: 4, memory: 8GiB}}
schedule: {cron: "0 2 * * *", timezone: Europe/Berlin, if_running: queue}
"""
DIGEST = "images.example/nightlabel@sha256:" + "5" * 64
GOLDEN = {
    "rayjob": (NIGHTLY, RenderOptions("rayjob", date="2026-11-01")),
    "raycronjob": (NIGHTLY, RenderOptions("raycronjob", date="today")),
    "cronjob": (NIGHTLY, RenderOptions("cronjob", date="today")),
    "cronjob-head-only": (HEAD_ONLY, RenderOptions("cronjob", image=DIGEST)),
}


def job_of(text: str, date: str | None = "2026-11-01") -> Job:
    job = parse_job(text.encode(), date=date)
    assert isinstance(job, Job)
    return job


def rendered(text: str, wish: RenderOptions) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(to_yaml(render(job_of(text), text, wish))))


def with_kind(things: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (thing,) = [thing for thing in things if thing["kind"] == kind]
    return thing


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str):
    """Regenerate: python tests/test_render.py"""
    text, wish = GOLDEN[name]
    assert to_yaml(render(job_of(text), text, wish)) == (ROOT / f"tests/golden/{name}.yaml").read_text()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_api_servers_take_it_as_it_is(name: str):
    for thing in rendered(*GOLDEN[name]):
        check(thing)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_pod_is_restricted_and_takes_what_it_asks_for(name: str):
    pods = [template["spec"] for thing in rendered(*GOLDEN[name]) for template in templates(thing)]
    assert pods
    for pod in pods:
        assert unrestricted(pod) == []
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
            assert "@sha256:" in container["image"]


def test_the_checks_can_fail():
    (job,) = [thing for thing in rendered(*GOLDEN["rayjob"]) if thing["kind"] == "RayJob"]
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodeSelectors"):
        check(wrong)
    wrong = copy.deepcopy(job)
    wrong["spec"]["managedBy"] = "ray.io/kuberay-operator"
    with pytest.raises(AssertionError, match="managedBy"):
        check(wrong)
    (cron,) = [thing for thing in rendered(*GOLDEN["cronjob"]) if thing["kind"] == "CronJob"]
    cron["spec"]["jobTemplate"]["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        check(cron)
    (pod,) = [template["spec"] for template in templates(cron)]
    pod["containers"][0]["securityContext"].update(capabilities={"drop": ["NET_RAW"]}, allowPrivilegeEscalation=True)
    pod["securityContext"]["runAsUser"] = 0
    assert unrestricted(pod) == ["apply: may be root", "apply: privileges", "apply: capabilities"]


def test_nodes_are_waited_for_as_long_as_the_job_says():
    text = NIGHTLY.replace("cluster:\n", "cluster:\n  wait: 5m\n").replace("deadline: 6h", "deadline: 1h")
    plain, told = (with_kind(rendered(job, GOLDEN["rayjob"][1]), "RayJob")["spec"] for job in (NIGHTLY, text))
    assert (plain["preRunningDeadlineSeconds"], told["preRunningDeadlineSeconds"]) == (1800, 300)
    assert plain["activeDeadlineSeconds"] - told["activeDeadlineSeconds"] == 5 * 3600 + 1500


DATED = HEAD_ONLY.replace("s3://photos/", '"s3://photos/{date}/"') + "limits: {deadline: 1h}\n"


@pytest.mark.parametrize(
    ("text", "date", "days"),
    [
        (DATED, "2026-11-01", 1),
        (DATED, "2026-11-01..2026-11-30", 30),
        (DATED, "yesterday", 1),
        (DATED.replace("queue}", "queue, catch_up: 7d}"), "yesterday", 8),
        (DATED.replace("queue}", "queue, catch_up: 7d}"), "2026-11-01", 1),
        (DATED.replace("queue}", "queue, catch_up: 7d}").replace("{date}/", ""), "yesterday", 1),
    ],
)
def test_the_deadline_is_of_every_day_and_every_attempt(text: str, date: str, days: int, tmp_path: Path):
    """The driver's own begins anew for every day. KubeRay's clock does for every attempt; that of a Kubernetes Job does not."""
    path, workers = tmp_path / "job.yaml", "memory: 8GiB}, workers: {count: 1, cpus: 4, memory: 8GiB}"

    def spec(target: Any, kind: str, text: str = text) -> dict[str, Any]:
        path.write_text(text)
        things = render(load_label_template(path), text, RenderOptions(target, date, DIGEST))
        return with_kind([dict(thing) for thing in things], kind)["spec"]

    last = 1800 + days * (3600 + 600)
    assert spec("rayjob", "RayJob")["activeDeadlineSeconds"] == last
    queued = last + 6 * 3600  # for another night: its lease in the driver, its RayJob in what applies
    assert spec("raycronjob", "RayCronJob")["jobTemplate"]["activeDeadlineSeconds"] == queued
    assert spec("cronjob", "CronJob")["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 2 * queued
    skipping = spec("cronjob", "CronJob", text.replace("if_running: queue", "if_running: skip"))
    assert skipping["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 2 * last
    applied = spec("cronjob", "CronJob", text.replace("memory: 8GiB}", workers))
    assert applied["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 2 * queued


def test_what_the_job_says_is_in_the_ray_job():
    spec = with_kind(rendered(*GOLDEN["rayjob"]), "RayJob")["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] | {"ephemeral-storage": ""} == {
        "cpu": "16",
        "memory": "64Gi",
        "nvidia.com/gpu": "1",
        "ephemeral-storage": "",
    }
    assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "spot", "karpenter.k8s.aws/instance-gpu-name": "l4"}
    assert {toleration["key"] for toleration in pod["tolerations"]} == {"karpenter.sh/capacity-type", "nvidia.com/gpu"}
    assert "nodeSelector" not in head["template"]["spec"]
    (term,) = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"].values()
    assert term == [{"matchExpressions": [{"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]}]}]
    assert spec["backoffLimit"] == 2
    assert spec["activeDeadlineSeconds"] > 6 * 3600
    assert spec["shutdownAfterJobFinishes"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["submissionMode"] == "K8sJobMode"  # which the schema takes as any text
    assert spec["entrypoint"] == "nightlabel run /job/job.yaml --date 2026-11-01 --if-running share --again"


def test_what_kuberay_tries_again_ends_as_the_attempt_before_it():
    once = HEAD_ONLY.replace("memory: 8GiB}", "memory: 8GiB}, kubernetes: {attempts: 1}")
    for text, again in ((HEAD_ONLY, True), (once, False)):
        night = with_kind(rendered(text, RenderOptions("rayjob", image=DIGEST)), "RayJob")["spec"]
        every_night = with_kind(rendered(text, RenderOptions("raycronjob", image=DIGEST)), "RayCronJob")["spec"]["jobTemplate"]
        for spec in (night, every_night):
            assert ("--again" in spec["entrypoint"].split()) == again == (spec["backoffLimit"] > 0)


def test_one_run_is_for_one_day_whenever_its_attempts_begin(one_day: str):
    for text, days in ((HEAD_ONLY, {one_day}), (HEAD_ONLY.replace("queue}", "queue, catch_up: 3d}"), {"today"})):
        (job,) = [thing for thing in rendered(text, RenderOptions("rayjob", "today", DIGEST)) if thing["kind"] == "RayJob"]
        assert job["spec"]["entrypoint"].split()[4] in days


@pytest.mark.parametrize(
    ("name", "label"), [("cronjob", "job-name"), ("cronjob-head-only", "job-name"), ("raycronjob", "ray.io/cluster")]
)
def test_the_driver_of_a_scheduled_run_knows_its_tick(name: str, label: str):
    """By the label of a Job or a cluster, which is called after the minute. Workers ask for no day."""
    told = []
    for template in (template for thing in rendered(*GOLDEN[name]) for template in templates(thing)):
        env = template["spec"]["containers"][0]["env"]
        told += [variable["valueFrom"] for variable in env if variable["name"] == TICK]
    assert told == [{"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}]


def test_the_run_of_a_tick_hands_it_on():
    job = with_kind(rendered(NIGHTLY, RenderOptions("rayjob", "today", tick="n-29927400")), "RayJob")
    head, *others = (template["spec"]["containers"][0]["env"] for template in templates(job["spec"]["rayClusterSpec"]))
    assert {"name": TICK, "value": "n-29927400"} in head
    assert all(variable["name"] != TICK for env in others for variable in env)


SETTINGS = {
    "image": "images.example/other@sha256:" + "6" * 64,
    "namespace": "night",
    "labels": {"kueue.x-k8s.io/queue-name": "q", "app.kubernetes.io/name": "theirs"},
    "pod_labels": {"azure.workload.identity/use": "true", "app.kubernetes.io/instance": "theirs"},
    "node_selector": {"zone": "a"},
    "pull_secrets": ["registry", "mirror"],
    "secrets": ["s3-keys"],
    "spot": {"capacity": "spot"},
    "service_account": "labeller",
    "service_account_annotations": {"eks.amazonaws.com/role-arn": "arn:1"},
}


@pytest.mark.parametrize("workers", [None, {"count": 2, "cpus": 4, "gpus": 1, "gpu_type": "t4"}])
@pytest.mark.parametrize("target", ["rayjob", "raycronjob", "cronjob"])
def test_what_the_settings_say_is_in_every_object_and_pod(target: Any, workers: dict[str, Any] | None):
    """On spot nodes are the workers, and the pod that is all there is; who says what is ours is not overruled."""
    cluster = {"head": {"cpus": 4, "memory": "8GiB"}, "kubernetes": SETTINGS} | ({"workers": workers} if workers else {})
    text = yaml.safe_dump(yaml.safe_load(HEAD_ONLY) | {"cluster": cluster})
    things = rendered(text, RenderOptions(target, image=DIGEST))
    ours = {"app.kubernetes.io/name": "nightlabel", "app.kubernetes.io/instance": "small"}
    ours |= {"app.kubernetes.io/managed-by": "nightlabel"}
    assert with_kind([thing for thing in things if "annotations" in thing["metadata"]], "ServiceAccount")["metadata"] == {
        "name": "labeller",
        "namespace": "night",
        "labels": ours | {"kueue.x-k8s.io/queue-name": "q"},
        "annotations": {"eks.amazonaws.com/role-arn": "arn:1"},
    }
    for thing in things:
        assert thing["metadata"]["namespace"] == "night"
        assert thing["metadata"]["labels"] == ours | {"kueue.x-k8s.io/queue-name": "q"}
        for pod in templates(thing):
            assert pod["metadata"]["labels"] == ours | {"azure.workload.identity/use": "true"}
            spec, (container,) = pod["spec"], pod["spec"]["containers"]
            assert container["image"] == DIGEST, "--image stands in for the job's"
            assert spec["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror"}]
            gpus = "nvidia.com/gpu" in container["resources"]["limits"]
            on_spot = gpus or (target == "cronjob" and not workers)
            selector = {"zone": "a"} | ({"capacity": "spot"} if on_spot else {})
            gpu_type = {"cloud.google.com/gke-accelerator": "t4"} if gpus else {}
            assert spec["nodeSelector"] == selector | gpu_type
            assert ("affinity" in spec) != on_spot
            assert ("envFrom" in container) == (container["name"] == "ray")
            assert spec["serviceAccountName"] == ("small-apply" if container["name"] == "apply" else "labeller")


@example(150 * 2**20)  # of which half is for the object store
@given(st.integers(2**20, 2**50) | st.integers(1, 2**20).map(lambda number: number * 2**30))
def test_a_pod_has_the_memory_that_the_job_says(memory: int):
    text = HEAD_ONLY.replace("memory: 8GiB", f"memory: {memory}B") + "resources: {object_store: 75MiB}\n"
    if memory < 150 * 2**20:
        return
    (pod,) = (template for thing in rendered(text, RenderOptions("cronjob", image=DIGEST)) for template in templates(thing))
    (ray,) = pod["spec"]["containers"]
    assert parse_quantity(ray["resources"]["limits"]["memory"]) == memory
    sizes = {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
    assert 1 <= parse_quantity(sizes["shared-memory"]) / (75 * 2**20) <= Decimal("1.1")
    assert parse_quantity(sizes["scratch"]) == parse_quantity(ray["resources"]["limits"]["ephemeral-storage"]) == 16 * 2**30


@pytest.mark.parametrize(("if_running", "policy"), [("skip", "Forbid"), ("queue", "Allow"), ("replace", "Replace")])
def test_a_cron_job_does_with_the_last_run_what_the_schedule_says(if_running: str, policy: str):
    """Where they are allowed side by side the driver's own lease has the next one wait."""
    text = HEAD_ONLY.replace("if_running: queue", f"if_running: {if_running}")
    cron = with_kind(rendered(text, RenderOptions("cronjob", image=DIGEST)), "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == policy
    (pod,) = templates(cron)
    assert ("share" in pod["spec"]["containers"][0]["command"]) == (if_running != "queue")
    suspended = text.replace("memory: 8GiB}", "memory: 8GiB}, kubernetes: {suspend: true}")
    for target, kind in (("cronjob", "CronJob"), ("raycronjob", "RayCronJob")):
        assert with_kind(rendered(suspended, RenderOptions(target, image=DIGEST)), kind)["spec"]["suspend"]


def test_secrets_reach_ray_and_nobody_else():
    text = HEAD_ONLY.replace("memory: 8GiB}", "memory: 8GiB}, kubernetes: {secrets: [s3-keys], suspend: true}")
    job = with_kind(rendered(text, RenderOptions("rayjob", image=DIGEST)), "RayJob")
    head, submitter = (job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"], job["spec"]["submitterPodTemplate"])
    assert head["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert "envFrom" not in submitter["spec"]["containers"][0]
    assert job["spec"]["suspend"]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"] == []
    assert "num-cpus" not in job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]


@pytest.mark.parametrize(
    ("text", "wish", "words"),
    [
        (HEAD_ONLY, RenderOptions("rayjob"), "no image; required: cluster.kubernetes.image or --image"),
        (HEAD_ONLY, RenderOptions("rayjob", image="images.example/nightlabel:latest"), "has no digest"),
        (
            HEAD_ONLY.replace("s3://photos/", "photos/"),
            RenderOptions("rayjob", image=DIGEST),
            "input.uri is photos/; required: s3://",
        ),
        (
            HEAD_ONLY.replace("s3://models/m/", "/models/m/"),
            RenderOptions("rayjob", image=DIGEST),
            "model.uri is /models/m/; required: s3://",
        ),
        (
            HEAD_ONLY.replace("s3://labels/", "labels/"),
            RenderOptions("rayjob", image=DIGEST),
            "output.uri is labels/; required: s3",
        ),
        (HEAD_ONLY.replace("8GiB", "1GiB"), RenderOptions("rayjob", image=DIGEST), "object_store is 1 GiB of a node's 1 GiB"),
        (
            HEAD_ONLY.replace("8GiB}", "8GiB}, workers: {count: 1, cpus: 4, memory: 1GiB}"),
            RenderOptions("rayjob", image=DIGEST),
            "object_store is 1 GiB of a node's 1 GiB",
        ),
        (HEAD_ONLY.partition("cluster")[0], RenderOptions("rayjob", image=DIGEST), "no cluster section"),
        (HEAD_ONLY.partition("schedule")[0], RenderOptions("cronjob", image=DIGEST), "no schedule in the job"),
    ],
)
def test_refusals(text: str, wish: RenderOptions, words: str):
    with pytest.raises(JobError, match=words.replace("(", r"\(")):
        render(job_of(text), text, wish)


def test_a_tag_is_taken_when_that_is_said():
    text = HEAD_ONLY.replace("memory: 8GiB}", "memory: 8GiB}, kubernetes: {allow_tags: true}")
    things = rendered(text, RenderOptions("rayjob", image="images.example/nightlabel:1"))
    assert with_kind(things, "RayJob")["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"].endswith(":1")


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", fullmatch=True)


@given(NAMES, NAMES)
@example("a" * 36, "a" * 37)
@example("a" * 50, "a" * 49 + "b")
@example("1" * 36, "a" * 26 + "-" * 10 + "b")
def test_names_are_rfc_1035_and_differ(one: str, other: str):
    for name in (one, other):
        made = object_name(name)
        assert len(made) <= 36
        assert made[0].isalpha()
        assert made[-1] != "-"
        assert made == name or not name[0].isalpha() or len(name) > 36
    assert one == other or object_name(one) != object_name(other) or f"job-{one}" == other or f"job-{other}" == one


@settings(deadline=None, max_examples=40)
@given(
    name=NAMES,
    head=st.tuples(st.integers(1, 64), st.integers(4, 512)),
    workers=st.none() | st.tuples(st.integers(1, 500), st.integers(2, 192), st.integers(0, 8), st.integers(4, 2048)),
    kubernetes=st.fixed_dictionaries(
        {},
        optional={
            "spot": st.dictionaries(st.sampled_from(["a/b", "spot", "x.y/z-1"]), st.sampled_from(["", "true", "spot"])),
            "attempts": st.integers(1, 9),
            "suspend": st.booleans(),
            "secrets": st.lists(NAMES, max_size=2, unique=True),
            "service_account_annotations": st.dictionaries(st.just("eks.amazonaws.com/role-arn"), st.text("abc:/ é", max_size=9)),
            "ttl": st.sampled_from(["0s", "1h", "1.5s"]),
        },
    ),
    deadline=st.none() | st.sampled_from(["1s", "6h", "0.5s"]),
    target=st.sampled_from(["rayjob", "raycronjob", "cronjob"]),
)
def test_every_job_renders_valid_objects(*, name, head, workers, kubernetes, deadline, target):
    cluster: dict[str, Any] = {"head": {"cpus": head[0] + 1, "memory": f"{head[1]}GiB"}, "kubernetes": kubernetes}
    if workers:
        cluster["workers"] = dict(
            zip(("count", "cpus", "gpus"), workers[:3], strict=True), memory=f"{workers[3]}GiB", gpu_type="t4"
        )
    job = yaml.safe_load(HEAD_ONLY) | {"name": name, "cluster": cluster}
    job |= {"limits": {"deadline": deadline}} if deadline else {}
    text = yaml.safe_dump(job)
    for thing in rendered(text, RenderOptions(target, image=DIGEST)):
        if thing["apiVersion"] == "ray.io/v1":
            check_kuberay(thing)
        for template in templates(thing):
            assert unrestricted(template["spec"]) == []
        if thing["kind"] == "ConfigMap":
            assert thing["data"]["job.yaml"] == text


@pytest.mark.parametrize("name", GOLDEN)
def test_the_pods_commands_are_commands_of_ours(name: str, tmp_path: Path):
    """They get as far as the job file, which is not there."""
    absent = str(tmp_path / "absent.yaml")
    for thing in rendered(*GOLDEN[name]):
        spec = thing.get("spec", {})
        commands = [
            container["command"] for pod in templates(thing) for container in pod["spec"]["containers"] if "command" in container
        ]
        commands += [entry.split() for entry in (spec.get("entrypoint"), spec.get("jobTemplate", {}).get("entrypoint")) if entry]
        for program, *words in commands:
            assert program == "nightlabel"
            called = [absent if word == "/job/job.yaml" else word for word in words]
            done = subprocess.run([sys.executable, "-m", "pipeline", *called], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (
                2,
                f"nightlabel: {absent}: No such file or directory; required: a job file in YAML. Give the path of a job file.\n",
            )


def test_the_command_asks_for_a_date_and_for_a_job_that_labels():
    for words, said in (
        (["jobs/nightly-products.yaml"], "{date}, which needs a date"),
        (["jobs/nightly-products.yaml", "--date", "2026-13-01"], "--date is '2026-13-01'; required"),
        (["jobs/demo-model.yaml"], "kind is finetune; required: label"),
    ):
        command = [sys.executable, "-m", "pipeline", "render", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 2
        assert said in done.stderr


def test_the_command_prints_it(tmp_path: Path):
    words = [sys.executable, "-m", "pipeline", "render", str(ROOT / "jobs/nightly-products.yaml"), "--date", "2026-11-01"]
    done = subprocess.run([*words, "--target", "rayjob"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "tests/golden/rayjob.yaml").read_text()


if __name__ == "__main__":
    for name, (text, wish) in GOLDEN.items():
        (ROOT / f"tests/golden/{name}.yaml").write_text(to_yaml(render(job_of(text), text, wish)))
