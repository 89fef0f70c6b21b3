"""From a float32 graph to int8 ones: the ranges of the activations on real images, and the schemes that are worth a try.

Static QDQ: uint8 activations, int8 weights, int32 sums, for convolutions, their additions, the pooling and the classifier. What
comes out, features and logits, is float32, for with 256 levels classes would tie. Ranges are the extremes seen: nearest to
float32 on photographs with random weights, a little further than percentiles on the one trained network that was tried (LOG.md,
2026-11-25), without keeping all activations in memory as those do.

CPUs without VNNI add pairs of products in 16 bits, which overflow silently, so weights of 7 bits are tried there too; an int8
model belongs to the kind of CPU that it was measured on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.onnx_engine import INPUT

OPERATORS = ("Conv", "Relu", "Add", "MaxPool", "Gemm")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantize the weights."""

    per_channel: bool
    """A scale for every output channel, instead of one for the whole tensor."""
    bits: int = 8
    """7 leaves the sums of CPUs without VNNI room."""

    def __str__(self) -> str:
        return ("per channel" if self.per_channel else "per tensor") + (f", {self.bits} bits" if self.bits < 8 else "")


def schemes(*, saturates: bool) -> tuple[Scheme, ...]:
    """What to try; `saturates` is about the CPU."""
    return tuple(Scheme(per_channel, bits) for bits in ((8, 7) if saturates else (8,)) for per_channel in (True, False))


def calibrate(model: bytes, batches: Iterable[np.ndarray]) -> Any:
    """The least and the greatest value of every tensor to quantize, over batches of uint8 [N, 3, S, S], at least one."""
    from onnxruntime.quantization import create_calibrator

    with tempfile.TemporaryDirectory() as name:  # ORT's calibrators work on files
        path = Path(name, "model.onnx")
        path.write_bytes(model)
        calibrator = create_calibrator(path, list(OPERATORS), augmented_model_path=str(Path(name, "augmented.onnx")))
        calibrator.collect_data(_Reader(iter(batches)))
        return calibrator.compute_data()


def quantize(model: bytes, ranges: Any, scheme: Scheme) -> bytes:
    """The int8 graph, which takes and gives what `model` does. The same ranges give the same bytes."""
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    quantizer = QDQQuantizer(
        onnx.load_from_string(model),
        scheme.per_channel,
        scheme.bits < 8,  # reduce_range
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges,
        [],
        [],
        list(OPERATORS),
        {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # ORT does not mind, every other reader of ONNX does
    data: bytes = quantizer.model.model.SerializeToString()
    return data


class _Reader:
    """What ORT calls a CalibrationDataReader."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}
