"""Which engine is the fastest at which precision? Each on one core, by batches of the same random crops, in turn.

    taskset -c 0 .venv/bin/python tests/benchmarks/engines.py [--rounds 5] [--images 64] [--batches 8 16 32]

ResNet-18 of random weights at 224 pixels, its int8 graph calibrated on the crops themselves. OpenVINO where it is installed.
Prints medians and writes tests/benchmarks/results/engines.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from result import write_result  # noqa: E402

from pipeline.artifact import INT8, Artifact, make_artifact, with_files  # noqa: E402
from pipeline.engines.onnx_graph import to_onnx  # noqa: E402
from pipeline.model.huggingface import resnet  # noqa: E402
from pipeline.model.preprocessing import Preprocessing  # noqa: E402
from pipeline.model.resnet import ResNet  # noqa: E402
from pipeline.predict import Predict  # noqa: E402
from pipeline.prepare.calibrate import Scheme, calibrate, quantize  # noqa: E402
from pipeline.spec import ModelSource, Output  # noqa: E402

RESNET18 = resnet(18, classes=1000)
WAYS = [
    ("torch", "float32"),
    ("onnxruntime", "float32"),
    ("openvino", "float32"),
    ("torch", "bfloat16"),
    ("openvino", "bfloat16"),
    ("onnxruntime", "int8"),
    ("openvino", "int8"),
]


def resnet18(pixels: np.ndarray) -> Artifact:
    torch.manual_seed(0)
    labels = tuple(map(str, range(RESNET18.classes)))
    artifact = make_artifact(RESNET18, ResNet(RESNET18).state_dict(), labels=labels, preprocessing=Preprocessing())
    graph = to_onnx(artifact)
    return with_files({**artifact.files, INT8: quantize(graph, calibrate(graph, iter([pixels[:16]])), Scheme(per_channel=True))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    args = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 3, 224, 224), dtype=np.uint8)
    artifact, output = resnet18(pixels), Output(uri="unused")
    ways = [way for way in WAYS if way[0] != "openvino" or importlib.util.find_spec("openvino")]
    rates: dict[str, dict[int, list[float]]] = {f"{precision} {engine}": {} for engine, precision in ways}
    for batch in args.batches:
        sources = {f"{p} {e}": ModelSource.model_validate({"uri": "x", "precision": p, "engine": e}) for e, p in ways}
        stages = {
            name: Predict(artifact, source, device="cpu", batch_size=batch, output=output, threads=1)
            for name, source in sources.items()
        }
        for number in range(args.rounds + 1):
            for name, stage in stages.items():
                since = time.perf_counter()
                stage.engine(pixels)
                if number:  # the first is warm-up
                    rates[name].setdefault(batch, []).append(args.images / (time.perf_counter() - since))
    medians = {name: {batch: statistics.median(found) for batch, found in by.items()} for name, by in rates.items()}
    for name, by in medians.items():
        print(f"{name:24}" + "".join(f"{rate:9.1f}" for rate in by.values()))
    write_result("engines", {"images": args.images, "rounds": args.rounds, "images_per_second": medians})


if __name__ == "__main__":
    main()
