"""How fast are others with the same photographs? Ours, the peers in peers/, and plain processes, in turn, in one run.

    .venv-bench/bin/python tests/benchmarks/peers.py [--quick] [--photos FOLDER] [--copies 2] [--rounds 2] [--only NAME ...]

`make bench` runs it in an environment of its own. Peers are written as their documentation or published script has it, with the
settings that a reader of it would choose for this machine, and get loose JPEG files, which spares them the tars that ours reads.
They label at float32 and bfloat16; none offers int8. A contender is a whole process: `end to end` is from its command to its
exit, `steady` from its first labels to its last. Labels are compared: a peer that labels otherwise than ours is no peer.
`core-ms`: time within our stages by image, as they share the cores; below the table, every step by itself (seams.py). Prints a
table and writes tests/benchmarks/results/peers.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from limit import limit, quantized  # noqa: E402
from photos import DEFAULT_PHOTOS, copy_tars, photographs, read_tar  # noqa: E402
from result import write_result  # noqa: E402
from seams import seams  # noqa: E402

PEERS = {
    "DataLoader + torchvision": ("dataloader.py",),
    "timm loop": ("timm_loop.py",),
    "Hugging Face pipeline": ("pipeline_hf.py",),
    "Ray Data, its guide": ("ray_data.py",),
    "Ray Data, Daft's script": ("ray_data.py", "--script=daft"),
    "Daft, its script": ("daft_script.py",),
}
ENGINES = {"float32": ("auto",), "bfloat16": ("auto", "openvino"), "int8": ("auto", "openvino")}
VERSIONS = ("torch", "torchvision", "ray", "daft", "transformers", "timm", "onnxruntime", "openvino")
AGREES = 0.9  # of labels


@dataclass
class Measured:
    """One contender, once: images a second, seconds, MB, and what it said of each image."""

    contender: str
    precision: str
    end_to_end: float | None
    steady: float
    first_s: float | None
    peak_mb: float | None
    core_ms: dict[str, float] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict, repr=False)


class Memory:
    """The peak of a process and its descendants while inside: PSS, which counts what they share once."""

    def __init__(self, pid: int) -> None:
        self.root, self.peak, self.done = psutil.Process(pid), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(1.0):  # reading PSS takes the kernel a few ms a process
            total = 0
            try:
                for process in [self.root, *self.root.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:  # gone in the meantime
                continue
            self.peak = max(self.peak, total / 1e6)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


@dataclass(frozen=True)
class Bench:
    """What all contenders share: photographs as tars and as files, the model, the job's resources."""

    folder: Path
    images: int
    model: str
    int8: str
    resources: dict[str, Any]

    def peer(self, name: str, precision: str) -> Measured:
        script, *words = PEERS[name]
        out = self.folder / "peer"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(HERE / "peers" / script), str(self.folder / "jpg"), self.model, str(out)]
        since, seconds, peak, _ = self._run([*command, "--precision", precision, *words])
        lines = [line.split() for line in (out / "labels").read_text().splitlines()]
        batches = [[pair.partition("=") for pair in pairs.split(",")] for _, pairs in lines]
        labels = {key: int(number) for batch in batches for key, _, number in batch}
        assert len(labels) == self.images, f"{name} labelled {len(labels)} of {self.images}"
        times = [float(at) for at, _ in lines]
        first, last = min(times), max(times)
        steady = (self.images - len(batches[times.index(first)])) / (last - first)
        return Measured(name, precision, self.images / seconds, steady, first - since, peak, labels=labels)

    def ours(self, precision: str, engine: str) -> Measured:
        out, job = self.folder / "labels", self.folder / "job.yaml"
        shutil.rmtree(out, ignore_errors=True)
        source = self.source(precision, engine)
        places = {"input": {"uri": str(self.folder / "tars")}, "model": source, "output": {"uri": str(out)}}
        job.write_text(json.dumps({"name": "bench", **places, "resources": self.resources}))
        _, seconds, peak, said = self._run([sys.executable, "-m", "pipeline", "run", str(job), "--json"])
        receipt = json.loads(said)
        assert receipt["ok"] == self.images, receipt
        core_ms = {seam: 1e3 * spent / self.images for seam, spent in receipt["seam_seconds"].items()}
        name = "ours" if engine == "auto" else f"ours, {engine}"
        steady, first = receipt["images_per_second"], receipt["first_seconds"]
        return Measured(name, precision, self.images / seconds, steady, first, peak, core_ms, _labels(receipt["where"]))

    def plain(self, precision: str, engine: str) -> Measured:
        rate = limit(self.folder / "tars", self.source(precision, engine), self.resources["predict"]["batch_size"])
        return Measured("plain processes" + ("" if engine == "auto" else f", {engine}"), precision, None, rate, None, None)

    def source(self, precision: str, engine: str) -> dict[str, str]:
        return {"uri": self.int8 if precision == "int8" else self.model, "precision": precision, "engine": engine}

    def _run(self, command: list[str]) -> tuple[float, float, float, str]:
        """(start, seconds, peak MB, stdout) of a process that ends well, as from a shell in the project's folder."""
        since = time.time()
        with (self.folder / "stderr").open("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=HERE.parents[1])
            with Memory(process.pid) as memory:
                said, _ = process.communicate(timeout=900)
            if process.returncode:
                errors.seek(0)
                sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read()[-2000:]}")
        return since, time.time() - since, memory.peak, said


