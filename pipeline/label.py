"""The driver of a labelling run: plan, passes, commits, verification, manifest. It decides; Ray (in `run`) only carries.

The outer loop is all there is to correctness: todo = plan − committed; run a pass; repeat until nothing is left or nothing moves.
A unit of several inputs that cannot be completed is split, so that what is wrong with one holds no other back.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.attempt import Attempt, Observer
from pipeline.commit import Provenance, UnitBuffer
from pipeline.committer import Committer
from pipeline.environment import set_ray_environment
from pipeline.errors import Conflict, PermissionDenied, Stalled, Temporary, UnfitError, Unidentified, UnitsLeft
from pipeline.job.jobfile import dump_job
from pipeline.log import Log
from pipeline.plan import Plan
from pipeline.report import Receipt
from pipeline.spec import Job
from pipeline.start import CODE_VERSION, begin, load_model, plan_job, split_unit
from pipeline.unit import Unit, bytes_of
from pipeline.verify import verify

TRIES = 3  # two passes as they come, the third in careful mode
_REPLANS = 20  # of an attempt: enough to find any culprit, and an end where an input is written over again and again
_AT_ONCE = 20_000  # units of a pass: each is put into Ray's store by itself before the first block can come
_LOST = UnitsLeft.error_class
_PASSING = frozenset({_LOST, Temporary.error_class, Unidentified.error_class})  # another pass may fare better
_OPEN = frozenset({UnfitError.error_class, PermissionDenied.error_class})  # may be said of one input or of a whole store

#: A pass over units: prediction rows as they arrive, None when nothing did for a second. Why blocks were lost goes into `lost`.
RunPass = Callable[..., Generator[pa.Table | None, None, None]]


class Driver:
    """One attempt at one run. `observe(event, fields)` is told what happens; `label()` returns the receipt. Its Ray goes when it
    ends, or with `stay`, for the drivers that come after it, when that stack is closed."""

    def __init__(self, job: Job, *, observe: Observer, started: float, stay: ExitStack | None = None) -> None:
        self.job, self.attempt, self.stay = job.from_root(), Attempt(started, observe), stay
        self.since = time.perf_counter()  # of limits.deadline; the command may have begun hours ago, and queued for the lease
        self.tries: Counter[str] = Counter()
        self.moved: dict[str, int] = {}  # how many units were committed when one was last tried
        self.probed = False
        self.artifact: Artifact

    def label(self) -> Receipt:
        """Label what is left to label. Raises NightlabelError for what stops the whole run; units left are in the receipt."""
        job = self.job
        set_ray_environment()
        with ThreadPoolExecutor(1) as aside:
            # Beside the planning.
            ray, ray_data = (aside.submit(importlib.import_module, f"pipeline.{name}") for name in ("cluster", "run"))
            self.artifact = load_model(job, weights=True)
            log, plan = plan_job(job, self.artifact, tell=self.attempt.tell)
            if plan.run_id is not None and plan.todo:
                begin(log, plan.run_id, job)
            before = len(plan.committed)
            sizes = {"bytes": bytes_of(plan.units), "todo_bytes": bytes_of(plan.todo)}
            self.attempt.tell("planned", run=plan.run_id, units=len(plan.units), done=before, **sizes)
            if plan.run_id is not None and plan.todo:
                cluster = ray.result().cluster(job, tell=self.attempt.tell)
                from pipeline.keep import kept_logs

                logs = kept_logs(log.store, self._logs(log, plan.run_id), self.attempt.events, self.attempt.tell)
                with ExitStack() as up:
                    up.enter_context(self.unhurried(cluster))  # Ray comes up beside the import of Ray Data, 1.5 s
                    with logs:
                        plan = self.passes(log, plan, partial(ray_data.result().run_pass, job=job, artifact=self.artifact))
                    if self.stay is not None and not plan.todo:  # else it may be Ray's fault: nobody goes on with this one
                        self.stay.push(up.pop_all())
        return self.finish(log, plan, before)

    @contextmanager
    def unhurried(self, cluster: AbstractContextManager[None]) -> Iterator[None]:
        """The cluster; what it takes to come does not count against limits.deadline."""
        asked = time.perf_counter()
        with cluster:
            self.since += time.perf_counter() - asked
            yield

    def passes(self, log: Log, plan: Plan, run_pass: RunPass) -> Plan:
        """Passes over what is left, until nothing is or nothing moves. The plan that it ends with may be a newer one."""
        provenance = Provenance(log.fingerprint, self.attempt.id, CODE_VERSION)
        with Committer(log, provenance, self.attempt) as committer:
            replans = 0
            while plan.todo:
                for unit in self._stuck(plan, committer):
                    trouble = self.attempt.trouble[unit.id]
                    split_unit(log, unit, self.job, self.artifact, why=f"{trouble.error_class}: {trouble.error}")
                standing = log.standing([unit.id for unit in plan.todo])
                if standing.split:  # by us or by another driver
                    if replans == _REPLANS:
                        break
                    replans += 1
                    plan = self._replan(len(plan.units))
                    continue
                plan = replace(plan, committed=plan.committed | (standing.committed - self._disputed))
                able = [unit for unit in plan.todo if self.tries[unit.id] < TRIES and not self._is_hopeless(unit)]
                if not able:
                    break
                fewest = min(self.tries[unit.id] for unit in able)
                todo = [unit for unit in able if self.tries[unit.id] == fewest][:_AT_ONCE]
                self._one_pass(todo, committer, run_pass, others=len(plan.todo) - len(todo))
                plan = replace(plan, committed=plan.committed | {unit.id for unit in able if unit.id in committer.committed})
        return plan

    def buffer(self, _: str) -> UnitBuffer:
        """What collects a unit's rows."""
        return UnitBuffer()

    def _is_hopeless(self, unit: Unit) -> bool:
        """Wrong in itself: another pass reads the same bytes with the same rights."""
        return self._trouble_of(unit) not in ("", *_PASSING)

    def _trouble_of(self, unit: Unit) -> str:
        """Its class; "" for none."""
        trouble = self.attempt.trouble.get(unit.id)
        return trouble.error_class if trouble else ""

    @property
    def _disputed(self) -> set[str]:
        """Units in whose place something stands that is not what we would have put there."""
        return {unit_id for unit_id, trouble in self.attempt.trouble.items() if trouble.error_class == Conflict.error_class}

    def _replan(self, before: int) -> Plan:
        _, plan = plan_job(self.job, self.artifact)
        plan = replace(plan, committed=plan.committed - self._disputed)
        self.attempt.tell("replanned", run=plan.run_id, units=len(plan.units), done=len(plan.committed), before=before)
        return plan

    def _stuck(self, plan: Plan, committer: Committer) -> list[Unit]:
        """Units of several inputs that will not come through as they are, by the fault of an input: not of a store that is away,
        full or not ours to read, which must not cost every unit its shape, nor of workers that lose whatever they get. Where that
        is open and nothing has come through since they were last tried, one is split for a probe: when a piece of it does, so
        may those of the others.

        Of the units {a, b}, TAR_CORRUPT, {c, d} and {e, f}, both UNFIT, and {g}, broken: {a, b}, and {c, d} and {e, f} where
        another unit was committed since they were tried; where none was, of these two {c, d}, once an attempt. {g} is one input.
        """
        joined = [unit for unit in plan.todo if len(unit.parts) > 1 and unit.id not in committer.refused]
        sure, unsure = list[Unit](), list[Unit]()
        for unit in joined:
            trouble = self._trouble_of(unit)
            if self._is_hopeless(unit):
                (unsure if trouble in _OPEN else sure).append(unit)
            elif self.tries[unit.id] >= TRIES and (trouble == _LOST or (committer.committed and unit.id in committer.broken)):
                unsure.append(unit)
        split = [unit for unit in unsure if len(committer.committed) > self.moved[unit.id]]
        if unsure and not split and not self.probed:
            self.probed, split = True, unsure[:1]
        return sure + split

    def _one_pass(self, todo: list[Unit], committer: Committer, run_pass: RunPass, *, others: int) -> None:
        """`others`: units that are left beside these."""
        attempt, careful = self.attempt, self.tries[todo[0].id] == TRIES - 1
        attempt.passes += 1
        attempt.tell("pass", number=attempt.passes, units=len(todo), careful=careful)
        waiting = {unit.id: unit for unit in todo}
        buffers: dict[str, UnitBuffer] = {}
        self.tries.update(waiting.keys())
        self.moved |= dict.fromkeys(waiting, len(committer.committed))
        committer.begin(todo)
        lost: list[str] = []
        error_class, reason = _LOST, ""
        try:
            with closing(run_pass(todo, careful=careful, lost=lost)) as blocks:
                for block in blocks:
                    self._check_deadline(len(waiting) + others)
                    committer.settle()  # what is said of a unit, on the screen and in the events, is said when it is done
                    if block is None:
                        continue
                    attempt.take_block(block)
                    for unit_id, rows in _by_unit(block):
                        if unit_id not in waiting:  # complete already: a task that ran again
                            continue
                        if unit_id not in buffers:
                            buffers[unit_id] = self.buffer(unit_id)
                        buffers[unit_id].add(rows)
                        if buffers[unit_id].complete:
                            committer.take(waiting.pop(unit_id), buffers.pop(unit_id))
        except Temporary as error:
            error_class, reason = error.error_class, str(error).rstrip(".")
            if isinstance(error, Stalled):  # what hangs would hang again: careful mode is next
                for unit_id in waiting:
                    self.tries[unit_id] = max(self.tries[unit_id], TRIES - 1)
        committer.settle(0)
        reason = reason or "; ".join(["its rows did not all arrive", *dict.fromkeys(lost)][:4])
        for unit in waiting.values():
            attempt.blame(unit, error_class, f"{unit.parts[0].uri}: {reason}.", buffer=buffers.get(unit.id))

    def _check_deadline(self, left: int) -> None:
        deadline = self.job.limits.deadline
        if deadline is not None and time.perf_counter() - self.since > deadline:
            do = "Run again to go on from here, or raise limits.deadline"
            raise UnitsLeft(f"limits.deadline of {deadline:g} s has passed with {left} units left", do=do)

    def finish(self, log: Log, plan: Plan, before: int) -> Receipt:
        """Reads back what is committed; writes the run's papers when all of it is. `before`: units done before this attempt."""
        from pipeline.keep import keep

        footers = verify(log, [unit for unit in plan.units if unit.id in plan.committed])
        receipt = self.attempt.receipt(self.job, plan, self.artifact, footers, log=log, before=before)
        if plan.run_id is not None and not plan.todo and receipt.rows_in:
            self._publish(log, plan.run_id, receipt)
        elif plan.run_id is not None:
            keep(log.store, self._logs(log, plan.run_id), lambda: {"report.html": receipt.page()}, self.attempt.tell)
        return receipt

    def _logs(self, log: Log, run_id: str) -> str:
        return log.run_key(run_id, f"logs/{self.attempt.id}")

    def _publish(self, log: Log, run_id: str, receipt: Receipt) -> None:
        """The run's papers, the manifest last. What another driver of the same run has put there stays."""
        papers = {"spec.yaml": dump_job(self.job), "report.html": receipt.page(), "events.jsonl": receipt.event_lines()}
        for name, content in papers.items():
            log.store.create(log.run_key(run_id, name), content)
        log.store.create(log.run_key(run_id, "manifest.json"), receipt.manifest(self.job, code=CODE_VERSION))


def _by_unit(block: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    names = block.column("unit")
    for unit_id in pc.unique(names).to_pylist():
        yield unit_id, block.filter(pc.equal(names, unit_id)).drop_columns(["unit"])
