"""What one attempt at a run did: events as they happen, and sums for the receipt.

Labels, rows and seconds are summed when a unit is committed, not when its rows arrive, so that what a receipt says is what the
Parquet files hold: rows of a pass that broke off come again, and of a unit that another driver committed first ours are dropped.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.commit import UnitBuffer
from pipeline.errors import InputMissing
from pipeline.footer import Footer, totals
from pipeline.log import Log
from pipeline.plan import Plan
from pipeline.report import Receipt, UnitTrouble, exit_code
from pipeline.rows import CAUTION, TIMINGS
from pipeline.spec import Job
from pipeline.unit import Unit

Observer = Callable[[str, dict[str, Any]], None]
_STEADY_S = 1.0


@dataclass
class Attempt:
    """`started` as of time.perf_counter; `observe(event, fields)` is told what happens."""

    started: float
    observe: Observer
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    first: float | None = None
    last: float = 0.0
    first_rows: int = 0
    arrived: int = 0
    rows: int = 0
    written: int = 0
    passes: int = 0
    seams: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMINGS, 0.0))
    labels: Counter[str] = field(default_factory=Counter)
    filled: set[str] = field(default_factory=set)  # columns with a value in any row
    cautions: set[str] = field(default_factory=set)  # that have been told of
    empty: list[str] = field(default_factory=list)  # inputs in which there was nothing to label
    imageless: Counter[str] = field(default_factory=Counter)  # samples of tars that have no image, by suffix
    trouble: dict[str, UnitTrouble] = field(default_factory=dict)
    missing: tuple[UnitTrouble, ...] = ()
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def span(self) -> tuple[str, str]:
        """When it began and now, in UTC as ISO 8601 has it."""
        now = time.time()
        began, ended = (datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for at in (now - self.seconds, now))
        return began, ended

    @property
    def steady_rate(self) -> float | None:
        """Images a second from the end of the first block to that of the last; None when these lie too near to each other: two
        actors that end their only blocks together would make thousands."""
        if self.first is None or self.last - self.first < _STEADY_S:
            return None
        return max(0, self.arrived - self.first_rows) / (self.last - self.first)

    def tell(self, event: str, **fields: Any) -> None:
        if event == "missing":
            self.missing = tuple(UnitTrouble("", (uri,), InputMissing.error_class, why) for uri, why in fields["errors"].items())
        if event != "rows":
            self.events.append({"event": event, "t": round(time.time(), 3), **fields})
        self.observe(event, fields)

    def take_block(self, table: pa.Table) -> None:
        """A block of prediction rows has arrived."""
        status = table.column("status")
        images = len(status) - status.null_count
        self.last = time.perf_counter()
        if images and self.first is None:
            self.first, self.first_rows = self.last, images
            self.tell("first", images=images)
        self.arrived += images
        said = table.column(CAUTION).drop_null().unique().to_pylist() if CAUTION in table.column_names else []
        for text in sorted({*said} - self.cautions):
            self.cautions.add(text)
            self.tell("caution", text=text)
        self.tell("rows", images=images, failed=pc.sum(pc.equal(status, "failed")).as_py() or 0)

    def take_commit(self, footer: Footer, rows: pa.Table, buffer: UnitBuffer, *, ours: bool) -> None:
        """A unit is committed, its `rows` from this `buffer`: by us, or they stood there already."""
        self.trouble.pop(footer.unit, None)
        self.written += ours
        if ours:
            self.rows += footer.rows_in
            self.empty += buffer.empty
            self.imageless.update(buffer.imageless)
            self.seams = {seam: self.seams[seam] + spent for seam, spent in buffer.seconds().items()}
            counts = pc.value_counts(rows.column("label").drop_null())
            self.labels.update({item["values"]: item["counts"] for item in counts.to_pylist()})
            self.filled.update(name for name in rows.column_names if rows.column(name).null_count < rows.num_rows)
        self.tell("commit", unit=footer.unit, rows=len(buffer), failed=buffer.failed(), ours=ours)

    def blame(self, unit: Unit, error_class: str, error: str, *, buffer: UnitBuffer | None = None) -> None:
        """The unit did not come through. What arrived of it, in `buffer`, is dropped and comes again."""
        self.trouble[unit.id] = UnitTrouble(unit.id, tuple(part.uri for part in unit.parts[:10]), error_class, error)
        dropped, failed = (len(buffer), buffer.failed()) if buffer is not None else (0, 0)
        self.arrived -= dropped
        self.tell("trouble", unit=unit.id, error_class=error_class, error=error, dropped=dropped, dropped_failed=failed)

    def drop(self, unit: Unit, why: str, buffer: UnitBuffer) -> None:
        """The unit was split while its rows were on their way; they come again in other units."""
        self.arrived -= len(buffer)
        self.tell("split", unit=unit.id, why=why, dropped=len(buffer), dropped_failed=buffer.failed())

    def receipt(self, job: Job, plan: Plan, artifact: Artifact, footers: Iterable[Footer], *, log: Log, before: int) -> Receipt:
        """`footers` of all units that are done, read back; `before` of them were done when this attempt began."""
        done, left, (started, ended) = totals(footers), {unit.id for unit in plan.todo}, self.span()
        self.tell("verified", units=done.units, rows=done.rows_in, failed=done.failed, left=len(left))
        trouble = (*self.missing, *(item for item in self.trouble.values() if item.unit in left))
        return Receipt(
            job=job.name,
            where=log.root,
            fingerprint=log.fingerprint,
            artifact=artifact.digest,
            precision=job.model.precision,
            decode=job.decode,
            lane=job.decode_lane,
            compared=done.compared,
            same_label=done.same_label,
            cautions=tuple(sorted(done.cautions)),
            run=plan.run_id,
            units=len(plan.units),
            units_done=done.units,
            units_before=before,
            rows_in=done.rows_in,
            ok=done.ok,
            failed=done.failed,
            failures=done.failures,
            labels=dict(self.labels),
            labelled_now=self.rows,
            **self._found(job.input.keep),
            written=self.written,
            started=started,
            ended=ended,
            seconds=self.seconds,
            first_seconds=None if self.first is None else self.first - self.started,
            images_per_second=self.steady_rate,
            seam_seconds=self.seams if self.passes else {},
            passes=self.passes,
            trouble=trouble,
            exit_code=exit_code(trouble, done, left=len(left), limit=job.limits.max_failed),
            events=tuple(self.events),
        )

    def _found(self, keep: Sequence[str]) -> dict[str, Any]:
        """What a user may want to look into, though every image has its row."""
        return {
            "kept_nothing": tuple(name for name in keep if self.rows and name not in self.filled),
            "empty": tuple(sorted(self.empty)),
            "imageless": dict(self.imageless.most_common()),
        }
