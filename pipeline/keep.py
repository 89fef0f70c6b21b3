"""Copies what a run and Ray's nodes have logged beside the run's papers, before a cluster that is only there for the run goes.

    runs/<run_id>/logs/<attempt>/events.jsonl, for each node <node>.tar.gz, and report.html when units are left

Asked for by NIGHTLABEL_KEEP_LOGS=1, as in the pods that `render` makes. Created like everything else, never over anything; what
goes wrong here does not fail the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster import Tell
from pipeline.storage import Store, join

_FILE = 2**20  # of each file its end
_NODE = 32 * 2**20  # of a node, before it is packed: the 8 GB of a full disk help nobody
_PATIENCE_S = 20.0  # a pod that is told to go has 30


@contextlib.contextmanager
def kept_logs(store: Store, folder: str, events: list[dict[str, Any]], tell: Tell) -> Iterator[None]:
    """Enter it while Ray is up: when the block ends, in whatever way, the logs of Ray's nodes are copied to `folder`, and with
    them the `events` that the run has told until then."""

    def papers() -> dict[str, bytes]:
        nodes = _collect()
        tell("logs", folder=folder, nodes=sorted(nodes))
        return {"events.jsonl": "".join(json.dumps(event) + "\n" for event in events).encode(), **nodes}

    try:
        yield
    finally:
        keep(store, folder, papers, tell)


def keep(store: Store, folder: str, papers: Callable[[], dict[str, bytes]], tell: Tell) -> None:
    """Creates the papers, name → content, in the folder, where that is asked for."""
    if os.environ.get("NIGHTLABEL_KEEP_LOGS") != "1":
        return
    try:
        for name, content in papers().items():
            store.create(join(folder, name), content)
    except Exception as error:  # noqa: BLE001  # a run whose labels are there has not failed for its logs
        tell("logs", folder=folder, error=str(error))


def _collect() -> dict[str, bytes]:
    """File name → packed logs, for each node that answers in time."""
    asked = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_remote.options(scheduling_strategy=where).remote()] = f"{node['NodeID'][:12]}.tar.gz"
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)
    packed: dict[str, bytes] = {}
    for answer in ready:
        with contextlib.suppress(ray.exceptions.RayError):  # its node has just gone; the others' logs may say why
            packed[asked[answer]] = ray.get(answer)
    return packed


@ray.remote(num_cpus=0, max_retries=0)
def _remote() -> bytes:
    node: Any = ray._private.worker._global_node  # nothing public says where a node logs
    return pack(Path(node.get_logs_dir_path()))


def pack(folder: Path) -> bytes:
    """The ends of the files in a folder as a tar.gz, the newest first, the drivers' before them, up to _NODE bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    files.sort(key=lambda path: (not path.name.startswith("job-driver-"), -path.stat().st_mtime))
    packed, left = io.BytesIO(), _NODE
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in files:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - min(_FILE, left)))
                content = file.read(min(_FILE, left))
            left -= len(content)
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size, member.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(member, io.BytesIO(content))
            if not left:
                break
    return packed.getvalue()
