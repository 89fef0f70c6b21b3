"""An artifact is a Hugging Face folder: transformers opens ours, we open theirs, and nobody opens what is not whole."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shards import LFS_POINTER
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"

from pipeline.artifact import (
    Artifact,
    Origin,
    build,
    digest_of,
    load_artifact,
    make_artifact,
    save_artifact,
    with_files,
)
from pipeline.errors import ModelError
from pipeline.model.huggingface import Architecture, read_config, read_preprocessor
from pipeline.model.preprocessing import PRESETS, Preprocessing
from pipeline.model.resnet import ResNet, fold
from pipeline.prepare.importer import crop_share, default_labels, import_model
from pipeline.prepare.parameters import to_huggingface, usual_name
from pipeline.preprocess import resize_and_crop

TINY = Architecture("basic", (1, 1), (8, 16), classes=3, embedding_size=8)
RESNET18 = Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), classes=10)
RESNET50 = Architecture("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048), classes=10)
V1 = Architecture("bottleneck", (1, 2), (16, 32), classes=2, downsample_in_bottleneck=True, downsample_in_first_stage=True)
SMALL = replace(RESNET18, stem="small")


def weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Random parameters, batch normalisation included, so that a mix-up of two of them shows."""
    torch.manual_seed(0)
    model = ResNet(architecture)
    shake(model)
    return model.state_dict()


def shake(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)


def made(architecture: Architecture = TINY, preprocessing: Preprocessing | None = None, **more: object) -> Artifact:
    labels = tuple(f"label {i}" for i in range(architecture.classes))
    wanted = preprocessing or Preprocessing(size=32)
    return make_artifact(architecture, weights(architecture), labels=labels, preprocessing=wanted, **more)


def logits(model: nn.Module, size: int = 64) -> np.ndarray:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = model.eval()(x)
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()


