"""Generations: units whose failed images were labelled again, each as a whole new object beside the old one, which stays.

    <root>/data/<unit>.parquet                            what a run committed
    <root>/generations/000001/retry.json                  what is retried; whoever creates it has the number
    <root>/generations/000001/data/<unit>.parquet         the same unit: rows that were retried are new, all others are copied
    <root>/generations/000001/runs/000001/manifest.json   its last object

A generation is an output in the output, with a plan, commits and a manifest of the same kind. The newest version of a unit is the
one in the highest generation, so a reader takes whole files and never merges rows; the price is that a unit's other rows, some
100 bytes each, are written once more. One begins when all before it are over: two at once would each copy the rows that the other
labels. What a driver left behind that was killed before its plan, another closes with a plan of no units. A plain glob of `data/`
shows what the runs committed; the newest version of every row is

    select key, label from read_parquet('labels/<fingerprint>/**/data/*.parquet', filename = true)
    qualify filename = max(filename) over (partition by parse_filename(filename))

and a published table has it as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pipeline.errors import JobError
from pipeline.footer import Footer, read_footer
from pipeline.log import Log
from pipeline.storage import Object, Store, below, join, side_by_side
from pipeline.unit import Unit
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

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of failure that are retried, as its note has them."""
        return tuple(json.loads(self.store.read(self.note_key))["classes"])

    @property
    def is_over(self) -> bool:
        """Finished, or closed before it had a plan."""
        return any(run.finished or not run.whole for run in self.runs())

    def begin(self, classes: tuple[str, ...], units: list[Unit]) -> bool:
        """Stores note and plan. False: another driver stored the plan. Raises JobError when the note is for other classes."""
        self.store.create(self.note_key, json.dumps({"classes": classes}).encode())
        self.check(classes)
        return self.append(units, after=[]) is not None

    def check(self, classes: tuple[str, ...]) -> None:
        """Raises JobError when it is for other classes."""
        if self.classes != classes:
            do = f"Finish it first with --class {','.join(self.classes)}"
            raise JobError(f"the retry of {', '.join(self.classes)} is not finished", do=do)


def generations(log: Log) -> list[Generation]:
    """All that were begun, oldest first."""
    keys = [item.uri for item in below(log.store, log.root, "generations") if item.uri.endswith("/retry.json")]
    return [Generation(log, int(key.split("/")[-2])) for key in sorted(keys)]


def to_plan(log: Log, classes: tuple[str, ...]) -> Generation:
    """The unfinished one, or the one after the last. Raises JobError when the unfinished one is for other classes."""
    begun = generations(log)
    if not begun:
        return Generation(log, 1)
    last = begun[-1]
    if last.classes != classes and not last.runs():
        last.append([], after=[])  # closed, unless its driver lives and was faster
    if last.is_over:
        return Generation(log, last.number + 1)
    last.check(classes)
    return last


def open_retries(log: Log) -> list[str]:
    """A line for a retry that has no manifest. The same classes again finish it, and until then no other retry begins."""
    lines: list[str] = []
    for generation in generations(log):
        runs = [run for run in generation.runs() if run.whole and not run.finished]
        for units in (run.units for run in runs):
            done = len(generation.objects().keys() & {unit.id for unit in units})
            what = f"retry {generation.number:06d} of {','.join(generation.classes)}"
            lines.append(f"{what}: {done} of {len(units)} units")
    return lines


def newest(log: Log, *, before: int | None = None) -> dict[str, Object]:
    """The newest version of every unit, tombstones included; with `before`, as it was before that generation."""
    found: dict[str, tuple[int, Object]] = {}
    for item in [*below(log.store, log.root, "data"), *below(log.store, log.root, "generations")]:
        match = _OBJECT.search(item.uri)
        if match is None or (before is not None and int(match[1] or 0) >= before):
            continue
        version = int(match[1] or 0)
        if version >= found.get(match[2], (0, item))[0]:
            found[match[2]] = version, item
    return {unit_id: item for unit_id, (_, item) in found.items()}


def read_footers(store: Store, objects: list[Object]) -> Iterator[Footer]:
    """Of all these units."""
    return side_by_side(lambda item: read_footer(store, item.uri), objects)


def last_labelled(log: Log, uris: frozenset[str]) -> Iterator[Footer]:
    """What the newest finished run with any of these inputs has labelled: the newest version of each of its units."""
    runs = [run for run in log.runs(uris) if run.finished and run.parts.num_rows]
    ids = {unit.id for unit in runs[-1].units} if runs else set()
    return read_footers(log.store, [item for unit_id, item in newest(log).items() if unit_id in ids])


def validate_all(log: Log, *, deep: bool = False) -> tuple[list[Footer], list[str]]:
    """As `verify.validate`, with the generations: (the newest footer of every unit, what is wrong)."""
    footers, problems = validate(log, deep=deep)
    latest = {footer.unit: footer for footer in footers}
    rows = {footer.unit: footer.rows_in for footer in footers}
    for generation in generations(log):
        found, wrong = validate(generation, deep=deep)
        problems += wrong
        for footer in found:
            if footer.rows_in != (was := rows.get(footer.unit)):
                problems.append(f"{generation.data_key(footer.unit)}: {footer.rows_in} rows of a unit that has {was}.")
            latest[footer.unit] = footer
    return list(latest.values()), problems
