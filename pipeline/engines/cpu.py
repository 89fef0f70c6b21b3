"""An arithmetic for which a CPU has no instructions costs time, or labels (LOG.md, 2026-11-27): what is to be said then."""

from __future__ import annotations

import platform
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.job.arithmetic import Precision, engine_for
from pipeline.spec import ModelSource

_CPUINFO = Path("/proc/cpuinfo")
_X86 = ("x86_64", "amd64", "i686")
SLOW = "on a CPU without AVX-512 BF16 or AMX, where float32 is several times as fast. Take float32"
_FLAGS = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "int8": {"avx512_vnni", "avx_vnni"}}


def lacks(precision: Precision, cpuinfo: Path = _CPUINFO) -> bool | None:
    """True on x86 without instructions for bfloat16, or for the products of int8 with sums of 32 bits; None where the system does
    not tell. Other CPUs lack neither."""
    if platform.machine().lower() not in _X86:
        return False
    return not _FLAGS[precision].intersection(cpuinfo.read_text().split()) if cpuinfo.exists() else None


def caution(artifact: Artifact, source: ModelSource, cpuinfo: Path = _CPUINFO) -> str | None:
    """What those should know who label with this artifact on this CPU; None for nothing."""
    engine = engine_for(source.engine, source.precision, gpu=False)
    if source.precision == "bfloat16" and engine == "torch" and lacks("bfloat16", cpuinfo):
        return f"model.precision is bfloat16 {SLOW}"
    if source.precision == "int8" and artifact.origin.data.get("vnni") and lacks("int8", cpuinfo):
        return (
            "the int8 model was quantized and measured on a CPU with VNNI and labels on one without, where sums of its products "
            "may overflow and change labels. Quantize it on such a CPU"
        )
    return None
