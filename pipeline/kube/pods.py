"""Pods as a careful cluster wants them: Pod Security "restricted" and a read-only root, requests that are the limits.

Every pod of ours is made here. What it writes goes to two volumes: /tmp, which is also its home and Ray's folder, and /dev/shm,
which Ray's object store fills and the memory limit includes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.environment import RAYLET_ENVIRONMENT
from pipeline.job.placement import Kubernetes
from pipeline.job.quantity import text
from pipeline.job.schedule import TICK
from pipeline.kube.types import (
    Container,
    Demand,
    EmptyDir,
    EnvSource,
    Expression,
    Meta,
    NodeTerms,
    PodMeta,
    PodSpec,
    PodTemplate,
    Seccomp,
    Strings,
    Volume,
)

Target = Literal["rayjob", "raycronjob", "cronjob"]

JOB_FOLDER = "/job"
JOB_FILE = f"{JOB_FOLDER}/job.yaml"
_USER = 1000  # of the image; any number but 0 does
_LONGEST = 36  # KubeRay: a RayCronJob, whose jobs append 11 characters, and their clusters another 6
_ENVIRONMENT = {"HOME": "/tmp", "RAY_USAGE_STATS_ENABLED": "0", **RAYLET_ENVIRONMENT}
_SECCOMP: Seccomp = {"type": "RuntimeDefault"}
_bytes = text({"Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10, "": 1})


@dataclass(frozen=True)
class Site:
    """What all objects of one job share: the name they go by, the image, the settings of the cluster."""

    name: str
    image: str
    settings: Kubernetes

    def meta(self, name: str = "") -> Meta:
        return {"name": name or self.name, "namespace": self.settings.namespace, "labels": self._labels(self.settings.labels)}

    def pod_meta(self) -> PodMeta:
        return {"labels": self._labels(self.settings.pod_labels)}

    def _labels(self, more: Strings) -> Strings:
        ours = {"app.kubernetes.io/name": "nightlabel", "app.kubernetes.io/instance": self.name}
        return {**more, **ours, "app.kubernetes.io/managed-by": "nightlabel"}


@dataclass(frozen=True)
class Size:
    """What a pod takes, and of its memory what goes to Ray's object store; bytes. `scratch` is its disk."""

    cpus: float
    memory: int
    gpus: int = 0
    object_store: int = 0
    scratch: int = 2**30


def object_name(name: str) -> str:
    """The job's name as one of RFC 1035, which a Service needs: it begins with a letter; a long one ends with its hash."""
    name = name if name[0].isalpha() else f"job-{name}"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def container(name: str, site: Site, size: Size, *, command: list[str] | None = None) -> Container:
    """The one container of a pod. Without a command KubeRay fills it in."""
    made: Container = {
        "name": name,
        "image": site.image,
        "env": [{"name": variable, "value": value} for variable, value in _ENVIRONMENT.items()],
        "resources": _demand(size),
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": _SECCOMP,
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }
    if command:
        made["command"] = command
    return made


def pod(site: Site, only: Container, *, scratch: int = 2**30, job_file: bool = False, spot: bool = False) -> PodTemplate:
    """A pod of one container. `job_file`: with the job at JOB_FILE; `spot`: on the nodes that cluster.kubernetes.spot names, and
    else on none of them."""
    settings = site.settings
    spec: PodSpec = {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,  # IRSA and workload identity bring a token of their own
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": _SECCOMP,
        },
        "containers": [only],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": _bytes(scratch)}}],
    }
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in settings.pull_secrets]
    selector = settings.node_selector | (settings.spot if spot else {})
    if selector:
        spec["nodeSelector"] = selector
    if spot and settings.spot:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in settings.spot]
    elif settings.spot:  # not every cluster taints its spot nodes
        others: list[Expression] = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in settings.spot.items()]
        terms: NodeTerms = {"nodeSelectorTerms": [{"matchExpressions": others}]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    if job_file:
        spec["volumes"].append({"name": "job", "configMap": {"name": site.name}})
        only["volumeMounts"].append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    return {"metadata": site.pod_meta(), "spec": spec}


def ray_pod(
    site: Site, size: Size, *, command: list[str] | None = None, job_file: bool = False, spot: bool = False
) -> PodTemplate:
    """A pod that runs Ray: with shared memory for its object store, a large disk, and the credentials for the stores."""
    size = replace(size, scratch=site.settings.scratch)
    ray = container("ray", site, size, command=command)
    if site.settings.secrets:
        ray["envFrom"] = [{"secretRef": {"name": secret}} for secret in site.settings.secrets]
    ray["env"].append({"name": "NIGHTLABEL_KEEP_LOGS", "value": "1"})
    made = pod(site, ray, scratch=size.scratch, job_file=job_file, spot=spot)
    # Ray leaves /dev/shm for the disk when it does not hold the store and a little more.
    shared: EmptyDir = {"medium": "Memory", "sizeLimit": _bytes(size.object_store + size.object_store // 16)}
    volume: Volume = {"name": "shared-memory", "emptyDir": shared}
    made["spec"]["volumes"].append(volume)
    ray["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    return made


def on_gpus(template: PodTemplate, site: Site, gpu_type: str | None) -> None:
    """The pod goes to nodes with GPUs, of the type when there is one; they are tainted so that nothing else does."""
    spec = template["spec"]
    spec.setdefault("tolerations", []).append({"key": "nvidia.com/gpu", "operator": "Exists"})
    if gpu_type:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), site.settings.gpu_label: gpu_type}


def tell_tick(template: PodTemplate, label: str) -> None:
    """The pod knows by its label which tick of the schedule it is of."""
    source: EnvSource = {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}
    template["spec"]["containers"][0]["env"].append({"name": TICK, "valueFrom": source})


def _demand(size: Size) -> Demand:
    amount = {
        "cpu": f"{size.cpus:g}",
        "memory": _bytes(size.memory),
        "ephemeral-storage": _bytes(size.scratch),
        **({"nvidia.com/gpu": str(size.gpus)} if size.gpus else {}),
    }
    return {"requests": amount, "limits": amount}
