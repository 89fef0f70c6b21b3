"""evaluation.html: the record of an evaluation as one file with plots, nothing loaded from elsewhere, no scripts.

Geometry is worked out here, the template only places it. A matrix of 1,000 classes has a million cells and no reader, so the page
shows the classes with the most mistakes; the JSON beside it has them all.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pipeline.prepare.evaluation import Record, percent, rate
from pipeline.prepare.metrics import most_confused, worst_confusions

SHOWN = 24  # mistakes
THUMBNAIL = 96  # pixels, 3-4 kB each
MATRIX = 30  # classes in the heat map: at 18 pixels a cell it fills the page
TABLE = 100  # classes in the table
PAIRS = 10
PLOT = 280  # edge of the reliability diagram, pixels
_LETTER = 6.2  # width of a letter of 11 pixels, on average
_LONGEST = 22  # letters of a class name beside the matrix


@dataclass(frozen=True, slots=True)
class Cell:
    """`x`, `y` in cells; `shade` 0 to 1, the root of the share of the true class's images, so that 5 % can be seen."""

    x: int
    y: int
    count: int
    shade: float
    title: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A confusion matrix: rows are the truth. Around it, in pixels, room for the names: left, above, and right of the last."""

    names: tuple[str, ...]
    cells: tuple[Cell, ...]
    edge: int
    left: int
    above: int
    right: int
    omitted: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin of the reliability diagram, in pixels from the top left of a PLOT × PLOT square; `tall` is its share of images."""

    x: float
    width: float
    top: float
    tick: float
    tall: float
    title: str


def render(record: Record) -> bytes:
    """The page."""
    environment = Environment(autoescape=True, trim_blocks=True, loader=PackageLoader("pipeline.prepare", "."))
    environment.filters |= {"percent": percent, "thousands": "{:,}".format, "rate": rate}
    labels = [one["label"] for one in record["classes"]]
    confusion = np.array(record["confusion"], dtype=np.int64)
    classes = sorted((one for one in record["classes"] if one["images"]), key=lambda one: one["recall"])
    return (
        environment.get_template("evaluation.html.j2")
        .render(
            r=record,
            heat=heat_map(confusion, labels),
            bars=bars(record["reliability"]),
            plot=PLOT,
            pairs=[(labels[truth], labels[answer], count) for truth, answer, count in worst_confusions(confusion, PAIRS)],
            classes=classes[:TABLE],
            with_images=len(classes),
        )
        .encode()
    )


def heat_map(confusion: np.ndarray, labels: Sequence[str]) -> HeatMap:
    """At most MATRIX classes, those with the most mistakes; shares are of all images of a class, shown or not."""
    picked = list(range(len(labels))) if len(labels) <= MATRIX else most_confused(confusion, MATRIX)
    cells = []
    for y, truth in enumerate(picked):
        images = int(confusion[truth].sum())
        for x, answer in enumerate(picked):
            count = int(confusion[truth, answer])
            title = f"{labels[truth]}, taken for {labels[answer]}: {count:,} of {images:,}"
            cells += [Cell(x, y, count, math.sqrt(count / images), title)] if count else []
    names = tuple(_short(labels[number]) for number in picked)
    edge = max(18, min(56, 560 // len(picked)))
    longest = _LETTER * max(map(len, names))  # above the columns they stand at 50 degrees
    room = {"left": round(12 + longest), "above": round(18 + 0.77 * longest), "right": round(12 + 0.64 * longest)}
    return HeatMap(names, tuple(cells), edge, **room, omitted=len(labels) - len(picked))


def bars(reliability: Sequence[dict[str, Any]]) -> list[Bar]:
    """Bins with images."""
    most = max(part["images"] for part in reliability)
    return [
        Bar(
            x=PLOT * part["from"],
            width=PLOT * (part["to"] - part["from"]),
            top=PLOT * (1 - part["accuracy"]),
            tick=PLOT * (1 - part["confidence"]),
            tall=part["images"] / most,
            title=f"{part['images']:,} images, mean score {part['confidence']:.1%}, {part['accuracy']:.1%} of them right",
        )
        for part in reliability
        if part["images"]
    ]


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 [3, S, S] as a data URI of a JPEG of at most THUMBNAIL pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
