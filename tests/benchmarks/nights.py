"""What a night costs beside labelling, on a real S3 server on loopback: taking and giving back the lease, publishing 1,000 files.

python tests/benchmarks/nights.py
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import seaweed  # noqa: E402
from test_publish import FINGERPRINT, Labels, parquet  # noqa: E402
from test_run import job  # noqa: E402

from pipeline.nights.lease import Office  # noqa: E402
from pipeline.storage import open_store  # noqa: E402

server = seaweed.start(Path(tempfile.mkdtemp()))
os.environ.update(server.env)
store, out = open_store("s3://", server.options), f"s3://{server.bucket()}/labels"
store.create(f"{out}/first", b"a client takes half a second to build")

took, gave = [], []
for _ in range(20):
    since = time.perf_counter()
    lease = Office(store, f"{out}/leases/products").acquire("skip", wait=0.0, say=print)
    took.append(time.perf_counter() - since)
    since = time.perf_counter()
    lease.__exit__()
    gave.append(time.perf_counter() - since)
print(f"lease: taken in {statistics.median(took) * 1000:.0f} ms (at most {max(took) * 1000:.0f}), given back in", end=" ")
print(f"{statistics.median(gave) * 1000:.0f} ms (at most {max(gave) * 1000:.0f})")

output = {"uri": out, "s3": server.options.model_dump()}
labels = Labels(job("in", "model", out, output=output, publish={"format": "delta"}), f"{out}/{FINGERPRINT}")
data = parquet([str(number) for number in range(100)])
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda number: labels.put(str(number), data), range(1000)))
for _ in range(2):
    since = time.perf_counter()
    print(f"{labels.publish().line()} in {time.perf_counter() - since:.2f} s")
server.stop()
