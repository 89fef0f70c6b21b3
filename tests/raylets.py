"""A Ray cluster of separate processes: `ray start` once for the head and once for every worker, with a token and a private HOME.

Every node has an address of its own, on loopback 127.0.0.2 and up (Ray replaces 127.0.0.1 by the machine's outer address). A node
is killed by the pid of its raylet, as a power cut would.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path("scripts"))
READY_SECONDS = 240
OBJECT_STORE = 200 * 2**20

#: What a server that is half up may answer with, beside a connection that is refused: nothing, a page in words, a part of it.
NOT_YET = (OSError, HTTPException, ValueError, LookupError)

#: A node whose process is gone is dead after 5 s, not 30; one that a busy machine keeps from answering lives.
_HEALTH = {"initial_delay_ms": "2000", "period_ms": "1000", "failure_threshold": "5", "timeout_ms": "5000"}
_SERVER_ENV = {"RAY_USAGE_STATS_ENABLED": "0", **{f"RAY_health_check_{name}": value for name, value in _HEALTH.items()}}


@dataclass(frozen=True)
class Place:
    """Where a node runs: its address, and what stands before its command, such as `ip netns exec`."""

    address: str
    prefix: tuple[str, ...] = ()


LOOPBACK = tuple(Place(f"127.0.0.{number}") for number in range(2, 20))


class Raylets:
    """A cluster with its head up. `env` holds what a client needs; `gcs` and `dashboard` are its addresses."""

    def __init__(
        self, home: Path, server_env: Mapping[str, str], *, head_cpus: int = 0, places: tuple[Place, ...] = LOOPBACK
    ) -> None:
        self.home, self.server_env, self.places = home, server_env, places
        self.token = secrets.token_hex(16)
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._folders: list[str] = []
        gcs, dashboard = free_port(), free_port()
        host = "127.0.0.1" if places is LOOPBACK else places[0].address
        self.gcs, self.dashboard = f"{places[0].address}:{gcs}", f"http://{host}:{dashboard}"
        ports = [f"--port={gcs}", "--include-dashboard=true", f"--dashboard-host={host}", f"--dashboard-port={dashboard}"]
        try:
            self._start("--head", *ports, f"--num-cpus={head_cpus}")
            self.wait_for(1)
        except BaseException:
            self.stop()
            raise

    @property
    def env(self) -> dict[str, str]:
        """For commands that talk to this cluster; everything else that Ray reads is unset."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "HOME": str(self.home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def add(self, *, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Starts a worker node; returns at once."""
        return self._start(f"--address={self.gcs}", f"--num-cpus={cpus}")

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        place = self.places[len(self.nodes)]
        self._folders.append(tempfile.mkdtemp(prefix="nl-"))  # short: the path of a socket has 107 characters at most
        words = [*place.prefix, SCRIPTS / "ray", "start", "--block", *options, f"--node-ip-address={place.address}"]
        # Nodes of one folder that start at the same time would take each other's sockets.
        words += [f"--temp-dir={self._folders[-1]}", f"--object-store-memory={OBJECT_STORE}", "--disable-usage-stats"]
        words += [f"--dashboard-agent-listen-port={free_port()}"]
        env = {**self.env, **self.server_env, **_SERVER_ENV, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
        with open(self.home / f"node-{len(self.nodes)}.log", "wb") as log:
            node = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.home)
        self.nodes.append(node)
        return node

    def wait_for(self, nodes: int) -> None:
        """Returns when as many nodes are alive."""
        deadline = time.monotonic() + READY_SECONDS
        while (alive := self._alive()) != nodes:
            if time.monotonic() > deadline or (alive is None and any(node.poll() is not None for node in self.nodes)):
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.home.glob("node-*.log")))
                raise RuntimeError(f"{alive} of {nodes} nodes after {READY_SECONDS} s:\n{logs}")
            time.sleep(0.2)

    def _alive(self) -> int | None:
        """Nodes that the cluster believes in; None before it answers."""
        request = urllib.request.Request(f"{self.dashboard}/nodes?view=summary")
        request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                summary = json.load(reply)["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in summary)
        except NOT_YET:
            return None

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """The raylet of a node ends without a word; its workers go with it."""
        os.kill(_raylet(node.pid), signal.SIGKILL)

    def stop(self) -> None:
        """At once: a worker whose head is gone would drain itself for 20 s."""
        for process in [process for node in self.nodes for process in below(node.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for node in self.nodes:
            node.wait()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def _raylet(pid: int) -> int:
    """The raylet among the processes below `ray start`."""
    for process in below(pid):
        with contextlib.suppress(OSError):
            if b"/raylet/raylet" in Path(f"/proc/{process}/cmdline").read_bytes():
                return process
    raise LookupError(f"no raylet below process {pid}")


def below(pid: int) -> list[int]:
    """A process, and all that it has started."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # gone meanwhile
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return [pid, *(inner for child in children for inner in below(child))]


_given: set[int] = set()


def free_port() -> int:
    """One that nobody takes before whom it is for: below 32,768, from where the system gives ports to clients and to servers that
    name none, of which Ray starts dozens; and above those of Ray's workers and of SeaweedFS."""
    while True:
        port = 22_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))  # on every address
            if port not in _given:
                _given.add(port)
                return port
