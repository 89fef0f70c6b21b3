"""The images of a training: read, given their classes, split, and what there is to say of them, on a screen and in the artifact.

Images that cannot be decoded or carry no label are left out, counted and named; an image with an unknown label is an error: the
one is how collections are, the other a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import JobError
from pipeline.job.training import Data
from pipeline.prepare.data import NO_LABEL, LeftOut
from pipeline.prepare.images import Images, find_classes, fitting, labelled, overlap, read_images, split
from pipeline.prepare.shelf import Found, Shelf


@dataclass(frozen=True)
class TrainingData:
    """(training, validation) images, `facts` for the artifact and `lines` for the screen."""

    images: tuple[Images, Images]
    classes: tuple[str, ...]
    facts: dict[str, Any]
    lines: tuple[str, ...]


def read_data(wanted: Data, *, seed: int, known: tuple[str, ...], shelf: Shelf) -> TrainingData:
    """Of a training on labels. The classes are those that the job gives, else those `known` to the model to begin from when the
    labels are exactly these, else those found."""
    train = read_images(wanted.train, label=wanted.label, label_key=wanted.label_key, classes=wanted.classes, shelf=shelf)
    classes = find_classes(train.texts, wanted.classes or fitting(train.texts, known), where=_where(wanted))
    return _together(wanted, train, _read_held(wanted, classes, shelf=shelf), classes=classes, seed=seed)


def read_taught(wanted: Data, *, seed: int, classes: tuple[str, ...], shelf: Shelf) -> TrainingData:
    """Of a training on the answers of a teacher of these classes: images without a label are trained on too, and when no labels
    are named, those to validate with have none either. Raises JobError for named labels of which none is there."""
    label, key = wanted.label, wanted.label_key
    train = read_images(wanted.train, label=label, label_key=key, classes=classes, unlabelled=True, shelf=shelf)
    held = _read_held(wanted, classes, shelf=shelf)
    if label is not None and held is None and not any(train.texts):
        do = "Name some as data.validation, or set data.label to null: then agreement with the teacher chooses"
        raise JobError(f"{_where(wanted)}: no image has a label", need="labelled images to choose the best epoch by", do=do)
    if any(train.texts):
        find_classes(train.texts, classes, where=_where(wanted))
    return _together(wanted, train, held, classes=classes, seed=seed)


def _read_held(wanted: Data, classes: tuple[str, ...], *, shelf: Shelf) -> Found | None:
    if wanted.validation is None:
        return None
    label, key, beside = wanted.label, wanted.label_key, replace(shelf, name="validation")
    return read_images(wanted.validation, label=label, label_key=key, classes=classes, unlabelled=label is None, shelf=beside)


def _where(wanted: Data) -> str:
    """Of the labels to train on, for what is said of them."""
    return ", ".join(filter(None, (*wanted.train.uris, wanted.label, wanted.label_key)))


def _together(wanted: Data, train: Found, held: Found | None, *, classes: tuple[str, ...], seed: int) -> TrainingData:
    images = labelled(train, classes)
    uris = wanted.validation.uris if wanted.validation else ()
    parts = split(images, wanted.validation_share, seed=seed) if held is None else (images, labelled(held, classes))
    trained_on = 0 if held is None else overlap(*parts)
    left_out = {"train": train.left_out} | ({"validation": held.left_out} if held is not None else {})
    facts = {
        "uris": list(wanted.train.uris),
        "validation_uris": list(uris),
        "label": wanted.label,
        **({"label_key": wanted.label_key} if wanted.label_key else {}),
        "images": {"train": len(parts[0]), "validation": len(parts[1])},
        **({"validation_also_trained_on": trained_on} if trained_on else {}),
        "unlabelled": int((parts[0].labels == NO_LABEL).sum()),
        "left_out": {name: dict(part.counts) for name, part in left_out.items()},
        "left_out_images": {name: part.keys for name, part in left_out.items()},
    }
    return TrainingData(parts, classes, facts, tuple(_lines(facts, left_out, len(classes))))


def _lines(facts: dict[str, Any], left_out: dict[str, LeftOut], classes: int) -> Iterator[str]:
    images, unlabelled = facts["images"], facts["unlabelled"]
    bare = f" ({unlabelled:,} without a label)" if unlabelled else ""
    yield f"{images['train']:,} images to train on{bare}, {images['validation']:,} to validate with, {classes:,} classes"
    if trained_on := facts.get("validation_also_trained_on"):
        yield f"{trained_on:,} of {images['validation']:,} validation images are trained on too, others would judge better"
    for name, part in left_out.items():
        if part.counts:
            yield f"left out of {'the training' if name == 'train' else 'the validation'} images: {part}"
