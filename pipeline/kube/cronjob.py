"""A job as a CronJob, for clusters whose KubeRay has no RayCronJob, or that have no KubeRay.

With workers, the pod of a night is small: it runs `nightlabel apply`, which makes the RayJob and follows it, so that the Job ends
when the run does and concurrencyPolicy means the whole run. Without workers the pod itself runs the job, on a Ray of its own.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from pipeline.errors import ExitCode
from pipeline.job.resources import Cluster
from pipeline.job.schedule import Schedule
from pipeline.kube.kuberay import attempt_seconds
from pipeline.kube.pods import Site, Size, container, pod, ray_pod, tell_tick
from pipeline.kube.types import Meta, PodMeta, PodTemplate, ServiceAccount
from pipeline.spec import Job

_JOB_NAME = "job-name"  # the label
_APPLIER = Size(cpus=0.25, memory=512 * 2**20)
Concurrency = Literal["Forbid", "Allow", "Replace"]
_CONCURRENCY: dict[str, Concurrency] = {"skip": "Forbid", "queue": "Allow", "replace": "Replace"}
#: Exit codes that the same command would only repeat.
_HOPELESS = (
    ExitCode.UNFIT,
    ExitCode.INPUT,
    ExitCode.TOO_MANY_FAILED,
    ExitCode.CONFLICT,
    ExitCode.BUG,
    ExitCode.NO_PERMISSION,
)
#: KubeRay has tried its attempts already; what is left to repeat is TEMPORARY, an API server out of reach.
_FOLLOWED = (*_HOPELESS, ExitCode.UNITS_LEFT)


class ExitCodes(TypedDict):
    operator: Literal["In"]
    values: list[int]


class PodCondition(TypedDict):
    type: Literal["DisruptionTarget"]


class FailureRule(TypedDict):
    action: Literal["FailJob", "Ignore"]
    onExitCodes: NotRequired[ExitCodes]
    onPodConditions: NotRequired[list[PodCondition]]


class FailurePolicy(TypedDict):
    rules: list[FailureRule]


class JobSpec(TypedDict):
    backoffLimit: int
    podFailurePolicy: FailurePolicy
    activeDeadlineSeconds: NotRequired[int]
    ttlSecondsAfterFinished: int
    template: PodTemplate


class JobTemplate(TypedDict):
    metadata: PodMeta
    spec: JobSpec


class CronJobSpec(TypedDict):
    schedule: str
    timeZone: str
    concurrencyPolicy: Concurrency
    suspend: bool
    jobTemplate: JobTemplate


class Rule(TypedDict):
    apiGroups: list[str]
    resources: list[str]
    verbs: list[str]


class RoleRef(TypedDict):
    apiGroup: str
    kind: Literal["Role"]
    name: str


class Subject(TypedDict):
    kind: Literal["ServiceAccount"]
    name: str
    namespace: str


class CronJob(TypedDict):
    apiVersion: Literal["batch/v1"]
    kind: Literal["CronJob"]
    metadata: Meta
    spec: CronJobSpec


class Role(TypedDict):
    apiVersion: Literal["rbac.authorization.k8s.io/v1"]
    kind: Literal["Role"]
    metadata: Meta
    rules: list[Rule]


class RoleBinding(TypedDict):
    apiVersion: Literal["rbac.authorization.k8s.io/v1"]
    kind: Literal["RoleBinding"]
    metadata: Meta
    roleRef: RoleRef
    subjects: list[Subject]


def local_cron_job(job: Job, cluster: Cluster, site: Site, *, command: list[str], schedule: Schedule, days: int) -> list[CronJob]:
    """The run in one pod, by schedule; `days` is how many it labels at most."""
    size = Size(cluster.head.cpus, cluster.head.memory, object_store=job.resources.object_store)
    template = ray_pod(site, size, command=command, job_file=True, spot=True)
    # Ray listens on the pod's address: a token, which it makes up itself, keeps the neighbours out.
    template["spec"]["containers"][0]["env"].append({"name": "RAY_AUTH_MODE", "value": "token"})
    tell_tick(template, _JOB_NAME)
    return [_cron_job(site, template, schedule, hopeless=_HOPELESS, seconds=attempt_seconds(job, days, schedule))]


def apply_cron_job(
    job: Job, site: Site, *, command: list[str], schedule: Schedule, days: int
) -> list[ServiceAccount | Role | RoleBinding | CronJob]:
    """A pod that makes the RayJob, by schedule, and what it needs to be allowed to."""
    name = f"{site.name}-apply"
    template = pod(site, container("apply", site, _APPLIER, command=command), job_file=True)
    template["spec"]["serviceAccountName"] = name
    template["spec"]["automountServiceAccountToken"] = True
    # A pod that begins again follows the run of the one before it, and of no other night.
    tell_tick(template, _JOB_NAME)
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": site.meta(name), "automountServiceAccountToken": False},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": site.meta(name),
            "rules": [
                {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch", "delete"]},
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
                {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": site.meta(name),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": site.settings.namespace}],
        },
        _cron_job(site, template, schedule, hopeless=_FOLLOWED, seconds=attempt_seconds(job, days, schedule)),
    ]


def _cron_job(
    site: Site, template: PodTemplate, schedule: Schedule, *, hopeless: tuple[ExitCode, ...], seconds: int | None
) -> CronJob:
    template["spec"]["restartPolicy"] = "Never"
    spec: JobSpec = {
        "backoffLimit": site.settings.attempts - 1,
        "podFailurePolicy": {
            "rules": [
                # A node that goes is not the job's fault.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [code.value for code in hopeless]}},
            ]
        },
        "ttlSecondsAfterFinished": 7 * 86_400,
        "template": template,
    }
    if seconds is not None:
        # The clock of a Job goes on over its pods, and over the attempts of a RayJob that one follows.
        spec["activeDeadlineSeconds"] = site.settings.attempts * seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": site.meta(),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": _CONCURRENCY[schedule.if_running],
            "suspend": site.settings.suspend,
            "jobTemplate": {"metadata": site.pod_meta(), "spec": spec},
        },
    }
