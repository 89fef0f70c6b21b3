"""Where does the driver or the object store stop the growth? The whole way with a model that only waits, on 1 to 32 actors.

    .venv-bench/bin/python tests/benchmarks/growth.py [--actors 1,2,4,8,16,32] [--nodes] [--rate 250] [--seconds 15]
        [--size 32]

Ray, reading, assembling and committing are real; decoding is left out and the model sleeps, `--rate` images a second and actor,
so that a machine of few cores stands for many. `--nodes` gives every actor a raylet of its own with a made-up GPU, else one
raylet holds them all. `--size 224` sends 150 kB a row through the object store, as labelling does; at 32 a row is 3 kB, which
leaves Ray's scheduling and the driver to be measured.

Prints a table, and writes tests/benchmarks/results/growth-<size>[-nodes].json and a plot beside it where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

SHARD = 2_000  # images


class Undecoded:
    """In preprocess's place: rows with pixels of zeros, or with none to speak of."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, batch: pa.Table) -> pa.Table:
        from pipeline.rows import pixels_array

        valid = np.asarray(batch.column("key").is_valid())
        pixels = np.zeros((int(valid.sum()), 3, self.size, self.size), np.uint8)
        pixels[:] = 1  # memory that is touched, as a decoder touches it
        sizes = pa.array(np.full(batch.num_rows, self.size), pa.int32(), mask=~valid)
        table = batch.drop_columns("bytes").append_column("pixels", pixels_array(pixels, valid))
        return table.append_column("width", sizes).append_column("height", sizes)


class Waiting:
    """In predict's place: the same prediction for every row, after the seconds that a model of `rate` images a second takes."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, batch: pa.Table) -> pa.Table:
        from pipeline.rows import PREDICTION, TIMINGS, TOPK

        valid = np.asarray(batch.column("key").is_valid())
        time.sleep(valid.sum() / self.rate)
        ranked = [[{"label_id": 7, "label": "cock", "score": 0.5}] * 5 if known else None for known in valid]
        columns = {
            name: batch.column(name) for name in ("unit", "key", "source", "index", "error_class", "error", "width", "height")
        }
        columns["status"] = pa.array(np.where(valid, "ok", ""), pa.string(), mask=~valid)
        columns["label"] = pa.array(np.where(valid, "cock", ""), pa.string(), mask=~valid)
        columns["label_id"] = pa.array(np.full(len(valid), 7), pa.int32(), mask=~valid)
        columns["score"] = pa.array(np.full(len(valid), 0.5), pa.float32(), mask=~valid)
        columns["topk"] = pa.array(ranked, TOPK)
        passing = {name: batch.column(name) for name in TIMINGS.values() if name in batch.column_names}
        return pa.table({"unit": columns.pop("unit"), **{name: columns[name] for name in PREDICTION.names}, **passing})


def replace_stages(rate: float, size: int, batch: int) -> None:
    """The chain's stages are made in its actors by functions; these travel there by value, as they belong to this script."""
    from pipeline import run

    def make_preprocess(*_: Any) -> Undecoded:
        return Undecoded(size)

    def make_predict(*_: Any) -> Waiting:
        return Waiting(rate)

    run.make_preprocess, run.make_predict = make_preprocess, make_predict
    run._block_bytes = lambda *_: batch * 3 * size**2  # else at least 4 MiB, which is everything when rows are small


@contextmanager
def raylets(actors: int, nodes: int) -> Any:
    """A cluster with made-up CPUs and GPUs enough, under RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    store = 2**30 if nodes == 1 else 2**28
    room = {"num_cpus": 3 * actors // nodes + 2, "num_gpus": actors // nodes, "object_store_memory": store}
    grown = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            grown.add_node(**room)
        grown.wait_for_nodes(timeout=120)
        os.environ["RAY_ADDRESS"] = grown.address
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        grown.shutdown()


def measure(folder: Path, args: argparse.Namespace, actors: int) -> dict[str, Any]:
    import resource

    from pipeline.job.jobfile import load_label_job
    from pipeline.label import Driver

    images = int(actors * args.rate * args.seconds)
    shards = max(4, -(-images // SHARD))
    inputs = folder / f"in-{actors}"
    inputs.mkdir()
    for number in range(shards):
        os.link(folder / "shard.tar", inputs / f"{number:05d}.tar")
    job = folder / f"job-{actors}.yaml"
    pools = {
        "read": {"tasks": min(shards, max(1, actors // 4)), "cpus_per_task": 1},
        "preprocess": {"actors": max(1, actors // 2), "cpus_per_actor": 1},
        "predict": {"actors": actors, "cpus_per_actor": 1, "gpus_per_actor": 1, "batch_size": args.batch},
    }
    places = {
        "input": {"uri": str(inputs)},
        "model": {"uri": args.model, "precision": "float16"},
        "output": {"uri": str(folder / f"out-{actors}")},
    }
    job.write_text(json.dumps({"kind": "label", "name": "growth", **places, "resources": pools}))
    with raylets(actors, actors if args.nodes else 1):
        cpu = time.process_time()
        receipt = Driver(load_label_job(job), observe=lambda *_: None, started=time.perf_counter()).label()
        cpu = time.process_time() - cpu
    assert receipt.ok == shards * SHARD, receipt
    ideal = actors * args.rate
    return {
        "actors": actors,
        "images": receipt.ok,
        "ideal": ideal,
        "steady": receipt.images_per_second,
        "share": (receipt.images_per_second or 0) / ideal,
        "first_s": receipt.first_seconds,
        "driver_core_us_per_image": 1e6 * cpu / receipt.ok,
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    actors = [row["actors"] for row in rows]
    axes.loglog(actors, [row["ideal"] for row in rows], "--", color="grey", label="every actor busy")
    axes.loglog(actors, [row["steady"] for row in rows], "o-", label="measured")
    axes.set(
        xlabel="actors",
        ylabel="images a second, steady",
        title=title,
        xticks=actors,
        xticklabels=[str(count) for count in actors],
        yticks=[row["ideal"] for row in rows],
        yticklabels=[f"{row['ideal']:,.0f}" for row in rows],
    )
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", default="1,2,4,8,16,32")
    parser.add_argument("--nodes", action="store_true", help="a raylet for every actor")
    parser.add_argument("--rate", type=float, default=250.0, help="images a second of one waiting model")
    parser.add_argument("--seconds", type=float, default=15.0, help="of work, if nothing stops the growth")
    parser.add_argument("--size", type=int, default=32, help="pixels of a row's edge")
    parser.add_argument("--batch", type=int, default=256, help="rows of a block")
    args = parser.parse_args()
    from models import make_artifact
    from result import write_result
    from shards import picture, tar_bytes

    from pipeline.model.preprocessing import Preprocessing

    replace_stages(args.rate, args.size, args.batch)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.model = make_artifact(folder, [picture(number) for number in range(4)], preprocessing=Preprocessing(size=args.size))
        tiny = picture(1, size=(8, 8))
        (folder / "shard.tar").write_bytes(tar_bytes({f"{number:05d}.jpg": tiny for number in range(SHARD)}))
        for actors in map(int, args.actors.split(",")):
            rows.append(measure(folder, args, actors))
            print(
                ", ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items()
                ),
                flush=True,
            )
    stem = f"growth-{args.size}" + "-nodes" * args.nodes
    write_result(stem, {"rows": rows})
    plot(rows, HERE / "results" / f"{stem}.png", "a waiting model on " + ("raylets of its own" if args.nodes else "one raylet"))


if __name__ == "__main__":
    main()
