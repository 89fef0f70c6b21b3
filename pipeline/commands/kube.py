"""The part of the command line that is about Kubernetes. Prints, like `cli`, which catches and exits."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import Dates, JobPath
from pipeline.commands.printing import say
from pipeline.errors import Interrupted, NightlabelError
from pipeline.kube.pods import Target

if TYPE_CHECKING:
    from pipeline.kube.apiserver import Api
    from pipeline.kube.kuberay import RayJob
    from pipeline.kube.render import KubeObject, RenderOptions
    from pipeline.spec import Job

AsTarget = Annotated[
    Target,
    typer.Option(
        help="rayjob: one run (KubeRay 1.6). raycronjob: by schedule (KubeRay 1.7). cronjob: by schedule, for a cluster without "
        "RayCronJob."
    ),
]
Image = Annotated[str | None, typer.Option(help="Container image by digest, in place of cluster.kubernetes.image.")]

_LOOK_S = 2.0


def render(job: JobPath, *, target: AsTarget = "rayjob", date: Dates = None, image: Image = None) -> None:
    """Print a labelling job as Kubernetes objects in YAML, for `kubectl apply` or a repository. Starts nothing."""
    from pipeline.kube.render import RenderOptions, to_yaml

    typer.echo(to_yaml(_things(_load(job, date), job, RenderOptions(target, date, image))), nl=False)


def apply(
    job: JobPath,
    *,
    target: AsTarget = "rayjob",
    date: Dates = None,
    image: Image = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the run to its end.")] = False,
    scheduled: Annotated[
        bool, typer.Option("--scheduled", help="For a CronJob's pod: make the RayJob alone, and heed schedule.if_running.")
    ] = False,
) -> None:
    """Make a labelling job's Kubernetes objects, follow the run and end with its exit code. Ctrl-C leaves it running."""
    from pipeline.extras import check_installed
    from pipeline.job.schedule import TICK

    check_installed("apply")
    from pipeline.kube.apiserver import Api
    from pipeline.kube.apply import apply as make
    from pipeline.kube.render import RenderOptions

    loaded = _load(job, date)
    things = _things(loaded, job, RenderOptions(target, date, image, tick=os.environ.get(TICK) if scheduled else None))
    things = [thing for thing in things if not scheduled or thing["kind"] == "RayJob"]
    api = Api()
    policy = loaded.schedule.if_running if scheduled and loaded.schedule else "refuse"
    run = make(api, things, if_running=policy, say=say)
    if run is not None and not detach:
        sys.exit(_follow(api, run))


def _follow(api: Api, run: RayJob) -> int:
    where = f"rayjob {run['metadata']['name']} -n {run['metadata']['namespace']}"
    over = threading.Event()
    reader = threading.Thread(target=_print_log, args=(api, run, over), daemon=True)
    try:
        for progress in api.follow(run):
            say(f"{where}: {progress.line()}")
            if progress.state == "Running" and not reader.ident:
                reader.start()
    except Interrupted as error:
        do = f"The run goes on; the same command follows it again, kubectl delete {where} ends it"
        raise Interrupted(error.got, signal_number=error.exit_code - 128, do=do) from None
    over.set()
    if reader.ident:
        reader.join(timeout=10.0)
    return progress.exit_code


def _print_log(api: Api, run: RayJob, over: threading.Event) -> None:
    """Prints what the driver prints. A pod that is not up yet is asked again, a log that broke off is read on where it did."""
    printed, trouble, last = Counter[str](), "", False
    while not last:
        last = over.is_set()
        read = Counter[str]()
        try:
            for pod, line in api.logs(run):
                read[pod] += 1
                if read[pod] > printed[pod]:
                    typer.echo(line)
                    printed[pod] += 1
        except NightlabelError as error:
            trouble = str(error)
        over.wait(_LOOK_S)
    if trouble and not printed:
        say(f"log     {trouble}")


def _load(path: Path, date: str | None) -> Job:
    from pipeline.job.jobfile import asked_days, at_day, load_label_template

    job = load_label_template(path, date=date)
    at_day(job, asked_days(job, date, name=str(path))[0], name=str(path))  # complains of a date that is missing
    return job


def _things(job: Job, path: Path, options: RenderOptions) -> list[KubeObject]:
    from pipeline.kube.render import render as objects

    return objects(job, path.read_text(encoding="utf-8"), options)
