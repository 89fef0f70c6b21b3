"""Does what stands add up: the units of a run before its manifest, a whole output for `nightlabel validate`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from pipeline.errors import Conflict, InputMissing
from pipeline.footer import MOVE, Footer, check_rows, totals
from pipeline.log import Log, Run
from pipeline.storage import side_by_side
from pipeline.unit import Part, Pin, Unit


def verify(log: Log, units: Sequence[Unit]) -> Iterator[Footer]:
    """The footer of every unit, read back and held against the plan. Raises what `Log.footer` raises, or Conflict."""
    for unit, footer in zip(units, side_by_side(lambda unit: log.footer(unit.id), units), strict=True):
        _check(log, unit, footer)
        yield footer


def _check(log: Log, unit: Unit, footer: Footer) -> None:
    if footer.unit != unit.id or footer.fingerprint != log.fingerprint or footer.split:
        holds = "a tombstone" if footer.split else f"unit {footer.unit}"
        got = f"{log.data_key(unit.id)}: holds {holds}, fingerprint {footer.fingerprint}"
        raise Conflict(got, need=f"rows of this unit, fingerprint {log.fingerprint}", do=MOVE)


def validate(log: Log, *, deep: bool = False) -> tuple[list[Footer], list[str]]:
    """Does an output hold together? (footers of all units, what is wrong with them in sentences, nothing when all is well):
    every object is a sound unit or a tombstone, no input is in two units, and every finished run's manifest says what its units
    say. `deep`: every page of every object is read, and its rows are what its footer says."""
    finished = log.finished()  # before the objects, and the plans after them: a run may end meanwhile, and another begin
    footers, problems = _footers(log, deep=deep)
    committed = {unit_id: footer for unit_id, footer in footers.items() if not footer.split}
    planned: set[str] = set()
    owners: dict[Pin, list[tuple[float, float, str]]] = defaultdict(list)
    runs = log.runs()
    for run in runs:
        units = run.units
        for unit in (unit for unit in units if unit.id in committed and unit.id not in planned):
            for part in unit.parts:
                owners[part.pin].append(_rows(part, unit.id))
        planned.update(unit.id for unit in units)
        if run.id in finished:
            problems += _check_manifest(log, run, {unit.id: committed.get(unit.id) for unit in units})
    for (uri, _, _), held in owners.items():
        rows = sorted(held)
        problems += [
            f"{uri}: labelled twice, in units {one} and {other}."
            for (_, stop, one), (start, _, other) in pairwise(rows)
            if start < stop
        ]
    problems += [f"{log.data_key(unit_id)}: in no plan." for unit_id in sorted(footers.keys() - planned)]
    if not runs and not problems:
        problems = [f"{log.root}: no run of this job is here, as it is now written and with this model."]
    return list(committed.values()), problems


def open_runs(log: Log, present: Callable[[Part], bool]) -> list[str]:
    """A line for every run that has units left and no manifest. That is no mistake: the same command goes on with them. Not with
    a unit of which no input is `present` any more as it was planned: nobody will ever complete it."""
    there = log.objects()
    lines: list[str] = []
    for run in log.runs():
        units = [] if run.finished else run.units
        left = [unit for unit in units if unit.id not in there]
        if any(present(part) for unit in left for part in unit.parts):  # as a rule the first is
            lines.append(f"run {run.id}: {len(units) - len(left)} of {len(units)} units")
    return lines


def _footers(log: Log, *, deep: bool) -> tuple[dict[str, Footer], list[str]]:
    def read(unit_id: str) -> Footer | str:
        try:
            footer = log.footer(unit_id)
            if deep:
                check_rows(log.store, log.data_key(unit_id), footer)
            return replace(footer, inputs=())  # which the plans say; of ten million images they would be gigabytes
        except (Conflict, InputMissing) as error:  # anything else says nothing about the output
            return str(error)

    footers: dict[str, Footer] = {}
    problems: list[str] = []
    unit_ids = sorted(log.objects())
    for unit_id, footer in zip(unit_ids, side_by_side(read, unit_ids), strict=True):
        if isinstance(footer, str):
            problems.append(footer)
            continue
        footers[unit_id] = footer
        if footer.unit != unit_id or footer.fingerprint != log.fingerprint:
            problems.append(f"{log.data_key(unit_id)}: its account is of unit {footer.unit}, {footer.fingerprint}.")
    return footers, problems


def _rows(part: Part, unit_id: str) -> tuple[float, float, str]:
    return part.start or 0, math.inf if part.stop is None else part.stop, unit_id


def _check_manifest(log: Log, run: Run, footers: Mapping[str, Footer | None]) -> list[str]:
    key = log.run_key(run.id, "manifest.json")
    try:
        counts = json.loads(log.store.read(key))["rows"]
        stated = {name: counts[name] for name in ("in", "ok", "failed")}
    except (ValueError, TypeError, KeyError) as error:
        return [f"{key}: not a manifest ({type(error).__name__}: {error})."]
    there = [footer for footer in footers.values() if footer is not None]
    if gone := [unit_id for unit_id, footer in footers.items() if footer is None]:
        got = f"{key}: {len(gone)} of its {len(footers)} units are gone, {log.data_key(gone[0])} first"
        return [f"{got}. Restore them, or move this manifest away and run again, which labels them alone."]
    sums = totals(there).rows
    return [] if sums == stated else [f"{key}: states {stated}, its units hold {sums}."]
