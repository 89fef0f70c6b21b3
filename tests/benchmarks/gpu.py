"""Where is the limit on a machine with a GPU, and how near is the pipeline? All ceilings in one go, under 8 minutes, one table.

    .venv/bin/python tests/benchmarks/gpu.py [--photos FOLDER] [--copies 40] [--seconds 3] [--device cpu]

* copy: crops from pinned memory to the device.
* model: ResNet-18 on crops that are on the device, by precision and batch; as the engine runs it, captured as a CUDA graph, and
  compiled. What wins here and is not what the engine does is what to build next.
* engine: blocks of 891 crops in the host's memory → labels in it, as a predict actor sees them.
* decode: photographs → crops, on one core and on all, in plain processes; and by nvJPEG where nvImageCodec is installed, pixels
  only, without the resize. Also what it says of photographs that are cut short or have a hole, which our decoder refuses: a lane
  that decodes these puts labels where failures belong.
* pipeline: `nightlabel run` on tars on the local disk, decoding on CPU actors, one GPU actor. R / R_limit is its steady rate over
  the smallest ceiling that it can meet: decode on all cores, or the engine.

`--device cpu` rehearses all of it with small numbers. Writes tests/benchmarks/results/gpu.json, or gpu-cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from limit import DEFAULT_PHOTOS, copy_tars, ours, photographs  # noqa: E402
from models import make_artifact  # noqa: E402
from result import write_result  # noqa: E402

from pipeline.artifact import Artifact, build, load_artifact  # noqa: E402
from pipeline.engines.scores import Wanted  # noqa: E402
from pipeline.engines.torch_engine import TorchEngine  # noqa: E402
from pipeline.model.preprocessing import Preprocessing  # noqa: E402
from pipeline.model.resnet import fold  # noqa: E402

MAX_PIXELS = 10**8
BLOCK = 891  # crops in a block of 128 MiB


class Bench:
    """`rates` by name, images a second; `seconds` of each, after a warm-up."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds, self.rates = torch.device(device), seconds, dict[str, float]()
        self.damaged: dict[str, dict[str, int]] = {}
        self.cuda = self.device.type == "cuda"

    def measure(self, name: str, images: int, step: Callable[[], object]) -> None:
        """`step` handles `images`. What cannot run here is said, and has no rate."""
        try:
            for _ in range(3):
                step()
            self._settle()
            since, steps = time.perf_counter(), 0
            while time.perf_counter() - since < self.seconds:
                step()
                steps += 1
                if steps % 8 == 0:
                    self._settle()  # or the host runs ahead by thousands of launches
            self._settle()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name:44} -  ({str(error).splitlines()[0][:80]})", flush=True)
            return
        self.note(name, images * steps / (time.perf_counter() - since))

    def note(self, name: str, rate: float) -> None:
        self.rates[name] = rate
        print(f"{name:44} {rate:12,.0f} img/s", flush=True)

    def _settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def copies(bench: Bench, batch: int) -> None:
    staged = torch.zeros((batch, 3, 224, 224), dtype=torch.uint8, pin_memory=bench.cuda)
    target = torch.empty_like(staged, device=bench.device)
    bench.measure("copy: pinned to device", batch, lambda: target.copy_(staged, non_blocking=True))


def engine(artifact: Artifact, precision: str, batch: int, device: str) -> TorchEngine:
    model = fold(build(artifact))
    wanted = Wanted(top_k=5)
    return TorchEngine(model, artifact.preprocessing, wanted=wanted, precision=precision, device=device, batch_size=batch)


def models(bench: Bench, artifact: Artifact, precisions: list[str], batches: list[int]) -> None:
    for precision, batch in itertools.product(precisions, batches):
        made = engine(artifact, precision, batch, str(bench.device))
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=bench.device)
        name = f"model: {precision}, batch {batch}"
        with torch.inference_mode(), made._autocast():
            bench.measure(name, batch, lambda made=made, pixels=pixels: made._forward(pixels))
            if bench.cuda:
                bench.measure(f"{name}, CUDA graph", batch, captured(made, pixels))
    if bench.cuda and precisions[-1] != "float32":
        made, batch = engine(artifact, precisions[-1], batches[-1], str(bench.device)), batches[-1]
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=bench.device)
        made.model.features = torch.compile(made.model.features, mode="max-autotune-no-cudagraphs")  # type: ignore[method-assign]
        with torch.inference_mode(), made._autocast():
            bench.measure(f"model: {precisions[-1]}, batch {batch}, compiled", batch, lambda: made._forward(pixels))


def captured(made: TorchEngine, pixels: torch.Tensor) -> Callable[[], object]:
    """The engine's forward as a graph that is replayed; made at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def step() -> None:
        if not graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            copying, made.copying = made.copying, None  # a capture waits for no other stream
            with torch.cuda.stream(side):
                for _ in range(3):
                    made._forward(pixels)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made._forward(pixels)
            made.copying = copying
            graphs.append(graph)
        graphs[0].replay()

    return step


def engines(bench: Bench, artifact: Artifact, precisions: list[str], batches: list[int], block: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (block, 3, 224, 224), dtype=np.uint8)
    rows = np.arange(block)
    for precision, batch in itertools.product(precisions, batches):
        made = engine(artifact, precision, batch, str(bench.device))
        bench.measure(f"engine: {precision}, batch {batch}", block, lambda made=made: made(pixels, rows))


def decoding(images: list[bytes], seconds: float, lines: tuple[Any, Any]) -> None:
    """One process: images a second of the CPU's decode and resize."""
    from pipeline.preprocess import Prepare

    torch.set_num_threads(1)
    prepare, (gate, results) = Prepare(Preprocessing(), MAX_PIXELS), lines
    for image in images[:20]:
        prepare(memoryview(image))
    gate.wait()
    since, done = time.perf_counter(), 0
    while time.perf_counter() - since < seconds:
        prepare(memoryview(images[done % len(images)]))
        done += 1
    results.put(done / (time.perf_counter() - since))


