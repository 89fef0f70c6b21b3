"""Nodes that share no network: a head and two workers in network namespaces of their own, on a bridge, with SeaweedFS on it.

    .venv/bin/python tests/benchmarks/namespaces.py [--photos FOLDER]        as root, with iproute2

Nothing leaves the machine: the bridge has no way out. Shows that a job travels between addresses that are not loopback, that such
a cluster is not spoken to without a token, and that a worker killed in the middle costs no row. Removes what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from cluster import RESOURCES, outcome, upload  # noqa: E402
from photos import add_photos, read_tar  # noqa: E402

NET = "10.231.77"
NAMES = ("nightlabel-head", "nightlabel-a", "nightlabel-b")
BRIDGE = "nightlabel0"


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@contextmanager
def network() -> Iterator[None]:
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(NAMES):
            ip("netns", "add", name)
            ip("link", "add", f"nl{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"nl{number}", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{NET}.{number + 2}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)
        ip("link", "del", BRIDGE, check=False)


def nightlabel(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(command, env=env | {"PYTHONPATH": str(HERE.parents[1])}, capture_output=True, text=True, check=False)


def listing(server: Any, bucket: str) -> list[dict[str, Any]]:
    return server.client.list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("it makes network namespaces; required: root. Run it with sudo")
    import seaweed
    from models import make_artifact
    from raylets import Raylets, Worker

    from pipeline.model.preprocessing import Preprocessing

    with tempfile.TemporaryDirectory() as name, network():
        folder = Path(name)
        for part in ("seaweed", "home"):
            (folder / part).mkdir()
        places = tuple(Worker(f"{NET}.{number + 2}", ("ip", "netns", "exec", ns)) for number, ns in enumerate(NAMES))
        server = seaweed.start(folder / "seaweed", host=f"{NET}.1")
        cluster = Raylets(folder / "home", server.env, places=places)
        try:
            cluster.add()
            cluster.add()
            cluster.wait_for(3)
            bucket = server.bucket()
            images = upload(server, bucket, args.photos, 1)
            some = [
                data for tar in sorted(args.photos.glob("*.tar"))[:1] for name, data in read_tar(tar) if name.endswith(".jpg")
            ]
            model = make_artifact(folder, some, preprocessing=Preprocessing())
            urls = {"input": {"uri": f"s3://{bucket}/in/"}, "output": {"uri": f"s3://{bucket}/out/"}, "model": {"uri": model}}
            resources = RESOURCES | {"predict": RESOURCES["predict"] | {"actors": 2}}
            job = folder / "job.yaml"
            job.write_text(json.dumps({"name": "namespaces", "resources": resources, **urls}))
            where = ("--address", cluster.dashboard)
            stranger = nightlabel("list", *where, env=cluster.env | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""})
            print(f"without a token: exit {stranger.returncode}, {stranger.stderr.strip()}")
            submitted = nightlabel("submit", str(job), "--no-wait", *where, env=cluster.env)
            while not any("/data/" in item["Key"] for item in listing(server, bucket)):
                time.sleep(0.2)
            cluster.kill(cluster.nodes[-1])
            done = nightlabel("wait", submitted.stdout.strip(), *where, env=cluster.env)
            print(done.stdout)
            rows = outcome(server, bucket, "out/")[1]
            print(f"exit {done.returncode}, {len(rows)} rows of {images} photographs, each once")
        finally:
            cluster.stop()
            server.stop()


if __name__ == "__main__":
    main()
