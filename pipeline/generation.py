"""Generations: units whose failed images were labelled again, each as a whole new object beside the old one, which stays.

    <root>/data/<unit>.parquet                            what a run committed
    <root>/generations/000001/data/<unit>.parquet         the same unit: rows that were retried are new, all others are copied
    <root>/generations/000001/runs/000001/manifest.json   its last object

A generation is an output in the output, with a plan, commits and a manifest of the same kind. The newest version of a unit is the
one in the highest generation, so a reader takes whole files and never merges rows; the price is that a unit's other rows, some
100 bytes each, are written once more. A plain glob of `data/` shows what the runs committed; the newest version of every row is

    select key, label from read_parquet('labels/<fingerprint>/**/data/*.parquet', filename = true)
    qualify filename = max(filename) over (partition by parse_filename(filename))

and a published table has it as it is.
"""

from __future__ import annotations

import re

from pipeline.errors import InputMissing
from pipeline.log import Log
from pipeline.storage import Object, Store, join

_OBJECT = re.compile(r"/generations/(\d{6})/data/([0-9a-f]{32})\.parquet$")


def newest(log: Log) -> dict[str, Object]:
    """The newest version of every unit, tombstones included."""
    found = {item.uri.rpartition("/")[2].removesuffix(".parquet"): item for item in listing(log.store, join(log.root, "data"))}
    versions = [
        (match[1], match[2], item)
        for item in listing(log.store, join(log.root, "generations"))
        if (match := _OBJECT.search(item.uri))
    ]
    for _, unit_id, item in sorted(versions, key=lambda version: version[0]):
        found[unit_id] = item
    return found


def listing(store: Store, folder: str) -> list[Object]:
    """Everything below a folder, nothing when it is not there."""
    try:
        return list(store.list(folder + "/"))
    except InputMissing:
        return []
