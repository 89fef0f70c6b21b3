"""Makes on a Kubernetes cluster what `render` says, once.

A RayJob is made by one create, under the job's name: two that apply the same job meet there, and the second follows the first's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from pipeline.errors import Conflict, Temporary, UnitsLeft
from pipeline.kube.apiserver import Api, title
from pipeline.kube.follow import progress_of
from pipeline.kube.kuberay import RayJob
from pipeline.kube.render import KubeObject

Policy = Literal["refuse", "skip", "queue", "replace"]
Say = Callable[[str], None]


def apply(api: Api, things: list[KubeObject], *, if_running: Policy, say: Say) -> RayJob | None:
    """Make everything; the RayJob to follow, where there is one and nothing forbids it. Raises Conflict when another run of that
    name is under way and the policy is to refuse; None when it is to skip."""
    run = next((thing for thing in things if thing["kind"] == "RayJob"), None)
    while run is not None and (standing := api.find(run)) is not None:
        ended = progress_of(standing).ended
        if not ended and _is_same(standing, run):
            say(f"{title(run)} is under way already")
            return run
        if ended or if_running == "replace":
            api.delete(run, standing)
            break
        if not _may_wait(api, run, if_running, say):
            return None
    for thing in things:
        if thing is not run:
            say(f"{title(thing)}: {api.put(thing)}")
    if run is not None and not api.create(run):
        raise Temporary(f"{title(run)} was made by somebody else just now", do="Apply again to follow it")
    if run is not None:
        say(f"{title(run)}: made")
    return run


def _is_same(standing: Mapping[str, Any], run: RayJob) -> bool:
    """Is the run that stands there the one that is wanted? For a tick of a schedule the one that it made itself: a job without
    {date} asks for the same in every night."""
    wanted = run["metadata"].get("annotations", {})
    mark = "nightlabel/tick" if "nightlabel/tick" in wanted else "nightlabel/asked"
    return bool(standing["metadata"].get("annotations", {}).get(mark) == wanted.get(mark))


def _may_wait(api: Api, run: RayJob, if_running: Policy, say: Say) -> bool:
    """Waits for the run that is under way when that is the policy; False when it is to skip."""
    if if_running == "refuse":
        do = f"Wait for it, or end it: kubectl delete rayjob {run['metadata']['name']} -n {run['metadata']['namespace']}"
        raise Conflict(f"{title(run)} is under way, for another date or of another job file", need="one at a time", do=do)
    say(f"{title(run)} of before is under way: {if_running}")
    if if_running == "queue":
        with suppress(UnitsLeft):  # deleted is over too
            for progress in api.follow(run):
                say(f"before  {progress.line()}")
    return if_running == "queue"
