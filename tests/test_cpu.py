"""An arithmetic that a CPU has no instructions for: who is told, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from test_predict import images, predict, table, tiny

from pipeline.artifact import Origin
from pipeline.commit import UnitBuffer
from pipeline.engines import cpu
from pipeline.rows import CAUTION, PREDICTION, TIMINGS
from pipeline.spec import ModelSource

BARE = "processor : 0\nflags : fpu avx2 fma\n"
FULL = "processor : 0\nflags : fpu avx2 avx512_vnni avx512_bf16\n"


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize(
    ("machine", "flags", "lacks"),
    [
        ("x86_64", "fpu avx2 fma", (True, True)),
        ("x86_64", "fpu avx2 avx512_vnni", (True, False)),
        ("x86_64", "fpu avx512_vnni avx512_bf16", (False, False)),
        ("AMD64", "fpu avx_vnni", (True, False)),
        ("x86_64", "amx_bf16 avx512_vnni", (False, False)),
        ("aarch64", "asimd", (False, False)),
    ],
)
def test_what_a_cpu_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine, flags, lacks):
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : {flags}\n")
    assert (cpu.lacks("bfloat16", cpuinfo), cpu.lacks("int8", cpuinfo)) == lacks


@pytest.mark.usefixtures("x86")
def test_a_system_that_does_not_tell(tmp_path: Path):
    assert cpu.lacks("int8", tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("flags", "wanted", "facts", "said"),
    [
        (BARE, {"precision": "bfloat16"}, {}, "model.precision is bfloat16"),
        (BARE, {"precision": "bfloat16", "engine": "openvino"}, {}, None),  # it computes in float32 then
        (FULL, {"precision": "bfloat16"}, {}, None),
        (BARE, {"precision": "float32"}, {"vnni": True}, None),
        (BARE, {"precision": "int8"}, {"vnni": True}, "the int8 model was quantized"),
        (BARE, {"precision": "int8"}, {"vnni": False}, None),
        (BARE, {"precision": "int8"}, {}, None),
        (FULL, {"precision": "int8"}, {"vnni": True}, None),
    ],
)
@pytest.mark.usefixtures("x86")
def test_a_caution_where_the_cpu_is_not_the_models(tmp_path: Path, flags, wanted, facts, said):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(flags)
    found = cpu.caution(replace(tiny(), origin=Origin(data=facts)), ModelSource(uri="unused", **wanted), cpuinfo)
    assert (found or "").startswith(said or "")
    assert (found is None) == (said is None)


def test_a_caution_travels_with_the_rows_and_stays_out_of_the_output(monkeypatch: pytest.MonkeyPatch):
    given = table(images(4), ends=(3,))
    monkeypatch.setattr(cpu, "lacks", lambda *_: False)
    assert CAUTION not in predict(tiny(), "bfloat16")(given).column_names
    monkeypatch.setattr(cpu, "lacks", lambda *_: True)
    model = predict(tiny(), "bfloat16")
    out = model(given)
    text = f"model.precision is bfloat16 {cpu.SLOW}"
    assert out[CAUTION].to_pylist() == [text, text, text, None]
    for name in TIMINGS.values():
        out = out.append_column(name, pa.array([0.5] * 4, pa.float32()))
    buffer = UnitBuffer()
    buffer.add(out.slice(0, 2).drop_columns(["unit"]))
    buffer.add(out.slice(2).drop_columns(["unit", CAUTION]))  # from another worker
    assert buffer.complete
    assert buffer.seen().cautions == (text,)
    assert buffer.table().column_names == [*PREDICTION.names, "cls"]