@pytest.mark.parametrize("architecture", [RESNET18, RESNET50, V1, SMALL], ids=["resnet18", "resnet50", "v1", "small stem"])
def test_transformers_opens_ours(tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    # Where transformers copies the code that a folder brings.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    preprocessing = Preprocessing(size=48, crop_pct=0.9, resample="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    artifact = save_artifact(made(architecture, preprocessing), str(tmp_path))
    theirs, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True, trust_remote_code=architecture.stem == "small"
    )
    assert not any(info[trouble] for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [theirs.config.id2label[i] for i in range(architecture.classes)] == list(artifact.labels)
    np.testing.assert_allclose(logits(build(artifact)), logits(theirs), atol=1e-4)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs_sees = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(theirs_sees, reference(image, preprocessing), atol=1e-5)


def reference(image: np.ndarray, p: Preprocessing) -> np.ndarray:
    """`Preprocessing` by Pillow, by the book."""
    height, width = image.shape[:2]
    scale = p.resize_edge / min(height, width)
    resized = Image.fromarray(image).resize(
        (int(width * scale), int(height * scale)), getattr(Image.Resampling, p.resample.upper())
    )
    left, top = (resized.width - p.size) // 2, (resized.height - p.size) // 2
    crop = np.asarray(resized)[top : top + p.size, left : left + p.size] / 255
    return ((crop - np.array(p.mean)) / np.array(p.std)).transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_ours_opens_what_transformers_saved(tmp_path: Path, layer_type: str) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        depths=[1, 2], hidden_sizes=[16, 32], embedding_size=8, layer_type=layer_type, id2label={0: "cat", 1: "dog"}
    )
    theirs = ResNetForImageClassification(config)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.95).save_pretrained(tmp_path)
    artifact = load_artifact(str(tmp_path))
    assert artifact.labels == ("cat", "dog")
    assert artifact.preprocessing == Preprocessing(224, 0.95, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert artifact == load_artifact(str(tmp_path), weights=False)
    np.testing.assert_allclose(logits(build(artifact)), logits(theirs), atol=1e-4)


def test_what_files_leave_out_is_what_transformers_takes_it_to_be() -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig

    theirs = ResNetConfig()
    architecture, labels = read_config(b'{"model_type": "resnet"}', "x")
    assert architecture == Architecture(
        theirs.layer_type,
        tuple(theirs.depths),
        tuple(theirs.hidden_sizes),
        classes=theirs.num_labels,
        embedding_size=theirs.embedding_size,
        downsample_in_first_stage=theirs.downsample_in_first_stage,
        downsample_in_bottleneck=theirs.downsample_in_bottleneck,
    )
    assert labels == tuple(theirs.id2label[number] for number in range(theirs.num_labels))
    shuffled = {str(number): f"class {number}" for number in (10, 1, 0, *range(2, 10))}  # as a writer has them that sorts texts
    _, labels = read_config(json.dumps({"model_type": "resnet", "id2label": shuffled}).encode(), "x")
    assert labels == tuple(f"class {number}" for number in range(11))
    processor, kind = ConvNextImageProcessor(size={"shortest_edge": 224}), b'{"image_processor_type": "ConvNextImageProcessor"'
    seen = read_preprocessor(kind + b', "size": {"shortest_edge": 224}}', "x")
    assert seen.resample == {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    assert (seen.mean, seen.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    image = np.random.default_rng(0).integers(0, 256, (260, 340, 3), dtype=np.uint8)
    (pixels,) = processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, reference(image, seen), atol=2 / 127)
    assert ConvNextImageProcessor().size["shortest_edge"] == 384
    with pytest.raises(ModelError, match=r"size is 384 pixels, at which Hugging Face's processor warps"):
        read_preprocessor(kind + b"}", "x")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"size": 0}, "size is 0, required: 1 to 4096 pixels"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0, required: over 0, up to 1"),
        ({"crop_pct": 1.01}, "crop_pct is 1.01, required: over 0, up to 1"),
        ({"resample": "lanczos"}, "resample is 'lanczos', required: one of bilinear, bicubic"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean is .*, required: three finite numbers"),
        ({"std": (math.inf, 1, 1)}, "std is .*, required: three finite numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std is .*, required: numbers over 0, they divide"),
        ({"std": (58.4, 57.1, 57.4)}, "on the scale 0 to 1; divide those of 0 to 255 by 255"),
        ({"mean": (-0.1, 0.5, 0.5)}, "on the scale 0 to 1"),
    ],
)
def test_values_no_image_can_be_prepared_with(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Preprocessing(**values)


def test_a_folder_of_2022_opens(tmp_path: Path) -> None:
    save_artifact(made(), str(tmp_path))
    (tmp_path / "artifact.json").unlink()
    old = {"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**old, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    opened = load_artifact(str(tmp_path)).preprocessing
    assert opened.resize_edge == 256
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**old, "crop_pct": None, "image_mean": 0.5, "image_std": 0.5}))
    assert load_artifact(str(tmp_path)).preprocessing == opened, "as transformers reads one number and null"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_state_dicts_of_torchvision_are_imported(tmp_path: Path, name: str, ending: str) -> None:
    import safetensors.torch
    import torchvision

    if ending == ".safetensors" and name == "resnet34":
        pytest.skip("the two others cover it")
    theirs = getattr(torchvision.models, name)(num_classes=7)
    shake(theirs)
    state = theirs.state_dict()
    if ending == ".pth":
        wrapped = {f"model._orig_mod.{key}": tensor for key, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": {**wrapped, "loss.weight": torch.ones(7)}}, tmp_path / "w.pth")
    else:
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    artifact = import_model(str(tmp_path / f"w{ending}"), str(tmp_path / "model"))
    assert artifact.labels[-1] == "class_6"
    assert artifact.origin.parents == (str(tmp_path / f"w{ending}"),)
    np.testing.assert_allclose(logits(build(artifact)), logits(theirs), atol=1e-4)
    # Random weights give logits of up to 200, whose last float32 bit is 1.5e-5: folding is held against their size.
    np.testing.assert_allclose(logits(fold(build(artifact))), logits(theirs), atol=1e-5 * np.abs(logits(theirs)).max())


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "model/state_dict"])
def test_a_state_dict_is_found_where_training_scripts_put_it(tmp_path: Path, nest: str) -> None:
    saved: dict[str, object] = {**weights(SMALL), "steps": 3}
    for name in reversed(nest.split("/")):
        saved = {"epoch": 3, name: saved, "optimizer": {"state": {}}}
    torch.save(saved, tmp_path / "w.pth")
    artifact = import_model(str(tmp_path / "w.pth"), str(tmp_path / "model"))
    assert artifact.architecture == SMALL, "its stem is seen in the first convolution"
    np.testing.assert_array_equal(logits(build(artifact)), logits(build(made(SMALL))))


