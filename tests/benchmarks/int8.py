"""What does int8 cost and bring? ONNX Runtime's float32 beside the quantized candidates, on photographs, by the gate itself.

    .venv/bin/python tests/benchmarks/int8.py [--photos FOLDER] [--runs 3] [--threads 1 2]

A ResNet-18 on 224 pixels with random weights has learned the photographs by heart, so every one has a label that is right. The
first quarter of the tars calibrates, the rest measures; every batch is labelled by all models in turn. Then the same job once
more, calibrated with black images, which the gate must refuse. Last, do sums overflow on this CPU? The int8 graphs of a ResNet-18
of random weights, which is less sure of itself, beside themselves without ONNX Runtime's optimisations, where float32 adds them
up: the mean distance of the probabilities (total variation). Prints a table and writes tests/benchmarks/results/int8.json.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from photos import add_photos, read_tar  # noqa: E402
from result import write_result  # noqa: E402

BATCH = 10
NUMBERS = ("accuracy", "agreement", "images_per_second", "speedup")


def label_by_number(photos: Path, folder: Path) -> list[bytes]:
    """The tars again, every photograph labelled by its own number; the photographs."""
    from shards import tar_bytes

    images: list[bytes] = []
    folder.mkdir()
    for tar in sorted(photos.glob("*.tar")):
        members: dict[str, bytes] = {}
        for name, data in read_tar(tar):
            if name.endswith(".jpg"):
                members |= {name: data, f"{name.removesuffix('.jpg')}.cls": b"%d" % len(images)}
                images.append(data)
        (folder / tar.name).write_bytes(tar_bytes(members))
    return images


def black_tar(path: Path) -> str:
    from PIL import Image
    from shards import tar_bytes

    sink = io.BytesIO()
    Image.new("RGB", (256, 256)).save(sink, "JPEG")
    path.write_bytes(tar_bytes({f"{number}.jpg": sink.getvalue() for number in range(32)}))
    return str(path)


def quantized(model: str, tars: list[str], out: Path, *, calibration: list[str] | str, threads: int) -> dict[str, Any]:
    """Facts of a quantize job with the default gate."""
    from pipeline.job.recipe import QuantizeJob
    from pipeline.prepare.quantize import run_job

    content = {
        "kind": "quantize",
        "name": "int8",
        "model": {"uri": model},
        "calibration": {"uri": calibration},
        "data": {"input": {"uri": tars}},
        "output": {"uri": str(out)},
        "threads": threads,
    }
    return dict(run_job(QuantizeJob.model_validate(content), say=lambda line: None, command="benchmark").facts)


def drift(pixels: np.ndarray, calibrating: int = 100) -> dict[str, dict[str, float]]:
    """By scheme, how far its probabilities are from its own with exact sums, and from float32's, on uint8 [N, 3, 224, 224], of
    which the first `calibrating` calibrate."""
    import onnxruntime
    from engines import resnet18

    from pipeline.engines.onnx_graph import to_onnx
    from pipeline.prepare.calibrate import calibrate, quantize, schemes

    def probabilities(graph: bytes, *, exact: bool = False) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if exact:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        parts = [session.run(["logits"], {"pixels": batch})[0] for batch in batches[calibrating // BATCH :]]
        powers = np.exp(np.concatenate(parts) - np.concatenate(parts).max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one - other).sum(axis=1).mean() / 2)

    batches = [pixels[at : at + BATCH] for at in range(0, len(pixels), BATCH)]
    float32 = to_onnx(resnet18(batches[0]))
    ranges, wanted, found = calibrate(float32, iter(batches[: calibrating // BATCH])), probabilities(float32), {}
    for scheme in schemes(saturates=True):
        graph = quantize(float32, ranges, scheme)
        fused, exact = probabilities(graph), probabilities(graph, exact=True)
        far = {"exact_sums": apart(fused, exact), "float32": apart(fused, wanted), "exact_sums_float32": apart(exact, wanted)}
        print(f"{scheme!s:21} {far['exact_sums']:.4f} from its exact sums, {far['float32']:.4f} from float32 ", end="")
        print(f"(exact sums {far['exact_sums_float32']:.4f}), same label {(fused.argmax(1) == wanted.argmax(1)).mean():.1%}")
        found[str(scheme)] = far
    return found


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the runs, of float32 and then of each candidate."""
    rows = []
    for same in zip(*([run["float32"], *run["candidates"]] for run in runs), strict=True):
        row = {key: statistics.median(one[key] for one in same) for key in NUMBERS}
        rows.append({"name": same[0]["name"], "bytes": same[0]["bytes"], "best": same[0]["best"], **row})
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    for row in rows:
        smaller = 1 - row["bytes"] / rows[0]["bytes"]
        print(
            f"{threads} threads  {row['name']:12} {row['bytes'] / 1e6:6.2f} MB, {smaller:5.1%} smaller, "
            f"top-1 {row['accuracy']:7.2%}, as float32 {row['agreement']:7.2%}, {row['images_per_second']:6.1f} img/s, "
            f"{row['speedup']:.2f} x" + ("  best" if row["best"] else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    args = parser.parse_args()
    from models import make_artifact

    from pipeline.errors import ModelError
    from pipeline.model.preprocessing import Preprocessing
    from pipeline.preprocess import Prepare

    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = label_by_number(args.photos, folder / "tars")
        model = make_artifact(folder, images, preprocessing=Preprocessing())
        tars = [str(path) for path in sorted((folder / "tars").iterdir())]
        calibration, data = tars[: len(tars) // 4], tars[len(tars) // 4 :]
        for threads in args.threads:
            outs = [folder / f"out-{threads}-{number}" for number in range(args.runs)]
            runs = [quantized(model, data, out, calibration=calibration, threads=threads) for out in outs]
            results[str(threads)] = medians(runs)
            show(results[str(threads)], threads)
        try:
            quantized(model, data, folder / "refused", calibration=black_tar(folder / "black.tar"), threads=args.threads[-1])
        except ModelError as error:
            print(f"black images to calibrate with: refused. {str(error).partition('; ')[2]}")
            assert not (folder / "refused").exists()
        else:
            sys.exit("black images to calibrate with: NOT refused")
    prepare = Prepare(Preprocessing(), 10**8)
    overflow = drift(np.stack([prepare(memoryview(image))[0] for image in images[:220]]))
    write_result("int8", {"images": len(images), "median_by_threads": results, "distance": overflow})


if __name__ == "__main__":
    main()
