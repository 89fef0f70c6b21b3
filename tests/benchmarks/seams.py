"""Where does an image's time go? Every step of the way by itself, on one core, with nothing between.

    taskset -c 0 .venv/bin/python tests/benchmarks/seams.py [--photos FOLDER] [--precision int8] [--engine auto] [--runs 3]

In milliseconds an image: `read` a tar on the local disk into rows, `decode`, `resize` and crop, `pack` (what Preprocess does
beside these: the batch, the Arrow columns), `model` (the engine, to ranked classes), `answer` (what Predict does beside it),
`commit` (put together, serialise, create on disk). Medians over tars and runs. peers.py has the same beside its table. Writes
tests/benchmarks/results/seams-<precision>.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from limit import quantized  # noqa: E402
from photos import add_photos, photographs  # noqa: E402
from result import write_result  # noqa: E402

STEPS = ("read", "decode", "resize", "pack", "model", "answer", "commit")


class Steps:
    """The stages of a job, each timed over one tar after the other."""

    def __init__(self, source: dict[str, str], batch: int, folder: Path) -> None:
        from pipeline.artifact import load_artifact
        from pipeline.disk import Disk
        from pipeline.log import Log
        from pipeline.predict import Predict
        from pipeline.preprocess import Preprocess
        from pipeline.spec import Input, ModelSource, Output

        wanted = ModelSource.model_validate(source)
        artifact = load_artifact(wanted.uri)
        self.store, self.wanted, self.preprocessing = Disk(), Input(uri="unused"), artifact.preprocessing
        self.preprocess = Preprocess(artifact.preprocessing, max_pixels=10**8)
        self.predict = Predict(artifact, wanted, device="cpu", batch_size=batch, output=Output(uri="unused"), threads=1)
        self.log = Log(self.store, str(folder / ("0" * 12)))

    def __call__(self, tar: Path, number: int) -> dict[str, float]:
        """Milliseconds an image by step; `number` makes the object another one."""
        import pyarrow as pa

        from pipeline import rows
        from pipeline.commit import Provenance, UnitBuffer, commit_unit
        from pipeline.decode import decode
        from pipeline.preprocess import resize_and_crop
        from pipeline.read import read_unit
        from pipeline.unit import Part, Unit

        item = self.store.head(str(tar))
        unit = Unit((Part(item.uri, f"{item.etag}-{number}", item.size),))
        took, since = dict.fromkeys(STEPS, 0.0), time.perf_counter()

        def lap(step: str) -> None:
            nonlocal since
            now = time.perf_counter()
            took[step] += now - since
            since = now

        table = pa.concat_tables(read_unit(self.store, Unit((Part(item.uri, item.etag, item.size),)), wanted=self.wanted))
        lap("read")
        images = [memoryview(data.as_buffer()) for data in table.column("bytes") if data.is_valid]
        since = time.perf_counter()
        for image in images:
            pixels = decode(image, max_pixels=10**8)
            lap("decode")
            resize_and_crop(pixels, self.preprocessing)
            lap("resize")
        batch = self.preprocess(table)
        lap("pack")
        took["pack"] -= took["decode"] + took["resize"]
        crops = rows.pixels_view(batch.column("pixels"), self.preprocessing.size)
        engine, since = self.predict.engine, time.perf_counter()
        scores = engine(crops)
        lap("model")
        self.predict.engine = lambda _: scores
        predictions = self.predict(batch)
        lap("answer")
        self.predict.engine = engine
        for name in rows.TIMINGS.values():
            predictions = predictions.append_column(name, pa.nulls(predictions.num_rows, pa.float32()))
        since = time.perf_counter()
        buffer = UnitBuffer()
        buffer.add(predictions.drop_columns("unit"))
        commit_unit(self.log, unit, buffer.table(), Provenance(self.log.fingerprint, "0" * 16, "bench"))
        lap("commit")
        return {step: 1e3 * seconds / len(images) for step, seconds in took.items()}


def seams(tars: list[Path], source: dict[str, str], batch: int, runs: int = 1) -> dict[str, float]:
    """Medians of milliseconds an image, by step, in this process on one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        steps = Steps(source, batch, Path(name))
        steps(tars[0], -1)  # warm-up
        found = [steps(tar, number) for number in range(runs) for tar in tars]
    return {step: statistics.median(one[step] for one in found) for step in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    from models import make_artifact

    from pipeline.model.preprocessing import Preprocessing

    tars = sorted(args.photos.glob("*.tar"))
    some = photographs(args.photos, 50)
    with tempfile.TemporaryDirectory() as name:
        model = make_artifact(Path(name), some, preprocessing=Preprocessing())
        if args.precision == "int8":
            model = quantized(model, some, Path(name, "int8"))
        source: dict[str, Any] = {"uri": model, "precision": args.precision, "engine": args.engine}
        found = seams(tars, source, 16, args.runs)
    print(", ".join(f"{step} {spent:.2f}" for step, spent in found.items()) + f", together {sum(found.values()):.2f} ms an image")
    write_result(f"seams-{args.precision}", {"engine": args.engine, "milliseconds": found})


if __name__ == "__main__":
    main()