def test_a_folder_says_what_no_weights_do(tmp_path: Path) -> None:
    """Where a network strides leaves no trace in its parameters; how many classes it has does."""
    save_artifact(made(V1), str(tmp_path / "theirs"))
    again = import_model(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert (again.architecture, again.labels) == (V1, ("label 0", "label 1"))
    np.testing.assert_array_equal(logits(build(again)), logits(build(made(V1))))
    broken(tmp_path / "theirs", "config.json", id2label={"0": "one"})
    with pytest.raises(ModelError, match="1 labels"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "other"))
    named = import_model(str(tmp_path / "theirs"), str(tmp_path / "other"), labels=("x", "y"))
    assert (named.architecture, named.labels) == (V1, ("x", "y"))


def test_torchvisions_names_bring_labels_and_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet50_Weights, resnet50

    state = resnet50().state_dict()
    asked: list[dict[str, object]] = []
    fetch = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(fetch, lambda url, **options: asked.append(options) or state)
    artifact = import_model("ResNet50_Weights.IMAGENET1K_V2", str(tmp_path / "model"))
    assert artifact.labels == tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    assert (artifact.preprocessing.size, artifact.preprocessing.resize_edge) == (224, 232)
    assert asked[0]["check_hash"]
    given = import_model("ResNet50_Weights.IMAGENET1K_V2", str(tmp_path / "other"), preprocessing=Preprocessing(size=64))
    assert given.preprocessing == Preprocessing(size=64)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_state_dicts_of_timm_are_imported_with_timms_crop(tmp_path: Path, name: str) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    theirs = timm.create_model(name, pretrained=False, num_classes=7)
    shake(theirs)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    artifact = import_model(str(tmp_path / "w.pth"), str(tmp_path / "model"), preprocessing=PRESETS["timm"])
    np.testing.assert_allclose(logits(build(artifact)), logits(theirs), atol=1e-4)
    says = resolve_data_config({}, model=theirs)
    ours = artifact.preprocessing
    assert (says["input_size"], says["crop_pct"], says["interpolation"]) == ((3, ours.size, ours.size), 0.95, "bicubic")
    assert (ours.crop_pct, ours.resample, ours.mean, ours.std) == (0.95, "bicubic", says["mean"], says["std"])
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (ours.mean, ours.std))
    theirs_sees = create_transform(**says)(Image.fromarray(image)).numpy() * std + mean
    np.testing.assert_allclose(theirs_sees, resize_and_crop(image, ours) / 255, atol=2.1 / 255)


def test_folders_of_timm_are_imported_with_what_they_say(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    theirs = timm.create_model("resnet34", pretrained=False, num_classes=3)
    shake(theirs)
    for safe, labels in ((True, ["ant", "bee", "cow"]), (False, None)):
        folder = tmp_path / f"theirs-{safe}"
        save_for_hf(theirs, str(folder), model_config={"label_names": labels} if labels else None, safe_serialization=safe)
        artifact = import_model(str(folder), str(tmp_path / f"ours-{safe}"))
        assert artifact.labels == (tuple(labels) if labels else ("class_0", "class_1", "class_2"))
        assert artifact.preprocessing == PRESETS["timm"]
        np.testing.assert_allclose(logits(build(artifact)), logits(theirs), atol=1e-4)
    again = import_model(str(folder), str(tmp_path / "small"), preprocessing=Preprocessing(size=64), labels=("x", "y", "z"))
    assert (again.preprocessing.size, again.labels) == (64, ("x", "y", "z"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"architecture": "resnetblur18"}, "architecture is 'resnetblur18'; required: resnet18, 34, 50, 101 or 152, plain"),
        ({"global_pool": "max"}, "global_pool is 'max'; required: a plain ResNet"),
        ({"model_args": {"output_stride": 8}}, "output_stride is 8; required: a plain ResNet"),
        ({"label_names": "ant"}, "label_names is 'ant'; required: a list of names"),
        ({"pretrained_cfg": {"input_size": [3, 224, 224]}}, "pretrained_cfg: 'crop_pct'"),
        ({"pretrained_cfg": {"input_size": [1, 224, 224]}}, "required: a centre square of RGB"),
        ({"pretrained_cfg": {"input_size": [3, 224, 192]}}, "required: a centre square of RGB"),
        ({"architecture": "ecaresnet50"}, "architecture is 'ecaresnet50'; required: resnet18"),
    ],
)
def test_what_timm_would_run_otherwise_is_refused(tmp_path: Path, changed: dict[str, object], sentence: str) -> None:
    """Weights of a blurred or dilated ResNet have the names and shapes of a plain one."""
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet18", pretrained=False, num_classes=3), str(tmp_path / "theirs"))
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ModelError, match=sentence):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "ours"))


