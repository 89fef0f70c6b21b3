"""What is to be done: inputs listed once, pinned, cut into units, what is finished subtracted, stored as an immutable plan.

An input belongs to one unit, whoever plans when. Two rules keep that. A plan is appended to the log only by a driver that has
read all plans before it. And a unit's inputs go into other units only after a tombstone was created where it would have been
committed (`footer`): a driver that still holds the unit then cannot commit it any more, and plans again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from pipeline.errors import Conflict, InputMissing, Temporary
from pipeline.log import Log, Run, Standing
from pipeline.storage import Object, side_by_side
from pipeline.unit import Part, Pin, Unit

_ATTEMPTS = 60
_PAUSE_S = 5.0


@dataclass(frozen=True)
class Plan:
    """What a driver works from. `run_id` None: every input is part of a finished run, there is nothing to do."""

    run_id: str | None
    units: tuple[Unit, ...]
    committed: frozenset[str]

    @property
    def todo(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.id not in self.committed)


Cut = Callable[[list[Object]], list[Unit]]
Retire = Callable[[Unit], bool]


def make_plan(
    log: Log, listing: list[Object], cut: Cut, *, present: Callable[[Part], bool], retire: Retire, write: bool = True
) -> Plan:
    """The plan for what was listed. `cut` turns inputs that no unit has into units, with the types that their kept columns have
    where no plan says others; `present` says whether an input that was not listed (by this job, at its time) is there as it was;
    `retire` puts a tombstone in the place of a unit, or says False: it was committed. Writes at most one new plan, or with
    `write` off none: a plan that would be new then has the run id "new".

    Raises Temporary when other drivers keep taking the next entry of the log, Conflict when one of these inputs is labelled and
    the plan that says so is gone.
    """
    uris = frozenset(item.uri for item in listing)
    for attempt in range(_ATTEMPTS):
        # Of many drivers that begin at the same minute one at a time gets on.
        time.sleep(random.uniform(0, min(attempt, _PAUSE_S)))
        # First the plans, then the objects: a plan that replaces a unit is younger than the unit's tombstone.
        runs = log.runs(uris)
        finished = {key for run in runs if run.finished for key in run.inputs}
        wanted = {(item.uri, item.etag, item.size): item for item in listing}
        wanted = {key: item for key, item in wanted.items() if key not in finished}
        if not runs or int(runs[-1].id) > len(runs):  # they are numbered from 1
            _check_objects(log, wanted)
        known = {unit.id: unit for run in runs if not run.finished for unit in run.units}
        known = {unit_id: unit for unit_id, unit in known.items() if any(part.pin in wanted for part in unit.parts)}
        standing = log.standing(known)
        adopted = _adopt(known, standing, wanted, present, retire)
        if adopted is None:
            continue
        units = _of_one_type([*adopted.values(), *_new_units(wanted, adopted, known, cut)], runs, known)
        if not units:
            return Plan(None, (), frozenset())
        ids = frozenset(unit.id for unit in units)
        for run in reversed(runs):
            if not run.finished and run.whole == len(ids) and ids == {unit.id for unit in run.units}:
                return Plan(run.id, tuple(run.units), standing.committed & ids)
        run_id = log.append(units, after=runs) if write else "new"
        if run_id is not None:
            return Plan(run_id, tuple(units), standing.committed & ids)
    raise Temporary(f"{log.root}: {_ATTEMPTS} other runs were planned in the meantime", do="Run again later")


def _check_objects(log: Log, wanted: Collection[Pin]) -> None:
    """Where plans are not there, because nobody has planned yet or because somebody took them away, as a VACUUM of a Delta table
    does: their inputs must not go into other units beside those that stand."""
    objects = log.objects()  # before the plans: a unit's plan is older than the unit
    runs = log.runs() if objects else []
    planned = {unit.id for run in runs for unit in run.units}

    def inputs(unit_id: str) -> tuple[Pin, ...]:
        try:
            footer = log.footer(unit_id)
        except (Conflict, InputMissing):  # none of ours, which validate names
            return ()
        return () if footer.split else footer.inputs

    lost = sorted(objects.keys() - planned)
    for unit_id, pins in zip(lost, side_by_side(inputs, lost), strict=True):
        # Without any plan whatever is labelled counts: the next one would hide that there were others.
        if labelled := next((pin[0] for pin in pins if pin in wanted or not runs), None):
            got = f"{labelled} is labelled in {log.data_key(unit_id)}, and no plan under {log.root}/runs says so"
            raise Conflict(got, need="every plan of an output", do="Restore them, or label into another output")


def _adopt(
    known: dict[str, Unit],
    standing: Standing,
    wanted: Collection[Pin],
    present: Callable[[Part], bool],
    retire: Retire,
) -> dict[str, Unit] | None:
    """The known units that stay as they are, or None: one was committed just now, look again.

    One that was committed stays for ever. One of whose inputs is gone can never be completed, so it gives its other inputs back.
    Not listed is not gone: another driver may have listed more.
    """
    adopted: dict[str, Unit] = {}
    for unit in known.values():
        if unit.id in standing.split:
            continue
        if unit.id in standing.committed or all(part.pin in wanted or present(part) for part in unit.parts):
            adopted[unit.id] = unit
        elif not retire(unit):
            return None
    return adopted


def _new_units(wanted: dict[Pin, Object], adopted: dict[str, Unit], known: dict[str, Unit], cut: Cut) -> Iterator[Unit]:
    """Units for the inputs that have none: pieces of a unit that was split although its inputs are all there, so that one bad
    shard holds nothing else back; for all other inputs what `cut` says.

    Wanted are a to f; {a} is adopted, {b, c} was split, {d, x} too, and x is gone: {b}, {c}, and what `cut` makes of d, e, f.
    """
    taken = {part.pin for unit in adopted.values() for part in unit.parts}
    free = {key: item for key, item in wanted.items() if key not in taken}
    tombs = known.keys() - adopted.keys()
    # Only what was listed: of these inputs every unit is known, so no piece takes what another plan's unit has.
    whole = [unit for unit in known.values() if unit.id in tombs and all(part.pin in wanted for part in unit.parts)]
    for piece in (piece for unit in whole for piece in _split(unit, tombs)):
        if all(part.pin in free for part in piece.parts):
            yield piece
            for part in piece.parts:
                del free[part.pin]
    if free:
        for unit in cut(list(free.values())):
            yield from _split(unit, tombs)


def _of_one_type(units: list[Unit], runs: Collection[Run], known: Collection[str]) -> list[Unit]:
    """The units with the types of kept columns that all of the output has, since its objects are one table: those in the first of
    its plans that says any. Where none does they have those that `cut` found, unless some are of runs that were begun without:
    these go on without."""
    kept = next((run.kept for run in runs if run.kept is not None), None)
    if kept is None and not known:
        return units
    return [unit if unit.kept is kept or unit.kept == kept else Unit(unit.parts, kept) for unit in units]


def _split(unit: Unit, tombs: Collection[str]) -> Iterator[Unit]:
    """The unit, or when it has a tombstone its pieces, or theirs. One input alone is never given up."""
    if unit.id not in tombs:
        yield unit
        return
    for piece in unit.pieces():
        yield from _split(piece, tombs)
