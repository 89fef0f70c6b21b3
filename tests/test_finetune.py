"""Training and fine-tuning, with small networks and 16-pixel images whose class is the side that is bright."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from pipeline.artifact import Artifact, build, load_artifact, make_artifact, save_artifact
from pipeline.errors import InputError, JobError, ModelError, UnfitError
from pipeline.huggingface import Architecture
from pipeline.prepare.augment import Augment, augment
from pipeline.prepare.finetune import TrainingSet, finetune, read_labelled, split, starting_model
from pipeline.prepare.train import Epoch, Labelled, Normalise, TrainSettings, decay_groups, measure, train
from pipeline.preprocessing import Preprocessing
from pipeline.resnet import ResNet
from pipeline.spec import Input

SMALL = Preprocessing(size=16, crop_pct=1.0)
QUICK = TrainSettings(epochs=3, batch_size=8, learning_rate=3e-3)
SIDES = ("left", "right", "top")


def pictures(count: int, *, classes: int = 2) -> Labelled:
    """Noise with one bright side; classes take turns."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 60, (count, 3, 16, 16), dtype=np.uint8)
    labels = np.arange(count) % classes
    pixels[labels == 0, :, :, :8] += 150
    pixels[labels == 1, :, :, 8:] += 150
    pixels[labels == 2, :, :8, :] += 150
    return Labelled(torch.from_numpy(pixels), torch.from_numpy(labels))


def small_network(classes: int = 2) -> ResNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ResNet(Architecture("basic", (1, 1), (8, 16), classes, embedding_size=8))


def small_artifact(labels: tuple[str, ...] = SIDES[:2]) -> Artifact:
    architecture = Architecture("basic", (1, 1), (8, 16), len(labels), embedding_size=8)
    return make_artifact(architecture, small_network(len(labels)).state_dict(), labels=labels, preprocessing=SMALL)


def training_set(count: int = 48, *, classes: int = 2) -> TrainingSet:
    return TrainingSet(pictures(count, classes=classes), SIDES[:classes], SMALL, {}, ("shards/",))


def write_shard(folder: Path, samples: list[tuple[str, bytes, str | None]]) -> Input:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, image, label in samples:
            for suffix, data in (("png", image), ("cls", None if label is None else label.encode())):
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return Input(uri=str(folder))


def png(pixels: torch.Tensor) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(sink, "PNG")
    return sink.getvalue()


def test_loss_falls_and_the_model_learns():
    data = pictures(64)
    seen: list[Epoch] = []
    model = small_network()
    result = train(model, (data, pictures(16)), preprocessing=SMALL, settings=QUICK, progress=seen.append)
    assert result.epochs == tuple(seen)
    assert [epoch.number for epoch in seen] == [1, 2, 3]
    assert seen[-1].loss < seen[0].loss
    assert result.best.accuracy == 1.0
    assert not model.training


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    def weights(seed: int) -> torch.Tensor:
        settings = QUICK.model_copy(update={"seed": seed, "augment": Augment(scale=(0.9, 1.1), shift=0.1), "epochs": 2})
        model = small_network()
        train(model, (pictures(32), pictures(8)), preprocessing=SMALL, settings=settings)
        return torch.cat([value.flatten().float() for value in model.state_dict().values()])

    state = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, weights(5))
    assert not torch.equal(first, weights(6))


def test_stops_early_and_keeps_the_best_epoch():
    # The labels of the validation images are wrong: the better the model learns, the worse it does on them.
    wrong = pictures(16)
    wrong = Labelled(wrong.pixels, 1 - wrong.labels)
    settings = QUICK.model_copy(update={"epochs": 12, "patience": 2})
    model = small_network()
    result = train(model, (pictures(64), wrong), preprocessing=SMALL, settings=settings)
    assert result.stopped_early
    assert result.best.number == len(result.epochs) - 2
    assert result.best == max(result.epochs, key=lambda epoch: epoch.rank)
    again = measure(model, wrong, Normalise(SMALL, torch.device("cpu")), batch_size=8)
    assert again == pytest.approx((result.best.validation_loss, result.best.accuracy))