def test_the_three_presets_differ_and_torchvision_is_the_default(tmp_path: Path) -> None:
    from torchvision.models import ResNet18_Weights

    crop = ResNet18_Weights.IMAGENET1K_V1.transforms()
    torchvision = PRESETS["torchvision"]
    assert (crop.resize_size, crop.crop_size) == ([torchvision.resize_edge], [torchvision.size])
    assert (crop.interpolation.value, tuple(crop.mean), tuple(crop.std)) == ("bilinear", torchvision.mean, torchvision.std)
    hugging = PRESETS["huggingface"]  # microsoft/resnet-18: 224, crop_pct 0.875, resample 3, ImageNet's mean and std
    assert (hugging.resize_edge, hugging.resample, hugging.mean, hugging.std) == (
        256,
        "bicubic",
        torchvision.mean,
        torchvision.std,
    )
    torch.save(weights(TINY), tmp_path / "w.pth")
    artifact = import_model(str(tmp_path / "w.pth"), str(tmp_path / "model"))
    assert artifact.preprocessing == torchvision
    assert len({*PRESETS.values()}) == 3


def test_a_thousand_classes_are_imagenet(tmp_path: Path) -> None:
    architecture = Architecture("basic", (1,), (8,), classes=1000, embedding_size=8)
    torch.save(weights(architecture), tmp_path / "w.pt")
    artifact = import_model(str(tmp_path / "w.pt"), str(tmp_path / "model"), preprocessing=Preprocessing(size=64))
    assert (artifact.labels[0], artifact.labels[-1], artifact.preprocessing.size) == ("tench", "toilet tissue", 64)
    assert [default_labels(classes)[-1] for classes in (999, 1001)] == ["class_998", "class_1000"]


def test_pickled_weights_of_a_folder_are_imported_not_loaded(tmp_path: Path) -> None:
    artifact = save_artifact(made(), str(tmp_path / "old"))
    torch.save(weights(TINY), tmp_path / "old" / "pytorch_model.bin")
    for name in ("model.safetensors", "artifact.json"):
        (tmp_path / "old" / name).unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors.* import the weights"):
        load_artifact(str(tmp_path / "old"))
    again = import_model(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (again.digest, again.labels) == (artifact.digest, artifact.labels)
    assert import_model(str(tmp_path / "old"), str(tmp_path / "b"), labels=("x", "y", "z")).labels == ("x", "y", "z")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(TINY), "path": Path("x")}, tmp_path / "w.ckpt")
    with pytest.raises(ModelError, match=r"; required: a pickle of nothing but tensors, since any other can run code\. Save"):
        import_model(str(tmp_path / "w.ckpt"), str(tmp_path / "model"))