def _labels(where: str) -> dict[str, int]:
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["key", "label_id"]) for path in Path(where, "data").glob("*.parquet")]
    return {row["key"]: row["label_id"] for table in tables for row in table.to_pylist()}


def contenders(bench: Bench, *, quick: bool, only: list[str]) -> Iterator[Callable[[], Measured]]:
    """A round, in order: by precision, the limit, ours, the peers."""
    for precision, engines in ENGINES.items():
        if quick and precision == "bfloat16":
            continue
        for engine in engines:
            if engine != "openvino" or importlib.util.find_spec("openvino"):
                yield partial(bench.plain, precision, engine)
                yield partial(bench.ours, precision, engine)
        for name in PEERS if precision != "int8" else ():
            if not only or name in only:
                yield partial(bench.peer, name, precision)


def check_labels(one: Measured, measured: list[Measured]) -> None:
    """Ends the benchmark when a contender says something else than ours at float32."""
    ours = next((other.labels for other in measured if other.contender == "ours" and other.precision == "float32"), {})
    if one.labels and ours:
        same = sum(ours[key] == label for key, label in one.labels.items()) / len(ours)
        if same < AGREES:
            sys.exit(f"{one.contender} at {one.precision} says the same as ours of {same:.1%} of the images; it does other work")


def medians(measured: list[Measured]) -> list[dict[str, Any]]:
    """Over the rounds; ratios to the limit of the same engine, and of ours to each peer of the same precision."""
    rows: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        rows.setdefault((one.precision, one.contender), []).append(one)
    table = []
    for (precision, name), runs in rows.items():
        row: dict[str, Any] = {"precision": precision, "contender": name, "runs": len(runs)}
        for number in ("end_to_end", "steady", "first_s", "peak_mb"):
            values = [getattr(run, number) for run in runs if getattr(run, number) is not None]
            row[number] = statistics.median(values) if values else None
        row["core_ms"] = {seam: statistics.median(run.core_ms[seam] for run in runs) for seam in runs[0].core_ms}
        table.append(row)
    rates = {(row["precision"], row["contender"]): row["steady"] for row in table}
    for row in table:
        engine = row["contender"].partition(", ")[2] if row["contender"].startswith("ours") else ""
        row["of_limit"] = row["steady"] / rates[row["precision"], "plain processes" + (f", {engine}" if engine else "")]
        row["ours_to_it"] = rates[row["precision"], "ours"] / row["steady"] if row["contender"] in PEERS else None
    return table


