"""Small shards to train on: 16-pixel pictures whose class is the side that is bright, and small networks that know nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shards import tar_bytes

from pipeline.artifact import Artifact, make_artifact
from pipeline.decode import decode
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet
from pipeline.prepare.images import Images
from pipeline.preprocess import resize_and_crop

SIDES = ("left", "right", "top")
SMALL = Preprocessing(size=16, crop_pct=1.0)
TINY = Architecture("basic", (1, 1), (8, 16), 2, embedding_size=8)


def picture(number: int, *, classes: int = 2, seed: int = 3) -> bytes:
    """A PNG of noise whose bright side is SIDES[number % classes]."""
    pixels = np.random.default_rng([seed, number]).integers(0, 60, (16, 16, 3), dtype=np.uint8)
    where = {"left": np.s_[:, :8], "right": np.s_[:, 8:], "top": np.s_[:8, :]}[SIDES[number % classes]]
    pixels[where] += 150
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_shards(folder: Path, count: int, *, classes: int = 2, label: str = "number", first: int = 0) -> str:
    """Tars of 32 pictures with their class in .cls, as a number, a name or not at all (`none`); the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(first, first + count, 32):
        members: dict[str, bytes] = {}
        for number in range(at, min(at + 32, first + count)):
            members[f"{number:04d}.png"] = picture(number, classes=classes)
            if label != "none":
                side = number % classes
                members[f"{number:04d}.cls"] = (SIDES[side] if label == "name" else str(side)).encode()
        (folder / f"{at:04d}.tar").write_bytes(tar_bytes(members))
    return str(folder)


def logits_of(network: ResNet, images: Images, preprocessing: Preprocessing) -> torch.Tensor:
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    crops = [resize_and_crop(decode(images[row], max_pixels=10**6), preprocessing) for row in range(len(images))]
    pixels = torch.stack([(torch.tensor(crop) / 255 - mean) / std for crop in crops])
    with torch.inference_mode():
        return network.eval()(pixels)


def accuracy(network: ResNet, images: Images, preprocessing: Preprocessing = SMALL) -> float:
    """Share of the images whose best class is the label's."""
    return float((logits_of(network, images, preprocessing).argmax(dim=1).numpy() == images.labels).mean())


def loss_of(network: ResNet, images: Images, preprocessing: Preprocessing = SMALL) -> float:
    """Mean cross entropy."""
    logits = logits_of(network, images, preprocessing)
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(images.labels)))


def tiny_network(classes: int = 2, *, seed: int = 0) -> ResNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return ResNet(Architecture("basic", (1, 1), (8, 16), classes, embedding_size=8))


def tiny_artifact(labels: tuple[str, ...] = SIDES[:2], *, preprocessing: Preprocessing = SMALL, wide: int = 16) -> Artifact:
    architecture = Architecture("basic", (1, 1), (8, wide), len(labels), embedding_size=8)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = ResNet(architecture).state_dict()
    return make_artifact(architecture, state, labels=labels, preprocessing=preprocessing)
