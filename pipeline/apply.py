"""Makes on a Kubernetes cluster what `render` says, once.

A RayJob is made by one create, under the job's name: two that apply the same job meet there, and the second follows the first's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline.apiserver import Api, title
from pipeline.errors import Conflict, Temporary
from pipeline.follow import progress_of
from pipeline.kuberay import RayJob
from pipeline.render import Thing

Policy = Literal["refuse", "skip", "queue", "replace"]
Say = Callable[[str], None]


def apply(api: Api, things: list[Thing], *, if_running: Policy, say: Say) -> RayJob | None:
    """Make everything; the RayJob to follow, where there is one and nothing forbids it. Raises Conflict when another run of that
    name is under way and the policy is to refuse; None when it is to skip."""
    run = next((thing for thing in things if thing["kind"] == "RayJob"), None)
    if run is not None:
        standing = api.find(run)
        if standing is not None and not progress_of(standing).ended:
            if _asked(standing) == _asked(run):
                say(f"{title(run)} is under way already")
                return run
            if not _make_room(api, run, if_running, say):
                return None
        if standing is not None:
            api.delete(run)
    for thing in things:
        if thing is not run:
            say(f"{title(thing)}: {api.put(thing)}")
    if run is not None and not api.create(run):
        raise Temporary(f"{title(run)} was made by somebody else just now", do="Apply again to follow it")
    if run is not None:
        say(f"{title(run)}: made")
    return run


def _asked(ray_job: Mapping[str, Any]) -> object:
    return ray_job["metadata"].get("annotations", {}).get("nightlabel/asked")


def _make_room(api: Api, run: RayJob, if_running: Policy, say: Say) -> bool:
    """Is there room for another run, after what the policy says of the one that is under way?"""
    if if_running == "refuse":
        do = f"Wait for it, or end it: kubectl delete rayjob {run['metadata']['name']} -n {run['metadata']['namespace']}"
        raise Conflict(f"{title(run)} is under way, for another date or of another job file", need="one at a time", do=do)
    say(f"{title(run)} of before is under way: {if_running}")
    if if_running == "queue":
        for progress in api.follow(run):
            say(f"before  {progress.line()}")
    return if_running != "skip"
