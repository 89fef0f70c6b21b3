"""Image rows with pixels → prediction rows: label, score and top-k of every image that has pixels.

The model runs over a whole block at a time, in batches of its own, and the columns are put together once, in Arrow, so a row
costs the host a few microseconds. Rows without pixels (failed before) and rows without a key (the end of a unit) pass through.
The arithmetic is in `torch_engine`, `onnx_engine` and `openvino_engine`; only the one that runs is imported.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import rows
from pipeline.artifact import INT8, Artifact, build
from pipeline.engines.cpu import caution
from pipeline.engines.scores import Engine, Scores, Wanted
from pipeline.errors import ModelError
from pipeline.job.arithmetic import engine_for
from pipeline.spec import ModelSource, Output

_NONFINITE = "the model's scores of this image are not finite numbers"


class Predict:
    """A callable on the tables that `preprocess` puts out. `source` says precision and engine, `threads` are of the CPU. For
    several threads of its own process, of which one has the engine while others put their columns together.

    Raises ModelError when the model, its precision and the device do not go together.
    """

    def __init__(
        self, artifact: Artifact, source: ModelSource, *, device: str, batch_size: int, output: Output, threads: int | None = None
    ) -> None:
        self.size, self.output = artifact.preprocessing.size, output
        self.features, self.classes = artifact.architecture.features, artifact.architecture.classes
        self.top_k = min(output.top_k, self.classes)
        self.labels = pa.array(artifact.labels, pa.string())
        wanted = Wanted(self.top_k, output.embeddings, output.probabilities)
        self.engine = _engine(artifact, source, wanted, device=device, batch_size=batch_size, threads=threads)
        self.caution = caution(artifact, source) if device == "cpu" else None
        self._computing = Lock()

    def __call__(self, batch: pa.Table, on_device: Any = None) -> pa.Table:
        """`unit`, the columns of rows.PREDICTION (status null in rows that end a unit), `embedding` and `probabilities` when the
        output wants them, then the kept columns untouched; rows.SAME_LABEL where `exact` pixels came with the others, and
        rows.CAUTION where there is one. With `on_device`, that has the pixels of the first rows, uint8 [K, 3, S, S] on the torch
        engine's device."""
        scores, at, exact_ids = self._scores(batch, on_device)
        scored = np.zeros(batch.num_rows, dtype=bool)
        scored[at] = scores.finite
        broken = np.zeros(batch.num_rows, dtype=bool)
        broken[at] = ~scores.finite
        error_class, error = _failures(batch, pa.array(broken))
        columns = {name: batch.column(name) for name in ("unit", "key", "source", "index", "width", "height")}
        columns |= {"error_class": error_class, "error": error, "status": _status(batch.column("key"), error_class)}
        optional = self._optional(scores, at, scored)
        columns |= self._labelled(scores, scored) | optional
        names = ["unit", *rows.PREDICTION.names, *optional]
        kept = [name for name in batch.column_names if name not in rows.USED_UP]
        types = {field.name: field.type for field in rows.PREDICTION}
        if "exact" in batch.column_names:
            columns[rows.SAME_LABEL] = _same_label(batch.column("exact"), exact_ids, scores, at)
            names.append(rows.SAME_LABEL)
        if self.caution is not None:
            labelled = pa.array(scored)
            columns[rows.CAUTION] = pc.if_else(labelled, self.caution, pa.scalar(None, pa.string()))
            names.append(rows.CAUTION)
        arrays = [columns[name].cast(types.get(name, columns[name].type)) for name in names]
        return pa.table([*arrays, *(batch.column(name) for name in kept)], names=[*names, *kept])

    def _scores(self, batch: pa.Table, on_device: Any) -> tuple[Scores, np.ndarray, np.ndarray]:
        """Scores of the rows that have pixels, where these rows are, and the labels that the rows with `exact` get by that."""
        first = 0 if on_device is None else len(on_device)
        column = batch.column("pixels").slice(first)
        at = np.concatenate([np.arange(first), first + np.flatnonzero(np.asarray(column.is_valid()))])
        exact = self._exact(batch)
        if on_device is None:
            pixels = rows.pixels_view(column, self.size)
            with self._computing:
                scores = self.engine(pixels) if len(pixels) else self._nothing()
                return scores, at, self.engine(exact).ids[:, 0] if len(exact) else np.empty(0, np.int32)
        if len(at) + len(exact) == 0:
            return self._nothing(), at, np.empty(0, np.int32)
        pieces = [rows.pixels_view(chunk, self.size) for chunk in column.chunks]  # one array of them would be a copy of 100 MB
        with self._computing:  # in one go: each has the GPU to itself, and other threads wait
            scores = self.engine.on_device(on_device, *pieces, exact)  # type: ignore[attr-defined]  # torch's: no other runs there
        return scores[: len(at)], at, scores[len(at) :].ids[:, 0]

    def _exact(self, batch: pa.Table) -> np.ndarray:
        """The pixels in `exact`, uint8 [K, 3, S, S], of the rows that have some."""
        shape = (3, self.size, self.size)
        column = batch.column("exact").drop_null() if "exact" in batch.column_names else []
        if not len(column):
            return np.empty((0, *shape), np.uint8)
        return np.stack([np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape) for pixels in column])

    def _nothing(self) -> Scores:
        ids, scores = np.empty((0, self.top_k), np.int32), np.empty((0, self.top_k), np.float32)
        embeddings = np.empty((0, self.features), np.float32)
        return Scores(ids, scores, np.empty(0, bool), embeddings, np.empty((0, self.classes), np.float16))

    def _labelled(self, scores: Scores, scored: np.ndarray) -> dict[str, pa.Array]:
        ids, values = scores.ids[scores.finite], scores.scores[scores.finite]
        flat = pa.array(ids.ravel())
        ranked = pa.StructArray.from_arrays(
            [flat, self.labels.take(flat), pa.array(values.ravel())], fields=list(rows.TOPK.value_type)
        )
        offsets = np.concatenate([[0], np.cumsum(scored) * self.top_k]).astype(np.int32)
        label_id = _spread(ids[:, 0], scored)
        return {
            "label_id": label_id,
            "label": self.labels.take(label_id),
            "score": _spread(values[:, 0], scored),
            "topk": pa.ListArray.from_arrays(pa.array(offsets), ranked, type=rows.TOPK, mask=pa.array(~scored)),
        }

    def _optional(self, scores: Scores, at: np.ndarray, scored: np.ndarray) -> dict[str, pa.Array]:
        """The optional columns that the output wants."""
        columns = {}
        if self.output.embeddings:
            columns["embedding"] = _vectors(scores.embeddings, at, scored)
        if self.output.probabilities:
            columns["probabilities"] = _vectors(scores.probabilities, at, scored)
        return columns