def lines(table: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'':>38}{'end to end':>11}{'steady':>8}{'of limit':>9}{'first, s':>9}{'peak, MB':>9}{'ours / it':>10}  core-ms"
    for row in table:
        numbers = ((row[name], width, digits) for name, width, digits in COLUMNS)
        cells = "".join(f"{'' if value is None else format(value, f'.{digits}f'):>{width}}" for value, width, digits in numbers)
        seams = ", ".join(f"{seam} {spent:.2f}" for seam, spent in row["core_ms"].items())
        yield f"{row['precision']:<10}{row['contender']:<28}{cells}  {seams}"


COLUMNS = (
    ("end_to_end", 11, 1),
    ("steady", 8, 1),
    ("of_limit", 9, 2),
    ("first_s", 9, 1),
    ("peak_mb", 9, 0),
    ("ours_to_it", 10, 2),
)


def prepared(folder: Path, photos: Path, copies: int) -> Bench:
    from models import make_artifact

    from pipeline.model.preprocessing import Preprocessing

    images = copy_tars(photos, folder / "tars", copies)
    (folder / "jpg").mkdir()
    for tar in (folder / "tars").glob("*.tar"):
        for name, data in read_tar(tar):
            if name.endswith(".jpg"):
                (folder / "jpg" / name).write_bytes(data)
    # Learned by heart, all of them: so small differences of decoders change no label, and large ones are seen.
    known = photographs(photos)
    model = make_artifact(folder, known, preprocessing=Preprocessing())
    job = yaml.safe_load((HERE.parents[1] / "jobs/photos-2cpu.yaml").read_text())
    return Bench(folder, images, model, quantized(model, known[:50], folder / "int8"), job["resources"])


def generated(folder: Path) -> Path:
    """400 noisy pictures of a photograph's size in 8 tars, for a machine without photographs."""
    import io

    import numpy as np
    from PIL import Image
    from shards import tar_bytes

    folder.mkdir()
    rng = np.random.default_rng(0)
    for tar in range(8):
        members = {}
        for number in range(50):
            small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            sink = io.BytesIO()
            small.resize((500, 375), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=95)
            members[f"g{tar}-{number}.jpg"] = sink.getvalue()
        (folder / f"{tar}.tar").write_bytes(tar_bytes(members))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=None, help="a folder of WebDataset tars; else pictures are made")
    parser.add_argument("--copies", type=int, default=2, help="every photograph so often, under new keys")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round, one copy, without bfloat16: 5 minutes")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=[], help="of the peers")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    with tempfile.TemporaryDirectory() as name:
        photos = args.photos or (DEFAULT_PHOTOS if DEFAULT_PHOTOS.is_dir() else generated(Path(name, "pictures")))
        bench = prepared(Path(name), photos, 1 if args.quick else args.copies)
        measured: list[Measured] = []
        for number in range(1 if args.quick else args.rounds):
            for contender in contenders(bench, quick=args.quick, only=args.only):
                one = contender()
                measured.append(one)
                first = "" if one.first_s is None else f", first after {one.first_s:.1f} s"
                print(f"round {number + 1}: {one.precision}, {one.contender}: {one.steady:.1f} img/s{first}", flush=True)
                check_labels(one, measured)
        tars = sorted((bench.folder / "tars").glob("*.tar"))[:4]
        alone = {precision: seams(tars, bench.source(precision, "auto"), 16) for precision in ENGINES}
    table = medians(measured)
    print("\n".join(lines(table)))
    for precision, steps in alone.items():
        print(f"{precision}, one core, ms an image: " + ", ".join(f"{step} {spent:.2f}" for step, spent in steps.items()))
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if importlib.util.find_spec(name)}
    runs = [{key: value for key, value in asdict(one).items() if key != "labels"} for one in measured]
    write_result("peers", {"images": bench.images, "versions": versions, "median": table, "core_ms": alone, "runs": runs})


if __name__ == "__main__":
    main()
