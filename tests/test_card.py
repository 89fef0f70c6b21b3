"""The model card: Hugging Face reads its front matter, it is one page, it tells no more and no less than the artifact."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_artifact import RESNET18, TINY, made, weights

from pipeline.artifact import Origin, load_artifact, save_artifact, with_files
from pipeline.prepare.card import folder_name, model_card
from pipeline.prepare.importer import import_model

ORIGIN = Origin(
    parents=("sha256:" + "1" * 64, "ResNet18_Weights.IMAGENET1K_V1"),
    data={"uris": ["s3://photos/"], "images": {"train": 1008, "validation": 112}, "settings": {f"s{i}": i for i in range(200)}},
    metrics={"accuracy": 0.98765, "epoch": 3, "bytes_int8": 11_800_000},
    command="nightlabel run jobs/x.yaml",
)


def front_matter(card: bytes) -> dict[str, object]:
    _, front, _ = card.decode().split("---\n", 2)
    return yaml.safe_load(front)


def test_it_says_it_all_on_one_page():
    artifact = made(RESNET18, origin=ORIGIN)
    card = model_card(artifact, name="pets", limits=("Not for birds.",))
    assert card == model_card(artifact, name="pets", limits=("Not for birds.",)), "the same artifact, the same bytes"
    text = card.decode()
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) < 400
    for words in (
        "# pets",
        "A ResNet-18 that puts images into 10 classes: label 0, label 1",
        "11.18 M parameters",
        artifact.digest,
        "* uris: s3://photos/",
        "* images: train 1,008, validation 112",
        "| accuracy | 0.9877 |",
        "| epoch | 3 |",
        "| bytes_int8 | 11,800,000 |",
        "nightlabel run jobs/x.yaml",
        "that also chose the epoch",
        "Not for birds.",
    ):
        assert words in text


def test_front_matter_is_hugging_faces():
    front = front_matter(model_card(made(origin=ORIGIN), name="x"))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "nightlabel"],
        "metrics": ["accuracy"],
        "base_model": "ResNet18_Weights.IMAGENET1K_V1",
    }
    from huggingface_hub import ModelCard

    assert ModelCard(model_card(made(origin=ORIGIN), name="x").decode()).data.pipeline_tag == "image-classification"


@pytest.mark.parametrize(
    "parent",
    [
        "sha256:" + "1" * 64,
        "weights.pth",
        "models/w.safetensors",
        "/data/resnet",
        "s3://b/m",
        "m/",
        "models/resnet18",
        "resnet18",
    ],
)
def test_a_parent_that_is_no_name_is_no_base_model(parent: str):
    card = model_card(made(origin=Origin(parents=(parent,))), name="x")
    assert "base_model" not in front_matter(card)
    assert f"Made from `{parent}`." in card.decode()


def test_nothing_recorded_is_said():
    text = model_card(made(), name="x").decode()
    for words in (
        "No parent is recorded.",
        "Not recorded.",
        "a job of `kind: evaluate` measures them",
        "is not recorded: measure it",
    ):
        assert words in text
    assert "precision int8" not in text
    assert "precision int8" in model_card(with_files({**made().files, "model.int8.onnx": b"x"}), name="x").decode()
    small = model_card(made(replace(TINY, stem="small")), name="x").decode()
    assert "trust_remote_code=True" in small


def test_classes_and_globs_are_no_markup():
    artifact = made(origin=Origin(data={"uris": ["s3://b/*/a_b_*.tar"]}))
    artifact = replace(artifact, labels=("<unk>", "__background__", "[x](y) `c`", "n01\n_tench"))
    card = model_card(artifact, name="_x_").decode()
    for line in (
        r"# \_x\_",
        r"classes: \<unk>, \_\_background\_\_, \[x](y) \`c\`, n01\\n_tench.",
        r"* uris: s3://b/\*/a_b\_\*.tar",
    ):
        assert line in card


def test_the_lines_for_transformers_run_as_they_stand(tmp_path: Path):
    artifact = made()
    save_artifact(artifact, str(tmp_path), card=model_card(artifact, name="x"))
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    found: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), found)
    assert found["model"].config.num_labels == 3


def test_transformers_opens_a_folder_with_a_card_and_nothing_is_overwritten(tmp_path: Path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    artifact = made()
    save_artifact(artifact, str(tmp_path), card=b"first")
    save_artifact(artifact, str(tmp_path), card=b"second")
    assert (tmp_path / "README.md").read_bytes() == b"first"
    (tmp_path / "README.md").write_text("edited by hand")
    assert load_artifact(str(tmp_path)).digest == artifact.digest, "no digest covers the card"
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 3
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").size["shortest_edge"] == 32


def test_imported_models_have_a_card_with_the_exact_command(tmp_path: Path):
    import torch

    torch.save(weights(TINY), tmp_path / "w.pth")
    words = ["prepare", "import", f"{tmp_path}/w.pth", f"{tmp_path}/my model", "--preprocessing", "timm", "--size", "160"]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=True)
    assert "assumed a plain ResNet's: strides, pooling and blur cannot be told from weights" in done.stdout
    assert "assumed labels class_0, class_1 and so on: a file of weights names none. Yours?" in done.stdout
    command = f"nightlabel prepare import {tmp_path}/w.pth '{tmp_path}/my model' --preprocessing timm --size 160"
    artifact = load_artifact(str(tmp_path / "my model"))
    assert artifact.origin.command == command
    assert (artifact.preprocessing.size, artifact.preprocessing.resize_edge) == (160, 168)
    card = (tmp_path / "my model" / "README.md").read_text()
    assert "# my model" in card
    assert command in card
    for words in (
        "my model: ResNet of 6 layers, 3 classes",
        artifact.digest,
        "sees    160 × 160 pixels: shortest edge to 168, bicubic, then the centre square, as timm does",
        "--preprocessing torchvision, huggingface or timm",
        "next    nightlabel model show '",
    ):
        assert words in done.stdout


def test_labels_from_windows(tmp_path: Path):
    import torch

    torch.save(weights(TINY), tmp_path / "w.pth")
    (tmp_path / "labels.txt").write_bytes("cat\r\ndog\r\nbär\r\n\r\n".encode("utf-8-sig"))
    words = ["prepare", "import", f"{tmp_path}/w.pth", f"{tmp_path}/m", "--labels", f"{tmp_path}/labels.txt"]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=True)
    assert "a file of weights names none" not in done.stdout, "they are given"
    assert load_artifact(str(tmp_path / "m")).labels == ("cat", "dog", "bär")


def refused(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "prepare", "import", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    return done.stderr


def test_a_size_without_its_crop_is_one_sentence():
    assert refused("w.pth", "m", "--size", "160").startswith("nightlabel: --size 160 alone; required: the crop and filter")
    assert "--size: size is 0, required: 1 to 4096 pixels" in refused("w.pth", "m", "--size", "0", "--preprocessing", "timm")
    assert "tim" in refused("w.pth", "m", "--preprocessing", "tim")


@pytest.mark.parametrize(("name", "what"), [("job.yaml", "a job file"), ("names.txt", "a file")])
def test_a_file_that_is_no_model_is_called_one(tmp_path: Path, name: str, what: str):
    (tmp_path / name).write_text("name: n")
    assert refused(f"{tmp_path}/{name}", "m").startswith(
        f"nightlabel: {tmp_path}/{name} is {what}; required: a model: a folder of"
    )


def test_names_of_folders():
    assert [folder_name(uri) for uri in ("a/b/", "s3://x/y", "m", "/")] == ["b", "y", "m", "model"]


def test_the_model_that_is_imported_twice_is_the_same(tmp_path: Path):
    import torch

    torch.save(weights(TINY), tmp_path / "w.pth")
    first = import_model(str(tmp_path / "w.pth"), str(tmp_path / "a"))
    assert import_model(str(tmp_path / "w.pth"), str(tmp_path / "a"), command="another") == first
