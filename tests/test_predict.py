"""Predict against a plain float32 loop over torchvision's network, and every kind of row that is no image."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from pipeline import rows
from pipeline.artifact import Artifact, make_artifact
from pipeline.commit import UnitBuffer
from pipeline.engines.scores import Scores, Wanted
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import ModelError
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet, fold
from pipeline.predict import Predict
from pipeline.prepare.parameters import to_huggingface
from pipeline.spec import ModelSource, Output

SIZE = 32
TINY = Architecture("basic", (1, 1), (8, 16), classes=4, embedding_size=8)
PREPROCESSING = Preprocessing(size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def tiny(scale: float = 1.0) -> Artifact:
    torch.manual_seed(0)
    state = ResNet(TINY).eval().state_dict()
    state["classifier.1.weight"] *= 8 * scale  # scores that are apart
    return make_artifact(TINY, state, labels=("ant", "bee", "cat", "dog"), preprocessing=PREPROCESSING)


def predict(artifact: Artifact, precision: str = "float32", batch_size: int = 3, **output: object) -> Predict:
    wanted = Output(uri="unused", **output)
    return Predict(artifact, source(precision), device="cpu", batch_size=batch_size, output=wanted, threads=1)


def source(precision: str) -> ModelSource:
    return ModelSource(uri="unused", precision=precision)  # type: ignore[arg-type]


def images(n: int, size: int = SIZE) -> np.ndarray:
    """Noise of many brightnesses, so that the model does not say the same of all."""
    rng = np.random.default_rng(0)
    return (rng.random((n, 3, size, size)) * rng.random((n, 3, 1, 1)) * 256).astype(np.uint8)


def table(pixels: np.ndarray, failed: tuple[int, ...] = (), ends: tuple[int, ...] = ()) -> pa.Table:
    """What preprocess puts out for these images; those of `failed` have no pixels, those of `ends` end a unit."""
    n = len(pixels)
    text = [None if i in ends else f"k{i}" for i in range(n)]
    valid = [i not in failed and i not in ends for i in range(n)]
    error = ["TRUNCATED" if i in failed else None for i in range(n)]
    return pa.table(
        {
            "unit": pa.array(["u"] * n, pa.string()),
            "index": pa.array(range(n), pa.int64()),
            "key": pa.array(text, pa.string()),
            "source": pa.array(text, pa.string()),
            "error_class": pa.array(error, pa.string()),
            "error": pa.array(error, pa.string()),
            "pixels": rows.pixels_array(pixels[valid], valid),
            "width": pa.array([i if ok else None for i, ok in enumerate(valid)], pa.int32()),
            "height": pa.array([i if ok else None for i, ok in enumerate(valid)], pa.int32()),
            "cls": pa.array(range(n), pa.uint8()),
        }
    )


def assert_shape(out: pa.Table, *optional: str) -> None:
    assert out.column_names == ["unit", *rows.PREDICTION.names, *optional, "cls"]
    for field in rows.PREDICTION:
        assert out.schema.field(field.name).type == field.type
    out.validate(full=True)


def test_equals_a_plain_loop_over_torchvision() -> None:
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.fc.weight.data *= 4
    labels = tuple(f"c{i}" for i in range(10))
    architecture = Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), classes=10)
    state = to_huggingface(theirs.state_dict(), "torchvision")
    artifact = make_artifact(architecture, state, labels=labels, preprocessing=Preprocessing(size=64))
    pixels = images(7, 64)
    out = predict(artifact, top_k=3, embeddings=True, probabilities=True)(table(pixels))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        x = (torch.from_numpy(pixels).float() / 255 - mean) / std
        expected = theirs(x).softmax(1)
        theirs.fc = nn.Identity()
        features = theirs(x).numpy()
    scores, ids = expected.topk(3)
    assert_shape(out, "embedding", "probabilities")
    assert out["label_id"].to_pylist() == ids[:, 0].tolist()
    assert out["label"].to_pylist() == [labels[i] for i in ids[:, 0]]
    np.testing.assert_allclose(out["score"].to_numpy(), scores[:, 0], atol=1e-5)
    ranked = out["topk"].to_pylist()
    assert [[entry["label_id"] for entry in row] for row in ranked] == ids.tolist()
    np.testing.assert_allclose([[entry["score"] for entry in row] for row in ranked], scores, atol=1e-5)
    assert all(entry["label"] == labels[entry["label_id"]] for row in ranked for entry in row)
    np.testing.assert_allclose(np.stack(out["embedding"].to_numpy()), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.stack(out["probabilities"].to_numpy()), expected, atol=1e-3)
    assert out.schema.field("probabilities").type == pa.list_(pa.float16(), 10)
    assert set(out["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_probabilities_of_several_batches_are_joined(precision: str) -> None:
    out = predict(tiny(), precision, batch_size=3, probabilities=True)(table(images(8)))
    np.testing.assert_allclose(np.stack(out["probabilities"].to_numpy()).sum(axis=1, dtype=np.float32), 1, atol=2e-3)


def test_rows_without_an_image_pass_through() -> None:
    given = table(images(8), failed=(1, 4), ends=(5, 7))
    out = predict(tiny(), embeddings=True, probabilities=True)(given)
    assert_shape(out, "embedding", "probabilities")
    assert out["status"].to_pylist() == ["ok", "failed", "ok", "ok", "failed", None, "ok", None]
    assert out["error_class"].to_pylist() == [None, "TRUNCATED", None, None, "TRUNCATED", None, None, None]
    for name in ("label", "label_id", "score", "topk", "embedding", "probabilities"):
        assert [value is None for value in out[name].to_pylist()] == [i in (1, 4, 5, 7) for i in range(8)], name
    for name in ("unit", "index", "key", "source", "width", "height", "cls"):
        assert out[name].to_pylist() == given[name].to_pylist()
    assert out.schema.field("cls").type == pa.uint8()
    alone = predict(tiny())(table(images(8)))
    kept = [0, 2, 3, 6]
    np.testing.assert_allclose(out["score"].take(kept), alone["score"].take(kept), atol=1e-6)
    assert out["label"].take(kept) == alone["label"].take(kept)


def test_slices_and_chunks_give_the_same_rows() -> None:
    given, stage = table(images(9), failed=(2,)), predict(tiny())
    whole = stage(given)
    parts = pa.concat_tables([given.slice(0, 4), given.slice(4)])
    assert parts["pixels"].num_chunks == 2
    for out, expected in ((stage(parts), whole), (stage(given.slice(3, 5)), whole.slice(3, 5))):
        assert out["label_id"].to_pylist() == expected["label_id"].to_pylist()
        np.testing.assert_allclose(out["score"].to_pandas(), expected["score"].to_pandas(), atol=1e-6)


@pytest.mark.parametrize("failed", [(), (0, 1, 2)], ids=["empty", "all failed"])
def test_nothing_to_score(failed: tuple[int, ...]) -> None:
    out = predict(tiny(), embeddings=True, probabilities=True)(table(images(len(failed)), failed))
    assert_shape(out, "embedding", "probabilities")
    assert out["status"].to_pylist() == ["failed"] * len(failed)
    assert out["topk"].null_count == len(failed)
    assert out.schema == predict(tiny(), embeddings=True, probabilities=True)(table(images(2))).schema


def test_a_tombstone_has_the_columns_of_what_is_committed() -> None:
    out = predict(tiny(), embeddings=True, probabilities=True)(table(images(2))).drop_columns(["unit"])
    buffer = UnitBuffer()
    buffer.add(out)
    kept = [pa.field("cls", pa.uint8())]
    assert buffer.table().schema == rows.output_schema(embedding=16, probabilities=4, kept=kept)


def test_top_k_is_at_most_the_classes() -> None:
    ranked = predict(tiny(), top_k=100)(table(images(2)))["topk"].to_pylist()
    assert [len(row) for row in ranked] == [4, 4]
    for row in ranked:
        assert sum(entry["score"] for entry in row) == pytest.approx(1, abs=1e-6)


def test_scores_that_are_not_finite_are_failed_rows() -> None:
    artifact = tiny(scale=3e38)
    out = predict(artifact, probabilities=True)(table(images(4), failed=(0,), ends=(3,)))
    assert_shape(out, "probabilities")
    assert out["status"].to_pylist() == ["failed", "failed", "failed", None]
    assert out["error_class"].to_pylist() == ["TRUNCATED", "NONFINITE", "NONFINITE", None]
    assert "not finite" in out["error"].to_pylist()[1]
    assert out["label"].null_count == out["topk"].null_count == out["probabilities"].null_count == 4


class Cramped(ResNet):
    """A network on a device that holds `room` images."""

    room = 5

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().features(x)


def test_the_batch_is_halved_for_good_when_memory_runs_out() -> None:
    torch.manual_seed(0)
    model = Cramped(TINY).eval()
    model.tried = []
    engine = TorchEngine(model, PREPROCESSING, wanted=Wanted(2), precision="float32", device="cpu", batch_size=16)
    pixels = images(11)
    cramped = engine(pixels)
    assert (model.tried, engine.batch_size) == ([11, 5, 5, 1], 5)
    model.room = 1000
    np.testing.assert_allclose(engine(pixels).scores, cramped.scores, atol=1e-6)
    assert model.tried[4:] == [5, 5, 1]
    model.room = 0
    with pytest.raises(ModelError, match="no memory for one image of 32 × 32"):
        engine(pixels)


def test_the_batch_is_halved_when_memory_runs_out_in_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    upload, tried = TorchEngine._upload, []

    def cramped(self: TorchEngine, pixels: np.ndarray) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("no room")
        return upload(self, pixels)

    engine = TorchEngine(ResNet(TINY).eval(), PREPROCESSING, wanted=Wanted(2), precision="float32", device="cpu", batch_size=8)
    pixels = images(8)
    whole = engine(pixels)
    monkeypatch.setattr(TorchEngine, "_upload", cramped)
    np.testing.assert_allclose(engine(pixels).scores, whole.scores, atol=1e-6)
    assert tried == [8, 4, 2, 2, 2, 2]


def test_pixels_that_are_on_the_device_get_the_same_scores() -> None:
    torch.manual_seed(0)
    model = Cramped(TINY).eval()
    model.tried = []
    wanted = Wanted(2, embeddings=True, probabilities=True)
    engine = TorchEngine(model, PREPROCESSING, wanted=wanted, precision="float32", device="cpu", batch_size=5)
    pixels = images(11)
    whole = engine(pixels)
    model.room = 2
    interleaved = torch.from_numpy(pixels.transpose(0, 2, 3, 1).copy()).permute(0, 3, 1, 2)  # as a decoder leaves it
    there = engine.on_device(interleaved[:4], pixels[4:4], pixels[4:5], pixels[5:])
    assert (model.tried, engine.batch_size) == ([5, 5, 1, 5, 2, 2, 2, 2, 2, 1], 2)
    for name in ("ids", "scores", "finite", "embeddings", "probabilities"):
        np.testing.assert_allclose(getattr(there, name), getattr(whole, name), atol=1e-5)


def test_crops_of_the_host_go_to_the_device_one_after_the_other() -> None:
    """By way of two buffers that are made when they are first wanted and written over in turn, as those of a GPU are."""

    class Feed:
        buffers: tuple[torch.Tensor, ...] = ()

        def __call__(self, pixels: np.ndarray) -> torch.Tensor:
            made = self.buffers or [torch.empty((16, 3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
            self.buffers = (made[1], made[0])
            return made[1][: len(pixels)].copy_(torch.tensor(pixels))

    engine = TorchEngine(ResNet(TINY).eval(), PREPROCESSING, wanted=Wanted(2), precision="float32", device="cpu", batch_size=8)
    pixels = images(16)
    whole = engine(pixels)
    engine.feed = Feed()
    engine(pixels[:8])
    there = engine.on_device(torch.from_numpy(pixels[:4]), *(pixels[at : at + 2] for at in range(4, 16, 2)))
    np.testing.assert_allclose(there.scores, whole.scores, atol=1e-5)


def test_bfloat16_agrees_with_float32() -> None:
    given = table(images(32))
    full, half = predict(tiny(), batch_size=16)(given), predict(tiny(), "bfloat16", batch_size=16, embeddings=True)(given)
    np.testing.assert_allclose(half["score"].to_numpy(), full["score"].to_numpy(), atol=0.05)
    same = np.array(half["label_id"]) == np.array(full["label_id"])
    assert len(set(full["label_id"].to_pylist())) > 1
    assert same.mean() >= 0.9
    assert not np.array_equal(half["score"], full["score"]), "autocast is on"
    assert half.schema.field("embedding").type == pa.list_(pa.float32(), 16)


@pytest.mark.parametrize(
    ("precision", "device", "sentence"),
    [
        ("int8", "cpu", r"has no model.int8.onnx; required: one, for precision int8. Make it with a quantize job"),
        ("int8", "cuda", "int8 on cuda; required: the CPU"),
        ("float16", "cpu", "float16 on a CPU; required: a GPU"),
        ("float32", "cuda", "no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused(precision: str, device: str, sentence: str) -> None:
    if precision == "float32" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match=sentence):
        Predict(tiny(), source(precision), device=device, batch_size=4, output=Output(uri="unused"))


def test_pixels_of_another_size_are_a_bug() -> None:
    with pytest.raises(ValueError, match="the model sees 32"):
        predict(tiny())(table(images(2, size=16)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_gpu_agrees_with_the_cpu(precision: str) -> None:
    given, output = table(images(33), failed=(4,)), Output(uri="unused", top_k=2)
    gpu = Predict(tiny(), source(precision), device="cuda", batch_size=8, output=output)(given)
    expected = predict(tiny(), top_k=2)(given)
    assert gpu["status"] == expected["status"]
    np.testing.assert_allclose(
        gpu["score"].to_pandas(), expected["score"].to_pandas(), atol=1e-5 if precision == "float32" else 0.05
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_gpus_buffers_are_written_over_only_when_they_were_read(precision: str) -> None:
    """Many small batches that the host makes faster than the GPU reads them."""
    torch.manual_seed(0)
    engine = TorchEngine(
        fold(ResNet(TINY).eval()), PREPROCESSING, wanted=Wanted(4), precision=precision, device="cuda", batch_size=16
    )
    pixels = images(1000)
    there = engine.on_device(torch.from_numpy(pixels).cuda())
    np.testing.assert_allclose(engine(pixels).scores, there.scores, atol=2e-3)
    pieces = engine.on_device(torch.from_numpy(pixels[:100]).cuda(), *(pixels[at : at + 9] for at in range(100, 1000, 9)))
    np.testing.assert_allclose(pieces.scores, there.scores, atol=2e-3)


def test_of_several_threads_one_has_the_engine() -> None:
    model, given = predict(tiny()), table(images(6))
    engine, busy, together = model.engine, Lock(), Barrier(4)

    def alone(pixels: np.ndarray) -> Scores:
        assert busy.acquire(blocking=False), "another thread is in the engine"
        time.sleep(0.02)
        busy.release()
        return engine(pixels)

    def label(_: int) -> pa.Table:
        together.wait(10)
        return model(given)

    expected, model.engine = model(given), alone
    with ThreadPoolExecutor(4) as pool:
        assert all(labelled.equals(expected) for labelled in pool.map(label, range(4)))


def test_images_with_exact_pixels_beside_are_labelled_twice_and_compared():
    pixels = images(6)
    model = predict(tiny())
    labels = model(table(pixels))["label_id"].to_pylist()
    other = next(row for row in range(6) if labels[row] != labels[0])
    exact = [pixels[0].tobytes(), pixels[other].tobytes(), None, None, pixels[4].tobytes(), None]
    pixels[1] = pixels[0]
    batch = table(pixels, failed=(2,), ends=(5,)).append_column("exact", pa.array(exact, pa.large_binary()))
    out = model(batch)
    assert out[rows.SAME_LABEL].to_pylist() == [True, False, None, None, True, None]
    assert "exact" not in out.column_names
    none = batch.set_column(batch.schema.get_field_index("exact"), "exact", pa.nulls(6, pa.large_binary()))
    assert model(none)[rows.SAME_LABEL].null_count == 6
