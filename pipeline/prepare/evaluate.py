"""An evaluate job: labelled shards through the stages of labelling, one or two artifacts side by side, figures and a page out.

Images without a label are counted and left out, images that cannot be decoded are counted by failure class: neither says anything
about the model. A label that is no class of the model is an error, because a wrong list of classes would look like a bad model.
The price: one process decodes and asks, when others have looked at each image, so that none ends or holds up the job.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from pipeline.artifact import Artifact
from pipeline.errors import JobError, ModelError, UnfitError
from pipeline.job.arithmetic import engine_for
from pipeline.job.recipe import EvaluateJob, Measured
from pipeline.prepare.answer import TRUTH, Evaluator, Mistake, mistakes
from pipeline.prepare.data import NO_LABEL, LeftOut, class_index, image_rows, listing, with_failures
from pipeline.prepare.evaluation import (
    VERSION,
    Images,
    Record,
    headline,
    lines,
    metrics_dict,
    number,
    standing,
    summary,
    write,
    write_page,
)
from pipeline.prepare.evaluation_page import SHOWN, render, thumbnail
from pipeline.prepare.metrics import agreement, measure
from pipeline.prepare.outcome import Outcome, Say
from pipeline.spec import ModelSource
from pipeline.start import load_source

EVERY_S = 10.0


def run_job(job: EvaluateJob, *, say: Say, command: str) -> Outcome:
    """Measure, write `evaluation.json` and `evaluation.html`; what is measured already is told again from there.

    Raises JobError for images without labels or with labels that are no classes, ModelError for a `compare` of other classes,
    StoreError for a folder that holds another evaluation, and what reading and loading raise.
    """
    if job.gpus and not torch.cuda.is_available():
        raise UnfitError("evaluate: torch sees no CUDA device", need="one", do="Set gpus to 0, or repair the driver")
    model = load_source(job.model)
    other = load_source(job.compare, field="compare") if job.compare else None
    if job.compare and other:
        _check_classes(model, other, uri=job.compare.uri)
    subject = _subject(job, model, other)
    found = standing(job.output, subject)
    first = f"nothing to do: {job.name} is evaluated already" if found else f"evaluated {job.name}"
    if found is None:
        evaluation = Evaluation(job, model, other)
        evaluation.read(say)
        found = write(
            job.output, {"version": VERSION, "name": job.name, "command": command, "subject": subject, **evaluation.record()}
        )
    write_page(job.output, partial(render, found))
    return Outcome((first, *lines(found, job.output.uri)), summary(found, job.output.uri))


class Evaluation:
    """The images of a job on their way past one or two models."""

    def __init__(self, job: EvaluateJob, model: Artifact, other: Artifact | None) -> None:
        self._job, self._labels = job, model.labels
        device = "cuda" if job.gpus else "cpu"
        self._model = Evaluator(model, job.model, device=device, batch_size=job.batch_size)
        self._other: Evaluator | None = None
        if job.compare is not None and other is not None:
            self._other = Evaluator(other, job.compare, device=device, batch_size=job.batch_size)
        self._read, self._unlabelled = 0, LeftOut()
        self._worst: list[Mistake] = []

    def read(self, say: Say) -> None:
        """All images. Raises JobError when not one can be measured."""
        where, told = self._job.data.where, time.monotonic()
        for one in filter(None, (self._model, self._other)):
            if one.caution is not None:
                say(f"caution: {one.artifact.digest}: {one.caution}")
        seen = with_failures(self._labelled(), processes=torch.get_num_threads(), quiet=True)
        for block in _blocks(seen, self._job.batch_size):
            self._ask(block)
            if time.monotonic() - told > EVERY_S:
                told = time.monotonic()
                say(f"{self._read:,} images read")
        if self._read == self._unlabelled.counts.total():
            do = "Set data.label to the sidecar or column that holds the class"
            raise JobError(f"{where}: none of {self._read:,} images has a label", need="labels to measure with", do=do)
        if not self._model.scored.any():
            got = f"{where}: no labelled image can be measured: {self._model.left_out}"
            raise JobError(got, need="one or more", do="Check the images")

    def _labelled(self) -> Iterator[pa.Table]:
        """Image rows with the class in place of the label; those without one are counted and gone."""
        data: Measured = self._job.data
        for table in image_rows(data.input, label=data.label, label_key=data.label_key, most=data.images):
            truth = class_index(table, data.label, self._labels, key=data.label_key)
            named = truth != NO_LABEL
            self._read += len(truth)
            self._unlabelled.add("NO_LABEL", table["key"].filter(pa.array(~named)).to_pylist())
            yield table.drop_columns([data.label]).append_column(TRUTH, pa.array(truth)).filter(pa.array(named))

    def _ask(self, block: pa.Table) -> None:
        decoded = self._model.decode(block)
        said, answers = self._model.ask(decoded)
        preprocessing = self._model.artifact.preprocessing
        fresh = mistakes(said, answers, size=preprocessing.size, most=SHOWN)
        self._worst = heapq.nlargest(SHOWN, [*self._worst, *fresh], key=lambda mistake: mistake.score)
        if self._other is not None:
            same = self._other.artifact.preprocessing == preprocessing
            self._other.ask(decoded if same else self._other.decode(block))

    def record(self) -> dict[str, Any]:
        """What evaluation.json holds of the images, the answers and the time."""
        answers = self._model.answers
        metrics = measure(answers, len(self._labels))
        images = Images(
            read=self._read,
            measured=len(answers),
            unlabelled=self._unlabelled.counts.total(),
            failed=dict(sorted(self._model.left_out.counts.items())),
        )
        return {
            "images": images.as_dict(),
            "left_out_images": self._unlabelled.keys | self._model.left_out.keys,
            **metrics_dict(metrics, self._labels),
            "throughput": self._throughput(),
            "compare": self._comparison(),
            "mistakes": [
                {
                    "key": mistake.key,
                    "source": mistake.source,
                    "truth": self._labels[mistake.truth],
                    "answer": self._labels[mistake.answer],
                    "score": number(mistake.score),
                    "truth_score": number(mistake.truth_score),
                    "picture": thumbnail(mistake.pixels),
                }
                for mistake in self._worst
            ],
        }

    def _throughput(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self._job.gpus else "cpu"
        threads = torch.get_num_threads()
        on = f"{threads} {'thread' if threads == 1 else 'threads'}" + (f" and {device}" if self._job.gpus else "")
        return {
            "decode": round(self._model.decoding.rate, 1),
            "predict": round(self._model.predicting.rate, 1),
            "device": device,
            "threads": threads,
            "batch_size": self._job.batch_size,
            "how": f"each alone, in one process with {on}; a labelling run overlaps them",
        }

    def _comparison(self) -> dict[str, Any] | None:
        if self._other is None or self._job.compare is None:
            return None
        mine, its = self._model.scored, self._other.scored
        model, other = self._model.answers.where(its[mine]), self._other.answers.where(mine[its])
        if not len(other):
            raise ModelError(f"{self._job.compare.uri}: scored no image", need="finite scores", do="Compare with another model")
        return {
            "digest": self._other.artifact.digest,
            "precision": self._job.compare.precision,
            "images": len(other),
            "agreement": number(agreement(model, other)),
            **headline(measure(other, len(self._labels))),
            "only_model_right": int((model.right & ~other.right).sum()),
            "only_it_right": int((other.right & ~model.right).sum()),
            "predict": round(self._other.predicting.rate, 1),
        }


def _blocks(tables: Iterable[pa.Table], least: int) -> Iterator[pa.Table]:
    """Tables joined to `least` rows or more, all but the last: a reader's 64 rows would leave a GPU idle."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= least:
            yield pa.concat_tables(waiting)
            waiting = []
    if rest := [part for part in waiting if part.num_rows]:
        yield pa.concat_tables(rest)


