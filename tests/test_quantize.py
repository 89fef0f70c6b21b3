"""A quantize job end to end on small shards: what it publishes, and that the gate lets nothing broken through."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx
import poison
import pytest
from PIL import Image
from shards import picture, tar_bytes
from test_artifact import logits
from test_onnx_engine import by_torch, with_int8
from test_predict import tiny
from test_run import job as label_job
from test_run import label, table

from pipeline.artifact import INT8, Artifact, load_artifact, save_artifact
from pipeline.careful import CarefulLimits
from pipeline.decode import decode
from pipeline.engines.onnx_engine import OnnxEngine
from pipeline.engines.onnx_graph import to_onnx
from pipeline.engines.scores import Scores, Wanted
from pipeline.errors import InputMissing, JobError, ModelError, StoreError
from pipeline.job.recipe import Gate, QuantizeJob
from pipeline.prepare import calibrate, gate
from pipeline.prepare.gate import FLOAT32, Measurement, best_of, passes
from pipeline.prepare.outcome import Outcome
from pipeline.prepare.quantize import run_job
from pipeline.preprocess import resize_and_crop
from pipeline.spec import Job
from pipeline.start import load_model

CLASSES = 8  # of the `model` fixture, one picture each


def write(path: Path, images: dict[str, bytes], labels: dict[str, str] | None = None) -> str:
    """A tar of these images by key, with .cls sidecars for those that have a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members: dict[str, bytes] = {}
    for key, data in images.items():
        members |= {f"{key}.jpg": data} | ({f"{key}.cls": labels[key].encode()} if key in (labels or {}) else {})
    path.write_bytes(tar_bytes(members))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """The export takes 2 s and is the same in every test; tests/test_onnx_engine.py has its own."""
    graphs: dict[str, bytes] = {}

    def export(artifact: Artifact) -> bytes:
        return graphs.get(artifact.digest) or graphs.setdefault(artifact.digest, to_onnx(artifact))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.prepare.quantize.to_onnx", export)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pictures that the model knows, labelled by number; others to calibrate with; and black ones."""
    folder = tmp_path_factory.mktemp("shards")
    known = {f"k{number}": picture(number) for number in range(CLASSES)}
    unlabelled = {"u0": picture(0), "broken": b"no image"}
    truth = {f"k{number}": f"{number}\n" for number in range(CLASSES)} | {"broken": "1"}
    return {
        "data": write(folder / "data.tar", known | unlabelled, truth),
        "some": write(folder / "some.tar", {f"s{number}": picture(number) for number in range(40)}),
        "black": write(folder / "black.tar", {f"b{number}": black() for number in range(8)}),
    }


def black() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (40, 40)).save(sink, "JPEG")
    return sink.getvalue()


def quantize_job(model: str, shards: dict[str, str], out: Path, **fields: Any) -> QuantizeJob:
    """Whose gate leaves the speed of this machine out."""
    content: dict[str, Any] = {"kind": "quantize", "name": "q", "output": {"uri": str(out)}, "threads": 1}
    content["model"] = {"uri": model, "digest": fields.pop("digest", None)}
    content |= {"calibration": {"uri": shards["some"]}, "calibration_images": 32, "gate": {"min_speedup": 0.01}}
    return QuantizeJob.model_validate(content | {"data": {"input": {"uri": shards["data"]}}} | fields)


def run(job: QuantizeJob) -> Outcome:
    return run_job(job, say=lambda line: None, command="nightlabel run q.yaml")


