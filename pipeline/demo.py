"""The demo: handwritten digits packed into shards, a model trained on half of them, the other half labelled by the main job.

It shows the whole way on real (if small) images with a truth to compare with, and a few files broken on purpose. What is there
from an earlier demo is used again, so a second one trains nothing and finds nothing to do.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipeline.attempt import Observer
from pipeline.errors import ExitCode, JobError
from pipeline.job.jobfile import load_job, load_label_job
from pipeline.job.training import FinetuneJob
from pipeline.label import Driver
from pipeline.prepare import finetune
from pipeline.prepare.digits import pack_digits
from pipeline.report import Receipt

WANTED = 0.95  # of the labels must be right, or the demo has failed


def _written(folder: Path) -> str:
    """As YAML has it: in quotes where the name needs them."""
    return yaml.safe_dump([f"{folder}/"], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]


def job_text(out: Path) -> str:
    """The demo's job file; jobs/demo.yaml is this text for `demo-out`."""
    return f"""# yaml-language-server: $schema=schema.json
# What `nightlabel demo` runs once it has packed the digits and trained a model on half of them.
kind: label
name: demo
input:
  uri: {_written(out / "digits/label")}
  keep: [cls]                    # the truth, copied beside the prediction
model:
  uri: {_written(out / "model")}
output:
  uri: {_written(out / "labels")}
  top_k: 3
limits: {{max_failed: 5%}}         # some images are broken on purpose
"""


def model_text(out: Path) -> str:
    """The job file that makes the demo's model; jobs/demo-model.yaml is this text for `demo-out`."""
    return f"""# yaml-language-server: $schema=schema.json
# The model of `nightlabel demo`: a ResNet-18 from a random start, on 898 handwritten digits of 32 pixels.
kind: finetune
name: demo-model
data:
  train: {{uri: {_written(out / "digits/train")}}}
preprocessing: {{size: 32, crop_pct: 1.0}}
training:
  epochs: 8
  augment: {{crop: [0.8, 1.0], flip: false}}
output:
  uri: {_written(out / "model")}
"""


@dataclass(frozen=True)
class Outcome:
    """The receipt of the run, what share of the labels is right, and the failed rows as (key, class, reason)."""

    receipt: Receipt
    accuracy: float
    compared: int
    failed: tuple[tuple[str, str, str], ...]

    @property
    def exit_code(self) -> int:
        return self.receipt.exit_code if self.accuracy >= WANTED else ExitCode.UNFIT

    def lines(self) -> list[str]:
        """For a screen."""
        lines = [f"broken  {key}: {error_class}, {error}" for key, error_class, error in self.failed]
        verdict = "" if self.accuracy >= WANTED else f", less than the {WANTED:.0%} that the demo must reach"
        return [*lines, f"right   {self.accuracy:.1%} of {self.compared} labels agree with the truth{verdict}"]


def run_demo(out: Path, *, say: Callable[[str], None], observe: Observer) -> Outcome:
    """Pack, train, label, compare. Raises JobError when `out` is no folder or holds something else."""
    if re.search(r"[{*?\[]|^(s3|file):", str(out)):  # in a job file they mean more
        need = "a folder of this machine, without {, *, ? and ["
        raise JobError(f"--out is {out}", need=need, do="Give another one")
    job_file, model = out / "job.yaml", out / "model"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not job_file.exists():
            raise JobError(
                f"{out} is not empty", need="a new folder or that of an earlier demo", do="Give another one with --out"
            )
        job_file.write_text(job_text(out))
    except OSError as error:
        raise JobError(
            f"{out}: {error.strerror}", need="a folder that can be written", do="Give another one with --out"
        ) from error
    if not (out / "digits").exists():
        packed = out / "digits.part"
        shutil.rmtree(packed, ignore_errors=True)
        digits = pack_digits(packed)
        packed.rename(out / "digits")  # there whole or not at all: a kill while packing would leave the next demo half of them
        say(f"packed  {digits.train_images} digits to train on, {digits.label_images} to label, {len(digits.broken)} broken")
    if not (model / "artifact.json").exists():
        _train(out, say)
    receipt = Driver(load_label_job(job_file), observe=observe, started=time.perf_counter()).label()
    return _compare(receipt)


def _train(out: Path, say: Callable[[str], None]) -> None:
    path = out / "model.yaml"
    path.write_text(model_text(out))
    job = load_job(path)
    assert isinstance(job, FinetuneJob)  # by its text above
    outcome = finetune.run_job(job, say=say, command=f"nightlabel run {path}")
    say(f"model   {outcome.lines[0]}")


def _compare(receipt: Receipt) -> Outcome:
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(Path(receipt.where, "data").glob("*.parquet"))])
    failed = rows.filter(pc.equal(rows["status"], "failed")).sort_by("key")
    labelled = rows.filter(pc.and_(pc.equal(rows["status"], "ok"), pc.is_valid(rows["cls"])))
    right = pc.sum(pc.equal(labelled["label"], labelled["cls"])).as_py() or 0
    reasons = zip(*(failed[name].to_pylist() for name in ("key", "error_class", "error")), strict=True)
    return Outcome(receipt, right / max(1, labelled.num_rows), labelled.num_rows, tuple(reasons))
