"""Runs of one job, one after the other for every day that is asked for, under the lease: label, publish, tell whoever waits.

A day that fails does not stop the others; the gravest exit code is that of all. A signal stops them, and so does another run that
was told to replace this one. A night that was missed is not remembered anywhere: `catch_up` looks at the days themselves, so what
came late or was left over is taken up as well, and a day that is labelled costs a listing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cut import list_inputs
from pipeline.errors import COMPLETE, ExitCode, InputMissing, JobError, NightlabelError, gravest
from pipeline.footer import totals
from pipeline.job.jobfile import asked_days, at_day
from pipeline.job.quantity import exceeds
from pipeline.job.schedule import WAIT_S, Policy, looked_back, looks_back
from pipeline.job.uris import above_days
from pipeline.log import Log
from pipeline.nights.generation import last_labelled
from pipeline.nights.lease import LeaseStore, Say
from pipeline.nights.notify import account, tell
from pipeline.report import Receipt
from pipeline.spec import Job
from pipeline.storage import join, open_input, open_store
from pipeline.tables.publish import Published, check_columns, check_publisher, publish

SILENCE_S = 15.0  # of a lease's store, until it is asked again: a beat that waited 60 s is almost too late
Check = Callable[[], None]
Label = Callable[[Job, Check], Receipt]  # labels a job, and calls the check now and then, which may raise
Table = Published | NightlabelError | None  # what became of it; None: the job wants none, or not everything is labelled


@dataclass(frozen=True)
class Day:
    """A day to label. `behind`: nobody asked for it, schedule.catch_up looks whether it was left over. `again`: where an earlier
    attempt has done it all, that one's exit code is this one's too."""

    date: str | None
    behind: bool = False
    again: bool = False


@dataclass(frozen=True)
class Night:
    """How a day ended."""

    job: str
    date: str | None
    outcome: Receipt | NightlabelError
    table: Table = None

    @property
    def exit_code(self) -> int:
        code: int = with_table(self.outcome.exit_code, self.table)["exit_code"]
        return code

    def as_dict(self) -> dict[str, Any]:
        return account(self.job, self.date, self.outcome) | with_table(self.outcome.exit_code, self.table)

    def line(self) -> str:
        """Its line in the table of days."""
        said = self.outcome.lines()[0] if isinstance(self.outcome, Receipt) else str(self.outcome)
        also = f"; {self.table}" if isinstance(self.table, NightlabelError) else ""
        return f"{self.date}  {self.exit_code:>2}  {said}{also}"


def asked(template: Job, date: str | None, *, name: str, again: bool = False) -> tuple[Day, ...]:
    """The days that `--date` and `schedule.catch_up` name, oldest first. Raises JobError."""
    days = asked_days(template, date, name=name)
    at_day(template, days[0], name=name)
    behind = looked_back(days[0], template.schedule) if days[0] and looks_back(date or "", template.schedule) else ()
    return (*(Day(day, behind=True) for day in behind), *(Day(day, again=again) for day in days))


def with_table(exit_code: int, table: Table) -> dict[str, Any]:
    """What `--json` adds to an account of labels: the table, and the exit code of both."""
    if isinstance(table, NightlabelError):
        return {"exit_code": gravest([exit_code, table.exit_code]), "table": {"error": str(table)}}
    return {"exit_code": exit_code, "table": table and table.as_dict()}


def run_nights(template: Job, days: tuple[Day, ...], *, label: Label, say: Say, if_running: Policy | None = None) -> list[Night]:
    """How every day ended; none when another run is at it and the policy is to skip. Raises Interrupted, UnitsLeft when another
    run takes over, and what no day can begin for, of which whoever is to hear how a run ended hears too."""
    with ExitStack() as held:
        try:
            check_publisher(template)
            check = held.enter_context(leased(template, say=say, if_running=if_running))
        except NightlabelError as error:
            tell(template.notify, account(template.name, days[-1].date, error), say=say)
            raise
        return [] if check is None else list(_each(template, days, label, check, say))


@contextmanager
def leased(template: Job, *, say: Say, if_running: Policy | None) -> Iterator[Check | None]:
    """Under the lease: what to call now and then, which raises UnitsLeft when another run takes over; None when another run is at
    it and the policy is to skip. `if_running` overrules the schedule's; a job that has neither takes no lease."""
    policy = if_running or (template.schedule.if_running if template.schedule else "share")
    if policy == "share":
        yield lambda: None
        return
    store = open_store(template.output.uri, template.output.s3, silence=SILENCE_S)
    leases = LeaseStore(store, lease_folder(template))
    lease = leases.acquire(policy, wait=template.schedule.wait if template.schedule else WAIT_S, say=say)
    if lease is None:
        yield None
        return
    with lease:
        yield lease.check


