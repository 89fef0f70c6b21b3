"""A quantize job: artifact → the same artifact with `model.int8.onnx` beside its weights, or a refusal.

Calibrated once, tried in every scheme of `calibrate`, measured by `gate`; the best that passes is published under a digest of
its own, all else of the folder as it was, so transformers opens it and it still labels at float32.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pipeline.artifact import INT8, RECORD, Artifact, Origin, save_artifact, with_files
from pipeline.engines import cpu
from pipeline.engines.onnx_engine import OnnxEngine
from pipeline.engines.onnx_graph import to_onnx
from pipeline.engines.scores import Wanted
from pipeline.errors import JobError, ModelError
from pipeline.job.recipe import QuantizeJob
from pipeline.job.uris import absolute
from pipeline.model.describe import file_sizes
from pipeline.model.preprocessing import PREPROCESSING_VERSION
from pipeline.prepare.calibrate import calibrate, quantize, schemes
from pipeline.prepare.card import folder_name, model_card
from pipeline.prepare.data import listing
from pipeline.prepare.gate import FLOAT32, Measurement, best_of, measure
from pipeline.prepare.outcome import Outcome, Say, made_before
from pipeline.prepare.quantize_data import QuantizeData
from pipeline.start import load_source
from pipeline.storage import check_writable, head_if_there, join, open_store

_LIMIT = "Accuracy and speed at int8 are those of one kind of CPU: without VNNI, 8-bit weights overflow in silence."


def run_job(job: QuantizeJob, *, say: Say, command: str) -> Outcome:
    """Quantize, measure, publish; what this very job has published on such a CPU is not made again. Raises ModelError when no
    candidate passes the gate (nothing is written then) or the artifact is quantized already, JobError for images or labels that
    do not serve."""
    source = _source(job)
    threads, saturates = job.threads or torch.get_num_threads(), cpu.lacks("int8") is not False  # also where nobody knows
    key = _key(job, source, saturates=saturates)
    if (standing := _standing(job, source)) is not None and standing.origin.data.get("job") == key:
        return _outcome(job, standing, ("nothing to do: the artifact is there", _told(standing.origin.metrics)))
    images = QuantizeData(job, source, threads)
    images.check_labels()
    float32 = float32_graph(source)
    say(f"calibrating on up to {job.calibration_images} images")
    ranges = calibrate(float32, images.calibration())
    candidates = {str(scheme): quantize(float32, ranges, scheme) for scheme in schemes(saturates=saturates)}
    say(f"measuring float32 and {', '.join(candidates)} with {threads} {'thread' if threads == 1 else 'threads'}")
    measured = measure({FLOAT32: float32, **candidates}, images.labelled(), job.gate, threads=threads)
    if not measured:
        raise JobError(f"{job.data.where}: no sound image has a label", need="some, to measure with", do="Check the label's name")
    best = best_of(measured, job.gate)
    if best is None:
        for line in _table(measured, None):
            say(line)
        raise _refusal(job, measured)
    facts = images.facts() | {"job": key, "scheme": best.name, "threads": threads, "vnni": not saturates, **_how()}
    origin = Origin(parents=(source.digest,), data=facts, metrics=_metrics(measured[0], best), command=command)
    artifact = with_files({**source.files, INT8: candidates[best.name]}, origin=origin)
    card = model_card(artifact, name=folder_name(job.output.uri), limits=[_LIMIT])
    artifact = save_artifact(artifact, job.output.uri, job.output.s3, card=card)
    for line in images.warnings():
        say(line)
    rows = [asdict(one) | {"accuracy": one.accuracy, "agreement": one.agreement, "best": one is best} for one in measured]
    return _outcome(job, artifact, _passed(job, measured, best), float32=rows[0], candidates=rows[1:])


def _key(job: QuantizeJob, source: Artifact, *, saturates: bool) -> str:
    """12 hex digits that name the work: the job but for name and places, the images as they are, the source, the CPU's kind."""
    what = job.model_dump(mode="json", exclude_defaults=True, exclude={"name", "output", "model"})
    whole = [what, listing(job.calibration), listing(job.data.input), source.digest, saturates, PREPROCESSING_VERSION]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def _source(job: QuantizeJob) -> Artifact:
    artifact = load_source(job.model)
    if artifact.quantized:
        raise ModelError(f"{job.model.uri}: has {INT8} already", need="an artifact without", do="Quantize what it was made from")
    return artifact


