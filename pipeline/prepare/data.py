"""Labelled shards: image rows as the main job reads them, and the class of each.

Reader, decoder and resize are those of labelling, so a model never sees other pixels in training or measuring than at work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.careful import CarefulLimits
from pipeline.columns import UNREADABLE
from pipeline.cut import check_inputs, cut, list_inputs
from pipeline.errors import JobError, kind_of
from pipeline.prepare.look import looked_at, see
from pipeline.read import read_unit
from pipeline.spec import Input, Limits
from pipeline.storage import Object, RangeFile, Store, open_input
from pipeline.unit import Part, Unit

NO_LABEL = -1
MAX_PIXELS = Limits().max_pixels  # as in labelling
_PATIENCE = CarefulLimits(Limits().decode_timeout, Limits().decode_memory)  # as in labelling
SPREAD = 16  # shards that a number of images comes from: of each one a first range of 8 MB is fetched
_LISTED, _SHOWN = 50, 3  # keys of images left out, of each reason: those that are recorded, and those on a screen


@dataclass
class LeftOut:
    """Images that are not used: how many, by failure class or NO_LABEL, and the keys of the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, keys: Sequence[str]) -> None:
        if keys:
            self.keys.setdefault(reason, []).extend(keys[: max(0, _LISTED - self.counts[reason])])
            self.counts[reason] += len(keys)

    def add_failed(self, decoded: pa.Table) -> None:
        """Those of a block from `preprocess` that have no pixels."""
        failed = decoded.filter(pc.is_valid(decoded["error_class"]))
        for reason in pc.unique(failed["error_class"]).to_pylist():
            self.add(reason, failed["key"].filter(pc.equal(failed["error_class"], reason)).to_pylist())

    def __str__(self) -> str:
        """`2 TRUNCATED (a, b), 57 NO_LABEL (c, d, e, …)`; empty for none."""
        return ", ".join(
            f"{count:,} {reason} ({', '.join(self.keys[reason][:_SHOWN])}{', …' if count > _SHOWN else ''})"
            for reason, count in self.counts.items()
        )


