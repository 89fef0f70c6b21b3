"""One job on 1, 2 and 3 raylets: equal rows? How soon after `nightlabel submit` is the first image labelled on a warm cluster?

    .venv/bin/python tests/benchmarks/cluster.py [--photos FOLDER] [--copies 5] [--raylets 1 2 3]

Every raylet is a process of its own with an address of its own on loopback and one CPU; the photographs lie on SeaweedFS,
repeated under new keys; the job is submitted over the Jobs API with a token. On fewer cores than raylets this shows that the rows
are the same, not how fast several machines are. Prints a table and writes tests/benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import json
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

from photos import add_photos, read_tar, repeated  # noqa: E402
from result import write_result  # noqa: E402

#: Fits one CPU, so that the same job runs on one raylet.
RESOURCES = {
    "read": {"cpus_per_task": 0.1},
    "preprocess": {"actors": 1, "cpus_per_actor": 0.3},
    "predict": {"actors": 1, "cpus_per_actor": 0.6, "batch_size": 16},
}


def upload(server: Any, bucket: str, photos: Path, copies: int) -> int:
    """Every tar `copies` times under other keys; the number of images."""
    images = 0
    for name, data, count in repeated(photos, copies):
        server.put(f"s3://{bucket}/in/{name}", data)
        images += count
    return images


@contextmanager
def raylets(count: int, home: Path, env: dict[str, str]) -> Iterator[Any]:
    from raylets import Raylets

    home.mkdir()
    cluster = Raylets(home, env, head_cpus=1)
    try:
        for _ in range(count - 1):
            cluster.add()
        cluster.wait_for(count)
        yield cluster
    finally:
        cluster.stop()


def submit(cluster: Any, job: Path, env: dict[str, str]) -> tuple[float, float]:
    """(when, seconds until it has come back) of `nightlabel submit`."""
    since, clock = time.time(), time.perf_counter()
    words = [sys.executable, "-m", "pipeline", "submit", str(job), "--address", cluster.dashboard]
    environment = cluster.env | env | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return since, time.perf_counter() - clock


def outcome(server: Any, bucket: str, prefix: str) -> tuple[dict[str, Any], dict[tuple[str, str], tuple[str, str, float]]]:
    """(events by name, label and score of every image) of a run that has ended."""
    from io import BytesIO

    import pyarrow.parquet as pq

    listed = server.client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    bodies = {item["Key"]: server.client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read() for item in listed}
    lines = next(body for key, body in bodies.items() if key.endswith("events.jsonl")).decode().splitlines()
    rows: dict[tuple[str, str], tuple[str, str, float]] = {}
    for key, body in bodies.items():
        if "/data/" not in key:
            continue
        for row in pq.read_table(BytesIO(body), columns=["source", "key", "status", "label", "score"]).to_pylist():
            name = (row["source"], row["key"])
            assert name not in rows, f"{name} stands twice"
            rows[name] = (row["status"], row["label"], round(row["score"], 5))
    return {event["event"]: event for event in reversed(list(map(json.loads, lines)))}, rows


def measure(args: argparse.Namespace, server: Any, folder: Path) -> list[dict[str, Any]]:
    from models import make_artifact

    from pipeline.model.preprocessing import Preprocessing

    bucket = server.bucket()
    images = upload(server, bucket, args.photos, args.copies)
    tar = sorted(args.photos.glob("*.tar"))[0]
    server.put(f"s3://{bucket}/one/{tar.name}", tar.read_bytes())
    some = [data for name, data in read_tar(tar) if name.endswith(".jpg")]
    model = make_artifact(folder, some, preprocessing=Preprocessing())
    common = {"name": "cluster", "model": {"uri": model}, "resources": RESOURCES}
    job, figures, first = folder / "job.yaml", [], None
    for count in args.raylets:
        with raylets(count, folder / f"home-{count}", server.env) as cluster:
            for name in ("one", "in"):  # the first job warms the cluster up: page cache, worker processes
                output = f"{name}-{count}"
                job.write_text(
                    json.dumps(
                        common | {"input": {"uri": f"s3://{bucket}/{name}/"}, "output": {"uri": f"s3://{bucket}/{output}/"}}
                    )
                )
                since, seconds = submit(cluster, job, server.env)
                events, rows = outcome(server, bucket, f"{output}/")
        first = first or rows
        figures.append(
            {
                "raylets": count,
                "images": images,
                "rows": len(rows),
                "equal_rows": rows == first and len(rows) == images,
                "submit_to_first_s": round(events["first"]["t"] - since, 2),
                "submit_to_exit_s": round(seconds, 2),
            }
        )
        print(figures[-1], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--raylets", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    import seaweed

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seaweed").mkdir()
        server = seaweed.start(folder / "seaweed")
        try:
            figures = measure(args, server, folder)
        finally:
            server.stop()
    write_result("cluster", {"resources": RESOURCES, "runs": figures})
    if not all(figure["equal_rows"] for figure in figures):
        sys.exit("the rows are not equal")


if __name__ == "__main__":
    main()
