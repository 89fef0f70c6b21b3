"""Labelled shards → artifact: read the way the main job reads, train from a model or a random start, keep what it came from.

Reader, decoder and resize are those of labelling, so a model never sees other pixels in training than at work. Images that cannot
be decoded or carry no label are left out and counted in the artifact, an image with an unknown label is an error: the one is how
collections are, the other a mistake. The price: one process reads, and all images are held in memory (see `train`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from pipeline.artifact import Artifact, Origin, build, make_artifact
from pipeline.cut import cut, list_inputs
from pipeline.errors import InputError, JobError, UnfitError
from pipeline.huggingface import Architecture
from pipeline.prepare.train import Epoch, Labelled, TrainSettings, train
from pipeline.preprocess import Preprocess
from pipeline.preprocessing import Preprocessing
from pipeline.read import read_unit
from pipeline.resnet import ResNet
from pipeline.rows import pixels_view
from pipeline.spec import Input
from pipeline.storage import open_store

RESNET18 = Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), classes=1)
VALIDATION = 0.1  # of the images: at 898 digits one of them is 1.1 % of accuracy, enough to choose an epoch by
MAX_PIXELS = 100 * 10**6


@dataclass(frozen=True)
class TrainingSet:
    """What was read: images with labels (an index into `classes`), and how many were left out, by reason."""

    images: Labelled
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    left_out: dict[str, int]
    uris: tuple[str, ...]


def read_labelled(
    wanted: Input,
    *,
    preprocessing: Preprocessing,
    label: str = "cls",
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> TrainingSet:
    """Read and prepare every image of `wanted`; its label is the sidecar or column `label`, as text.

    Without `classes` they are the labels found, numbers by size and all else by alphabet. Raises JobError for no labels, one
    class only, or a label outside `classes`; InputError for an input that cannot be read.
    """
    wanted = wanted.model_copy(update={"keep": (label,)})
    prepare = Preprocess(preprocessing, max_pixels=max_pixels, threads=torch.get_num_threads())
    pixels: list[np.ndarray] = []
    texts: list[str] = []
    left_out: Counter[str] = Counter()
    for table in map(prepare, _image_rows(wanted)):
        names = pc.utf8_trim_whitespace(table[label].cast("string"))
        named = pc.fill_null(pc.not_equal(names, ""), False)
        sound = pc.is_valid(table["pixels"])
        left_out.update(table["error_class"].drop_null().to_pylist())
        left_out["NO_LABEL"] += pc.sum(pc.and_not(sound, named)).as_py() or 0
        taken = pc.and_(sound, named)
        pixels.append(pixels_view(table["pixels"].filter(taken), preprocessing.size))
        texts += names.filter(taken).to_pylist()
    found = _classes(texts, classes, where=f"{', '.join(wanted.uris)}, {label}")
    index = {name: number for number, name in enumerate(found)}
    images = Labelled(torch.from_numpy(np.concatenate(pixels)), torch.tensor([index[text] for text in texts]))
    return TrainingSet(images, found, preprocessing, dict(+left_out), wanted.uris)


def _image_rows(wanted: Input) -> Iterator[pa.Table]:
    """The image rows of every unit. Raises InputError with what an end row says about its unit."""
    store = open_store(wanted.uris[0], wanted.s3)
    for unit in cut(store, wanted, list_inputs(store, wanted), tasks=1):
        for table in read_unit(store, unit, wanted=wanted):
            images = table.filter(pc.is_valid(table["key"]))
            for end in table.filter(pc.is_null(table["key"])).to_pylist():
                if end["error_class"] is not None:
                    raise InputError(end["error"].rstrip("."))
            if images.num_rows:
                yield images


def _classes(texts: list[str], given: Sequence[str] | None, *, where: str) -> tuple[str, ...]:
    found = set(texts)
    if not found:
        raise JobError(f"{where}: no image has a label", need="a label for every image to train on", do="Check the label's name")
    if given is not None and (unknown := found - set(given)):
        shown = ", ".join(sorted(unknown)[:5])
        need = f"one of {len(given)} classes, {', '.join(given[:5])}" + ", …" * (len(given) > 5)
        raise JobError(f"{where}: {shown}", need=need, do="Correct the labels or name the class")
    if len(found) < 2:
        raise JobError(f"{where}: every label is {min(found)}", need="two classes or more", do="Add images of other classes")
    if given is not None:
        return tuple(given)
    numeric = all(text.isascii() and text.isdigit() for text in found)
    return tuple(sorted(found, key=lambda text: (int(text), text) if numeric else (0, text)))


def finetune(
    data: TrainingSet,
    *,
    start: Artifact | None = None,
    settings: TrainSettings | None = None,
    command: str = "",
    device: str = "cpu",
    progress: Callable[[Epoch], None] | None = None,
) -> Artifact:
    """Train on `data` and return the artifact, in memory; `save_artifact` writes it.

    Starts from `start`, whose classifier is replaced unless it has the same classes in the same order, or else from a random
    ResNet-18. Accuracy is that of a validation split the weights never saw, but the best epoch was chosen by it. Raises JobError
    for fewer images than a batch or a preprocessing that is not that of `start`.
    """
    settings = settings or TrainSettings()
    if start is not None and start.preprocessing != data.preprocessing:
        got = f"the images were prepared by {data.preprocessing}"
        raise JobError(got, need=f"{start.preprocessing}, that of the model", do="Read the images with the model's preprocessing")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnfitError("training wants a GPU, and torch sees no CUDA device", do="Take the CPU, or repair the driver")
    model = starting_model(start, data.classes, seed=settings.seed)
    parts = split(data.images, VALIDATION, seed=settings.seed)
    if device.startswith("cuda"):
        model.to(device)
    result = train(model, parts, preprocessing=data.preprocessing, settings=settings, progress=progress)
    return make_artifact(
        _architecture(start, len(data.classes)),
        {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        labels=data.classes,
        preprocessing=data.preprocessing,
        origin=Origin(
            parents=() if start is None else (start.digest,),
            data=_facts(data, parts, settings),
            metrics=_metrics(result.best),
            command=command,
        ),
    )


def _metrics(best: Epoch) -> dict[str, Any]:
    return {"accuracy": best.accuracy, "validation_loss": best.validation_loss, "epoch": best.number}


def _facts(data: TrainingSet, parts: tuple[Labelled, Labelled], settings: TrainSettings) -> dict[str, Any]:
    return {
        "uris": list(data.uris),
        "images": {"train": len(parts[0]), "validation": len(parts[1])},
        "left_out": data.left_out,
        "settings": settings.model_dump(mode="json"),
    }


def split(images: Labelled, share: float, *, seed: int) -> tuple[Labelled, Labelled]:
    """(training, validation) images, disjoint, at random; of every class about `share`, rounded, goes to validation, and at least
    one image in all."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    rank = torch.zeros(len(order), dtype=torch.int64)  # of an image among those of its class
    for value in range(int(labels.max()) + 1):
        mine = labels == value
        rank[mine] = torch.arange(int(mine.sum()))
    counts = torch.bincount(labels)[labels]
    held = rank < (counts * share).round()
    held[0] |= not bool(held.any())
    kept, out = order[~held], order[held]
    return Labelled(images.pixels[kept], images.labels[kept]), Labelled(images.pixels[out], images.labels[out])


def starting_model(start: Artifact | None, classes: tuple[str, ...], *, seed: int) -> ResNet:
    """The network to train: `start` with its own classifier or a fresh one, or a random ResNet-18. Leaves the global random
    numbers as they were."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if start is None:
            return _initialised(ResNet(_architecture(None, len(classes))))
        model = build(start)
        if start.labels != classes:
            model.classifier[1] = nn.Linear(start.architecture.features, len(classes))
        return model


def _architecture(start: Artifact | None, classes: int) -> Architecture:
    return replace(RESNET18 if start is None else start.architecture, classes=classes)


def _initialised(model: ResNet) -> ResNet:
    """He's initialisation for ReLU, fan out (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
