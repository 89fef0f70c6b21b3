"""Does any image get lost or labelled twice, whatever breaks, for as long as you like?

    .venv/bin/python tests/benchmarks/soak.py [--photos FOLDER] [--copies 4] [--rounds 20] [--seed 0] [--faults 0.03]

Photographs, one of twelve broken on purpose, in tars on SeaweedFS; a cluster of raylets with a CPU each. One calm run says what
is right. Then, into other outputs, round after round: one driver or two at once, an S3 that fails or delays requests by lot
(`--faults` of them: 500 and 503, resets, bodies cut short, replies lost when the work was done), and at a moment drawn by lot a
kill -9 of a driver, of a worker process or of a node, or a SIGTERM. When a run is done, or the rounds are over, a calm run ends
it, and the next round begins another output. Fails unless the rows are those of the first run, each once, no committed object was
written again, and `validate` finds nothing. Prints a line a round and writes tests/benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from faults import Fault, FaultProxy  # noqa: E402
from photos import add_photos, photographs, repeated  # noqa: E402
from result import write_result  # noqa: E402

RESOURCES = {
    "read": {"tasks": 4, "cpus_per_task": 0.05},
    "preprocess": {"actors": 0},
    "predict": {"actors": 2, "cpus_per_actor": 0.7, "batch_size": 16},
}
#: Codes with which a run may end while things break; 70 is a bug, 2, 3 and 6 would be lies.
ALLOWED = {0, 5, 75, 143, -signal.SIGKILL}
ACTIONS = ("kill a driver", "kill a worker", "kill a node", "SIGTERM")
BROKEN = 12  # one image of so many


class Weather(FaultProxy):
    """Gives a fault by lot to a share of the requests."""

    def __init__(self, port: int, *, seed: int) -> None:
        self.share, self.drawn, self._rng = 0.0, Counter[str](), random.Random(seed)
        super().__init__(port)

    def _take(self, method: str, path: str) -> Fault | None:
        rng = self._rng
        if rng.random() >= self.share:
            return None
        kind = rng.choice(("status", "status", "reset", "truncate", "delay", "lost"))
        self.drawn[kind] += 1
        code, status = rng.choice((("SlowDown", 503), ("InternalError", 500)))
        return Fault(kind, status=status, code=code, after=rng.randrange(100_000), seconds=rng.uniform(0, 3))


def fill(server: Any, bucket: str, photos: Path, copies: int, rng: random.Random) -> int:
    """Every tar `copies` times under other keys, some images broken; the number of images."""
    images = 0
    for name, data, count in repeated(photos, copies, lambda image: damaged(image, rng)):
        server.put(f"s3://{bucket}/in/{name}", data)
        images += count
    return images


def damaged(data: bytes, rng: random.Random) -> bytes:
    if rng.randrange(BROKEN):
        return data
    return rng.choice((data[: rng.randrange(len(data))], b"", data[::-1], rng.randbytes(1000)))


@dataclass
class Soak:
    """A cluster and a store to break, and what was committed so far, by key with its etag."""

    server: Any
    weather: Weather
    cluster: Any
    folder: Path
    bucket: str
    rng: random.Random

    def job(self, output: str, model: str) -> Path:
        path = self.folder / f"{output}.yaml"
        urls = {"input": {"uri": f"s3://{self.bucket}/in/"}, "output": {"uri": f"s3://{self.bucket}/{output}/"}}
        patience = {"limits": {"max_failed": "100%"}, "cluster": {"wait": "60s"}}
        path.write_text(json.dumps({"name": output, "model": {"uri": model}, "resources": RESOURCES, **patience, **urls}))
        return path

    def start(self, *words: object) -> subprocess.Popen[str]:
        env = self.cluster.env | self.server.env
        env |= {"AWS_ENDPOINT_URL": self.weather.endpoint, "RAY_ADDRESS": self.cluster.gcs, "PYTHONPATH": str(HERE.parents[1])}
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def committed(self, output: str) -> dict[str, str]:
        listed = self.server.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{output}/").get("Contents", [])
        return {item["Key"]: item["ETag"] for item in listed if "/data/" in item["Key"]}

    def rows(self, output: str) -> list[tuple[Any, ...]]:
        """(source, key, status, label, error class) of every row, sorted."""
        from io import BytesIO

        import pyarrow.parquet as pq

        columns = ["source", "key", "status", "label", "error_class"]
        bodies = (self.server.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in self.committed(output))
        tables = (pq.read_table(BytesIO(body), columns=columns) for body in bodies)
        return sorted((tuple(row.values()) for table in tables for row in table.to_pylist()), key=repr)

    def round(self, job: Path) -> dict[str, Any]:
        """One or two drivers, and something that happens to them: as they start, or some time after so many new units."""
        self.mend()
        drivers = [self.start("run", job) for _ in range(self.rng.choice((1, 1, 2)))]
        action, since, before = self.rng.choice(ACTIONS), time.monotonic(), len(self.committed(job.stem))
        units, pause = self.rng.randrange(5), self.rng.uniform(0, 5)
        while len(self.committed(job.stem)) < before + units and any(driver.poll() is None for driver in drivers):
            time.sleep(0.1)
        time.sleep(pause)
        moment = time.monotonic() - since
        self.do(action, drivers)
        said = [driver.communicate(timeout=900)[0] for driver in drivers]
        codes = [driver.returncode for driver in drivers]
        for code, text in zip(codes, said, strict=True):
            if code not in ALLOWED or "Traceback" in text:
                sys.exit(f"a driver ended with {code} after: {action}\n{text[-4000:]}")
        return {"drivers": len(drivers), "happened": action, "after_s": round(moment, 1), "codes": codes}

    def end(self, job: Path) -> None:
        """A run to the end, on a whole cluster, and a look at what it left."""
        self.mend()
        for command in ("run", "validate"):
            process = self.start(command, job)
            said = process.communicate(timeout=900)[0]
            if process.returncode != 0:
                sys.exit(f"`nightlabel {command}` ended with {process.returncode} in calm weather\n{said[-4000:]}")

    def mend(self) -> None:
        """Two workers again: one is killed on purpose, and a starved one may be taken for dead."""
        while (lost := 2 - sum(node.poll() is None for node in self.cluster.nodes[1:])) > 0:
            for _ in range(lost):
                self.cluster.add()
            self.cluster.wait_for(3)

    def do(self, action: str, drivers: list[subprocess.Popen[str]]) -> None:
        if action in ("kill a driver", "SIGTERM"):
            self.rng.choice(drivers).send_signal(signal.SIGKILL if action == "kill a driver" else signal.SIGTERM)
        elif action == "kill a worker" and (workers := self.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(workers), signal.SIGKILL)
        elif action == "kill a node":
            with contextlib.suppress(LookupError):  # it is gone already
                self.cluster.kill(self.cluster.nodes[-1])

    def workers(self) -> list[int]:
        """Processes of the nodes that read, decode or label."""
        from raylets import below

        found = []
        for pid in (pid for node in self.cluster.nodes for pid in below(node.pid)):
            with contextlib.suppress(OSError):
                if b"ray::Map" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


def soak(args: argparse.Namespace, it: Soak, model: str) -> list[dict[str, Any]]:
    """The rounds. Raises SystemExit when something is wrong."""
    it.end(it.job("calm", model))
    right, rounds, standing, outputs = it.rows("calm"), [], {}, 0
    job = it.job(f"out-{outputs}", model)
    for number in range(args.rounds):
        it.weather.share = args.faults
        rounds.append(it.round(job) | {"output": job.stem})
        now = it.committed(job.stem)
        if not standing.items() <= now.items():
            sys.exit(f"a committed object was written again or is gone after: {rounds[-1]}")
        standing = now
        rounds[-1]["units"] = len(now)
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
        if 0 in rounds[-1]["codes"] or number + 1 == args.rounds:
            it.weather.share = 0.0
            it.end(job)
            if it.rows(job.stem) != right or not standing.items() <= it.committed(job.stem).items():
                sys.exit(f"the rows of {job.stem} are not those of a calm run, or were written again")
            standing, outputs = {}, outputs + 1
            job = it.job(f"out-{outputs}", model)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.03)
    args = parser.parse_args()
    import seaweed
    from models import make_artifact
    from raylets import Raylets

    from pipeline.model.preprocessing import Preprocessing

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as end:
        folder = Path(name)
        for part in ("seaweed", "home"):
            (folder / part).mkdir()
        server = seaweed.start(folder / "seaweed")
        end.callback(server.stop)
        weather = Weather(server.port, seed=args.seed)
        end.callback(weather.close)
        cluster = Raylets(folder / "home", server.env | {"AWS_ENDPOINT_URL": weather.endpoint})
        end.callback(cluster.stop)
        bucket = server.bucket()
        images = fill(server, bucket, args.photos, args.copies, rng)
        model = make_artifact(folder, photographs(args.photos, 50), preprocessing=Preprocessing())
        rounds = soak(args, Soak(server, weather, cluster, folder, bucket, rng), model)
        requests, faults = len(weather.requests), dict(sorted(weather.drawn.items()))
    outputs = 1 + len({one["output"] for one in rounds})
    print(f"{outputs} outputs of {images} images, each a row once, all alike; {requests:,} requests, of which by lot: {faults}")
    write_result("soak", {"images": images, "requests": requests, "faults": faults, "rounds": rounds})


if __name__ == "__main__":
    main()