def _standing(job: QuantizeJob, source: Artifact) -> Artifact | None:
    """What an earlier run has made of this source. That something else stands there is told now, not minutes later by
    `save_artifact`."""
    if join(absolute(job.output.uri)) == join(absolute(job.model.uri)):
        raise _taken(job, source, "the model itself")
    store = open_store(job.output.uri, job.output.s3)
    if head_if_there(store, join(job.output.uri, RECORD)) is None:
        for name in file_sizes(job.output.uri, job.output.s3):  # a kill while saving leaves the source's own files
            if name != INT8 and store.read(join(job.output.uri, name)) != source.files.get(name):
                raise _taken(job, source, f"another {name}")
        check_writable(job.output.uri)
        return None
    standing = made_before(job.output)
    if not standing.quantized or standing.origin.parents != (source.digest,):
        raise _taken(job, source, f"{standing.digest}, made of something else")
    return standing


def _taken(job: QuantizeJob, source: Artifact, what: str) -> ModelError:
    need = f"an empty folder, or {source.digest} quantized"
    return ModelError(f"output.uri {job.output.uri} holds {what}", need=need, do="Give another output.uri")


def float32_graph(source: Artifact) -> bytes:
    """What is quantized. Raises ModelError when its scores of random pixels are not finite: their ranges would be infinite, and a
    library fail of that much later, which does not say why."""
    graph, size = to_onnx(source), source.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    if not OnnxEngine(graph, wanted=Wanted(), batch_size=1)(pixels).finite.all():
        raise ModelError("the model's scores of random pixels are not finite numbers", do="Train or import it again")
    return graph


def _how() -> dict[str, str]:
    return {"method": "static QDQ, extremes", "onnxruntime": importlib.metadata.version("onnxruntime")}


def _metrics(original: Measurement, best: Measurement) -> Mapping[str, float]:
    return {
        "accuracy_float32": original.accuracy,
        "accuracy_int8": best.accuracy,
        "agreement": best.agreement,
        "speedup": best.speedup,
        "images_per_second_float32": original.images_per_second,
        "images_per_second_int8": best.images_per_second,
        "bytes_float32": original.bytes,
        "bytes_int8": best.bytes,
    }


def _refusal(job: QuantizeJob, measured: Sequence[Measurement]) -> ModelError:
    original, *candidates = measured
    told = ", ".join(f"{one.name} {_lost(one, original)} and is {one.speedup:.2f} x as fast" for one in candidates)
    return ModelError(
        f"{job.model.uri}: no int8 candidate passes, nothing is published; of {original.images} images float32 is right on "
        f"{original.accuracy:.1%}, {told}",
        need=f"a loss of at most {100 * job.gate.max_accuracy_loss:.2f} points and {job.gate.min_speedup:g} x the speed",
        do="Calibrate with images that look like those to label, label at float32, or change the gate",
    )


def _lost(one: Measurement, original: Measurement) -> str:
    lost = 100 * (original.accuracy - one.accuracy)
    return f"{'gains' if lost < 0 else 'loses'} {abs(lost):.2f} points"


def _table(measured: Sequence[Measurement], best: Measurement | None) -> tuple[str, ...]:
    lines = [f"{'':19}{'MB':>8}{'smaller':>9}{'top-1':>9}{'as float32':>12}{'img/s':>9}{'speed':>8}"]
    for one in measured:
        smaller = "" if one is measured[0] else f"{1 - one.bytes / measured[0].bytes:.1%}"
        same = "" if one is measured[0] else f"{one.agreement:.1%}"
        numbers = f"{one.bytes / 1e6:>8.2f}{smaller:>9}{one.accuracy:>9.2%}{same:>12}{one.images_per_second:>9.1f}"
        lines.append(f"{one.name:19}{numbers}{one.speedup:>6.2f} x" + ("  best" if one is best else ""))
    return tuple(lines)


def _passed(job: QuantizeJob, measured: Sequence[Measurement], best: Measurement) -> tuple[str, ...]:
    limits = f"at most {100 * job.gate.max_accuracy_loss:.2f} and at least {job.gate.min_speedup:g} x"
    how = f"{_lost(best, measured[0])}, {best.speedup:.2f} x as fast, on {best.images} images ({limits})"
    return *_table(measured, best), f"passed  {best.name}: {how}"


def _told(metrics: Mapping[str, float]) -> str:
    return (
        f"int8    right on {metrics['accuracy_int8']:.2%}, float32 on {metrics['accuracy_float32']:.2%}; "
        f"{metrics['speedup']:.2f} x as fast"
    )


def _outcome(job: QuantizeJob, artifact: Artifact, lines: tuple[str, ...], **rows: Any) -> Outcome:
    tail = (
        f"where   {job.output.uri}",
        f"digest  {artifact.digest}",
        f"next    in a labelling job: model: {{uri: {job.output.uri}, precision: int8}}, then nightlabel run JOB",
    )
    facts = {"where": job.output.uri, "digest": artifact.digest, "parent": artifact.origin.parents[0]}
    return Outcome((*lines, *tail), {**facts, **rows, "metrics": artifact.origin.metrics})