def lease_folder(template: Job) -> str:
    """Beside the folders of fingerprints; above that of the day, so that one night sees another. Raises JobError when the days
    share no bucket."""
    try:
        return join(above_days(template.output.uri), "leases", template.name)
    except ValueError as error:
        raise JobError(str(error)) from None


def _each(template: Job, days: tuple[Day, ...], label: Label, check: Check, say: Say) -> Iterator[Night]:
    for day in days:
        check()
        job = at_day(template, day.date)
        if day.behind and not _has_input(template, job):
            continue
        if len(days) > 1:
            say(f"day     {day.date}")
        outcome = _outcome(job, label, check, day, say)
        night = Night(job.name, day.date, outcome, _table(job, outcome))
        if not (day.behind and isinstance(night.outcome, Receipt) and night.outcome.run is None):
            tell(job.notify, night.as_dict(), say=say)
        yield night


def _outcome(job: Job, label: Label, check: Check, day: Day, say: Say) -> Receipt | NightlabelError:
    try:
        check_columns(job)
        receipt = label(job, check)
        return _as_it_stands(job, receipt) if day.again and receipt.run is None else receipt
    except NightlabelError as error:
        check()  # when it was told to stop, that is no failure of the day
        return error
    except Exception as error:  # a bug: whoever is to hear how a night ended hears of it too, and it goes on its way
        tell(job.notify, account(job.name, day.date, NightlabelError(f"a bug: {error!r}")), say=say)
        raise


def _as_it_stands(job: Job, receipt: Receipt) -> Receipt:
    """Nothing was left to do: the receipt with the counts and the exit code of the run that did it, if too many failed."""
    if receipt.exit_code:  # an absent input is graver
        return receipt
    inputs = list_inputs(open_input(job.input), job.input, some=True).inputs
    sums = totals(last_labelled(_log(job, receipt), frozenset(item.uri for item in inputs)))
    if not exceeds(sums.failed, job.limits.max_failed, of=sums.rows_in):
        return receipt
    return replace(
        receipt,
        units=sums.units,
        units_done=sums.units,
        units_before=sums.units,
        rows_in=sums.rows_in,
        ok=sums.ok,
        failed=sums.failed,
        failures=sums.failures,
        exit_code=ExitCode.TOO_MANY_FAILED,
    )


def _table(job: Job, outcome: Receipt | NightlabelError) -> Table:
    if not isinstance(outcome, Receipt):
        return None
    return publish_labels(job, _log(job, outcome), outcome.exit_code)


def _log(job: Job, receipt: Receipt) -> Log:
    return Log(open_store(receipt.where, job.output.s3), receipt.where)


def publish_labels(job: Job, log: Log, exit_code: int) -> Table:
    """Brings the job's table up to date when everything is labelled. The labels are there and verified whatever becomes of the
    table, so what went wrong is returned; the next run makes up for it."""
    if exit_code not in COMPLETE:
        return None
    try:
        return publish(job, log)
    except NightlabelError as error:
        return error


def _has_input(template: Job, job: Job) -> bool:
    """Anything in any one of the day's uris: of what is missing beside it the run tells. A uri without `{date}` among ones that
    have it is there on every day, and says nothing of this one."""
    wanted = job.input
    dated = [uri for uri, form in zip(wanted.uris, template.input.uris, strict=True) if "{date}" in form]
    for uri in dated or wanted.uris:
        try:
            list_inputs(open_input(wanted), wanted.model_copy(update={"uri": uri}))
            return True
        except InputMissing:
            pass
        except NightlabelError:  # the run says it
            return True
    return False
