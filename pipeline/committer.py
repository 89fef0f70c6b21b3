"""Conditional creates in flight beside the pass. What one fails with is its own unit's trouble; the other units go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from pipeline.attempt import Attempt
from pipeline.commit import Provenance, UnitBuffer, commit_unit
from pipeline.errors import JobError, NightlabelError, Temporary
from pipeline.footer import Footer
from pipeline.log import Log
from pipeline.unit import Unit

_THREADS = 4  # each waits for the store, not for a core
_IN_FLIGHT = 2 * _THREADS


@dataclass(frozen=True)
class _Outcome:
    footer: Footer
    ours: bool
    rows: pa.Table


class Committer:
    """Takes units whose rows are all there. Use as a context manager: at its end what is in flight is waited for."""

    def __init__(self, log: Log, provenance: Provenance, attempt: Attempt) -> None:
        self.log, self.provenance, self.attempt = log, provenance, attempt
        self.committed: set[str] = set()
        self.refused: set[str] = set()  # by the store, for its own reasons or a stranger's object: no fault of an input
        self.broken: set[str] = set()  # arrived with what its reader failed of, and may not next time
        self._pool = ThreadPoolExecutor(_THREADS)
        self._flying: deque[tuple[Unit, UnitBuffer, Future[_Outcome]]] = deque()
        self._failures = 0  # in a row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, units: Iterable[Unit]) -> None:
        """A new pass over these units: what the last one failed of is over, until it comes again."""
        self._failures = 0
        for before in (self.refused, self.broken):
            before.difference_update(unit.id for unit in units)

    def take(self, unit: Unit, buffer: UnitBuffer) -> None:
        """Commits the unit, or blames it for the error that it arrived with. Raises Temporary when so many creates have failed
        in a row that the store is at fault, and the work of this pass would be for nothing."""
        if buffer.error is not None:
            if buffer.error[0] == Temporary.error_class:
                self.broken.add(unit.id)
            self.attempt.blame(unit, *buffer.error, buffer=buffer)
            return
        self._flying.append((unit, buffer, self._pool.submit(self._commit, unit, buffer)))
        self.settle()
        if self._failures >= _IN_FLIGHT:
            raise Temporary(
                f"{_IN_FLIGHT} units in a row could not be committed", do="Look at the output's store, then run again"
            )

    def settle(self, most: int = _IN_FLIGHT) -> None:
        """Takes in the creates that are done, and waits until at most `most` are in flight."""
        while len(self._flying) > most or (self._flying and self._flying[0][2].done()):
            unit, buffer, future = self._flying.popleft()
            try:
                outcome = future.result()
            except NightlabelError as error:
                if not isinstance(error, JobError):  # which is of columns that do not fit together
                    self._failures += 1
                    self.refused.add(unit.id)
                self.attempt.blame(unit, error.error_class, str(error), buffer=buffer)
                continue
            self._failures = 0
            if outcome.footer.split:  # another driver has put its inputs into other units: the next plan knows them
                self.attempt.drop(unit, outcome.footer.split, buffer)
                continue
            self.committed.add(unit.id)
            self.attempt.take_commit(outcome.footer, outcome.rows, buffer, ours=outcome.ours)

    def _commit(self, unit: Unit, buffer: UnitBuffer) -> _Outcome:
        rows = buffer.table()
        return _Outcome(*commit_unit(self.log, unit, rows, self.provenance, buffer.seen()), rows)
