"""`nightlabel model show`: its counts are torch's, its table is the paper's, it says where a model came from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_artifact import RESNET18, RESNET50, TINY, V1, made
from torch import nn

from pipeline.artifact import Origin, save_artifact
from pipeline.job.training import Training
from pipeline.model.describe import architecture_name, figure, giga, layers, plain
from pipeline.model.huggingface import Architecture
from pipeline.model.resnet import ResNet

IMAGENET18 = replace(RESNET18, classes=1000)
RESNET34 = Architecture("basic", (3, 4, 6, 3), (64, 128, 256, 512), classes=5)
SMALL = replace(RESNET18, stem="small")
CASES = [(RESNET18, 224), (IMAGENET18, 224), (RESNET34, 97), (RESNET50, 224), (V1, 61), (TINY, 32), (SMALL, 32)]


def counted(architecture: Architecture, size: int) -> int:
    """MACs as the network runs: a hook on every convolution and on the classifier."""
    macs = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal macs
        each = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        macs += each * out.numel()

    model = ResNet(architecture).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    return macs


@pytest.mark.parametrize(("architecture", "size"), CASES)
def test_counts_are_those_of_torch(architecture: Architecture, size: int):
    table = layers(architecture, size)
    with torch.device("meta"):
        model = ResNet(architecture)
    assert sum(layer.parameters for layer in table) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.macs for layer in table) == counted(architecture, size)
    stages = [list(part.parameters()) for part in model.resnet.encoder.stages]
    assert [row.parameters for row in table if row.name.startswith("stage")] == [sum(p.numel() for p in s) for s in stages]


def test_resnet_18_is_what_the_paper_says():
    table = layers(IMAGENET18, 224)
    assert f"{sum(layer.parameters for layer in table) / 1e6:.2f} M" == "11.69 M"
    assert f"{sum(layer.macs for layer in table) / 1e9:.2f}" == "1.81"
    assert [(row.name, row.what, row.channels, row.edge) for row in table] == [
        ("conv1", "7 × 7, stride 2", 64, 112),
        ("maxpool", "3 × 3, stride 2", 64, 56),
        ("stage 1", "2 basic blocks", 64, 56),
        ("stage 2", "2 basic blocks, stride 2", 128, 28),
        ("stage 3", "2 basic blocks, stride 2", 256, 14),
        ("stage 4", "2 basic blocks, stride 2", 512, 7),
        ("average pool", "7 × 7", 512, 1),
        ("fc", "512 to 1,000", 1000, 1),
    ]
    assert [row.name for row in layers(SMALL, 32)][:2] == ["conv1", "stage 1"]


def test_names():
    names = [architecture_name(a) for a in (RESNET18, RESNET34, RESNET50, TINY, SMALL)]
    assert names == ["ResNet-18", "ResNet-34", "ResNet-50", "ResNet of 6 layers", "ResNet-18, small-image stem"]
    assert architecture_name(V1) == "ResNet of 11 layers, stride in the 1 × 1 (v1)"
    assert architecture_name(replace(RESNET18, hidden_sizes=(128, 256, 512, 1024))) == "ResNet of 18 layers", "a wide one"
    assert [giga(macs) for macs in (5 * 10**8, 99_900_000)] == ["0.50 GMACs", "99.9 MMACs"]


def test_a_figure_is_a_share_or_a_count():
    figures = {"accuracy": 0.98765, "gain_points": -1.5, "epoch": 3, "bytes_int8": 11_800_123, "images_per_second": 22_600.4}
    assert [figure(value) for value in figures.values()] == ["0.9877", "-1.5", "3", "11,800,123", "22,600"]


def show(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pipeline", "model", "show", *words], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_command_shows_it_all(tmp_path: Path):
    origin = Origin(
        parents=("sha256:1",),
        data={"uris": ["a/"], "images": {"train": 1200}},
        metrics={"top1": 0.7, "bytes_int8": 11_800_000},
        command="nightlabel x",
    )
    artifact = save_artifact(made(IMAGENET18, origin=origin), str(tmp_path))
    said = show(str(tmp_path))
    for words in (
        f"{tmp_path}: ResNet-18, 1,000 classes",
        artifact.digest,
        "11.69 M parameters",
        "46.8 MB",
        "sees    32 × 32 pixels: shortest edge to 36, bilinear",
        "from    sha256:1",
        "\ndata    uris    a/\n        images  train 1,200\n",
        "\nmetrics top1        0.7\n        bytes_int8  11,800,000\n",
        "command nightlabel x",
        "conv1         7 × 7, stride 2",
        "512 to 1,000",
    ):
        assert words in said
    facts = json.loads(show(str(tmp_path), "--json"))
    assert facts["parameters"] == 11_689_512
    assert facts["files"]["model.safetensors"] == len(artifact.files["model.safetensors"])
    assert facts["preprocessing"]["size"] == 32
    assert facts["metrics"] == {"top1": 0.7, "bytes_int8": 11_800_000}
    assert len(facts["layers"]) == 8


def test_what_a_training_was_is_a_fact_a_line_and_no_line_is_wide(tmp_path: Path):
    training = {**Training(epochs=3, batch_size=8).model_dump(mode="json"), "notes": [f"note {n}" for n in range(40)]}
    data = {"uris": [f"s3://bucket/photos/{n}/" for n in range(9)], "validation_uris": [], "unlabelled": 0, "training": training}
    metrics = {"accuracy": 0.98765, "validation_loss": 0.1}
    save_artifact(made(RESNET18, origin=Origin(data=data, metrics=metrics)), str(tmp_path))
    said = show(str(tmp_path)).splitlines()
    assert max(map(len, said)) <= 100
    start = said.index("        validation_uris  none")
    assert said[start - 3].startswith("data    uris             s3://bucket/photos/0/, s3://bucket/photos/1/")
    assert said[start - 2].startswith(" " * 25 + "s3://bucket/photos/"), "the rest of a long fact stands below its beginning"
    assert said[start + 1] == "        unlabelled       0"
    assert said[start + 2].startswith("        training         epochs 3, batch_size 8, ")
    words = " ".join(line.strip() for line in said[start + 2 : said.index("metrics accuracy         0.9877")])
    assert words == f"training         {plain(training)}", "nothing is left out"
    assert said[said.index("metrics accuracy         0.9877") + 1] == "        validation_loss  0.1"


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "model", "show", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"nightlabel: {tmp_path}: has no config.json; required: ")
