"""How near is the pipeline to plain processes? Both do the same work on the same photographs, in turn, in one run.

    .venv/bin/python tests/benchmarks/limit.py [--photos FOLDER] [--copies 3] [--runs 3] [--precision float32]

The limit: one process a core, each with its own images in memory, `Preprocess` and `Predict` called in a plain loop, nothing
between. Ours: `nightlabel run` on tars on the local disk. Photographs are repeated under new keys, so that start-up and steady
state are told apart. At int8 both run ONNX Runtime; the artifact is calibrated with some of the photographs and passes no gate,
for tests/benchmarks/int8.py measures what int8 costs. Prints a table and writes tests/benchmarks/results/limit.json, or
limit-int8.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from photos import add_photos, copy_tars, photographs, read_tar  # noqa: E402
from result import write_result  # noqa: E402


def quantized(model: str, images: list[bytes], out: Path) -> str:
    """The artifact in the folder `model` with an int8 graph, per channel, calibrated with `images`; its folder."""
    from pipeline.artifact import INT8, load_artifact, save_artifact, with_files
    from pipeline.engines.onnx_graph import to_onnx
    from pipeline.prepare.calibrate import Scheme, calibrate, quantize
    from pipeline.preprocess import Prepare

    artifact = load_artifact(model)
    prepare, graph = Prepare(artifact.preprocessing, 10**8), to_onnx(artifact)
    ranges = calibrate(graph, (prepare(memoryview(image))[0][None] for image in images))
    made = with_files({**artifact.files, INT8: quantize(graph, ranges, Scheme(per_channel=True))})
    save_artifact(made, str(out))
    return str(out)


def plain(tars: list[Path], source: dict[str, str], batch: int, lines: tuple[Any, Any]) -> None:
    """One process of the limit: (images, seconds) after everything is loaded and warm."""
    import pyarrow as pa

    from pipeline.artifact import load_artifact
    from pipeline.predict import Predict
    from pipeline.preprocess import Preprocess
    from pipeline.rows import IMAGE
    from pipeline.spec import ModelSource, Output

    wanted = ModelSource.model_validate(source)
    artifact = load_artifact(wanted.uri)
    preprocess = Preprocess(artifact.preprocessing, max_pixels=10**8)
    predict = Predict(artifact, wanted, device="cpu", batch_size=batch, output=Output(uri="x"), threads=1)
    tables = []
    for tar in tars:
        images = [data for name, data in read_tar(tar) if name.endswith(".jpg")]
        rows = [{"unit": "u", "index": at, "key": str(at), "source": "s", "bytes": data} for at, data in enumerate(images)]
        tables.append(pa.Table.from_pylist(rows, schema=IMAGE))
    predict(preprocess(tables[0].slice(0, batch)))
    gate, results = lines
    gate.wait()
    since = time.perf_counter()
    for table in tables:
        predict(preprocess(table))
    results.put((sum(table.num_rows for table in tables), time.perf_counter() - since))


def limit(folder: Path, source: dict[str, str], batch: int) -> float:
    """Images a second of one plain process per core, together, with the model and engine of a job's `model`."""
    cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(cores), spawn.Queue()
    tars = sorted(folder.glob("*.tar"))
    os.environ["OMP_NUM_THREADS"] = "1"
    common = (source, batch, (gate, results))
    workers = [spawn.Process(target=plain, args=(tars[at::cores], *common)) for at in range(cores)]
    for worker in workers:
        worker.start()
    rates = [images / seconds for images, seconds in (results.get(timeout=1800) for _ in workers)]
    for worker in workers:
        worker.join()
    del os.environ["OMP_NUM_THREADS"]
    return sum(rates)


def ours(job: Path) -> dict[str, Any]:
    """The receipt of `nightlabel run`."""
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", str(job), "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--resources", default=None, help="JSON of the job's resources; default those of jobs/photos-2cpu.yaml")
    args = parser.parse_args()
    import yaml
    from models import make_artifact

    from pipeline.model.preprocessing import Preprocessing

    resources = (
        json.loads(args.resources)
        if args.resources
        else yaml.safe_load((HERE.parents[1] / "jobs/photos-2cpu.yaml").read_text())["resources"]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = copy_tars(args.photos, folder / "tars", args.copies)
        some = photographs(args.photos, 50)
        model = make_artifact(folder, some, preprocessing=Preprocessing())
        if args.precision == "int8":
            model = quantized(model, some, folder / "int8")
        rows = []
        for number in range(args.runs):
            source = {"uri": model, "precision": args.precision}
            rate = limit(folder / "tars", source, resources["predict"]["batch_size"])
            job = folder / "job.yaml"
            job.write_text(
                json.dumps(
                    {
                        "name": "limit",
                        "input": {"uri": str(folder / "tars")},
                        "model": source,
                        "output": {"uri": str(folder / f"out-{number}")},
                        "resources": resources,
                    }
                )
            )
            receipt = ours(job)
            assert receipt["ok"] == images, receipt
            row = {
                "limit": rate,
                "steady": receipt["images_per_second"],
                "first_s": receipt["first_seconds"],
                "seconds": receipt["seconds"],
            }
            row |= {"ratio": row["steady"] / rate, "end_to_end": images / receipt["seconds"]}
            rows.append(row)
            print(f"run {number + 1}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"median of {args.runs}, {images} photographs, {args.precision}: "
        + ", ".join(f"{key} {value:.2f}" for key, value in medians.items())
    )
    figures = {"images": images, "precision": args.precision, "resources": resources, "runs": rows, "median": medians}
    write_result("limit" if args.precision == "float32" else f"limit-{args.precision}", figures)


if __name__ == "__main__":
    main()
