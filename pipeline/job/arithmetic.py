"""Which arithmetic a model is run with, what computes it, and on what: a choice of a job that not every machine can have.

`auto` is the fastest that a plain install has (LOG.md, 2026-11-25): torch on GPUs and for bfloat16, ONNX Runtime for float32 and
int8 on CPUs. It never takes an engine because it happens to be there: engines differ in the last bits of a score.
"""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["float32", "float16", "bfloat16", "int8"]
EngineName = Literal["auto", "torch", "onnxruntime", "openvino"]
Lane = Literal["cpu", "gpu", "both"]

_RUNS: dict[EngineName, tuple[Precision, ...]] = {
    "auto": get_args(Precision),
    "torch": ("float32", "float16", "bfloat16"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}


def engine_for(engine: EngineName, precision: Precision, *, gpu: bool) -> EngineName:
    """What `auto` stands for; any other as it is."""
    if engine != "auto":
        return engine
    return "onnxruntime" if precision == "int8" or (precision == "float32" and not gpu) else "torch"


def check_engine(engine: EngineName, precision: Precision) -> None:
    """Raises ValueError when the engine has no such arithmetic."""
    if precision not in _RUNS[engine]:
        can = ", ".join(_RUNS[engine])
        raise ValueError(f"precision is {precision}; required for engine {engine}: {can}. Take one of these, or engine auto")


def check_device(engine: EngineName, precision: Precision, *, gpus: float) -> None:
    """Raises ValueError when the actors of a labelling job have not the device that this needs."""
    if precision == "float16" and gpus == 0:
        raise ValueError("model: precision is float16, which needs a GPU. Set resources.predict.gpus_per_actor, or take bfloat16")
    if gpus > 0 and engine_for(engine, precision, gpu=True) != "torch":
        what = "precision is int8" if precision == "int8" else f"engine is {engine}"
        raise ValueError(
            f"model: {what}, which runs on CPUs. Set resources.predict.gpus_per_actor to 0, or take torch and float16"
        )


def check_lane(lane: Lane, *, gpus: float, actors: int) -> None:
    """Raises ValueError when the images cannot take this lane: `gpus` of an actor of predict, `actors` of preprocess."""
    if lane != "cpu" and gpus == 0:
        raise ValueError(f"decode_lane is {lane}, which needs a GPU. Set resources.predict.gpus_per_actor, or take cpu")
    if lane == "both" and actors == 0:
        raise ValueError("decode_lane is both and resources.preprocess.actors is 0; required: 1 or more, which decode. Set it")