@pytest.fixture(scope="module")
def done(model: str, shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("int8") / "model"
    return run(quantize_job(model, shards, out)), out


def test_what_is_published(done: tuple[Outcome, Path], model: str, shards: dict[str, str]) -> None:
    outcome, out = done
    source, made = load_artifact(model), load_artifact(str(out))
    assert made.digest == outcome.facts["digest"] != source.digest
    assert {name: data for name, data in made.files.items() if name != INT8} == source.files
    assert made.quantized
    assert not source.quantized
    assert made.origin.parents == (source.digest,)
    assert made.origin.command == "nightlabel run q.yaml"
    assert made.origin.data["calibration"] == {"uris": [shards["some"]], "images": 32}
    assert made.origin.data["measured"] == {"uris": [shards["data"]], "images": CLASSES, "calibrated": 0}
    assert made.origin.data["left_out"] == {"calibration": {}, "measured": {"NO_LABEL": 1, "NOT_AN_IMAGE": 1}}
    assert made.origin.data["left_out_images"]["measured"] == {"NO_LABEL": ["u0"], "NOT_AN_IMAGE": ["broken"]}
    assert made.origin.metrics["accuracy_int8"] == made.origin.metrics["agreement"] == 1
    assert "those of one kind of CPU" in (out / "README.md").read_text()
    assert made.origin.metrics["bytes_int8"] == len(made.files[INT8]) < 0.27 * made.origin.metrics["bytes_float32"]


def test_the_receipt(done: tuple[Outcome, Path]) -> None:
    outcome, out = done
    facts = json.loads(json.dumps(outcome.facts))
    assert facts["where"] == str(out)
    assert {one["name"] for one in facts["candidates"]} >= {"per channel", "per tensor"}
    assert sum(one["best"] for one in facts["candidates"]) == 1
    text = "\n".join(outcome.lines)
    assert "top-1" in outcome.lines[0]
    assert len({len(line.removesuffix("  best")) for line in outcome.lines[: 2 + len(facts["candidates"])]}) == 1, "aligned"
    for words in (f"where   {out}", facts["digest"], "precision: int8", "loses 0.00 points", "on 8 images"):
        assert words in text


def test_transformers_opens_it_and_gives_the_same_logits(done: tuple[Outcome, Path], model: str) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    theirs, source = (AutoModelForImageClassification.from_pretrained(folder) for folder in (done[1], model))
    assert np.array_equal(logits(theirs), logits(source))
    assert AutoImageProcessor.from_pretrained(done[1], backend="pil").size == {"shortest_edge": 32}


def test_int8_says_what_float32_says_within_its_steps(done: tuple[Outcome, Path]) -> None:
    artifact = load_artifact(str(done[1]))
    crops = [resize_and_crop(decode(picture(n), max_pixels=10**6), artifact.preprocessing) for n in range(CLASSES)]
    pixels, wanted = np.stack(crops), Wanted(3, embeddings=True, probabilities=True)
    got = OnnxEngine(artifact.files[INT8], wanted=wanted, batch_size=3, threads=1)(pixels)
    want = by_torch(artifact, pixels, wanted)
    assert got.ids[:, 0].tolist() == want.ids[:, 0].tolist() == list(range(CLASSES))
    np.testing.assert_allclose(got.probabilities, want.probabilities, atol=0.1)
    assert not np.array_equal(got.probabilities, want.probabilities)
    assert got.embeddings.shape == want.embeddings.shape == (CLASSES, 512)
    length, expected = (np.linalg.norm(scores.embeddings, axis=1) for scores in (got, want))
    cosines = (got.embeddings * want.embeddings).sum(axis=1) / length / expected
    assert cosines.min() > 0.9, cosines  # 0.96; of the photographs at 224 pixels, whose noise averages out, 0.999


def test_an_image_that_kills_or_hangs_its_decoder_is_left_out(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    """Of those to calibrate with, and of those to measure with."""
    monkeypatch.setattr("pipeline.prepare.data.see", poison.see)
    monkeypatch.setattr("pipeline.prepare.data._PATIENCE", CarefulLimits(6.0, 2**28))
    sound = {f"k{number}": picture(number) for number in range(CLASSES)}
    truth = {f"k{number}": str(number) for number in range(CLASSES)} | {"slow": "1"}
    places = {
        "some": write(tmp_path / "some.tar", {"bad": b"abort"} | sound),
        "data": write(tmp_path / "data.tar", sound | {"slow": b"hang"}, truth),
    }
    run(quantize_job(model, places, tmp_path / "out"))
    facts = load_artifact(str(tmp_path / "out")).origin.data
    assert (facts["calibration"]["images"], facts["measured"]["images"]) == (CLASSES, CLASSES)
    assert facts["left_out_images"] == {"calibration": {"DECODER_CRASH": ["bad"]}, "measured": {"DECODE_TIMEOUT": ["slow"]}}


def test_again_is_the_same_and_nothing_is_overwritten(done: tuple[Outcome, Path], model: str, shards: dict[str, str]) -> None:
    outcome, out = done
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(quantize_job(model, shards, out))
    assert again.lines[0] == "nothing to do: the artifact is there"
    told = again.facts["metrics"]
    assert f"{told['speedup']:.2f} x as fast" in again.lines[1]
    assert again.facts == {name: outcome.facts[name] for name in ("where", "digest", "parent", "metrics")}
    another = run(quantize_job(model, shards, out, gate={"max_accuracy_loss": "40%", "min_speedup": 0.01}))
    assert another.facts["digest"] == outcome.facts["digest"], "another gate is measured by, and nothing is made anew"
    assert another.lines[0] != again.lines[0]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(
        ModelError, match=r"made of something else; required: an empty folder, or sha256:.* Give another output\.uri"
    ):
        run(quantize_job(model, shards, Path(shutil.copytree(model, out.parent / "other"))))


def test_what_stands_in_the_folder_is_found_before_the_work(model: str, shards: dict[str, str], tmp_path: Path) -> None:
    taken, half = tmp_path / "taken", tmp_path / "half"
    for folder, data in ((taken, b"{}"), (half, Path(model, "config.json").read_bytes())):
        folder.mkdir()
        (folder / "config.json").write_bytes(data)
    said: list[str] = []
    with pytest.raises(
        ModelError, match=r"^output\.uri .*/taken holds another config\.json; required: an empty folder, or sha256:.* quantized"
    ):
        run_job(quantize_job(model, shards, taken), say=said.append, command="")
    with pytest.raises(StoreError, match=r"config\.json is a file; required: a folder, or nothing yet\. Name another place"):
        run_job(quantize_job(model, shards, taken / "config.json"), say=said.append, command="")
    assert said == []
    run_job(quantize_job(model, shards, half), say=said.append, command="")
    assert said[1].endswith(" with 1 thread")
    assert "left out of the measured images: 1 NOT_AN_IMAGE (broken), 1 NO_LABEL (u0)" in said
    assert load_artifact(str(half)).quantized
    (half / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^output\.uri .*/half: has no model\.safetensors; .*\. Give another output\.uri"):
        run(quantize_job(model, shards, half))


def test_the_folder_of_the_model_itself_stays_as_it_is(model: str, shards: dict[str, str], tmp_path: Path) -> None:
    """One of transformers, which has no record: what is found there is what the source has."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "artifact.json").unlink()
    for uri in (str(folder), f"file://{folder}/"):
        with pytest.raises(ModelError, match=r"^output\.uri .* holds the model itself; required: an empty folder.* Give another"):
            run(quantize_job(uri, shards, folder))
    assert not (folder / "model.int8.onnx").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"calibration": "black"},
            r"no int8 candidate passes, nothing is published; of 8 images .*per tensor loses [1-9].* Calib",
        ),
        ({"gate": {"min_speedup": 1000.0}}, r"per channel loses 0.00 points and is .* required: .* and 1000 x the speed"),
    ],
    ids=["broken calibration", "not fast enough"],
)
def test_the_gate_publishes_nothing(
    model: str, shards: dict[str, str], tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    if "calibration" in fields:
        fields = {"calibration": {"uri": shards[fields["calibration"]]}}
    said: list[str] = []
    with pytest.raises(ModelError, match=sentence) as caught:
        run_job(quantize_job(model, shards, tmp_path / "out", **fields), say=said.append, command="")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert any(line.startswith("per tensor") for line in said), "the numbers are shown all the same"


@pytest.mark.parametrize(
    ("labels", "kind", "sentence"),
    [
        (
            {"k0": "0", "k1": "zebra"},
            JobError,
            r"data\.tar: cls of k1 is zebra; required: one of 8 classes, class 0, .*or its num",
        ),
        ({"k0": "8"}, JobError, "cls of k0 is 8; required: one of 8 classes"),
        ({}, JobError, "data.tar, cls: no image has a label; required: some, to measure with"),
        ({"k0": "class 1", "k1": "0", "k2": "2"}, ModelError, "float32 is right on 1 of 3 images, a constant answer on 1"),
        ({"k0": "0"}, ModelError, "float32 is right on 1 of 1 images, a constant answer on 1"),
    ],
    ids=["no class", "no number", "no labels", "wrong labels", "one class"],
)
def test_labels_that_do_not_serve(  # noqa: PLR0917
    model: str, shards: dict[str, str], tmp_path: Path, labels: dict[str, str], kind: type[Exception], sentence: str
) -> None:
    images = {f"k{number}": picture(number) for number in range(max(1, len(labels)))}
    data, said = {"input": {"uri": write(tmp_path / "data.tar", images, labels)}}, list[str]()
    with pytest.raises(kind, match=sentence):
        run_job(quantize_job(model, shards, tmp_path / "out", data=data, calibration_images=2), say=said.append, command="")
    assert not (tmp_path / "out").exists()
    assert (said == []) == (kind is JobError), "labels are looked at before the calibration"


def test_labels_of_broken_images_alone_do_not_serve(model: str, shards: dict[str, str], tmp_path: Path) -> None:
    data = {"input": {"uri": write(tmp_path / "data.tar", {"a": picture(0), "b": b"no image"}, {"b": "0"})}}
    with pytest.raises(JobError, match=r"data\.tar, cls: no sound image has a label; required: some, to measure with"):
        run(quantize_job(model, shards, tmp_path / "out", data=data, calibration_images=2))


def test_other_bad_inputs_are_one_sentence(
    model: str, done: tuple[Outcome, Path], shards: dict[str, str], tmp_path: Path
) -> None:
    broken = {"uri": write(tmp_path / "broken.tar", {"a": b"x"})}
    quantized = str(done[1])
    for start, fields, kind, sentence in (
        (model, {"calibration": broken}, JobError, r"broken.tar: no sound image to calibrate with; required"),
        (model, {"calibration": {"uri": str(tmp_path / "absent/")}}, InputMissing, r"absent"),
        (quantized, {}, ModelError, r"has model.int8.onnx already; required: an artifact without"),
        (model, {"digest": "sha256:" + "0" * 64}, ModelError, r"digest sha256:.*; required: sha256:0000"),
    ):
        with pytest.raises(kind, match=sentence) as caught:
            run(quantize_job(start, shards, tmp_path / "out", **fields))
        assert "\n" not in str(caught.value)


def measured(name: str, right: int, *, same: int = 0, drift: float = 0.0, speedup: float = 2.0) -> Measurement:
    return Measurement(name, 1000, 200, right, same, drift, 10.0, speedup)


def test_the_gate_counts_images_and_takes_the_one_nearest_to_float32() -> None:
    original = measured(FLOAT32, 200, same=200, speedup=1.0)
    wanted = Gate()
    assert passes(measured("one in 200 lost is half a point", 199), original, wanted)
    assert not passes(measured("two are more", 198), original, wanted)
    assert passes(measured("as fast", 200, speedup=1.0), original, wanted)
    assert not passes(measured("slower", 200, speedup=0.99), original, wanted)
    near, nearer, far = (
        measured(name, 199, same=same, drift=drift) for name, same, drift in (("a", 9, 2), ("b", 9, 1), ("c", 8, 0))
    )
    lost = replace(near, name="lost", right=100, same=199)
    assert best_of([original, near, nearer, far, lost], wanted) is nearer
    assert best_of([original, lost], wanted) is None


def test_a_constant_answer_never_passes_the_gate() -> None:
    """Of 990 images of one class and 10 of another: always the first is 0.3 points behind a model that tells 3 of them apart."""
    truth = Counter({0: 990, 1: 10})
    for right in (990, 993, 995):
        with pytest.raises(
            ModelError, match=rf"right on {right} of 1000 images, a constant answer on 990: max_accuracy_loss would"
        ):
            gate._check_power(right, truth, Gate())
    gate._check_power(996, truth, Gate())


def test_few_images_are_measured_in_rounds_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, seen = to_onnx(tiny()), []
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    rounds = gate._round
    monkeypatch.setattr(gate, "_round", lambda *given: seen.append(given[2]) or rounds(*given))
    best = OnnxEngine(graph, wanted=Wanted(), batch_size=2)(pixels).ids[:, 0].astype(np.int64)
    monkeypatch.setattr(gate, "_check_power", lambda right, truth, wanted: None)
    one, other = gate.measure({FLOAT32: graph, "other": graph}, [(pixels, best)], Gate(), threads=1)
    assert seen == [0, *range(gate.ROUNDS)], "a warm-up, then every round begins with another model"
    assert (one.right, other.same, other.images, other.drift) == (2, 2, 2, 0)
    assert gate.measure({FLOAT32: graph}, [], Gate(), threads=1) == ()


def test_the_gate_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in two batches; what is not finite is never right; a speed-up is the median of those of the rounds, and with
    these paces neither that of the medians nor its inverse."""
    clock = 0.0

    class Engine:
        def __init__(self, model: bytes, **_: Any) -> None:
            paces = [1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 10.0]
            ratios = [2, 2, 2, 2, 3, 3, 3] if model == b"int8" else [1] * 7
            self._paces = iter([0.0, *(pace / ratio for pace, ratio in zip(paces, ratios, strict=True))])
            self._ids = np.array([0, 0, 2] if model == b"int8" else [0, 1, 0])
            self._finite = np.array([True, True, model != b"int8"])
            shares = (
                [[0.75, 0.25, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]] if model == b"int8" else [[0.75, 0.25, 0], [0, 1, 0], [1, 0, 0]]
            )
            self._shares = np.array(shares, np.float16)

        def __call__(self, pixels: np.ndarray) -> Scores:
            nonlocal clock
            clock += next(self._paces) * len(pixels)
            rows = pixels[:, 0, 0, 0]
            ids, shares = self._ids[rows, None], self._shares[rows]
            return Scores(ids, np.take_along_axis(shares, ids, axis=1), self._finite[rows], None, shares)

    monkeypatch.setattr(gate, "OnnxEngine", Engine)
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    pixels = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(3, axis=1)
    batches = [(pixels[:2], np.array([0, 1])), (pixels[2:], np.array([2]))]
    original, int8 = gate.measure({FLOAT32: b"whole", "int8": b"int8"}, batches, Gate(), threads=1)
    assert (original.bytes, original.images, original.right, original.same, original.drift) == (5, 3, 2, 3, 0)
    assert (int8.bytes, int8.images, int8.right, int8.same) == (4, 3, 1, 1)
    assert (int8.accuracy, int8.agreement, int8.drift) == (1 / 3, 1 / 3, (0.5 + 0.5) / 3)
    assert (original.speedup, int8.speedup) == (1, 2)
    assert (original.images_per_second, int8.images_per_second) == pytest.approx((0.1, 0.3))


def test_seven_bits_only_where_sums_overflow() -> None:
    assert [str(scheme) for scheme in calibrate.schemes(saturates=False)] == ["per channel", "per tensor"]
    assert "per channel, 7 bits" in map(str, calibrate.schemes(saturates=True))


@pytest.mark.parametrize("lacks", [True, False, None])
def test_where_the_cpu_is_not_known_seven_bits_are_tried_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, shards: dict[str, str], lacks: bool | None
) -> None:
    monkeypatch.setattr("pipeline.engines.cpu.lacks", lambda _: lacks)
    outcome = run(quantize_job(model, shards, tmp_path / "out"))
    assert ["per channel, 7 bits" in [one["name"] for one in outcome.facts["candidates"]]] == [lacks is not False]
    assert load_artifact(str(tmp_path / "out")).origin.data["vnni"] == (lacks is False)


def test_schemes_do_what_they_say() -> None:
    artifact: Artifact = tiny()
    graph = to_onnx(artifact)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    ranges = calibrate.calibrate(graph, iter([pixels]))
    for scheme in calibrate.schemes(saturates=True):
        made = onnx.load_from_string(calibrate.quantize(graph, ranges, scheme))
        onnx.checker.check_model(made)
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        weights = [array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim > 1]
        assert len(weights) == 7  # of six convolutions and the classifier
        assert max(int(np.abs(array.astype(int)).max()) for array in weights) == (127 if scheme.bits == 8 else 64)
        scales = {array.size for name, array in arrays.items() if name.endswith("weight_scale")}
        assert (scales == {1}) == (not scheme.per_channel)
        assert "Relu" not in {node.op_type for node in made.graph.node}, "the zero point does it"
        (logits,) = [node for node in made.graph.node if "logits" in node.output]
        assert logits.op_type == "Gemm", "in 256 levels classes would tie"


def test_a_job_labels_at_int8(done: tuple[Outcome, Path], tmp_path: Path, shards: dict[str, str], on_ray: str) -> None:
    wanted = label_job(
        shards["data"], str(done[1]), tmp_path / "out", input={"keep": ["cls"]}, model={"uri": str(done[1]), "precision": "int8"}
    )
    receipt = label(wanted)
    assert (receipt.exit_code, receipt.ok, receipt.failed) == (0, CLASSES + 1, 1)
    labels = {row["key"]: row["label"] for row in table(receipt.where).to_pylist()}
    expected = {f"k{number}": f"class {number}" for number in range(CLASSES)}
    assert labels == expected | {"u0": "class 0", "broken": None}


def test_int8_is_refused_before_anything_starts(model: str, tmp_path: Path) -> None:
    source = load_artifact(model)
    wanted = Job.model_validate(
        {"name": "x", "input": {"uri": "i"}, "output": {"uri": "o"}, "model": {"uri": model, "precision": "int8"}}
    )
    for weights in (True, False):
        with pytest.raises(
            ModelError, match=r"has no model.int8.onnx; required: one, for precision int8. Make it with a quantize"
        ):
            load_model(wanted, weights=weights)
    save_artifact(with_int8(source, b"some graph"), str(tmp_path / "with"))
    there = wanted.model_copy(update={"model": wanted.model.model_copy(update={"uri": str(tmp_path / "with")})})
    assert load_model(there, weights=False).quantized