def _engine(
    artifact: Artifact, source: ModelSource, wanted: Wanted, *, device: str, batch_size: int, threads: int | None
) -> Engine:
    precision = source.precision
    name = engine_for(source.engine, precision, gpu=device != "cpu")
    if name != "torch":
        from pipeline.engines.onnx_engine import OnnxEngine

        graph = _graph(artifact, precision, device)
        if name == "openvino":
            from pipeline.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(graph, wanted=wanted, precision=precision, batch_size=batch_size, threads=threads)
        return OnnxEngine(graph, wanted=wanted, batch_size=batch_size, threads=threads, where=INT8)
    import torch

    from pipeline.engines.torch_engine import TorchEngine
    from pipeline.model.resnet import fold

    if threads is not None:
        torch.set_num_threads(threads)
    model, seen = fold(build(artifact)), artifact.preprocessing
    return TorchEngine(model, seen, wanted=wanted, precision=precision, device=device, batch_size=batch_size)


def _graph(artifact: Artifact, precision: str, device: str) -> bytes:
    """What the engines of the CPU run: the artifact's int8 graph, or one made of its weights."""
    if device != "cpu":
        raise ModelError(f"model: precision is {precision} on {device}", need="the CPU", do="Take torch, and float16, on a GPU")
    if precision == "int8":
        from pipeline.engines.onnx_engine import check_int8

        check_int8(artifact, "model")
        return artifact.files[INT8]
    from pipeline.engines.onnx_graph import to_onnx

    return to_onnx(artifact)


def _same_label(exact: pa.ChunkedArray, exact_ids: np.ndarray, scores: Scores, at: np.ndarray) -> pa.Array:
    """Whether the rows with `exact` have the label that they get by that, null elsewhere."""
    wanted, label = np.asarray(exact.is_valid()), np.full(len(exact), -1)
    label[at] = scores.ids[:, 0]
    same = np.zeros(len(exact), dtype=bool)
    same[wanted] = label[wanted] == exact_ids
    return pa.array(same, mask=~wanted)


def _failures(batch: pa.Table, broken: pa.Array) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """`error_class` and `error`, with NONFINITE where `broken`."""
    error_class, error = (batch.column(name).cast(pa.string()) for name in ("error_class", "error"))
    return pc.if_else(broken, rows.Failure.NONFINITE.value, error_class), pc.if_else(broken, _NONFINITE, error)


def _status(key: pa.ChunkedArray, error_class: pa.ChunkedArray) -> pa.ChunkedArray:
    status = pc.if_else(error_class.is_null(), "ok", "failed")
    return pc.if_else(key.is_valid(), status, pa.scalar(None, pa.string()))


def _spread(values: np.ndarray, where: np.ndarray) -> pa.Array:
    """One value for every true of `where`, null elsewhere."""
    full = np.zeros(len(where), values.dtype)
    full[where] = values
    return pa.array(full, mask=~where)


def _vectors(values: np.ndarray | None, at: np.ndarray, scored: np.ndarray) -> pa.Array:
    """Vectors [len(at), width] at the rows `at` of a column that is null where not `scored`."""
    assert values is not None  # the engine returns what the output wants
    full = np.zeros((len(scored), values.shape[1]), values.dtype)
    full[at] = values
    return pa.FixedSizeListArray.from_arrays(pa.array(full.ravel()), values.shape[1], mask=pa.array(~scored))
