"""A job as KubeRay's RayJob: a cluster of its own for one run, gone afterwards; and as RayCronJob, by schedule.

K8sJobMode, because in it every pod is ours to restrict, the submitter's too, and `kubectl logs` shows the driver. SidecarMode has
no template for its submitter; HTTPMode has no pod whose logs outlive the head. The driver runs on the head, which has no CPUs for
anything else. RayJob wants KubeRay 1.6; RayCronJob 1.7, whose forerunner drops `timeZone` in silence.
"""

from __future__ import annotations

import importlib.metadata
from typing import Literal, NotRequired, TypedDict

from pipeline.job.resources import Cluster, Workers
from pipeline.job.schedule import Schedule
from pipeline.kube.pods import Site, Size, container, on_gpus, pod, ray_pod, tell_tick
from pipeline.kube.types import Meta, PodTemplate, Strings
from pipeline.spec import Job

_NODES_S = 1800  # for nodes to come up, images to be pulled; GPU capacity may take a while
_CLOSING_S = 600  # after the deadline the driver still commits what is in flight and copies logs
_SUBMITTER = Size(cpus=0.5, memory=512 * 2**20)
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}  # no Ray client, which nobody here uses


class HeadGroup(TypedDict):
    rayStartParams: Strings
    template: PodTemplate


class WorkerGroup(TypedDict):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: Strings
    template: PodTemplate


class AuthOptions(TypedDict):
    mode: Literal["token"]


class RayClusterSpec(TypedDict):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class SubmitterConfig(TypedDict):
    backoffLimit: int


class RayJobSpec(TypedDict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    suspend: NotRequired[bool]
    backoffLimit: int
    preRunningDeadlineSeconds: int
    activeDeadlineSeconds: NotRequired[int]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    submitterConfig: SubmitterConfig
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec


class RayCronJobSpec(TypedDict):
    schedule: str
    timeZone: str
    suspend: bool
    jobTemplate: RayJobSpec


class RayJob(TypedDict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Meta
    spec: RayJobSpec


class RayCronJob(TypedDict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Meta
    spec: RayCronJobSpec


def ray_job(job: Job, cluster: Cluster, site: Site, *, entrypoint: str, days: int) -> RayJob:
    """The run as a RayJob; `days` is how many it labels at most."""
    spec = _spec(job, cluster, site, entrypoint, attempt_seconds(job, days))
    spec["suspend"] = site.settings.suspend
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": site.meta(), "spec": spec}


def ray_cron_job(job: Job, cluster: Cluster, site: Site, *, entrypoint: str, schedule: Schedule, days: int) -> RayCronJob:
    """The same by schedule. KubeRay starts a RayJob at every tick: what to do when the last one still runs, the driver's lease
    decides."""
    every = _spec(job, cluster, site, entrypoint, attempt_seconds(job, days, schedule))
    tell_tick(every["rayClusterSpec"]["headGroupSpec"]["template"], "ray.io/cluster")
    spec: RayCronJobSpec = {
        "schedule": schedule.cron,
        "timeZone": schedule.timezone,
        "suspend": site.settings.suspend,
        "jobTemplate": every,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": site.meta(), "spec": spec}


def _nodes_seconds(job: Job) -> int:
    """How long a cluster may take to come up: `cluster.wait`, or half an hour."""
    wait = job.cluster.wait if job.cluster else None
    return _NODES_S if wait is None else int(wait)


def attempt_seconds(job: Job, days: int, schedule: Schedule | None = None) -> int | None:
    """How long an attempt may take, nodes and all; None: it has no deadline. The driver's own begins anew for every day, and
    after the wait for another run, where the `schedule` has it wait."""
    if job.limits.deadline is None:
        return None
    wait = schedule.queues_for if schedule else 0
    return _nodes_seconds(job) + int(wait) + days * (int(job.limits.deadline) + _CLOSING_S)


def _spec(job: Job, cluster: Cluster, site: Site, entrypoint: str, seconds: int | None) -> RayJobSpec:
    submitter = pod(site, container("ray-job-submitter", site, _SUBMITTER))
    submitter["spec"]["restartPolicy"] = "Never"
    # KubeRay tries again after any exit code but 0, also after 4, when everything is committed and nothing is left to do.
    again = " --again" if site.settings.attempts > 1 else ""
    spec: RayJobSpec = {
        "entrypoint": entrypoint + again,
        "submissionMode": "K8sJobMode",
        "backoffLimit": site.settings.attempts - 1,
        "preRunningDeadlineSeconds": _nodes_seconds(job),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": int(site.settings.ttl),
        "submitterConfig": {"backoffLimit": 2},  # it asks whether its job is there already, and follows that one
        "submitterPodTemplate": submitter,
        "rayClusterSpec": _cluster(job, cluster, site),
    }
    if seconds is not None:
        # The driver's own deadline comes first. This one ends what no longer listens, and KubeRay does not try again after it.
        spec["activeDeadlineSeconds"] = seconds
    return spec


def _cluster(job: Job, cluster: Cluster, site: Site) -> RayClusterSpec:
    head, workers, store = cluster.head, cluster.workers, job.resources.object_store
    # Beside workers only the driver reads blocks on the head. 75 MiB is Ray's least.
    own = max(75 * 2**20, min(store, head.memory // 4)) if workers else store
    template = ray_pod(site, Size(head.cpus, head.memory, object_store=own), job_file=True)
    template["spec"]["containers"][0]["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    params = {"object-store-memory": str(own), **({"num-cpus": "0"} if workers else {})}
    return {
        # By the version KubeRay knows that it can probe over HTTP; else it calls wget, which a small image lacks.
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": params, "template": template},
        "workerGroupSpecs": [_workers(workers, site, store)] if workers else [],
    }


def _workers(workers: Workers, site: Site, store: int) -> WorkerGroup:
    template = ray_pod(site, Size(workers.cpus, workers.memory, workers.gpus, store), spot=True)
    if workers.gpus:
        on_gpus(template, site, workers.gpu_type)
    return {
        "groupName": "workers",
        "replicas": workers.count,
        "minReplicas": workers.count,
        "maxReplicas": workers.count,
        "rayStartParams": {"object-store-memory": str(store)},
        "template": template,
    }
