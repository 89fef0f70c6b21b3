"""The graph that a quantize job starts from: `graph.to_onnx`, held to give finite scores.

Weights that overflow would calibrate to ranges of infinity and fail much later, in a library that does not say why.
"""

from __future__ import annotations

import numpy as np

from pipeline.artifact import Artifact
from pipeline.engines import onnx_graph as graph
from pipeline.engines.onnx_engine import OnnxEngine
from pipeline.engines.scores import Wanted
from pipeline.errors import ModelError


def to_onnx(artifact: Artifact) -> bytes:
    """Raises ModelError when the scores of random pixels are not finite."""
    model, size = graph.to_onnx(artifact), artifact.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    if not OnnxEngine(model, wanted=Wanted(), batch_size=1)(pixels).finite.all():
        raise ModelError("the model's scores of random pixels are not finite numbers", do="Train or import it again")
    return model
