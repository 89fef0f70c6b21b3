"""The same ONNX graphs by OpenVINO, an extra: the fastest on CPUs with AVX-512, VNNI or AMX, at bfloat16 and int8.

Of one core of an EPYC it makes a fifth more at both than what a plain install has (LOG.md, 2026-11-25); at float32 it makes no
difference. bfloat16 is its own conversion of the float32 graph. The price: 150 MB of another library, and scores that differ in
the last bits, which is why a job has to name it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.engines.onnx_engine import INPUT, OUTPUTS
from pipeline.engines.scores import Scores, Wanted, ranked
from pipeline.errors import UnfitError

_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # of what an int8 graph has not quantized


class OpenVinoEngine:
    """A callable on uint8 [N, 3, S, S]. `threads` None means all CPUs. Raises UnfitError without openvino."""

    def __init__(self, graph: bytes, *, wanted: Wanted, precision: str, batch_size: int, threads: int | None = None) -> None:
        try:
            from openvino import Core
        except ImportError as error:
            do = "Install the extra: pip install 'nightlabel[openvino]', or take engine auto"
            raise UnfitError("model: engine openvino is not installed", do=do) from error
        self.wanted, self.batch_size = wanted, batch_size
        core = Core()
        # One stream: it is the job that says how many actors there are.
        options: dict[str, Any] = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads or 0, "ENABLE_CPU_PINNING": False}
        options |= {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(core.read_model(graph), "CPU", options).create_infer_request()

    def __call__(self, pixels: np.ndarray) -> Scores:
        """Scores of the images uint8 [N, 3, S, S], N > 0."""
        found: list[tuple[np.ndarray, ...]] = []
        for at in range(0, len(pixels), self.batch_size):
            answer = self.request.infer({INPUT: pixels[at : at + self.batch_size]})
            found.append(tuple(answer[name].copy() for name in OUTPUTS))  # the next call writes over them
        logits, features = (np.concatenate(part) for part in zip(*found, strict=True))
        return ranked(logits, features if self.wanted.embeddings else None, self.wanted)