def decode_on_cores(images: list[bytes], seconds: float, processes: int) -> float:
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(processes), spawn.Queue()
    workers = [spawn.Process(target=decoding, args=(images, seconds, (gate, results))) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rate = sum(results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    return float(rate)


def decode_on_gpu(bench: Bench, images: list[bytes]) -> None:
    try:
        from nvidia import nvimgcodec
    except ImportError:
        print("decode: nvJPEG -  (nvImageCodec is not installed)")
        return
    kinds = nvimgcodec.BackendKind
    sets = {"hardware": [kinds.HW_GPU_ONLY], "CUDA": [kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU]}
    batch = (images * (256 // len(images) + 1))[:256]
    for name, allowed in sets.items():
        decoder = nvimgcodec.Decoder(backends=[nvimgcodec.Backend(kind) for kind in allowed])

        def step(decoder: Any = decoder) -> None:
            done = decoder.decode([nvimgcodec.CodeStream(image) for image in batch])
            if any(image is None for image in done):
                raise RuntimeError(f"{sum(image is None for image in done)} of {len(batch)} are not decoded")

        bench.measure(f"decode: nvJPEG, {name}", len(batch), step)
        broken = damaged(images[:50])
        taken = sum(image is not None for image in decoder.decode([nvimgcodec.CodeStream(image) for image in broken]))
        bench.damaged[name] = {"refused by the CPU's decoder": len(broken), "decoded all the same": taken}
        print(f"{'':44} {taken:>12} of {len(broken)} damaged photographs are decoded all the same", flush=True)


def damaged(images: list[bytes]) -> list[bytes]:
    """Cut off at six tenths, and with 64 bytes of zeros in the middle of the scan; those of them that our decoder refuses."""
    from pipeline.decode import BadImage, decode

    def refused(data: bytes) -> bool:
        try:
            decode(data, max_pixels=MAX_PIXELS)
        except BadImage:
            return True
        return False

    cut = [data[: len(data) * 6 // 10] for data in images]
    holed = [data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :] for data in images]
    return [data for data in (*cut, *holed) if refused(data)]


def pipelines(bench: Bench, folder: Path, model: str, *, precisions: list[str], batch: int, cores: int) -> None:
    actors = max(1, cores - 2)
    predict = {"actors": 1, "cpus_per_actor": 1 if bench.cuda else 0.5, "batch_size": batch}
    resources = {
        "read": {"tasks": max(1, cores // 8), "cpus_per_task": 0.1},
        "preprocess": {"actors": actors, "cpus_per_actor": 0.9 if bench.cuda else 0.5},
        "predict": predict | ({"gpus_per_actor": 1} if bench.cuda else {}),
        "object_store": "8GiB" if bench.cuda else "1GiB",
    }
    for precision in precisions:
        places = {"input": {"uri": str(folder / "tars")}, "output": {"uri": str(folder / f"out-{precision}")}}
        job = {
            "name": "gpu",
            "model": {"uri": model, "precision": precision, "engine": "torch"},
            "resources": resources,
            **places,
        }
        (folder / "job.yaml").write_text(json.dumps(job))
        receipt = ours(folder / "job.yaml")
        bench.note(f"pipeline: {precision}", receipt["images_per_second"])
        fed = max(rate for name, rate in bench.rates.items() if name.startswith(f"engine: {precision}"))
        share = receipt["images_per_second"] / min(fed, bench.rates["decode: all cores"])
        bench.rates[f"pipeline: {precision}, of the limit"] = share
        print(f"{'':44} {share:12.2f} of the limit", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=DEFAULT_PHOTOS, help="a folder of WebDataset tars")
    parser.add_argument("--copies", type=int, default=40, help="every photograph so often in the pipeline's run")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    if not args.photos.is_dir():
        sys.exit(f"{args.photos} is absent: give a folder of WebDataset tars with --photos")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; required: one. Rehearse with --device cpu")
    bench, cores = Bench(args.device, args.seconds), len(os.sched_getaffinity(0))
    cuda = bench.cuda
    precisions, batches = (["float32", "bfloat16", "float16"], [256, 512, 1024]) if cuda else (["bfloat16"], [16])
    images = photographs(args.photos, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_artifact(folder, images[:50], preprocessing=Preprocessing())
        artifact = load_artifact(model)
        copies(bench, batches[-1])
        models(bench, artifact, precisions, batches)
        engines(bench, artifact, precisions, batches, BLOCK if cuda else 64)
        bench.note("decode: one core", decode_on_cores(images, args.seconds, 1))
        bench.note("decode: all cores", decode_on_cores(images, args.seconds, cores))
        if cuda:
            decode_on_gpu(bench, images)
        copy_tars(args.photos, folder / "tars", args.copies)
        labelled = precisions[1:] if cuda else precisions
        pipelines(bench, folder, model, precisions=labelled, batch=batches[1] if cuda else 16, cores=cores)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    where = torch.cuda.get_device_name() if cuda else "cpu"
    write_result(
        "gpu" if cuda else "gpu-cpu",
        {"device": where, "cores": cores, "versions": versions, "rates": bench.rates, "damaged": bench.damaged},
    )


if __name__ == "__main__":
    main()