def _check_classes(model: Artifact, other: Artifact, *, uri: str) -> None:
    if model.labels == other.labels:
        return
    pairs = zip(model.labels, other.labels, strict=False)
    at = next((number for number, (one, two) in enumerate(pairs) if one != two), None)
    if at is None:
        has, need = f"{len(other.labels):,} classes", f"the classes of the model in the same order ({len(model.labels):,})"
    else:
        has, need = f"{other.labels[at]!r} as class {at}", f"{model.labels[at]!r}, as in the model"
    raise ModelError(f"{uri}: has {has}", need=need, do="Compare with a model of the same classes")


def _subject(job: EvaluateJob, model: Artifact, other: Artifact | None) -> Record:
    """What is measured: the models by digest, with what computes; the images by what a listing says of their shards."""
    wanted = job.data.input
    inputs = json.dumps(listing(wanted))

    def subject(source: ModelSource, artifact: Artifact) -> Record:
        engine = engine_for(source.engine, source.precision, gpu=job.gpus > 0)
        return {"digest": artifact.digest, "precision": source.precision, "engine": engine}

    return {
        "model": subject(job.model, model),
        "compare": subject(job.compare, other) if other and job.compare else None,
        "data": {
            "uris": list(wanted.uris),
            "format": wanted.format,
            "columns": [wanted.image_column, wanted.key_column] if wanted.format == "parquet" else [],
            "label": job.data.label,
            **({"label_key": job.data.label_key} if job.data.label_key else {}),
            "images": job.data.images,
            "inputs": hashlib.sha256(inputs.encode()).hexdigest(),
        },
        "device": "cuda" if job.gpus else "cpu",
    }
