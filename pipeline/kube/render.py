"""The job as Kubernetes objects, in the order in which they are to be made; and as YAML."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.errors import JobError
from pipeline.job.jobfile import asked_days
from pipeline.job.resources import Cluster
from pipeline.job.schedule import TICK, Schedule, looked_back, looks_back, settled
from pipeline.job.uris import is_dated
from pipeline.kube.cronjob import CronJob, Role, RoleBinding, apply_cron_job, local_cron_job
from pipeline.kube.kuberay import RayCronJob, RayJob, ray_cron_job, ray_job
from pipeline.kube.pods import JOB_FILE, Site, Target, object_name
from pipeline.kube.types import ConfigMap, ServiceAccount
from pipeline.spec import Job

KubeObject = RayJob | RayCronJob | CronJob | ConfigMap | ServiceAccount | Role | RoleBinding


@dataclass(frozen=True)
class RenderOptions:
    """What is asked for beside the job: with which image, for which date, `today` and `yesterday` included; by which tick of a
    schedule."""

    target: Target
    date: str | None = None
    image: str | None = None
    tick: str | None = None


def render(job: Job, text: str, options: RenderOptions) -> list[KubeObject]:
    """The objects of a job; `text` is its file, which goes into the cluster as it is. Raises JobError."""
    cluster = _cluster(job)
    site = Site(object_name(job.name), _image(cluster, options), cluster.kubernetes)
    return [*_account(site), _job_file(site, text), *_runs(job, text, site, options)]


def _runs(job: Job, text: str, site: Site, options: RenderOptions) -> list[KubeObject]:
    cluster, asked = _cluster(job), asked_days(job, options.date)
    day = options.date and (settled(options.date, asked, job.schedule) if options.target == "rayjob" else options.date)
    date = ["--date", day] if day else []
    run, days = ["nightlabel", "run", JOB_FILE, *date], _days(job, options, asked)
    # The name of a RayJob and the policy of a CronJob keep runs apart, so their drivers need no lease, which an attempt whose
    # cluster was lost would leave behind for the next one to respect.
    share = ["--if-running", "share"] if job.schedule else []
    if options.target == "rayjob":
        made = ray_job(job, cluster, site, entrypoint=" ".join([*run, *share]), days=days)
        # `apply` knows by it whether the run under way is this one. The days too, of which the entrypoint may say the word only.
        wanted = json.dumps([text, made["spec"], asked]).encode()
        made["metadata"]["annotations"] = {"nightlabel/asked": hashlib.sha256(wanted).hexdigest()[:16]}
        if options.tick:
            made["metadata"]["annotations"]["nightlabel/tick"] = options.tick
            (head,) = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
            head["env"].append({"name": TICK, "value": options.tick})  # for an attempt that begins after midnight, and looks back
        return [made]
    schedule = _schedule(job, options)
    if options.target == "raycronjob":
        return [ray_cron_job(job, cluster, site, entrypoint=" ".join(run), schedule=schedule, days=days)]
    if cluster.workers is None:
        command = run if schedule.if_running == "queue" else [*run, *share]
        return [*local_cron_job(job, cluster, site, command=command, schedule=schedule, days=days)]
    apply = ["nightlabel", "apply", JOB_FILE, *date, "--scheduled", "--image", site.image]
    return [*apply_cron_job(job, site, command=apply, schedule=schedule, days=days)]


def _days(job: Job, options: RenderOptions, asked: tuple[str | None, ...]) -> int:
    """How many days the run may have to label: limits.deadline is of each."""
    first = asked[0]
    back = looked_back(first, job.schedule) if first and is_dated(job) and looks_back(options.date or "", job.schedule) else ()
    return len(back) + len(asked)


def _cluster(job: Job) -> Cluster:
    if job.cluster is None:
        do = "Add it; jobs/README.md says what it holds"
        raise JobError("the job has no cluster section", need="cluster.head and cluster.workers, which a pod is made of", do=do)
    for field, uri in (
        *(("input.uri", uri) for uri in job.input.uris),
        ("model.uri", job.model.uri),
        ("output.uri", job.output.uri),
    ):
        if not uri.startswith("s3://"):
            raise JobError(f"{field} is {uri}", need="s3://, which pods reach too", do="Put it into a bucket")
    cluster = job.cluster
    store, node = job.resources.object_store, cluster.workers or cluster.head
    if store > node.memory // 2:
        got = f"resources.object_store is {store / 2**30:.3g} GiB of a node's {node.memory / 2**30:.3g} GiB"
        raise JobError(got, need="half of the memory at most, of which it is a part", do="Change the one or the other")
    return cluster


def _schedule(job: Job, options: RenderOptions) -> Schedule:
    if job.schedule is None:
        do = "Add it, or take --target rayjob for one run"
        raise JobError(f"--target {options.target} and no schedule in the job", need="schedule.cron", do=do)
    return job.schedule


def _image(cluster: Cluster, options: RenderOptions) -> str:
    image = options.image or cluster.kubernetes.image
    if image is None:
        raise JobError("no image", need="cluster.kubernetes.image or --image, name@sha256:…", do="Name the image of your build")
    if "@sha256:" not in image and not cluster.kubernetes.allow_tags:
        do = "Take the digest that the push printed, or set cluster.kubernetes.allow_tags"
        raise JobError(f"image {image} has no digest", need="name@sha256:…, since a tag may be another image tomorrow", do=do)
    return image


def _account(site: Site) -> list[ServiceAccount]:
    if not site.settings.service_account_annotations:
        return []
    meta = site.meta(site.settings.service_account)
    meta["annotations"] = site.settings.service_account_annotations
    return [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False}]


def _job_file(site: Site, text: str) -> ConfigMap:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": site.meta(), "data": {"job.yaml": text}}


class _Dumper(yaml.SafeDumper):
    """No anchors for what stands in two places, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(things: list[KubeObject]) -> str:
    """A stream of YAML documents, for `kubectl apply -f -`."""
    return yaml.dump_all(things, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=130, explicit_start=True)