def image_rows(
    wanted: Input, *, label: str | None = None, label_key: str | None = None, most: int | None = None
) -> Iterator[pa.Table]:
    """Tables of rows.IMAGE, plus the column `label` when one is named, or what is under `label_key` in each of its objects. With
    `most`, at most so many images: from the front of SPREAD shards alike, for in whole shards, as in loose images, there is often
    one class after the other.

    Raises what an end row says about a unit that cannot be read: InputError, or what may be the store's fault.
    """
    wanted = wanted.model_copy(update={"keep": (label,) if label and wanted.format != "images" else ()})
    store = open_input(wanted)
    inputs = list_inputs(store, wanted).inputs
    check_inputs(store, wanted, inputs)
    if most is None or wanted.format == "images":
        yield from _rows(store, wanted, inputs if most is None else _evenly(inputs, most), label=label, key=label_key)
        return
    # What a small one lacks, larger ones make up for.
    picked = sorted(_evenly(inputs, min(SPREAD, most)), key=lambda item: item.size)
    rest = [item for item in inputs if item not in picked]
    for place, item in enumerate(picked + rest):
        share = -(-most // max(1, len(picked) - place))
        for table in _rows(store, wanted, [item], label=label, key=label_key) if share else ():
            images = table.slice(0, share)
            share, most = share - images.num_rows, most - images.num_rows
            yield images
            if not share:
                break


def with_failures(tables: Iterable[pa.Table], *, processes: int, quiet: bool = False) -> Iterator[pa.Table]:
    """Tables of `image_rows` with the failure of each image that cannot be decoded, as so many processes beside this one find;
    `quiet` as in `looked_at`."""
    return looked_at(tables, partial(see, max_pixels=MAX_PIXELS), _PATIENCE, processes=processes, quiet=quiet)


def listing(wanted: Input) -> list[list[Any]]:
    """URI, size and etag of every input: what a job's key is made of, beside what it says."""
    return [[item.uri, item.size, item.etag] for item in list_inputs(open_input(wanted), wanted).inputs]


def _evenly(inputs: list[Object], most: int) -> list[Object]:
    """At most so many of them, from the first to the last."""
    count = min(most, len(inputs))
    return [inputs[place * len(inputs) // count] for place in range(count)]


def _rows(store: Store, wanted: Input, inputs: list[Object], *, label: str | None, key: str | None) -> Iterator[pa.Table]:
    # A shard by itself: what are labels may be of another type in the next one.
    units = cut(store, wanted, inputs, tasks=1) if wanted.format == "images" else [Unit((Part.of(item),)) for item in inputs]
    for unit in units:
        for table in read_unit(store, unit, wanted=wanted):
            for end in table.filter(pc.is_null(table["key"])).to_pylist():
                if end["error_class"] is not None:
                    raise kind_of(end["error_class"])(end["error"].rstrip("."))
            images = table.filter(pc.is_valid(table["key"]))
            if images.num_rows:
                yield _with_labels(images, wanted, label, key)


def _with_labels(images: pa.Table, wanted: Input, label: str | None, key: str | None) -> pa.Table:
    if label is None:
        return images
    if wanted.format == "images":
        folders = [source.rpartition("/")[0].rpartition("/")[2] for source in images["source"].to_pylist()]
        return images.append_column(label, pa.array(folders, pa.string()))
    return _with_texts(images, label) if key is None else _with_members(images, label, key)


def _with_texts(images: pa.Table, label: str) -> pa.Table:
    """Image rows with their labels as text. Raises JobError for a column that cannot be."""
    column = images[label]
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # Arrow does not look at what a file says is text
    except pa.ArrowNotImplementedError:
        got = f"is {column.type}"
    except pa.ArrowInvalid:
        got = "is not UTF-8"
    else:
        return images.set_column(images.schema.get_field_index(label), label, texts)
    key = "name a key of this one as data.label_key" if pa.types.is_struct(column.type) else "write this one as text"
    do = f"Name another column as data.label, or {key}"
    raise JobError(f"{images['source'][0]}: column {label} {got}", need="labels as text or numbers", do=do)


def _with_members(images: pa.Table, label: str, key: str) -> pa.Table:
    """Image rows with what their labels, JSON or structs, have under `key`, as text; None where that is null or not there. Raises
    JobError for a label that is no object, and for what is no name and no number."""
    texts: list[str | None] = []
    for image, content in zip(images["key"].to_pylist(), images[label].to_pylist(), strict=True):
        try:
            whole = {} if content is None else content if isinstance(content, dict) else json.loads(content)
        except (TypeError, ValueError, RecursionError):  # neither text nor a struct; not JSON, or not UTF-8; too deep
            whole = None
        value = whole.get(key) if isinstance(whole, dict) else None
        if not isinstance(whole, dict) or not isinstance(value, str | int | None):
            got = f"has {str(value)[:60]} as {key}" if isinstance(whole, dict) else "is no object"
            need = f"a JSON object or a struct with a name or a number as {key}"
            raise JobError(f"{images['source'][0]}: {label} of {image} {got}", need=need, do="Correct it, or data.label_key")
        texts.append(value if isinstance(value, str | None) else json.dumps(value))  # true, as Arrow casts it
    return images.set_column(images.schema.get_field_index(label), label, pa.array(texts, pa.string()))


def has_labels(wanted: Input, label: str) -> bool:
    """False for Parquet files of which not one has the column; every image of a tar may have its sidecar or not."""
    if wanted.format != "parquet":
        return True
    store = open_input(wanted)
    try:
        return any(label in pq.read_schema(RangeFile(store, item)).names for item in list_inputs(store, wanted).inputs)
    except UNREADABLE:
        return True  # broken: whoever reads it says what is wrong


def label_texts(column: pa.ChunkedArray) -> list[str | None]:
    """Labels without white space; None where there is none."""
    texts = pc.utf8_trim_whitespace(column).to_pylist()
    return [text or None for text in texts]


def class_index(images: pa.Table, label: str, classes: Sequence[str], *, key: str | None = None) -> np.ndarray:
    """The number in `classes` of each label of a table of `image_rows`, int64 [N], NO_LABEL where there is none. `key` is for
    words. Raises JobError for a label that is none of `known_labels`, with the first image that has it."""
    texts, known = label_texts(images[label]), known_labels(classes)
    wrong = next((row for row, text in enumerate(texts) if text is not None and text not in known), None)
    if wrong is None:
        return np.array([NO_LABEL if text is None else known[text] for text in texts], dtype=np.int64)
    text = str(texts[wrong])
    said = f"has {text[:60]} as {key}" if key else f"is {text[:60]}"
    got = f"{images['source'][wrong]}: {label} of {images['key'][wrong]} {said}"
    if text in classes:
        do = "Give its number" if _have_numbers(classes) else "Rename one of them"
        raise JobError(f"{got}, which names two classes", need="labels that name one", do=do)
    others = sorted({other[:60] for other in texts if other is not None and other not in known} - {text[:60]})
    more = f", others are {', '.join(others[:4])}" if others else ""
    need = f"one of {len(classes)} classes, {', '.join(classes[:5])}" + (", …" if len(classes) > 5 else "")
    need += ", or its number" if _have_numbers(classes) else ""
    raise JobError(got + more, need=need, do="Correct the labels or name the class")


def known_labels(classes: Sequence[str]) -> dict[str, int]:
    """Every label that stands for one class, with the number of that: its name, unless two have it, or its number, when no class
    is named by one."""
    counts = Counter(classes)
    numbers = {str(number): number for number in range(len(classes))} if _have_numbers(classes) else {}
    return numbers | {name: number for number, name in enumerate(classes) if counts[name] == 1}


def _have_numbers(classes: Sequence[str]) -> bool:
    return not any(name.isdigit() for name in classes)
