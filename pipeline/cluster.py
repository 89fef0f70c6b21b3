"""Bring Ray up, or find the one that is there, and hold the job's demand against it before the first image."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.errors import JobError, NightlabelError, PermissionDenied, Temporary, UnfitError, first_line
from pipeline.job.demand import Node, check_demand
from pipeline.spec import Job

KNOCK_S = 10.0  # for a head to answer
FREE_S = 5.0  # for Ray to find room where there is some
BUSY_WAIT_S = 600.0  # for other jobs to end
_FILES = 256  # to be open at a time: with 64 Ray does not come up, with 96 no image came, 128 are enough for 2 CPUs
_ROOM = 2**20  # bytes for Ray's files; with 64 KB it does not come up, with 200 KB it does
TELL_S = 60  # a run that waits says so again, lest it look hung, and sees whether another takes over

Tell = Callable[..., None]


@contextmanager
def cluster(job: Job, *, tell: Tell) -> Iterator[None]:
    """A Ray to work on: the one that RAY_ADDRESS names, or one of our own on this machine, gone afterwards. One that is up will
    do, for jobs of the same resources.

    Raises JobError when it cannot hold what the job asks for, and Temporary when it does not come to hold it in `cluster.wait`,
    which `tell` was told of; there is no silent waiting and no fall back from GPU to CPU.
    """
    most = Node(os.cpu_count() or 1, gpus=1000)  # of a Ray here, which takes 5 s to come up and say what it has
    if not os.environ.get("RAY_ADDRESS") and (missing := _missing(job, [most])):
        raise JobError(missing)
    try:
        connect(job)
        _make_room(job, tell)
        yield
    finally:
        ray.shutdown()


def connect(job: Job) -> None:
    """Connect to Ray, or start one, and set Ray Data up for passes that take what the job says and no more."""
    if not ray.is_initialized():
        start_ray(object_store=job.resources.object_store)
    from ray.data import DataContext, ExecutionResources  # 1.5 s, which a driver that is in a hurry spends while Ray starts

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.execution_options.preserve_order = False
    takes = job.resources
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=takes.cpus + 0.01,  # a hair more than the pools: sums of tenths are not exact
        gpu=takes.gpus,
        object_store_memory=takes.object_store,
    )
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _make_room(job: Job, tell: Tell) -> None:
    """Returns when the cluster has what the job takes, all of it free at the same time.

    A placement group asks for it: an autoscaler sees it, and of two jobs that wait neither holds half of what the other needs.
    It is given back before the pools take its place, so a third job may come in between; the pass then waits, and stalls.
    """
    shared = bool(os.environ.get("RAY_ADDRESS"))  # a Ray of our own is ours alone, and does not grow
    wait, missing = job.cluster.wait if job.cluster and shared else None, missing_from_cluster(job)
    if missing and wait is None:
        raise JobError(missing)
    if not shared:
        return
    pools = job.resources.pools()
    group = placement_group(
        [pool.bundle for pool in pools for _ in range(pool.size)],
        bundle_label_selector=[dict(pool.labels) for pool in pools for _ in range(pool.size)],
    )
    try:
        if group.wait(FREE_S):
            return
        seconds = BUSY_WAIT_S if wait is None else wait
        awaited = missing or f"{job.resources.cpus:g} CPUs and {job.resources.gpus:g} GPUs that other jobs hold"
        tell("waiting", awaited=awaited, seconds=seconds)
        end = time.monotonic() + seconds
        while not group.wait(min(TELL_S, max(0, math.ceil(end - time.monotonic())))):  # Ray cuts it to whole seconds
            if time.monotonic() >= end:
                still = missing_from_cluster(job) or awaited
                raise Temporary(f"waited {seconds:g} s in vain: {still}", do="Run again, or raise cluster.wait")
            tell("still_waiting")
    finally:
        remove_placement_group(group)


def start_ray(*, object_store: int) -> None:
    """Connect to the Ray that RAY_ADDRESS names, or start one with `object_store` bytes of shared memory.

    Raises Temporary when there is none or it does not let us in, UnfitError when it is of another version, or when too few files
    may be open.
    """
    _check_files()
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": "local", "object_store_memory": object_store, "include_dashboard": False}
    if address:
        _knock(address)
    on_terminate, terminated = signal.getsignal(signal.SIGTERM), False
    try:
        with _stderr_closed():  # the core greets with a line about its log level
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **({} if address else own))
    except SystemExit:  # by Ray's own handler, which stands there meanwhile and says no word how to go on
        terminated = True
    except Exception as error:  # bare ones too: "The current node timed out during startup" (ray/_private/node.py)
        raise _failure(error, address) from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def _check_files() -> None:
    """Ray sets the soft limit of open files to the hard one by itself."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < _FILES:
        do = "Raise it with ulimit -n 65536; where that is refused, in limits.conf or the container's --ulimit"
        raise UnfitError(f"{most} files may be open at a time", need=f"{_FILES} for Ray, thousands on many CPUs", do=do)


