"""The graph and the engines that run it against torch, what is refused, and that nothing but onnxruntime is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from test_artifact import RESNET18, TINY, V1, made
from test_predict import images, table, tiny

from pipeline.artifact import INT8, Artifact, Origin, build, save_artifact, with_files
from pipeline.engines.onnx_engine import OnnxEngine
from pipeline.engines.onnx_graph import to_onnx
from pipeline.engines.openvino_engine import OpenVinoEngine
from pipeline.engines.scores import Scores, Wanted
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import ModelError, UnfitError
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import fold
from pipeline.predict import Predict
from pipeline.prepare.quantize import float32_graph
from pipeline.spec import ModelSource, Output

SMALL_STEM = Architecture("basic", (1, 1), (8, 16), classes=3, embedding_size=8, stem="small")
ALL = Wanted(top_k=3, embeddings=True, probabilities=True)


def by_torch(artifact: Artifact, pixels: np.ndarray, wanted: Wanted = ALL) -> Scores:
    engine = TorchEngine(
        fold(build(artifact)), artifact.preprocessing, wanted=wanted, precision="float32", device="cpu", batch_size=3
    )
    return engine(pixels)


def assert_alike(got: Scores, want: Scores) -> None:
    assert np.array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-5)
    np.testing.assert_allclose(got.embeddings, want.embeddings, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.probabilities, want.probabilities, atol=1e-3)
    for name in ("ids", "scores", "finite", "embeddings", "probabilities"):
        assert getattr(got, name).dtype == getattr(want, name).dtype, name
        assert getattr(got, name).shape == getattr(want, name).shape, name


@pytest.mark.parametrize(
    "architecture", [TINY, RESNET18, V1, SMALL_STEM], ids=["tiny", "resnet18", "bottleneck v1", "small stem"]
)
def test_the_graph_equals_torch(architecture: Architecture) -> None:
    seen = Preprocessing(size=48, mean=(0.1, 0.5, 0.3), std=(0.4, 0.2, 0.6))
    artifact, pixels = made(architecture, seen), images(5, 48)
    engine = OnnxEngine(to_onnx(artifact), wanted=ALL, batch_size=2, threads=1)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (seen.mean, seen.std))
    with torch.inference_mode():
        logits = build(artifact)((torch.from_numpy(pixels).float() / 255 - mean) / std).numpy()
    np.testing.assert_allclose(engine.session.run(["logits"], {"pixels": pixels})[0], logits, rtol=1e-4, atol=1e-4)
    wanted = Wanted(architecture.classes, embeddings=True, probabilities=True)
    engine.wanted = wanted
    assert_alike(engine(pixels), by_torch(artifact, pixels, wanted))


def test_batches_do_not_matter() -> None:
    artifact, pixels = tiny(), images(5)
    graph, want = to_onnx(artifact), by_torch(artifact, pixels)
    for batch_size in (1, 2, 5, 64):
        assert_alike(OnnxEngine(graph, wanted=ALL, batch_size=batch_size, threads=1)(pixels), want)
    bare = OnnxEngine(graph, wanted=Wanted(top_k=99), batch_size=4, threads=2)(pixels)
    assert bare.embeddings is bare.probabilities is None
    assert bare.ids.shape == (5, 4), "top-k is at most the classes"
    assert (np.diff(bare.scores, axis=1) <= 0).all()


def classifier_of(artifact: Artifact, value: float) -> bytes:
    """Its graph with every number of the classifier replaced."""
    graph = onnx.load_from_string(to_onnx(artifact))
    for tensor in graph.graph.initializer:
        if "classifier" in tensor.name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(tensor.dims), value, np.float32), tensor.name))
    return graph.SerializeToString()


def test_of_equal_scores_the_lower_id_comes_first() -> None:
    engine = OnnxEngine(classifier_of(tiny(), 0), wanted=Wanted(4), batch_size=4, threads=1)
    assert engine(images(2)).ids.tolist() == [[0, 1, 2, 3]] * 2


def test_scores_that_are_not_finite_are_told() -> None:
    engine = OnnxEngine(classifier_of(tiny(), np.inf), wanted=ALL, batch_size=2, threads=1)
    assert engine(images(3)).finite.tolist() == [False] * 3
    with pytest.raises(ModelError, match="are not finite"):
        float32_graph(tiny(scale=3e38))


def with_int8(artifact: Artifact, graph: bytes) -> Artifact:
    return with_files({**artifact.files, INT8: graph}, origin=Origin())


def test_predict_takes_the_graph_for_int8(tmp_path: Path) -> None:
    artifact = tiny()  # its graph stays float32 here, so that both engines must say the same
    output = Output(uri="unused", top_k=2, embeddings=True, probabilities=True)
    given = table(images(8), failed=(1,), ends=(7,))
    out, want = (
        Predict(model, ModelSource(uri="unused", precision=precision), device="cpu", batch_size=3, output=output, threads=1)(
            given
        )
        for model, precision in ((with_int8(artifact, to_onnx(artifact)), "int8"), (artifact, "float32"))
    )
    assert out.schema == want.schema
    for name in ("status", "error_class", "label", "label_id", "key"):
        assert out[name].to_pylist() == want[name].to_pylist(), name
    np.testing.assert_allclose(out["score"].to_pandas(), want["score"].to_pandas(), atol=1e-5)


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (b"no graph", r"model.int8.onnx: onnxruntime does not open it .*\. Make it with a quantize job"),
        (b"", r"model.int8.onnx: onnxruntime does not open it"),
        (None, r"takes x and gives y; required: pixels as uint8, giving logits and features\. Make it"),
    ],
    ids=["garbage", "empty", "other graph"],
)
def test_what_is_no_such_graph_is_refused(graph: bytes | None, sentence: str) -> None:
    artifact = with_int8(tiny(), other_graph() if graph is None else graph)
    with pytest.raises(ModelError, match=sentence):
        Predict(artifact, ModelSource(uri="unused", precision="int8"), device="cpu", batch_size=3, output=Output(uri="unused"))


def other_graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        UnfitError, match=r"not installed. Install the extra: pip install 'nightlabel\[openvino\]', or take engine"
    ):
        OpenVinoEngine(b"", wanted=ALL, precision="int8", batch_size=1)


@pytest.mark.parametrize(("precision", "atol"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_openvino_says_the_same(precision: str, atol: float) -> None:
    pytest.importorskip("openvino")
    artifact, pixels = tiny(), images(5)
    got = OpenVinoEngine(to_onnx(artifact), wanted=ALL, precision=precision, batch_size=2, threads=1)(pixels)
    want = by_torch(artifact, pixels)
    np.testing.assert_allclose(got.probabilities, want.probabilities, atol=max(atol, 1e-3))
    np.testing.assert_allclose(got.embeddings, want.embeddings, rtol=atol * 10, atol=atol)
    assert got.finite.all()


def test_an_int8_worker_never_imports_torch(tmp_path: Path) -> None:
    """Nor does the module that Ray's worker finds the stages in."""
    artifact = tiny()
    save_artifact(with_int8(artifact, to_onnx(artifact)), str(tmp_path / "model"))
    code = (
        "import json, sys\n"
        "from pipeline.stages import make_predict\n"
        "from pipeline.spec import Job\n"
        "from pipeline.start import load_model\n"
        "job = Job.model_validate(json.loads(sys.argv[1]))\n"
        "stage = make_predict(job, load_model(job, weights=False).digest, None)\n"
        "import numpy as np\n"
        "assert stage.engine(np.zeros((2, 3, 32, 32), np.uint8)).ids.shape == (2, 4)\n"
        "print(','.join(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))))"
    )
    model = f'{{"uri": "{tmp_path}/model", "precision": "int8"}}'
    job = f'{{"name": "x", "input": {{"uri": "i"}}, "output": {{"uri": "o"}}, "model": {model}}}'
    done = subprocess.run([sys.executable, "-c", code, job], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "onnxruntime\n", done.stderr