def test_damaged_pickles_are_one_sentence(tmp_path: Path) -> None:
    """In both of torch's formats: bytes of the pickle changed, lost and added; some of it is luck and is imported."""
    torch.save(weights(TINY), tmp_path / "w.pth")
    torch.save(weights(TINY), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "w.pth") as file:
        members = {name: file.read(name) for name in file.namelist()}
    (pickled,) = [name for name in members if name.endswith("/data.pkl")]
    old, rng = (tmp_path / "old.pth").read_bytes(), random.Random(0)
    sentences: list[str] = []
    for number in range(400):
        if number % 2:
            (tmp_path / "x.pth").write_bytes(damaged(old[:9000], rng) + old[9000:])
        else:
            with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
                for name, content in members.items():
                    file.writestr(name, damaged(content, rng) if name == pickled else content)
        try:
            import_model(str(tmp_path / "x.pth"), str(tmp_path / f"model-{number}"))
        except ModelError as error:
            sentences.append(str(error))
    assert len(sentences) > 200
    assert not [sentence for sentence in sentences if "\n" in sentence]


def damaged(data: bytes, rng: random.Random) -> bytes:
    content, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(3):
        case 0:
            content[at] ^= 1 << rng.randrange(8)
        case 1:
            del content[at : at + rng.randrange(1, 9)]
        case _:
            content[at:at] = rng.randbytes(rng.randrange(1, 5))
    return bytes(content)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("absent.pth", "not found"),
        ("absent", r"not found\. Give .* a Hugging Face folder, which hf download NAME --local-dir FOLDER makes, or"),
        ("ResNet18_Weights.NOPE", "torchvision has no such weights"),
        ("empty.pth", "cannot be read"),
        ("other.pt", "has no layer1.0.conv1.weight"),
        ("headless.pt", "has no classifier.1.weight"),
        ("two.ckpt", r"holds 2 ResNets, under 'teacher\.', 'student\.'; required: one"),
        ("sigmoid.pt", r"sigmoid\.pt: classifier\.1\.weight is of one class, as for a sigmoid; required: two or more"),
        ("nan.pt", r"classifier\.1\.bias holds nan or infinity; required: finite numbers"),
        ("unprepared", r"preprocessor_config\.json: not found\. Restore it, or say .* with --preprocessing"),
        ("grouped.pt", "has shape"),
        ("turned.pt", "has shape"),
        ("attention.pt", r"has resnet\.encoder\.stages\.0\.layers\.0\.attention\.weight; required: only what a ResNet"),
    ],
)
def test_what_is_no_resnet_is_not_imported(tmp_path: Path, source: str, sentence: str) -> None:
    state = weights(V1)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    torch.save({name: t for name, t in state.items() if "classifier" not in name}, tmp_path / "headless.pt")
    torch.save({name: t[:1].clone() if "classifier" in name else t for name, t in state.items()}, tmp_path / "sigmoid.pt")
    both = {f"{prefix}.{name}": tensor for prefix in ("teacher", "student") for name, tensor in state.items()}
    torch.save({"state_dict": both}, tmp_path / "two.ckpt")
    torch.save({**state, "classifier.1.bias": torch.tensor([0.0, math.inf])}, tmp_path / "nan.pt")
    save_artifact(made(), str(tmp_path / "unprepared"))
    (tmp_path / "unprepared/preprocessor_config.json").unlink()
    grouped = "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight"
    torch.save({**state, grouped: state[grouped][:, :2].clone()}, tmp_path / "grouped.pt")
    turned = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    torch.save({**state, turned: state[turned].transpose(0, 1).clone()}, tmp_path / "turned.pt")
    torch.save({**state, "resnet.encoder.stages.0.layers.0.attention.weight": torch.ones(4)}, tmp_path / "attention.pt")
    with pytest.raises(ModelError, match=sentence):
        import_model(source if "_Weights" in source else str(tmp_path / source), str(tmp_path / "model"))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("layer3.", r"has no {}layer3\.0\.conv2\.weight; required: a whole ResNet\. Give the weights of a plain ResNet"),
        ("fc.", r"has no {}fc\.weight; required: a whole ResNet"),
        ("conv1.", r"has no {}conv1\.weight; required: a whole ResNet"),
        ("bn1.weight", r"has no {}bn1\.weight; required: every parameter of a ResNet of depths \(2, 2, 2, 2\)"),
        ("layer2.0.downsample.1.bias", r"has no {}layer2\.0\.downsample\.1\.bias; required: every parameter"),
        ("layer2.0.downsample.0", r"has no {}layer2\.0\.downsample\.0\.weight; required: every parameter"),
        ("layer4.1.bn2.running_var", r"has no {}layer4\.1\.bn2\.running_var; required: every parameter"),
        ("layer4.", r"{}fc\.weight has shape \[5, 512\]; required: \[5, 256\] for a ResNet of depths \(2, 2, 2\)"),
    ],
)
def test_what_a_file_lacks_is_told_by_the_names_in_it(tmp_path: Path, prefix: str, lost: str, sentence: str) -> None:
    from torchvision.models import resnet18

    state = resnet18(num_classes=5).state_dict()
    kept = {prefix + name: tensor for name, tensor in state.items() if not name.startswith(lost)}
    torch.save(kept, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/w\.pth: {sentence.format(re.escape(prefix))}"):
        import_model(str(tmp_path / "w.pth"), str(tmp_path / "model"))


def test_every_name_of_torchvisions_is_found_again() -> None:
    from torchvision.models import resnet18, resnet50

    for network in (resnet18(), resnet50()):
        state = network.state_dict()
        ours = to_huggingface(state, "x")
        assert [usual_name(state, name) for name in ours] == list(state)
        assert [usual_name(ours, name) for name in ours] == list(ours)


@pytest.mark.parametrize("recorded", [True, False], ids=["an artifact", "a Hugging Face folder"])
def test_a_model_that_git_lfs_has_not_fetched_is_told(tmp_path: Path, recorded: bool) -> None:
    folder = tmp_path / "model"
    save_artifact(made(), str(folder))
    (folder / "model.safetensors").write_bytes(LFS_POINTER)
    if not recorded:
        (folder / "artifact.json").unlink()
    said = f"^{folder}/model.safetensors: a Git LFS pointer .*; required: the file itself. Fetch the object with git lfs pull.$"
    with pytest.raises(ModelError, match=said):
        load_artifact(str(folder))
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(ModelError, match=said):
            import_model(str(source), str(tmp_path / "imported"))
    assert not (tmp_path / "imported").exists()


def test_half_precision_weights_become_float32() -> None:
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights(TINY).items()}
    artifact = make_artifact(TINY, half, labels=("a", "b", "c"), preprocessing=Preprocessing(size=32))
    assert {tensor.dtype for tensor in build(artifact).parameters()} == {torch.float32}
    quantized = {**weights(TINY), "classifier.1.bias": torch.zeros(3, dtype=torch.int8)}
    with pytest.raises(ModelError, match="is int8"):
        make_artifact(TINY, quantized, labels=("a", "b", "c"), preprocessing=Preprocessing(size=32))


