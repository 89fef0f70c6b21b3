"""How fast are the two ends of the way by themselves: reading shards, and assembling and committing rows?

    .venv/bin/python tests/benchmarks/rates.py read [--processes 2] [--shards 8] [--megabytes 64] [--runs 5]
    .venv/bin/python tests/benchmarks/rates.py latency [--first-byte 0.15] [--rate 87]
    .venv/bin/python tests/benchmarks/rates.py commit [--rows 20000] [--units 20] [--runs 5]
    .venv/bin/python tests/benchmarks/rates.py lanes [--photos FOLDER] [--runs 5]

read: processes that read tars from a SeaweedFS on this machine into image rows, in turn with as many that fetch the same objects
whole and drop them; together, in MB/s.
latency: one reader of tars on a store that answers as S3 is known to, `--first-byte` seconds until the first byte and `--rate`
MB/s on one connection, by the number of ranges under way at once. The store only sleeps.
commit: the driver's part: blocks of prediction rows from memory → units put together, serialised, created on disk. In rows a
second, rows for each second of a core, and the memory that it took on top of the blocks.
lanes: what is done on a CPU where the GPU decodes: blocks of 1,000 photographs, as readers put them together, in which plain
files are told apart and the others decoded. In us of a core an image, our own and the kernel's.

Each writes tests/benchmarks/results/rates-<what>.json.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

BLOCK = 891  # rows, as a 128 MiB block of 224 × 224 crops holds
MEMBER = 110_000  # bytes, as the photographs have on average


@cache
def client(endpoint: str) -> Any:
    import botocore.session

    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint)


def fetch(uri: str, endpoint: str) -> int:
    """What a plain client does: one GET, read to its end."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    body = client(endpoint).get_object(Bucket=bucket, Key=key)["Body"]
    size = 0
    while chunk := body.read(2**20):
        size += len(chunk)
    return size


def read(uri: str, endpoint: str) -> int:
    """What our read task does."""
    from pipeline.read import read_unit
    from pipeline.run import _store
    from pipeline.spec import S3, Input
    from pipeline.unit import Part, Unit

    wanted = Input(uri=uri.rpartition("/")[0] + "/", s3=S3(endpoint=endpoint, region="us-east-1"))  # of all: one client
    store = _store(wanted)
    item = store.head(uri)
    rows = 0
    for table in read_unit(store, Unit((Part(item.uri, item.etag, item.size),)), wanted=wanted):
        assert table.column("error").null_count == table.num_rows, table.column("error")
        rows += table.num_rows
    assert rows > 1
    return item.size


def work(what: Callable[[str, str], int], uris: list[str], endpoint: str, lines: tuple[Any, Any]) -> None:
    what(uris[0], endpoint)  # imports and connections
    gate, results = lines
    gate.wait()
    since = time.perf_counter()
    size = sum(what(uri, endpoint) for uri in uris)
    results.put((size, since, time.perf_counter()))


def together(what: Callable[[str, str], int], uris: list[str], endpoint: str, processes: int) -> float:
    """MB/s of all processes, from the first start to the last end."""
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(processes), spawn.Queue()
    workers = [spawn.Process(target=work, args=(what, uris[at::processes], endpoint, (gate, results))) for at in range(processes)]
    for worker in workers:
        worker.start()
    done = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return sum(size for size, _, _ in done) / (max(end for *_, end in done) - min(since for _, since, _ in done)) / 1e6


