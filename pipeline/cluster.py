"""Bring Ray up, or find the one that is there, and hold the job's demand against it before the first image."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import DataContext

from pipeline.demand import Node, check_demand
from pipeline.errors import JobError
from pipeline.spec import Job


@contextmanager
def cluster(job: Job) -> Iterator[None]:
    """A Ray to work on: the one that RAY_ADDRESS names, or one of our own on this machine, gone afterwards.

    Raises JobError when it cannot hold what the job asks for; there is no silent waiting and no fall back from GPU to CPU.
    """
    try:
        connect(job)
        _check_fits(job)
        yield
    finally:
        ray.shutdown()


def connect(job: Job) -> None:
    """Connect to Ray, or start one, and set Ray Data up for passes."""
    start_ray(object_store=job.resources.object_store)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.execution_options.preserve_order = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def start_ray(*, object_store: int) -> None:
    """Connect to the Ray that RAY_ADDRESS names, or start one with `object_store` bytes of shared memory."""
    own: dict[str, Any] = {"address": "local", "object_store_memory": object_store, "include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    with _stderr_closed():  # the core greets with a line about its log level
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else own))
    signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler exits at once, without a word how to go on


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


def _check_fits(job: Job) -> None:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [Node(have.get("CPU", 0), have.get("GPU", 0)) for have in alive]
    try:
        check_demand(job.resources, nodes, where="this machine" if len(nodes) == 1 else f"{len(nodes)} nodes")
    except ValueError as error:
        raise JobError(str(error)) from None
