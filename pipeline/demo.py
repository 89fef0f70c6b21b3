"""The demo: handwritten digits packed into shards, a model trained on half of them, the other half labelled by the main job.

It shows the whole way on real (if small) images with a truth to compare with, and a few files broken on purpose. What is there
from an earlier demo is used again, so a second one trains nothing and finds nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifact import save_artifact
from pipeline.errors import JobError
from pipeline.jobfile import load_label_job
from pipeline.label import Driver, Observer
from pipeline.prepare.augment import Augment
from pipeline.prepare.digits import CLASSES, pack_digits
from pipeline.prepare.finetune import finetune, read_labelled
from pipeline.prepare.train import Epoch, TrainSettings
from pipeline.preprocessing import Preprocessing
from pipeline.report import Receipt
from pipeline.spec import Input

PREPROCESSING = Preprocessing(size=32, crop_pct=1.0)
SETTINGS = TrainSettings(epochs=6, augment=Augment(scale=(0.9, 1.1), shift=0.08))  # 98.7-99.4 % over five seeds
WANTED = 0.95  # of the labels must be right, or the demo has failed


def job_text(out: Path) -> str:
    """The demo's job file; jobs/demo.yaml is this text for `demo-out`."""
    return f"""# yaml-language-server: $schema=schema.json
# What `nightlabel demo` runs once it has packed the digits and trained a model on half of them.
kind: label
name: demo
input:
  uri: {out}/digits/label/
  keep: [cls]                    # the truth, copied beside the prediction
model:
  uri: {out}/model/
output:
  uri: {out}/labels/
  top_k: 3
limits: {{max_failed: 5%}}         # some images are broken on purpose
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
        return self.receipt.exit_code if self.accuracy >= WANTED else 1

    def lines(self) -> list[str]:
        """For a screen."""
        lines = [f"broken  {key}: {error_class}, {error}" for key, error_class, error in self.failed]
        verdict = "" if self.accuracy >= WANTED else f", less than the {WANTED:.0%} that the demo must reach"
        return [*lines, f"right   {self.accuracy:.1%} of {self.compared} labels agree with the truth{verdict}"]


def run_demo(out: Path, *, say: Callable[[str], None], observe: Observer) -> Outcome:
    """Pack, train, label, compare. Raises JobError when `out` holds something else."""
    started = time.perf_counter()
    job_file, model = out / "job.yaml", out / "model"
    if out.exists() and any(out.iterdir()) and not job_file.exists():
        raise JobError(f"{out} is not empty", need="a new folder or that of an earlier demo", do="Give another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    job_file.write_text(job_text(out))
    if not (out / "digits").exists():
        digits = pack_digits(out / "digits")
        say(f"packed  {digits.train_images} digits to train on, {digits.label_images} to label, {len(digits.broken)} broken")
    if not (model / "artifact.json").exists():
        _train(out, model, say)
    receipt = Driver(load_label_job(job_file), observe=observe, started=started).label()
    return _compare(receipt)


def _train(out: Path, model: Path, say: Callable[[str], None]) -> None:
    data = read_labelled(Input(uri=f"{out}/digits/train/"), preprocessing=PREPROCESSING, classes=CLASSES)
    say(f"training ResNet-18 on {len(data.images)} digits, at most {SETTINGS.epochs} epochs")

    def tell(epoch: Epoch) -> None:
        say(f"epoch {epoch.number}: loss {epoch.loss:.3f}, {epoch.accuracy:.1%} right on held-out digits")

    artifact = finetune(data, settings=SETTINGS, command=f"nightlabel demo --out {out}", progress=tell)
    save_artifact(artifact, str(model))
    say(f"model   {model}, {artifact.digest[:19]}…")


def _compare(receipt: Receipt) -> Outcome:
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(Path(receipt.where, "data").glob("*.parquet"))])
    failed = rows.filter(pc.equal(rows["status"], "failed")).sort_by("key")
    labelled = rows.filter(pc.and_(pc.equal(rows["status"], "ok"), pc.is_valid(rows["cls"])))
    right = pc.sum(pc.equal(labelled["label"], labelled["cls"])).as_py() or 0
    reasons = zip(*(failed[name].to_pylist() for name in ("key", "error_class", "error")), strict=True)
    return Outcome(receipt, right / max(1, labelled.num_rows), labelled.num_rows, tuple(reasons))