def test_the_digest_names_every_byte_and_nothing_else(tmp_path: Path) -> None:
    artifact = made(origin=Origin(parents=("sha256:1",), metrics={"top1": 0.7}, command="nightlabel import x"))
    saved = save_artifact(artifact, str(tmp_path / "a"))
    assert saved == made()
    assert saved.origin == artifact.origin
    changed = bytearray(artifact.files["model.safetensors"])
    changed[-1] ^= 1
    others = [
        with_files({**artifact.files, "model.safetensors": bytes(changed)}),
        with_files({**artifact.files, "model.int8.onnx": b"onnx"}),
        with_files({**artifact.files, "config.json": artifact.files["config.json"] + b"\n"}),
        made(preprocessing=Preprocessing(size=32, crop_pct=0.8)),
    ]
    assert len({artifact.digest, *(other.digest for other in others)}) == 5
    assert artifact.digest.startswith("sha256:")
    assert digest_of({"b": "2", "a": "1"}) == digest_of({"a": "1", "b": "2"})
    for other in others:
        with pytest.raises(ModelError, match="holds sha256:"):
            save_artifact(other, str(tmp_path / "a"))


def test_saving_twice_is_no_error_and_an_int8_model_travels(tmp_path: Path) -> None:
    artifact = with_files({**made().files, "model.int8.onnx": b"onnx"})
    save_artifact(artifact, str(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert save_artifact(artifact, f"file://{tmp_path}/").files["model.int8.onnx"] == b"onnx"
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert load_artifact(str(tmp_path), weights=False) == artifact


def test_another_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds another config.json"):
        save_artifact(made(), str(tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"


def broken(folder: Path, name: str, **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("config.json", {"model_type": "vit"}, "model_type is 'vit'; required: 'resnet'"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("config.json", {"layer_type": "wide"}, "layer_type is 'wide'"),
        ("config.json", {"depths": [2]}, "do not describe a network"),
        ("config.json", {"depths": 5}, "depths 5, hidden_sizes .* do not describe a network"),
        ("config.json", {"hidden_sizes": None}, "hidden_sizes None, embedding_size 8 do not describe a network"),
        ("config.json", {"embedding_size": None}, "embedding_size None do not describe a network"),
        ("config.json", {"id2label": None, "num_labels": "x"}, "num_labels is 'x'; required: a whole number over 0"),
        ("config.json", {"id2label": None, "num_labels": None}, "num_labels is None; required: a whole number over 0"),
        ("config.json", {"id2label": None, "num_labels": 0}, "num_labels is 0; required"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "id2label has 2 entries"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "the weights have 3 classes, config.json names 2 labels"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type is 'ViTImageProcessor'",
        ),
        ("preprocessor_config.json", {"size": {"shortest_edge": 384}}, "warps instead of cropping; required: below 384"),
        ("preprocessor_config.json", {"size": {"height": 224}}, "the shortest edge is None; required: a whole number over 0"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 224.9}}, "the shortest edge is 224.9; required"),
        ("preprocessor_config.json", {"size": math.inf}, "the shortest edge is inf; required"),
        (
            "preprocessor_config.json",
            {"do_center_crop": True, "crop_size": 200},
            "do_center_crop is True; required",
        ),
        ("preprocessor_config.json", {"image_mean": [123.675, 116.28, 103.53]}, "on the scale 0 to 1; divide those of 0 to 255"),
        ("preprocessor_config.json", {"crop_pct": 1e-320}, "images are resized to inf pixels, required: at most"),
        ("preprocessor_config.json", {"resample": 0}, "resample is 0"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale is False"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("config.json", {"num_channels": 1}, "num_channels is 1; required: 3"),
        ("preprocessor_config.json", {"image_std": [1, 1]}, "unpack"),
    ],
)
def test_what_we_would_run_wrong_is_refused(tmp_path: Path, name: str, fields: dict[str, object], sentence: str) -> None:
    save_artifact(made(), str(tmp_path))
    (tmp_path / "artifact.json").unlink()
    broken(tmp_path, name, **fields)
    with pytest.raises(ModelError, match=sentence):
        load_artifact(str(tmp_path))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artifact(made(), str(tmp_path / "a"))
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        (tmp_path / name / name).unlink()
        for all_of_it in (True, False):
            with pytest.raises(ModelError, match=f"has no {name}"):
                load_artifact(str(tmp_path / name), weights=all_of_it)
    monkeypatch.chdir(tmp_path)
    told = f"^{re.escape(str(tmp_path))}/nowhere/: has no config.json"  # where it looked
    with pytest.raises(ModelError, match=f"{told}.* import the weights.*: nightlabel prepare import"):
        load_artifact("nowhere/")


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    artifact = save_artifact(made(), str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"model.safetensors is not the one it was saved with"):
        load_artifact(str(tmp_path))
    assert load_artifact(str(tmp_path), weights=False).digest == artifact.digest, "artifact.json is believed"
    (tmp_path / "model.int8.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model.int8.onnx is not the one .* none, as in artifact.json, not one"):
        load_artifact(str(tmp_path), weights=False)
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is not an artifact"):
        load_artifact(str(tmp_path))
    (tmp_path / "artifact.json").unlink()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="is damaged"):
        load_artifact(str(tmp_path))


def test_every_crop_of_torchvision_keeps_its_edge() -> None:
    for size in range(16, 384):
        for edge in range(size, 2 * size):
            assert Preprocessing(size=size, crop_pct=crop_share(size, edge)).resize_edge == edge


def test_an_artifact_is_read_without_torch(tmp_path: Path) -> None:
    save_artifact(made(), str(tmp_path))
    code = (
        "import sys; from pipeline.artifact import load_artifact; load_artifact(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parent.parent)
