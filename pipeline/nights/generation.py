"""Generations: units whose failed images were labelled again, each as a whole new object beside the old one, which stays.

    <root>/data/<unit>.parquet                            what a run committed
    <root>/generations/000001/retry.json                  what is retried; whoever creates it has the number
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
from pipeline.footer import Footer
from pipeline.log import Log
from pipeline.storage import Object, Store, join
from pipeline.verify import validate

_OBJECT = re.compile(r"(?:/generations/(\d{6}))?/data/([0-9a-f]{32})\.parquet$")
RUN = "000001"  # a generation's only one


class Generation(Log):
    """The log of generation `number` of an output."""

    def __init__(self, base: Log, number: int) -> None:
        super().__init__(base.store, join(base.root, "generations", f"{number:06d}"))
        self.base, self.number = base, number

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    @property
    def note_key(self) -> str:
        return join(self.root, "retry.json")


def generations(log: Log) -> list[Generation]:
    """All that were begun, oldest first."""
    keys = [item.uri for item in listing(log.store, join(log.root, "generations")) if item.uri.endswith("/retry.json")]
    return [Generation(log, int(key.split("/")[-2])) for key in sorted(keys)]


def newest(log: Log, *, before: int | None = None) -> dict[str, Object]:
    """The newest version of every unit, tombstones included; with `before`, as it was before that generation."""
    found: dict[str, tuple[int, Object]] = {}
    for item in [*listing(log.store, join(log.root, "data")), *listing(log.store, join(log.root, "generations"))]:
        match = _OBJECT.search(item.uri)
        if match is None or (before is not None and int(match[1] or 0) >= before):
            continue
        version = int(match[1] or 0)
        if version >= found.get(match[2], (0, item))[0]:
            found[match[2]] = version, item
    return {unit_id: item for unit_id, (_, item) in found.items()}


def validate_all(log: Log) -> tuple[list[Footer], list[str]]:
    """As `verify.validate`, with the generations: (the newest footer of every unit, what is wrong)."""
    footers, problems = validate(log)
    latest = {footer.unit: footer for footer in footers}
    rows = {footer.unit: footer.rows_in for footer in footers}
    for generation in generations(log):
        found, wrong = validate(generation)
        problems += wrong
        for footer in found:
            if footer.rows_in != rows.get(footer.unit):
                was = rows.get(footer.unit)
                problems.append(f"{generation.data_key(footer.unit)}: {footer.rows_in} rows of a unit that has {was}.")
            latest[footer.unit] = footer
    return list(latest.values()), problems


def listing(store: Store, folder: str) -> list[Object]:
    """Everything below a folder, nothing when it is not there."""
    try:
        return list(store.list(folder + "/"))
    except InputMissing:
        return []
