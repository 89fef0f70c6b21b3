"""What an evaluation found: one record as JSON, as lines for a screen, and as the folder that holds it.

`subject` says what was measured, by digests and etags, and a folder is of one subject: the same job finds its result there and
measures nothing, any other is refused. So figures never stand beside a model or images that they are not of. The JSON is written
first and holds all that the page shows, pictures too, so a page that a kill has cost is drawn by the next run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import StoreError
from pipeline.job.recipe import Folder
from pipeline.prepare.data import LeftOut
from pipeline.prepare.metrics import Metrics
from pipeline.storage import check_writable, head_if_there, join, open_store, read_if_there

VERSION = 1
RECORD, PAGE = "evaluation.json", "evaluation.html"
LISTED = 10  # classes on the screen
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Images:
    """`read = measured + unlabelled + failed`; `failed` counts by failure class."""

    read: int
    measured: int
    unlabelled: int
    failed: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        if self.read != self.measured + self.unlabelled + sum(self.failed.values()):
            raise AssertionError(f"the counts do not add up: {self}")
        return {"read": self.read, "measured": self.measured, "unlabelled": self.unlabelled, "failed": dict(self.failed)}


def metrics_dict(metrics: Metrics, labels: tuple[str, ...]) -> dict[str, Any]:
    """As JSON holds it; a ratio of nothing is null."""
    columns = zip(labels, metrics.images.tolist(), metrics.precision.tolist(), metrics.recall.tolist(), strict=True)
    return {
        **headline(metrics),
        "classes": [
            {"label": label, "images": images, "precision": number(precision), "recall": number(recall)}
            for label, images, precision, recall in columns
        ],
        "confusion": metrics.confusion.tolist(),
        "reliability": [
            {
                "from": round(part.low, 4),
                "to": round(part.high, 4),
                "images": part.images,
                "confidence": number(part.confidence),
                "accuracy": number(part.accuracy),
            }
            for part in metrics.reliability
        ],
    }


def headline(metrics: Metrics) -> dict[str, float | None]:
    return {name: number(getattr(metrics, name)) for name in ("top1", "top5", "ece", "nll")}


def number(value: float) -> float | None:
    """Six digits after the point, enough for a million images; None for nan."""
    return None if math.isnan(value) else round(value, 6)


def summary(record: Record, where: str) -> dict[str, Any]:
    """What `nightlabel run --json` prints: everything but the long tables and the pictures, and where these are."""
    short = {name: value for name, value in record.items() if name not in ("confusion", "reliability")}
    mistakes = [{name: value for name, value in one.items() if name != "picture"} for one in record["mistakes"]]
    return {"where": where, **short, "mistakes": mistakes}


def lines(record: Record, where: str) -> Iterator[str]:
    """The table for a screen."""
    images, speed, other = record["images"], record["throughput"], record["compare"]
    classes = record["classes"]
    yield f"top-1   {record['top1']:.2%}"
    yield f"top-5   {record['top5']:.2%}" + (f", for there are only {len(classes)} classes" if len(classes) <= 5 else "")
    yield f"ECE     {record['ece']:.2%}, how far the scores are from the share that is right"
    yield f"images  {images['measured']:,} measured of {images['read']:,}{_left_out(record)}"
    yield f"img/s   {rate(speed['decode'])} decode, {rate(speed['predict'])} predict; {speed['how']}"
    if other is not None:
        on = "" if other["images"] == images["measured"] else f", on the {other['images']:,} images that both could score"
        yield f"agrees  {other['agreement']:.2%} with {other['digest'][:19]}…, {other['precision']}{on}"
        alone = f"right alone on {other['only_it_right']:,} images, this model on {other['only_model_right']:,}"
        yield f"        its top-1 {other['top1']:.2%}; {alone}"
    yield ""
    yield from _worst(classes)
    yield ""
    yield f"where   {where}"
    yield f"page    {join(where, PAGE)}"


def _worst(classes: list[dict[str, Any]]) -> Iterator[str]:
    shown = sorted((one for one in classes if one["images"]), key=lambda one: one["recall"])[:LISTED]
    more = len(classes) - len(shown)
    width = max(len("class"), *(len(one["label"][:30]) for one in shown))
    yield f"{'class':<{width}}  {'recall':>8}  {'precision':>9}  {'images':>7}"
    for one in shown:
        yield f"{one['label'][:30]:<{width}}  {percent(one['recall']):>8}  {percent(one['precision']):>9}  {one['images']:>7,}"
    if more:
        yield f"and {more:,} more {'class' if more == 1 else 'classes'}; the lowest recall is on top"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _left_out(record: Record) -> str:
    counts = Counter({"NO_LABEL": record["images"]["unlabelled"], **record["images"]["failed"]})
    told = str(LeftOut(+counts, record["left_out_images"]))
    return f"; left out: {told}" if told else ", none left out"


def rate(value: float) -> str:
    """Images a second, with a digit after the point below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def standing(folder: Folder, subject: Record) -> Record | None:
    """The evaluation of `subject` that the folder holds, or None when it is free. Raises StoreError when it holds another."""
    store = open_store(folder.uri, folder.s3)
    data = read_if_there(store, join(folder.uri, RECORD))
    if data is None:
        if head_if_there(store, join(folder.uri, PAGE)):
            need = "an empty folder, for nothing is overwritten"
            raise StoreError(f"output.uri {folder.uri} holds {PAGE} without {RECORD}", need=need, do="Give another output.uri")
        check_writable(folder.uri)
        return None
    try:
        record = json.loads(data)
        found = record["subject"]
        different = [name for name in subject if found[name] != subject[name]]
    except (ValueError, TypeError, KeyError):
        got = f"output.uri {join(folder.uri, RECORD)}: is not an evaluation of ours"
        raise StoreError(got, need="an empty folder", do="Give another output.uri") from None
    if different:
        got = f"output.uri {folder.uri} holds an evaluation with other {' and '.join(different)}"
        need = "an empty folder, for nothing is overwritten"
        raise StoreError(got, need=need, do="Give another output.uri")
    return dict(record)


def write(folder: Folder, record: Record) -> Record:
    """Create the record, and return the one that stands there then: ours, or that of a twin that was faster. Raises StoreError
    when something else came between."""
    store = open_store(folder.uri, folder.s3)
    if store.create(join(folder.uri, RECORD), as_json(record)):
        return record
    found = standing(folder, record["subject"])
    assert found is not None  # something made the create fail
    return found


def write_page(folder: Folder, draw: Callable[[], bytes]) -> None:
    """Create the page beside the record if it is not there."""
    store, uri = open_store(folder.uri, folder.s3), join(folder.uri, PAGE)
    if head_if_there(store, uri) is None:
        store.create(uri, draw())


def as_json(record: Record) -> bytes:
    """A line for every field, so that a matrix of 1,000 × 1,000 is one line and not a million."""
    texts = {name: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for name, value in record.items()}
    fields = (f"{json.dumps(name)}: {text}" for name, text in texts.items())
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()
