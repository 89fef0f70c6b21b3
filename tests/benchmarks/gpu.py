"""Where is the limit on a machine with a GPU, and how near is the pipeline? All ceilings in one go, under 4 minutes on 16 cores.

    .venv/bin/python tests/benchmarks/gpu.py [--photos FOLDER] [--sections model,engine,decode,nvjpeg,lane,pipeline] [--seconds 2]
                                             [--lanes cpu,gpu,apart,both] [--copies N] [--precision float16] [--device cpu]

* model: ResNet-18 on crops that are on the device: the engine by precision and batch, its first batch of a new size, the same
  captured as a CUDA graph, and a half-precision network compiled. What wins here by far is what to build next.
* engine: blocks of 891 crops in the host's memory → labels in it, as a predict actor sees them, and of crops on the device.
* decode: photographs → crops in plain processes, on one core and on all.
* nvjpeg: photographs → pixels, without the resize, by nvJPEG where nvImageCodec is installed; how far these are from libjpeg's,
  and how many of the damaged photographs that our decoder refuses come through.
* lane: photographs → crops on the GPU as its lane makes them, its kernels one by one, and what a predict actor makes of them, by
  threads.
* pipeline: `nightlabel run` on tars on the local disk for each of `--lanes`; `gpu` tells plain files apart where it reads them,
  `apart` in actors of preprocess. Images for 12 s of the limit, or `--copies` of the
  photographs. R / R_limit is its steady rate over what there is with nothing between: the engine or all cores that decode,
  whichever is less; or the GPU's lane with its model; or the sum of both. It needs these sections in the same run.

`--device cpu` rehearses all of it with small numbers. Writes tests/benchmarks/results/gpu.json, or gpu-cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from gpu_decode import on_cores, on_gpu  # noqa: E402
from gpu_lane import WHOLE, lane  # noqa: E402
from limit import ours  # noqa: E402
from photos import add_photos, photographs, read_tar  # noqa: E402
from result import write_result  # noqa: E402

from pipeline.model.preprocessing import Preprocessing  # noqa: E402

SECTIONS = ("model", "engine", "decode", "nvjpeg", "lane", "pipeline")
LANES = ("cpu", "gpu", "apart", "both")
BLOCK = 891  # crops in a block of 128 MiB
SHARD = 1000  # photographs of a tar, 50 to 110 MB
STEADY_S = 12.0  # of the pipeline at the limit: 10 s and its ends


@dataclass
class Bench:
    """`rates` by name, images a second; `seconds` of each, after a warm-up. `store`: the shared memory of a pipeline on a GPU.
    `found`: what else there is to say."""

    device: torch.device
    seconds: float
    store: str = "16GiB"
    rates: dict[str, float] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def measure(self, name: str, images: int, step: Callable[[], object]) -> None:
        """`step` handles `images`. What cannot run here is said, and has no rate."""
        try:
            for _ in range(3):
                step()
            self.settle()
            since, steps = time.perf_counter(), 0
            while time.perf_counter() - since < self.seconds:
                step()
                steps += 1
                if steps % 8 == 0:
                    self.settle()  # or the host runs ahead by thousands of launches
            self.settle()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name:44} -  ({str(error).splitlines()[0][:80]})", flush=True)
            return
        self.note(name, images * steps / (time.perf_counter() - since))

    def note(self, name: str, rate: float) -> None:
        self.rates[name] = rate
        print(f"{name:44} {rate:12,.0f} img/s", flush=True)

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def crops(self, count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=self.device)


def engine(artifact: Any, precision: str, batch: int, device: torch.device) -> Any:
    from pipeline.artifact import build
    from pipeline.engines.scores import Wanted
    from pipeline.engines.torch_engine import TorchEngine
    from pipeline.model.resnet import fold

    model, wanted = fold(build(artifact)), Wanted(top_k=5)
    return TorchEngine(model, artifact.preprocessing, wanted=wanted, precision=precision, device=str(device), batch_size=batch)


def models(bench: Bench, artifact: Any) -> None:
    cases = [("float32", 512), ("bfloat16", 512), ("float16", 256), ("float16", 512), ("float16", 1024)]
    for precision, batch in cases if bench.cuda else [("float32", 4), ("bfloat16", 4)]:
        made, crops, name = (
            engine(artifact, precision, batch, bench.device),
            bench.crops(batch),
            f"model: {precision}, batch {batch}",
        )
        with torch.inference_mode(), made._autocast():
            since = time.perf_counter()
            made.forward(crops)
            bench.settle()
            print(f"{name + ', the first':44} {time.perf_counter() - since:12.2f} s", flush=True)
            bench.measure(name, batch, lambda made=made, crops=crops: made.forward(crops))
            if bench.cuda and (precision, batch) == ("float16", 512):
                bench.measure(f"{name}, CUDA graph", batch, captured(lambda made=made, crops=crops: made.forward(crops)))
                bench.measure(f"{name}, compiled", batch, compiled(artifact, made, crops))


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph that is replayed; made at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def compiled(artifact: Any, made: Any, crops: torch.Tensor) -> Callable[[], object]:
    """The plain network in half precision and what the engine does on both sides of it, by torch.compile; at the first call."""
    from pipeline.artifact import build
    from pipeline.model.resnet import fold

    model = fold(build(artifact)).to(crops.device, torch.float16).to(memory_format=torch.channels_last)

    def forward() -> object:
        seen = torch.addcmul(made.shift, crops.to(torch.float32, memory_format=torch.channels_last), made.scale).half()
        return made.classifier(model.features(seen)).softmax(dim=1).topk(5)

    return torch.compile(forward)


def engines(bench: Bench, artifact: Any, block: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (block, 3, 224, 224), dtype=np.uint8)
    cases = [("float32", 512), ("bfloat16", 512), ("float16", 512), ("float16", 1024)]
    for precision, batch in cases if bench.cuda else [("float32", 16), ("bfloat16", 16)]:
        made, name = engine(artifact, precision, batch, bench.device), f"engine: {precision}, batch {batch}"
        bench.measure(name, block, lambda made=made: made(pixels))
    crops = bench.crops(block)
    bench.measure(f"{name}, on the device", block, lambda: made.on_device(crops))


def shards(photos: Path, folder: Path, images: int) -> int:
    """A tar of SHARD photographs or fewer, by hard links as often as it takes to `images`; how many there are."""
    from shards import tar_bytes

    members = [member for tar in sorted(photos.glob("*.tar")) for member in read_tar(tar) if member[0].endswith(".jpg")]
    each = min(SHARD, images)
    many = itertools.islice(itertools.cycle(enumerate(members)), each)
    folder.mkdir()
    first = folder / "00000.tar"
    first.write_bytes(tar_bytes({f"{at:05d}-{number}-{name}": data for at, (number, (name, data)) in enumerate(many)}))
    copies = -(-images // each)
    for copy in range(1, copies):
        os.link(first, folder / f"{copy:05d}.tar")
    return copies * each


def resources(bench: Bench, which: str) -> dict[str, Any]:
    cores, cuda = len(os.sched_getaffinity(0)), bench.cuda
    half = max(1, cores // 2)
    ways = {"cpu": (cores // 8, max(1, cores - 2)), "gpu": (cores - 3, 0), "apart": (half, half), "both": (half - 2, half)}
    reading, decoding = ways[which]
    batch = 896 if which != "cpu" else 512  # a block holds 891 crops
    predict: dict[str, Any] = {"actors": 1, "cpus_per_actor": 1 if cuda else 0.5, "batch_size": batch if cuda else 16}
    return {
        "read": {"tasks": max(1, reading), "cpus_per_task": 0.1},
        "preprocess": {"actors": decoding, "cpus_per_actor": 0.9 if cuda else 0.5},
        "predict": predict | ({"gpus_per_actor": 1} if cuda else {}),
        "object_store": bench.store if cuda else "1GiB",
    }


def pipeline(bench: Bench, folder: Path, model: str, precision: str, which: str) -> None:
    name, ceiling = f"pipeline: {precision}, lane {which}", limit(bench, precision, which)
    tars = sorted(map(str, (folder / "tars").glob("*.tar")))
    job = {
        "name": "gpu",
        "model": {"uri": model, "precision": precision, "engine": "torch"},
        "input": {"uri": tars[: int(STEADY_S * ceiling / SHARD) + 1] if ceiling else tars},
        "output": {"uri": str(folder / f"out-{which}")},
        "decode_lane": "gpu" if which == "apart" else which,
        "resources": resources(bench, which),
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    try:
        receipt = ours(folder / "job.yaml")
    except subprocess.CalledProcessError as error:
        print(f"{name:44} -  (exit code {error.returncode})", flush=True)
        return
    bench.note(name, receipt["images_per_second"])
    print(f"{'':44} {receipt['ok']:,} labelled, the first after {receipt['first_seconds']:.1f} of {receipt['seconds']:.1f} s")
    seams = ", ".join(f"{seam} {1e3 * seconds / receipt['ok']:.3f}" for seam, seconds in receipt["seam_seconds"].items())
    print(f"{'':44} ms an image: {seams}; {receipt['same_label']} of {receipt['compared']} labels the same", flush=True)
    if ceiling:
        bench.rates[f"{name}, of the limit"] = receipt["images_per_second"] / ceiling
        print(f"{'R / R_limit':44} {receipt['images_per_second'] / ceiling:12.2f} of {ceiling:,.0f} img/s", flush=True)


def limit(bench: Bench, precision: str, which: str) -> float | None:
    """Of a lane with nothing between, where all of it was measured."""
    cores = bench.rates.get("decode: all cores")
    engine = [rate for name, rate in bench.rates.items() if name.startswith(f"engine: {precision}") and "device" not in name]
    whole = [rate for name, rate in bench.rates.items() if name.startswith(WHOLE)]
    alone = max(whole, default=None)
    own = {"cpu": [cores], "gpu": [alone], "apart": [alone], "both": [cores, alone]}[which]
    if None in own or (which == "cpu" and not engine):
        return None
    return min(max(engine), sum(own)) if which == "cpu" else sum(own)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--lanes", default=",".join(LANES), help="of the pipeline's runs; a CPU has just the first")
    parser.add_argument("--copies", type=int, default=None, help="every photograph so often in the pipeline's run")
    parser.add_argument("--precision", default=None, help="of the pipeline's run; float16, or bfloat16 on a CPU")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--store", default="16GiB", help="object_store of the pipeline's runs on a GPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    args.sections, args.lanes = args.sections.split(","), args.lanes.split(",") if args.device == "cuda" else ["cpu"]
    if unknown := set(args.sections) - set(SECTIONS):
        sys.exit(f"--sections: {', '.join(sorted(unknown))}; required: some of {','.join(SECTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; required: one. Rehearse with --device cpu")
    return args


def run(args: argparse.Namespace, bench: Bench, folder: Path) -> None:
    """The sections asked for, in order."""
    from models import make_artifact

    from pipeline.artifact import load_artifact

    images = photographs(args.photos, 200)
    if {"model", "engine", "lane", "pipeline"} & set(args.sections):
        model = make_artifact(folder, images[:50], preprocessing=Preprocessing())
    if "model" in args.sections:
        models(bench, load_artifact(model))
    if "engine" in args.sections:
        engines(bench, load_artifact(model), BLOCK if bench.cuda else 64)
    if "decode" in args.sections:
        bench.note("decode: one core", on_cores(images, args.seconds, 1))
        bench.note("decode: all cores", on_cores(images, args.seconds, len(os.sched_getaffinity(0))))
    if "nvjpeg" in args.sections and bench.cuda:
        bench.found["nvjpeg"] = on_gpu(bench.measure, images)
    if "lane" in args.sections and bench.cuda:
        lane(bench, load_artifact(model), images, BLOCK)
    if "pipeline" in args.sections:
        precision = args.precision or ("float16" if bench.cuda else "bfloat16")
        guess = 700.0 * len(os.sched_getaffinity(0))
        wanted = int(STEADY_S * max(limit(bench, precision, which) or guess for which in args.lanes))
        if args.copies is not None:
            wanted = args.copies * len(photographs(args.photos))
        bench.found["images"] = shards(args.photos, folder / "tars", wanted)
        for which in args.lanes:
            pipeline(bench, folder, model, precision, which)


def main() -> None:
    args = parse()
    bench = Bench(torch.device(args.device), args.seconds, args.store)
    where = torch.cuda.get_device_name() if bench.cuda else "cpu"
    told = {"device": where, "cores": len(os.sched_getaffinity(0)), "versions": {"torch": torch.__version__}}
    told["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory() as name:
            run(args, bench, Path(name))
    finally:  # whatever ends it: what was measured stays
        write_result("gpu" if bench.cuda else "gpu-cpu", {**told, "rates": bench.rates, **bench.found})


if __name__ == "__main__":
    main()