def test_another_objective_is_used():
    def only_first(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images), torch.zeros_like(labels))

    model = small_network()
    result = train(model, (pictures(64), pictures(16)), preprocessing=SMALL, settings=QUICK, objective=only_first)
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert result.epochs[-1].accuracy == 0.5


def test_bfloat16_trains():
    settings = QUICK.model_copy(update={"precision": "bfloat16"})
    assert train(small_network(), (pictures(64), pictures(16)), preprocessing=SMALL, settings=settings).best.accuracy > 0.9


def test_norms_and_biases_do_not_decay():
    model = small_network()
    decayed, spared = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith(("convolution.weight", "classifier.1.weight")) for p in decayed["params"])
    assert all("normalization" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_a_diverging_training_says_what_to_do():
    settings = QUICK.model_copy(update={"learning_rate": 1e30, "epochs": 5})
    with pytest.raises(ModelError, match=r"loss became nan; required: a finite number\. Lower learning_rate"):
        train(small_network(), (pictures(64), pictures(16)), preprocessing=SMALL, settings=settings)


def test_fewer_images_than_a_batch():
    with pytest.raises(JobError, match=r"7 images to train on .* a batch of 8 and one. Give more images or lower batch_size"):
        train(small_network(), (pictures(7), pictures(2)), preprocessing=SMALL, settings=QUICK)


def test_settings_refuse_what_cannot_be():
    for wrong in ({"epochs": 0}, {"batch_size": 1}, {"label_smoothing": 1.0}, {"epoch": 3}, {"augment": {"scale": (0.1, 1)}}):
        with pytest.raises(ValidationError):
            TrainSettings.model_validate(wrong)


def test_augmentation_changes_nothing_unless_asked():
    pixels = pictures(4).pixels
    assert augment(pixels, Augment()) is pixels


def test_augmentation_moves_and_mirrors():
    pixels = pictures(64, classes=1).pixels  # all bright on the left
    mirrored = augment(pixels, Augment(flip=True))
    assert mirrored.dtype == torch.uint8
    turned = (mirrored == pixels.flip(3)).flatten(1).all(1)
    assert ((mirrored == pixels).flatten(1).all(1) | turned).all()
    assert 16 < int(turned.sum()) < 48
    moved = augment(pixels, Augment(shift=0.25))
    edges = (moved[:, 0].float().mean(1) > 100).sum(1)  # bright columns: 8, and up to 4 more or fewer
    assert set(edges.tolist()) <= set(range(3, 14))
    assert len(set(edges.tolist())) > 4


def test_finetune_from_a_model_keeps_its_head_when_the_classes_are_the_same():
    start = small_artifact()
    same, other = (starting_model(start, classes, seed=0) for classes in (SIDES[:2], SIDES))
    head = build(start).classifier[1].weight
    assert torch.equal(same.classifier[1].weight, head)
    assert other.classifier[1].weight.shape == (3, 16)
    assert torch.equal(next(other.parameters()), next(build(start).parameters()))
    reordered = starting_model(start, ("right", "left"), seed=0)
    assert not torch.equal(reordered.classifier[1].weight, head)


def test_finetune_writes_an_artifact_with_its_origin(tmp_path: Path):
    start = small_artifact()
    made = finetune(training_set(96, classes=3), start=start, settings=QUICK, command="nightlabel prepare finetune")
    assert made.labels == SIDES
    assert made.architecture.classes == 3
    saved = save_artifact(made, str(tmp_path / "model"))
    assert saved == load_artifact(str(tmp_path / "model"))
    record = json.loads((tmp_path / "model" / "artifact.json").read_text())
    assert record["parents"] == [start.digest]
    assert record["command"] == "nightlabel prepare finetune"
    assert record["data"]["images"] == {"train": 87, "validation": 9}
    assert record["data"]["settings"]["seed"] == 0
    assert record["metrics"]["accuracy"] > 0.9
    accuracy = measure(build(saved), pictures(30, classes=3), Normalise(SMALL, torch.device("cpu")), batch_size=8)[1]
    assert accuracy > 0.9


def test_random_start_is_a_resnet18_and_repeats():
    settings = TrainSettings(epochs=1, batch_size=16)
    first, second = (finetune(training_set(20), settings=settings) for _ in range(2))
    assert first.digest == second.digest
    assert first.architecture.depths == (2, 2, 2, 2)
    assert first.origin.parents == ()


def test_split_holds_out_a_share_of_every_class():
    data = pictures(60, classes=3)
    kept, held = split(data, 0.1, seed=1)
    assert torch.bincount(held.labels).tolist() == [2, 2, 2]
    images = {image.numpy().tobytes() for image in (*kept.pixels, *held.pixels)}
    assert len(images) == 60 == len(kept) + len(held)
    assert len(split(pictures(4), 0.1, seed=1)[1]) == 1


def test_read_labelled_counts_what_it_leaves_out(tmp_path: Path):
    images = pictures(12, classes=2)
    samples = [(f"{n:02d}", png(images.pixels[n]), f" {10 - n % 2}\n") for n in range(10)]
    samples += [("10", png(images.pixels[10]), None), ("11", b"<html>", "9"), ("12", b"", None)]
    data = read_labelled(write_shard(tmp_path / "a", samples), preprocessing=SMALL)
    assert data.classes == ("9", "10")  # by size, not by alphabet
    assert data.left_out == {"NO_LABEL": 1, "NOT_AN_IMAGE": 2}
    assert torch.equal(data.images.pixels, images.pixels[:10])
    assert data.images.labels.tolist() == [1, 0] * 5


def test_given_classes_keep_their_order(tmp_path: Path):
    samples = [(str(n), png(image), SIDES[n % 2]) for n, image in enumerate(pictures(4).pixels)]
    data = read_labelled(write_shard(tmp_path / "a", samples), preprocessing=SMALL, classes=("top", "right", "left"))
    assert data.classes == ("top", "right", "left")
    assert data.images.labels.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        ([None, None], None, "no image has a label; required: a label for every image to train on. Check the label's name"),
        (["cat", "cat"], None, "every label is cat; required: two classes or more. Add images of other classes"),
        (["cat", "dog"], ("cat", "cow"), "dog; required: one of 2 classes, cat, cow. Correct the labels or name the class"),
    ],
)
def test_bad_labels_are_one_sentence(tmp_path: Path, labels: list[str | None], classes: tuple[str, ...] | None, says: str):
    samples = [(str(n), png(image), label) for n, (image, label) in enumerate(zip(pictures(2).pixels, labels, strict=True))]
    with pytest.raises(JobError) as caught:
        read_labelled(write_shard(tmp_path / "a", samples), preprocessing=SMALL, classes=classes)
    assert str(caught.value).endswith(f", cls: {says}.")


def test_a_broken_shard_is_an_input_error(tmp_path: Path):
    wanted = write_shard(tmp_path / "a", [("0", png(pictures(1).pixels[0]), "left")])
    shard = tmp_path / "a" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:1100])
    with pytest.raises(InputError, match=r"0\.tar"):
        read_labelled(wanted, preprocessing=SMALL)


def test_another_preprocessing_than_the_models_is_refused():
    start = make_artifact(
        Architecture("basic", (1, 1), (8, 16), 2, embedding_size=8),
        small_network().state_dict(),
        labels=SIDES[:2],
        preprocessing=Preprocessing(size=32),
    )
    with pytest.raises(JobError, match=r"size=16.*required:.*size=32.*Read the images with the model's preprocessing"):
        finetune(training_set(), start=start, settings=QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(UnfitError, match="torch sees no CUDA device"):
        finetune(training_set(), settings=QUICK, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_in_float16():
    made = finetune(training_set(96), start=small_artifact(), settings=QUICK, device="cuda")
    assert made.origin.metrics["accuracy"] > 0.9
