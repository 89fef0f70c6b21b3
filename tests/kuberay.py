"""KubeRay played by hand: the pods of a rendered RayJob with the commands that KubeRay 1.7 gives them, each in its sandbox.

The network is that of this machine: nodes have loopback addresses, and the ports are free ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any

from programs import wait_for
from raylets import below, free_port
from sandbox import Sandbox

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}  # which KubeRay adds from a secret of its own
Process = subprocess.Popen[str]
_HEALTHY = "import urllib.request; exit(b'success' not in urllib.request.urlopen('{}/api/gcs_healthz', timeout=5).read())"


class KubeRay:
    """The cluster of one RayJob; everything that it runs ends with the `with` block. `url` is the head's service."""

    def __init__(self, box: Sandbox, spec: dict[str, Any]) -> None:
        self._box, self._spec, self._running = box, spec, ExitStack()
        self._gcs, self._dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._dashboard}"

    def __enter__(self) -> KubeRay:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def head(self) -> Process:
        """Up when this returns; after another one that was killed it has the same address."""
        ports = f"--port={self._gcs} --dashboard-host=127.0.0.1 --dashboard-port={self._dashboard}"
        return self._node(self._spec["rayClusterSpec"]["headGroupSpec"], 2, f"--head {ports}")

    def worker(self, number: int = 3) -> Process:
        """Up when this returns, at 127.0.0.`number`."""
        return self._node(self._spec["rayClusterSpec"]["workerGroupSpecs"][0], number, f"--address=127.0.0.2:{self._gcs}")

    def _node(self, group: dict[str, Any], number: int, own: str) -> Process:
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        params = {"num-cpus": limits["cpu"], "memory": str(int(limits["memory"][:-2]) * 2**30), **group["rayStartParams"]}
        address = f"127.0.0.{number}"
        params |= {"node-ip-address": address, "dashboard-agent-listen-port": str(free_port())}
        options = " ".join(f"--{name}={value}" for name, value in params.items())
        command = ["/bin/bash", "-c", "--", f"ulimit -n 65536; ray start --block {own} {options}"]
        node = self._running.enter_context(self._box.running(pod, command, **TOKEN))
        assert wait_for(lambda: address in self._alive(), seconds=240.0)
        return node

    def submitter(self) -> Process:
        """The pod of a Job; each new one of it does the same."""
        address, name = f"--address {self.url}", "small-x7k2p"
        command = f"""
            until python -c "{_HEALTHY.format(self.url)}" >/dev/null 2>&1 ; do sleep 2 ; done ;
            if ! ray job status {address} {name} >/dev/null 2>&1 ;
            then ray job submit {address} --no-wait --submission-id {name} -- {self._spec["entrypoint"]} ;
            fi ; ray job logs {address} --follow {name}"""
        pod = self._spec["submitterPodTemplate"]["spec"]
        return self._running.enter_context(self._box.running(pod, ["/bin/bash", "-ce", "--", command], **TOKEN))

    def _alive(self) -> set[str]:
        """Addresses; of a node that was killed for some time too."""
        nodes = self._get("/nodes?view=summary")["data"]["summary"]
        # Not node["ip"]: that comes with the agent's first report, some time after the node is known as alive.
        return {node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def jobs(self) -> list[tuple[str, str]]:
        """(id, status) of all that were submitted."""
        return [(job["submission_id"], job["status"]) for job in self._get("/api/jobs/")]

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)


def terminate(pod: Process) -> None:
    """As kubelet does: SIGTERM to the first process of the container."""
    os.kill(below(pod.pid)[1], signal.SIGTERM)


def kill(pod: Process) -> None:
    """And what it does 30 s later, or the kernel when memory is out."""
    for pid in below(pod.pid)[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    pod.wait()