def _knock(address: str) -> None:
    """Is anything there? Ray itself asks a dead address for many minutes."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    do = "Set it to that, or give a dashboard to nightlabel submit"
    unfit = UnfitError(f"RAY_ADDRESS is {address}", need="host:port of a running Ray's head, such as head:6379", do=do)
    if scheme not in ("", "ray") or (rest != "auto" and not (host and port.isdecimal())):
        raise unfit
    try:
        if rest != "auto":
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except UnicodeError:  # a part of the host's name is empty, or has more than 63 letters
        raise unfit from None
    except OSError as error:
        do = "Bring the cluster up, or unset RAY_ADDRESS for a Ray on this machine"
        raise Temporary(f"RAY_ADDRESS is {address}, where nothing answers ({error.strerror or error})", do=do) from error


def _failure(error: Exception, address: str | None) -> NightlabelError:
    """What `ray.init` failed of, as something a user can act on."""
    theirs = f"the Ray at {address}" if address else "a Ray on this machine"
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) == 2:
        got, need = (f"Ray {ray_version} on Python {python}" for ray_version, python in versions)
        return UnfitError(f"{theirs} is {got}", need=f"{need}, as here", do="Take the same on both sides, or nightlabel submit")
    if isinstance(error, AuthenticationError):
        return PermissionDenied(f"{theirs} wants a token, and not this one", do="Set RAY_AUTH_TOKEN to the cluster's own")
    if address and isinstance(error, ConnectionError):  # all that Ray says, of another token too
        do = "Check that it is the head of a Ray, and that RAY_AUTH_TOKEN is its token; then run again"
        return Temporary(f"something answers at {address} and does not let us in", do=do)
    if isinstance(error, ValueError) and "object store" in str(error):  # by which the memory for all else is below zero
        do = "Lower resources.object_store"
        return JobError(
            "resources: object_store is more than this machine's memory", need="room beside it for the workers", do=do
        )
    got = f"{theirs} did not come up ({first_line(error).rstrip('.')})"
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray takes it
    if not address and (need := _needs(error)):
        return UnfitError(got, need=need, do=f"Set RAY_TMPDIR to such a folder, in place of {folder}")
    if not address and _is_full(folder):  # Ray itself often says no more than that it waited
        do = f"Make some in {folder}, or set RAY_TMPDIR to another; then run again"
        return Temporary(got, need="room in the folder for temporary files", do=do)
    return Temporary(got, do="Run again; what is committed stays")


def _needs(error: Exception) -> str:
    """What the folder lacks that Ray has its sockets and logs in, if it did not come up for that; to run again mends none."""
    if "AF_UNIX" in str(error):
        return "a folder for temporary files with a shorter path, which those of sockets begin with"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
        return "a folder for temporary files that can be written"
    return ""


def _is_full(folder: str) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(folder).free < _ROOM
    return False


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """What native code writes to stderr goes nowhere; Python's exceptions come through."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def missing_from_cluster(job: Job) -> str | None:
    """What the job asks for and the cluster as it stands does not have, in a sentence."""
    alive = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return _missing(job, [Node(have.get("CPU", 0), have.get("GPU", 0), have.get("memory", 0), labels) for have, labels in alive])


def _missing(job: Job, nodes: list[Node]) -> str | None:
    try:
        check_demand(job.resources, nodes, where="this machine" if len(nodes) == 1 else f"{len(nodes)} nodes")
    except ValueError as error:
        return str(error)
    return None
