"""An ONNX graph on the CPU: uint8 crops in, ranked classes out, by ONNX Runtime. What labels at float32 and int8.

The graph takes `pixels` uint8 [N, 3, S, S] and normalises inside, so nothing but crops goes in; it gives `logits` and `features`.
At float32 it is an eighth faster than torch on one core, with the same scores to 3e-6. A predict actor seldom has its cores to
itself, so threads never spin while they wait: two threads beside those of another model lost a fifth of their speed to the
spinning (LOG.md, 2026-11-25).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.artifact import INT8, Artifact
from pipeline.engines.scores import Scores, Wanted, ranked
from pipeline.errors import ModelError, first_line

INPUT, OUTPUTS = "pixels", ("logits", "features")
_QUANTIZE = "Make it with a quantize job, such as jobs/quantize-photos.yaml"


class OnnxEngine:
    """A callable on uint8 [N, 3, S, S]. `threads` None means all CPUs; `where` is what messages call the model.

    Raises ModelError for bytes that are not such a graph.
    """

    def __init__(
        self, model: bytes, *, wanted: Wanted, batch_size: int, threads: int | None = None, where: str = "the model"
    ) -> None:
        self.wanted, self.batch_size = wanted, batch_size
        self.session = _open(model, threads or 0, where)

    def __call__(self, pixels: np.ndarray) -> Scores:
        """Scores of the images uint8 [N, 3, S, S], N > 0."""
        names = OUTPUTS if self.wanted.embeddings else OUTPUTS[:1]
        starts = range(0, len(pixels), self.batch_size)
        batches = (self.session.run(names, {INPUT: pixels[at : at + self.batch_size]}) for at in starts)
        logits, *features = (np.concatenate(part) for part in zip(*batches, strict=True))
        return ranked(logits, features[0] if features else None, self.wanted)


def check_int8(artifact: Artifact, where: str) -> None:
    """Raises ModelError when the artifact cannot label at precision int8. Loads nothing."""
    if not artifact.quantized:
        raise ModelError(f"{where}: has no {INT8}", need="one, for precision int8", do=_QUANTIZE + ", or take another precision")


def _open(model: bytes, threads: int, where: str) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; its warnings are about graphs and machines, and nobody can act on them here
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented) as error:
        raise ModelError(f"{where}: onnxruntime does not open it ({first_line(error)})", do=_QUANTIZE) from None
    given = {item.name: item.type for item in session.get_inputs()}, [item.name for item in session.get_outputs()]
    if given != ({INPUT: "tensor(uint8)"}, list(OUTPUTS)):
        got = f"{where}: takes {', '.join(given[0])} and gives {', '.join(given[1])}"
        raise ModelError(got, need=f"{INPUT} as uint8, giving {' and '.join(OUTPUTS)}", do=_QUANTIZE)
    return session
