"""What does `decode: fast` save, and what does it change? Photographs as they are and as large copies, decoded both ways in turn.

    .venv/bin/python tests/benchmarks/decode.py [--photos FOLDER] [--images 100] [--scale 4] [--runs 5]

One thread. Large copies are bicubic, quality 90, so they hold less detail than a camera's own and say nothing about labels of
those; a job with `decode: fast` compares labels on its own images. Prints milliseconds an image for decoding and resizing
together (medians), their ratio, the levels by which crops differ, and the share of labels that stayed, by a model that knows the
photographs by heart. Writes tests/benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from models import make_artifact  # noqa: E402
from photos import add_photos, photographs  # noqa: E402
from result import write_result  # noqa: E402

from pipeline.artifact import load_artifact  # noqa: E402
from pipeline.engines.onnx_engine import OnnxEngine  # noqa: E402
from pipeline.engines.onnx_graph import to_onnx  # noqa: E402
from pipeline.engines.scores import Wanted  # noqa: E402
from pipeline.model.preprocessing import Preprocessing  # noqa: E402
from pipeline.preprocess import Prepare  # noqa: E402

MAX_PIXELS = 10**8


def enlarged(data: bytes, scale: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        size = (image.width * scale, image.height * scale)
        sink = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def crops(prepare: Prepare, images: list[bytes]) -> tuple[np.ndarray, float]:
    """(uint8 [N, 3, S, S], milliseconds an image)"""
    since = time.perf_counter()
    pixels = [prepare(memoryview(image))[0] for image in images]
    return np.stack(pixels), 1e3 * (time.perf_counter() - since) / len(images)


def compared(images: list[bytes], engine: OnnxEngine, runs: int) -> dict[str, Any]:
    ways = {mode: Prepare(Preprocessing(), MAX_PIXELS, fast=mode == "fast") for mode in ("exact", "fast")}
    times: dict[str, list[float]] = {mode: [] for mode in ways}
    pixels = {}
    for _ in range(runs):
        for mode, prepare in ways.items():
            pixels[mode], spent = crops(prepare, images)
            times[mode].append(spent)
    exact, fast = (engine(pixels[mode]).ids[:, 0] for mode in ways)
    medians = {f"{mode}_ms": statistics.median(spent) for mode, spent in times.items()}
    return medians | {
        "exact_to_fast": medians["exact_ms"] / medians["fast_ms"],
        "levels": float(np.abs(pixels["exact"].astype(int) - pixels["fast"]).mean()),
        "same_label": float((exact == fast).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    photos = photographs(args.photos, args.images)
    with tempfile.TemporaryDirectory() as name:
        artifact = load_artifact(make_artifact(Path(name), photos, preprocessing=Preprocessing()))
    engine = OnnxEngine(to_onnx(artifact), wanted=Wanted(), batch_size=16, threads=1)
    figures = {}
    for size, images in {
        "as they are": photos,
        f"{args.scale} times as wide": [enlarged(data, args.scale) for data in photos],
    }.items():
        figures[size] = compared(images, engine, args.runs)
        print(f"{size}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures[size].items()), flush=True)
    write_result("decode", {"images": len(photos), "scale": args.scale, **figures})


if __name__ == "__main__":
    main()
