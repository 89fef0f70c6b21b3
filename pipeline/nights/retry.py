"""Labels images again that failed, by class of failure, into a new generation. What was committed stays as it is.

The driver of a run does it, with two differences: a unit's buffer begins with the rows that stay, and of its inputs only the
images in question are read (of loose images), or decoded (of shards). An image whose input is gone or was replaced since is not
retried: replaced, it is a new input that the next run labels. Of a unit of several shards none is then, since its images are
numbered through all of them. A retry that was killed is gone on with by the same command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.attempt import Observer
from pipeline.commit import Provenance, UnitBuffer, commit_unit
from pipeline.committer import Committer
from pipeline.cut import list_inputs
from pipeline.environment import set_ray_environment
from pipeline.errors import Conflict, JobError
from pipeline.footer import Footer, Totals, read_rows, read_types, totals
from pipeline.label import TRIES, Driver
from pipeline.log import Log
from pipeline.nights.generation import RUN, Generation, newest, read_footers, to_plan
from pipeline.nights.retried import Retried
from pipeline.plan import Plan
from pipeline.report import counted, exit_code
from pipeline.rows import TIMINGS, Failure
from pipeline.spec import Job
from pipeline.start import CODE_VERSION, load_model, open_log, present, tell_missing
from pipeline.storage import Object, open_input, side_by_side
from pipeline.unit import Part, Unit, bytes_of
from pipeline.verify import verify

#: What would take the pass down once more outside of careful mode.
_POISON = {Failure.DECODE_TIMEOUT, Failure.DECODER_CRASH}


@dataclass(frozen=True)
class _Task:
    """A unit, the object that has its rows as they are, how many of these are labelled, and the numbers of those to label again,
    counted by class in `taken`. The rows themselves are read when it is their turn: those of all units might be the whole
    output."""

    unit: Unit
    uri: str
    ok: int
    only: frozenset[int]
    taken: Mapping[str, int]


class _Begun(UnitBuffer):
    """Begins with the `rows` of a unit but for `only`, which come; so what it counts is these alone. They keep the keys that they
    have: those of loose images follow from the folder that a job names."""

    def __init__(self, rows: pa.Table, only: frozenset[int]) -> None:
        super().__init__()
        self._keys = dict(zip(*(rows.column(name).to_pylist() for name in ("index", "key")), strict=True))
        stay = rows.filter(pc.invert(pc.is_in(rows.column("index"), value_set=pa.array(sorted(only), pa.int64()))))
        for name in TIMINGS.values():
            stay = stay.append_column(name, pa.nulls(stay.num_rows, pa.float32()))
        super().add(stay)
        self._stay = super().__len__(), super().failed()

    def __len__(self) -> int:
        return super().__len__() - self._stay[0]

    def failed(self) -> int:
        return super().failed() - self._stay[1]

    def add(self, table: pa.Table) -> None:
        known = pa.array(map(self._keys.get, table.column("index").to_pylist()), pa.string())
        is_image = pc.is_valid(table.column("key"))  # the end row of a unit that broke off has the index of an image
        keys = pc.if_else(is_image, known, pa.scalar(None, pa.string()))
        super().add(table.set_column(table.schema.get_field_index("key"), "key", keys))


class Retry(Driver):
    """One attempt at a retry."""

    def __init__(self, job: Job, classes: tuple[str, ...], *, observe: Observer, started: float) -> None:
        super().__init__(job, observe=observe, started=started)
        self.classes = classes
        self.log: Log  # of the output, once the retry has begun
        self._tasks: dict[str, _Task] = {}
        self._failures: Mapping[str, int] = {}

    def retry(self) -> Retried:
        """Raises JobError when another retry is unfinished, and what `Driver.label` raises."""
        set_ray_environment()
        self.artifact = load_model(self.job, weights=True)
        self.log = log = open_log(self.job, self.artifact)
        generation = self._plan()
        units = tuple(task.unit for task in self._tasks.values())
        if not units:
            missing = self.attempt.missing
            code = exit_code(missing, Totals(), left=0, limit=self.job.limits.max_failed)
            told: dict[str, Any] = {"failures": self._failures, "trouble": missing, "exit_code": code}
            return Retried(self.job.name, log.root, self.classes, *self.attempt.span(), **told)
        plan = Plan(RUN, units, generation.standing([unit.id for unit in units]).committed)
        for task in [self._tasks[unit.id] for unit in plan.todo if not self._tasks[unit.id].only]:  # their inputs are gone since
            commit_unit(generation, task.unit, read_rows(log.store, task.uri), Provenance(log.fingerprint, "", CODE_VERSION))
        plan = Plan(RUN, plan.units, generation.standing([unit.id for unit in units]).committed)
        size = bytes_of(plan.todo)
        done = len(plan.committed)
        self.attempt.tell("planned", run=RUN, units=len(units), done=done, bytes=size, todo_bytes=size)
        if plan.todo:
            from pipeline.cluster import cluster
            from pipeline.run import run_pass

            only = {unit_id: task.only for unit_id, task in self._tasks.items()}
            if _POISON & set(self.classes):
                self.tries.update(dict.fromkeys(only, TRIES - 1))
            with self.unhurried(cluster(self.job, tell=self.attempt.tell)):
                plan = self.passes(generation, plan, partial(run_pass, job=self.job, artifact=self.artifact, only=only))
        return self._settle(generation, plan)

    def buffer(self, unit_id: str) -> UnitBuffer:
        """A buffer that has the rows that stay."""
        task = self._tasks[unit_id]
        return _Begun(read_rows(self.log.store, task.uri), task.only)

    def _stuck(self, _plan: Plan, _committer: Committer) -> list[Unit]:
        return []  # never split: the unit is what it was

    def _plan(self) -> Generation:
        """Fills the tasks: the units of the generation, planned now or before. Raises JobError when another one is unfinished."""
        log, job = self.log, self.job
        store = open_input(job.input)
        listing = list_inputs(store, job.input, some=True)
        tell_missing(listing, self.attempt.tell)
        pins = {(item.uri, item.etag, item.size) for item in listing.inputs}

        def is_there(part: Part) -> bool:
            return part.pin in pins or present(store, part)  # a job may list less than the one that planned

        generation = to_plan(log, self.classes)
        planned = generation.runs()
        units = planned[0].units if planned else self._candidates(listing.inputs)
        versions = newest(log, before=generation.number)
        if lost := [log.data_key(unit.id) for unit in units if unit.id not in versions]:
            raise Conflict(f"{lost[0]}: gone since the retry was planned", need="the rows that it keeps", do="Restore it")
        tasks = list(side_by_side(lambda unit: self._task(unit, versions[unit.id].uri, is_there), units))
        if not planned:
            tasks = [task for task in tasks if task.only]
            # Without the types of kept columns, which each unit's object says.
            if tasks and not generation.begin(self.classes, [Unit(task.unit.parts) for task in tasks]):
                return self._plan()  # another one was faster
        self._tasks = {task.unit.id: task for task in tasks}
        return generation

    def _candidates(self, listed: list[Object]) -> list[Unit]:
        """Units of these inputs whose newest version has failures of the classes."""
        with_failures = [(unit, footer) for unit, footer in _labelled(self.log, listed) if footer.failed]
        self._failures = totals(footer for _, footer in with_failures).failures
        return [unit for unit, footer in with_failures if any(footer.failures.get(name) for name in self.classes)]

    def _task(self, unit: Unit, uri: str, is_there: Callable[[Part], bool]) -> _Task:
        rows = read_rows(self.log.store, uri, columns=["index", "source", "status", "error_class"])
        if self.job.input.format == "parquet" and self.job.input.keep:  # of the types that the rows have which stay
            unit = Unit(unit.parts, read_types(self.log.store, uri, self.job.input.keep))
        failed = rows.filter(pc.is_in(rows.column("error_class"), value_set=pa.array(self.classes)))
        sources = set(failed.column("source").to_pylist())
        whole = self.job.input.format != "images"
        gone = {part.uri for part in unit.parts if (whole or part.uri in sources) and not is_there(part)}
        gone = sources if whole and gone else gone
        failed = failed.filter(pc.invert(pc.is_in(failed.column("source"), value_set=pa.array(sorted(gone), pa.string()))))
        ok = pc.sum(pc.equal(rows.column("status"), "ok")).as_py() or 0
        only, taken = frozenset(failed.column("index").to_pylist()), Counter(failed.column("error_class").to_pylist())
        return _Task(unit, uri, ok, only, taken)

    def _settle(self, generation: Generation, plan: Plan) -> Retried:
        done = [unit for unit in plan.units if unit.id in plan.committed]
        footers = list(verify(generation, done))
        left = {unit.id for unit in plan.todo}
        trouble = (*self.attempt.missing, *(item for item in self.attempt.trouble.values() if item.unit in left))
        taken = Counter[str]()
        for footer in footers:
            taken.update(self._tasks[footer.unit].taken)
        ok_before = sum(self._tasks[footer.unit].ok for footer in footers)
        everything = footers if left else read_footers(generation.store, list(newest(generation.base).values()))
        outcome = Retried(
            self.job.name,
            generation.root,
            self.classes,
            *self.attempt.span(),
            generation=generation.number,
            units=len(plan.units),
            units_done=len(done),
            retried=taken.total(),
            taken=dict(sorted(taken.items())),
            mended=sum(footer.ok for footer in footers) - ok_before,
            failures=totals(footers).failures,
            trouble=trouble,
            exit_code=exit_code(trouble, totals(everything), left=len(left), limit=self.job.limits.max_failed),
        )
        if not left:
            generation.store.create(generation.run_key(RUN, "manifest.json"), outcome.manifest(footers))
        return outcome


def _labelled(log: Log, listed: list[Object]) -> Iterator[tuple[Unit, Footer]]:
    """The units that have these inputs, each with the footer of its newest version."""
    uris = frozenset(item.uri for item in listed)
    known = {unit.id: unit for run in log.runs(uris) for unit in run.units}
    versions = [item for unit_id, item in newest(log).items() if unit_id in known]
    return ((known[footer.unit], footer) for footer in read_footers(log.store, versions))


def without_classes(job: Job) -> JobError:
    """What is said where no classes are given: which there are, and of how many images."""
    job = job.from_root()
    log = open_log(job, load_model(job, weights=False))
    inputs = list_inputs(open_input(job.input), job.input, some=True).inputs
    failures = totals(footer for _, footer in _labelled(log, inputs)).failures
    if not failures:
        return JobError(f"no --class is given, and no image of {job.name} has failed", do="There is nothing to retry")
    need = "with commas between, the classes of failure to label again"
    got = f"no --class is given, and of {job.name} there failed {counted(failures)}"
    return JobError(got, need=need, do=f"Add --class {','.join(failures)}, or some of them")


def parse_classes(text: str) -> tuple[str, ...]:
    """Classes of failure with commas between, sorted, each once. Raises JobError for one that is none."""
    wanted = sorted({name.strip().upper() for name in text.split(",")})
    unknown = [name for name in wanted if name not in Failure.__members__]
    if unknown:
        raise JobError(f"--class is {unknown[0] or 'empty'}", need=f"some of {', '.join(Failure)}", do="Change it")
    return tuple(wanted)