def measure_read(args: argparse.Namespace) -> list[dict[str, Any]]:
    import seaweed
    from shards import tar_bytes

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        server = seaweed.start(Path(folder))
        try:
            os.environ |= server.env
            bucket, uris = server.bucket(), []
            for number in range(args.shards):
                members = {f"{at:04d}.jpg": rng.bytes(MEMBER) for at in range(args.megabytes * 10**6 // MEMBER)}
                uris.append(f"s3://{bucket}/{number}.tar")
                server.put(uris[-1], tar_bytes(members))
            rows = []
            for _ in range(args.runs):
                plain, ours = (together(what, uris, server.endpoint, args.processes) for what in (fetch, read))
                rows.append({"plain_mb_s": plain, "ours_mb_s": ours, "ratio": ours / plain})
                print(rows[-1], flush=True)
        finally:
            server.stop()
    return rows


@dataclass(frozen=True)
class Distant:
    """A store of zeros that answers late and at the rate of one connection, any number of times at once."""

    first_byte: float
    rate: float

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Any = None) -> bytes:
        size = (stop or 0) - start
        time.sleep(self.first_byte + size / self.rate)
        return bytes(size)


def measure_latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline.storage import Object
    from pipeline.tar import Stream

    rows = []
    for ahead in (1, 2, 4, 8):
        item, since, size = Object("x", 256 * 2**20, ""), time.perf_counter(), 0
        with Stream(Distant(args.first_byte, args.rate * 1e6), item, ahead=ahead) as stream:  # type: ignore[arg-type]
            while taken := stream.take(MEMBER):
                size += len(taken)
        rows.append({"ahead": ahead, "mb_s": size / (time.perf_counter() - since) / 1e6})
        print(rows[-1], flush=True)
    return rows


def blocks(units: list[str], rows: int) -> Iterator[pa.Table]:
    """Prediction rows as they come from the actors: blocks of units that are read side by side, four at a time."""
    from pipeline.rows import TOPK

    ranked = [[{"label_id": at, "label": f"class {at}", "score": 1 / (at + 1)} for at in range(5)]] * BLOCK
    topk = pa.array(ranked, TOPK)
    for group in range(0, len(units), 4):
        for start in range(0, rows, BLOCK):
            for unit in units[group : group + 4]:
                count = min(BLOCK, rows - start)
                yield _block(unit, start, count, topk)
        for unit in units[group : group + 4]:
            end = _block(unit, rows, 1, topk)
            yield end.set_column(1, "key", pa.nulls(1, pa.string())).set_column(4, "status", pa.nulls(1, pa.string()))


def _block(unit: str, start: int, count: int, topk: pa.Array) -> pa.Table:
    from pipeline.rows import TIMINGS

    numbers = np.arange(start, start + count)
    text = pa.array([f"{number:08d}" for number in numbers])
    same = {name: pa.array([value] * count) for name, value in (("s", f"s3://photos/{unit}.tar"), ("ok", "ok"), ("l", "class 0"))}
    nothing = pa.nulls(count, pa.string())
    sizes = pa.array(np.full(count, 500), pa.int32())
    columns = {
        "unit": pa.array([unit] * count),
        "key": text,
        "source": same["s"],
        "index": pa.array(numbers),
        "status": same["ok"],
    }
    columns |= {
        "label": same["l"],
        "label_id": pa.array(np.zeros(count), pa.int32()),
        "score": pa.array(np.ones(count), pa.float32()),
    }
    columns |= {"topk": topk[:count], "error_class": nothing, "error": nothing, "width": sizes, "height": sizes}
    return pa.table(columns | dict.fromkeys(TIMINGS.values(), pa.array(np.ones(count), pa.float32())))


def measure_commit(args: argparse.Namespace) -> list[dict[str, Any]]:
    from models import small_artifact

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_artifact(folder)
        for number in range(args.runs):
            rows.append(commit_once(folder / f"{number}", model, args))
            print(rows[-1], flush=True)
    return rows


def commit_once(folder: Path, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """A whole pass of the driver, whose blocks lie ready in memory instead of coming from Ray."""
    from shards import picture, tar_bytes

    from pipeline.label import Driver
    from pipeline.spec import Job
    from pipeline.start import load_model, plan_job

    (folder / "in").mkdir(parents=True)
    for number in range(args.units):
        (folder / "in" / f"{number}.tar").write_bytes(tar_bytes({"a.jpg": picture(number)}))
    places = {"input": {"uri": str(folder / "in")}, "model": {"uri": model}, "output": {"uri": str(folder / "out")}}
    pools = {"read": {"tasks": max(1, args.units // 4)}}  # a unit each: small shards are joined until there are 4 a read task
    job = Job.model_validate({"name": "rates", **places, "resources": pools})
    log, plan = plan_job(job, load_model(job, weights=False))
    units = [unit.id for unit in plan.todo]
    assert len(units) == args.units, units
    ready = list(blocks(units, args.rows))
    driver = Driver(job, observe=lambda *_: None, started=time.perf_counter())
    driver.artifact = load_model(job, weights=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since, cpu = time.perf_counter(), time.process_time()
    plan = driver.passes(log, plan, lambda *_, **__: (block for block in ready))
    seconds, cpu = time.perf_counter() - since, time.process_time() - cpu
    assert not plan.todo, plan
    assert driver.attempt.rows == args.rows * args.units, driver.attempt
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"rows_per_s": args.rows * args.units / seconds, "rows_per_core_s": args.rows * args.units / cpu, "more_mb": more}


def measure_lanes(args: argparse.Namespace) -> list[dict[str, Any]]:
    from photos import photographs

    from pipeline.lanes import Lanes, all_on_gpu
    from pipeline.model.preprocessing import Preprocessing
    from pipeline.preprocess import Preprocess
    from pipeline.read import BATCH_ROWS
    from pipeline.rows import IMAGE

    images = [data for data, _ in zip(itertools.cycle(photographs(args.photos)), range(1000), strict=False)]
    rows = [{"unit": "u", "index": at, "key": f"{at}", "source": "s", "bytes": data} for at, data in enumerate(images)]
    block = pa.concat_tables(
        pa.Table.from_pylist(rows[at : at + BATCH_ROWS], schema=IMAGE) for at in range(0, len(rows), BATCH_ROWS)
    )
    seen, most = Preprocessing(), 10**8
    lanes, found = Lanes(Preprocess(seen, max_pixels=most, threads=1), seen, most, all_on_gpu), []
    plain = lanes(block)["bytes"].drop_null()
    for _ in range(args.runs):
        before = resource.getrusage(resource.RUSAGE_SELF)
        lanes(block)
        after = resource.getrusage(resource.RUSAGE_SELF)
        us = {name: 1e6 * (getattr(after, name) - getattr(before, name)) / len(images) for name in ("ru_utime", "ru_stime")}
        found.append({"user_us": us["ru_utime"], "kernel_us": us["ru_stime"], "plain": len(plain) / len(images)})
        print(found[-1], flush=True)
    return found


def main() -> None:
    from photos import DEFAULT_PHOTOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "latency", "commit", "lanes"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=64, help="of a shard")
    parser.add_argument("--first-byte", type=float, default=0.15, help="seconds")
    parser.add_argument("--rate", type=float, default=87.0, help="MB/s of one connection")
    parser.add_argument("--rows", type=int, default=20_000, help="of a unit")
    parser.add_argument("--units", type=int, default=20)
    parser.add_argument("--photos", type=Path, default=DEFAULT_PHOTOS, help="a folder of WebDataset tars")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    from result import write_result

    ways = {"read": measure_read, "latency": measure_latency, "commit": measure_commit, "lanes": measure_lanes}
    rows = ways[args.what](args)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]} if args.what != "latency" else {}
    print(medians or "")
    write_result(f"rates-{args.what}", {"rows": rows} | ({"median": medians} if medians else {}))


if __name__ == "__main__":
    main()
