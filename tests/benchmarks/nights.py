"""What a night costs beside labelling, on a real S3 server on loopback: the lease, and publishing 1,000 files as a Delta table.

    .venv/bin/python tests/benchmarks/nights.py [--leases 20] [--files 1000]

Seconds, medians for the lease. Publishing is done twice: the second time finds out that nothing is new. Writes
tests/benchmarks/results/nights.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import seaweed  # noqa: E402
from result import write_result  # noqa: E402


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    done = work()
    return time.perf_counter() - since, done


def lease_seconds(server: seaweed.Seaweed, out: str, times: int) -> dict[str, float]:
    from pipeline.nights.lease import LeaseStore
    from pipeline.storage import open_store

    store = open_store("s3://", server.options)
    store.create(f"{out}/first", b"a client takes half a second to build")
    took, gave = [], []
    for _ in range(times):
        seconds, lease = timed(lambda: LeaseStore(store, f"{out}/leases/products").acquire("skip", wait=0.0, say=print))
        took.append(seconds)
        gave.append(timed(lease.__exit__)[0])
    return {"taken": statistics.median(took), "taken_at_most": max(took), "given_back": statistics.median(gave)}


def publish_seconds(server: seaweed.Seaweed, out: str, files: int) -> dict[str, float]:
    from test_publish import FINGERPRINT, Labels, parquet
    from test_run import job

    output = {"uri": out, "s3": server.options.model_dump()}
    labels = Labels(job("in", "model", out, output=output, publish={"format": "delta"}), f"{out}/{FINGERPRINT}")
    data = parquet([str(number) for number in range(100)])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: labels.put(str(number), data), range(files)))
    (first, found), (again, nothing) = timed(labels.publish), timed(labels.publish)
    assert (found.added, nothing.added) == (files, 0), (found, nothing)
    return {"published": first, "nothing_new": again}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leases", type=int, default=20)
    parser.add_argument("--files", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = seaweed.start(Path(folder))
        try:
            os.environ.update(server.env)
            out = f"s3://{server.bucket()}/labels"
            seconds = lease_seconds(server, out, args.leases) | publish_seconds(server, out, args.files)
        finally:
            server.stop()
    print(", ".join(f"{name} {spent:.3f} s" for name, spent in seconds.items()))
    write_result("nights", {"leases": args.leases, "files": args.files, "seconds": seconds})


if __name__ == "__main__":
    main()
