"""The driver of a labelling run: plan, passes, commits, verification, manifest. It decides; Ray (in `run`) only carries.

The outer loop is all there is to correctness: todo = plan − committed; run a pass; repeat until nothing is left or nothing moves.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.commit import Footer, Provenance, UnitBuffer, commit_unit, verify
from pipeline.errors import Stalled, Temporary, UnitsLeft
from pipeline.jobfile import dump_job
from pipeline.plan import Log, Plan, Unit, split
from pipeline.report import Receipt, UnitTrouble, exit_code
from pipeline.rows import TIMINGS, UnitError
from pipeline.spec import Job
from pipeline.start import CODE_VERSION, load_model, plan_job, set_ray_environment

TRIES = 3  # two passes as they come, the third in careful mode
_COMMITTERS = 4  # conditional creates in flight; each waits for the store, not for a core
_LOST = "LOST"

Observer = Callable[[str, dict[str, Any]], None]


@dataclass
class _Tally:
    """What this attempt did, for the receipt."""

    started: float
    first: float | None = None
    last: float = 0.0
    first_rows: int = 0
    rows: int = 0
    written: int = 0
    passes: int = 0
    seams: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMINGS, 0.0))
    labels: Counter[str] = field(default_factory=Counter)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steady_rate(self) -> float | None:
        """Images a second from the end of the first block to that of the last; None when there is only one."""
        if self.first is None or self.last <= self.first:
            return None
        return (self.rows - self.first_rows) / (self.last - self.first)


class Driver:
    """One attempt at one run. `observe(event, fields)` is told what happens; `label()` returns the receipt."""

    def __init__(self, job: Job, *, observe: Observer, started: float) -> None:
        self.job, self._observe = job, observe
        self.tally = _Tally(started)
        self.trouble: dict[str, UnitTrouble] = {}
        self.tries: Counter[str] = Counter()
        self._flying: deque[Future[tuple[Footer, bool]]] = deque()

    def tell(self, event: str, **fields: Any) -> None:
        if event != "rows":
            self.tally.events.append({"event": event, "t": round(time.time(), 3), **fields})
        self._observe(event, fields)

    def label(self) -> Receipt:
        """Label what is left to label. Raises NightlabelError for what stops the whole run; units left are in the receipt."""
        job = self.job
        set_ray_environment()
        with ThreadPoolExecutor(1) as aside:
            importing = aside.submit(importlib.import_module, "pipeline.run")  # 2 s for Ray Data, beside the planning
            artifact = load_model(job, weights=True)
            log, plan = plan_job(job, artifact)
            run = importing.result()
        from pipeline.cluster import cluster
        from pipeline.keep import kept_logs

        self.provenance = Provenance(log.root.rstrip("/").rpartition("/")[2], secrets.token_hex(8), CODE_VERSION)
        before = len(plan.committed)
        self.tell(
            "planned", run=plan.run_id, units=len(plan.units), done=before, bytes=_bytes(plan.units), todo_bytes=_bytes(plan.todo)
        )
        if plan.run_id is not None and plan.todo:
            folder = log.run_key(plan.run_id, f"logs/{self.provenance.attempt}")
            logs = kept_logs(log.store, folder, self.tally.events, self.tell)
            with cluster(job), logs, ThreadPoolExecutor(_COMMITTERS) as pool:
                plan = self._passes(log, plan, pool, partial(run.run_pass, job=job, artifact=artifact))
        return self._finish(log, plan, artifact, before)

    def _passes(self, log: Log, plan: Plan, pool: ThreadPoolExecutor, run_pass: Callable[..., Iterator[pa.Table]]) -> Plan:
        while True:
            joined = frozenset(unit.id for unit in plan.todo if len(unit.parts) > 1 and self._hopeless(unit.id))
            if joined:
                plan = split(log, plan, joined)
            committed = plan.committed | log.committed() & {unit.id for unit in plan.units}
            plan = Plan(plan.run_id, plan.units, committed)
            able = [unit for unit in plan.todo if self.tries[unit.id] < TRIES and not self._hopeless(unit.id)]
            if not able:
                return plan
            fewest = min(self.tries[unit.id] for unit in able)
            todo = [unit for unit in able if self.tries[unit.id] == fewest]
            self._one_pass(log, todo, pool, run_pass, careful=fewest == TRIES - 1)

    def _hopeless(self, unit_id: str) -> bool:
        """Wrong in itself: another pass reads the same bytes."""
        trouble = self.trouble.get(unit_id)
        return trouble is not None and trouble.error_class in UnitError.__members__

    def _one_pass(
        self, log: Log, todo: list[Unit], pool: ThreadPoolExecutor, run_pass: Callable[..., Iterator[pa.Table]], *, careful: bool
    ) -> None:
        self.tally.passes += 1
        self.tell("pass", number=self.tally.passes, units=len(todo), careful=careful)
        units = {unit.id: unit for unit in todo}
        buffers: dict[str, UnitBuffer] = {}
        self.tries.update(units.keys())
        reason = "its rows did not all arrive"
        try:
            for table in run_pass(todo, careful=careful):
                self._check_deadline(len(units))
                for unit_id, rows in self._by_unit(table):
                    buffer = buffers.setdefault(unit_id, UnitBuffer())
                    buffer.add(rows)
                    if buffer.complete:
                        self._close(log, units.pop(unit_id), buffers.pop(unit_id), pool)
        except Temporary as error:
            reason = str(error).rstrip(".")
            if isinstance(error, Stalled):  # what hangs would hang again: careful mode is next
                self.tries.update({unit_id: TRIES - 1 - self.tries[unit_id] for unit_id in units if self.tries[unit_id] < TRIES})
        self._settle(0)
        for unit in units.values():
            self._blame(unit, _LOST, f"{unit.parts[0].uri}: {reason}.")

    def _check_deadline(self, left: int) -> None:
        deadline = self.job.limits.deadline
        if deadline is not None and time.perf_counter() - self.tally.started > deadline:
            do = "Run again to go on from here, or raise limits.deadline"
            raise UnitsLeft(f"limits.deadline of {deadline:g} s has passed with {left} units left", do=do)

    def _by_unit(self, table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """Takes the seconds off a block and splits it by unit."""
        now = time.perf_counter()
        for seam, column in TIMINGS.items():
            self.tally.seams[seam] += pc.sum(table.column(column)).as_py() or 0.0
            table = table.drop_columns([column])
        status = table.column("status")
        images = len(status) - status.null_count
        if images and self.tally.first is None:
            self.tally.first, self.tally.first_rows = now, images
        self.tally.last = now
        failed = pc.sum(pc.equal(status, "failed")).as_py() or 0
        self.tally.rows += images
        self.tally.labels.update(
            {item["values"]: item["counts"] for item in pc.value_counts(table.column("label").drop_null()).to_pylist()}
        )
        self.tell("rows", images=images, failed=failed)
        names = table.column("unit")
        for unit_id in pc.unique(names).to_pylist():
            yield unit_id, table.filter(pc.equal(names, unit_id)).drop_columns(["unit"])

    def _close(self, log: Log, unit: Unit, buffer: UnitBuffer, pool: ThreadPoolExecutor) -> None:
        if buffer.error is not None:
            self._blame(unit, *buffer.error)
            return
        self.trouble.pop(unit.id, None)
        self._flying.append(pool.submit(commit_unit, log, unit, buffer.table(), self.provenance))
        self._settle(2 * _COMMITTERS)

    def _settle(self, most: int) -> None:
        """Waits until at most `most` commits are in flight; a commit's error surfaces here."""
        while len(self._flying) > most:
            footer, ours = self._flying.popleft().result()
            self.tally.written += ours
            self.tell("commit", unit=footer.unit, rows=footer.rows_in, failed=footer.failed, ours=ours)

    def _blame(self, unit: Unit, error_class: str, error: str) -> None:
        self.trouble[unit.id] = UnitTrouble(unit.id, tuple(part.uri for part in unit.parts[:10]), error_class, error)
        self.tell("trouble", unit=unit.id, error_class=error_class, error=error)

    def _finish(self, log: Log, plan: Plan, artifact: Artifact, before: int) -> Receipt:
        done = [unit for unit in plan.units if unit.id in plan.committed]
        footers = list(verify(log, done, fingerprint=self.provenance.fingerprint))
        failures = sum((Counter(footer.failures) for footer in footers), Counter[str]())
        left = {unit.id for unit in plan.todo}
        tally, seconds = self.tally, time.perf_counter() - self.tally.started
        rows, failed = sum(footer.rows_in for footer in footers), sum(footer.failed for footer in footers)
        self.tell("verified", units=len(footers), rows=rows, failed=failed, left=len(left))
        trouble = tuple(item for item in self.trouble.values() if item.unit in left)
        receipt = Receipt(
            job=self.job.name,
            where=log.root,
            fingerprint=self.provenance.fingerprint,
            artifact=artifact.digest,
            precision=self.job.model.precision,
            run=plan.run_id,
            units=len(plan.units),
            units_done=len(done),
            units_before=before,
            rows_in=rows,
            ok=sum(footer.ok for footer in footers),
            failed=failed,
            failures=dict(sorted(failures.items())),
            labels=dict(tally.labels),
            labelled_now=tally.rows,
            written=tally.written,
            seconds=seconds,
            first_seconds=None if tally.first is None else tally.first - tally.started,
            images_per_second=tally.steady_rate,
            seam_seconds=tally.seams if tally.passes else {},
            passes=tally.passes,
            trouble=trouble,
            exit_code=exit_code(trouble, left=bool(left), share=failed / rows if rows else 0.0, limit=self.job.limits.max_failed),
            events=tuple(tally.events),
        )
        if plan.run_id is not None and not left:
            self._publish(log, plan.run_id, receipt)
        return receipt

    def _publish(self, log: Log, run_id: str, receipt: Receipt) -> None:
        """The run's papers, the manifest last. What another driver of the same run has put there stays."""
        papers = {"spec.yaml": dump_job(self.job), "report.html": receipt.page(), "events.jsonl": receipt.event_lines()}
        for name, content in papers.items():
            log.store.create(log.run_key(run_id, name), content)
        log.store.create(log.run_key(run_id, "manifest.json"), receipt.manifest(self.job, code=CODE_VERSION))


def _bytes(units: tuple[Unit, ...]) -> int:
    return sum(part.size for unit in units for part in unit.parts)
