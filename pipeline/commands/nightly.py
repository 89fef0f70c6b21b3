"""The part of the command line that labels: one day or several, under a lease. Prints, like `cli`, which catches and exits."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import AsJson, Date, IfRunning, JobPath
from pipeline.commands.printing import print_json, put, say
from pipeline.errors import COMPLETE, ExitCode, NightlabelError, gravest

if TYPE_CHECKING:
    from pipeline.attempt import Observer
    from pipeline.job.schedule import Policy
    from pipeline.nights.nightly import Day, Night, Table
    from pipeline.prometheus import Metrics
    from pipeline.report import Receipt
    from pipeline.spec import Job


Classes = Annotated[
    str | None,
    typer.Option(
        "--class", help="Classes of failure with commas between: FETCH_FAILED,DECODE_TIMEOUT. Without it they are only counted."
    ),
]


def retry_failed(
    job: JobPath,
    *,
    classes: Classes = None,
    date: Date = None,
    if_running: IfRunning = None,
    as_json: AsJson = False,
) -> None:
    """Label again the images that failed, into a new generation of their units; what was committed stays as it is."""
    from pipeline.job.jobfile import load_label_template, one_day
    from pipeline.nights.nightly import leased, publish_labels, with_table
    from pipeline.nights.retry import Retry, parse_classes, without_classes  # brings Ray
    from pipeline.screen import Screen
    from pipeline.tables.publish import check_columns, check_publisher

    template, wanted = load_label_template(job, date=date), parse_classes(classes) if classes is not None else ()
    loaded = one_day(template, date, name=str(job))
    if classes is None:
        raise without_classes(loaded)
    check_publisher(loaded)
    check_columns(loaded)
    with leased(template, say=say, if_running=if_running) as check:
        if check is None:
            _print_skipped(as_json)
            return
        with Screen() as screen:
            driver = Retry(loaded, wanted, observe=_checked(check, screen.observe), started=time.perf_counter())
            outcome = driver.retry()
        table = publish_labels(loaded, driver.log, outcome.exit_code)
    if as_json:
        told = outcome.as_dict() | with_table(outcome.exit_code, table)
        print_json(told)
        sys.exit(told["exit_code"])
    for line in outcome.lines():
        put(line)
    _print_table(table)
    sys.exit(outcome.exit_code)


def label_nights(
    template: Job, days: tuple[Day, ...], *, if_running: Policy | None, telling: Metrics, started: float
) -> list[Night]:
    """Labels the days that are asked for, with a screen and metrics. `started` is when the command was."""
    from pipeline.nights.nightly import run_nights

    starts = [started]
    with ExitStack() as stack:

        def begin() -> float:
            """When the day began, and tells of the run from the first one on: one that is skipped tells nothing."""
            if not starts:
                return time.perf_counter()
            stack.enter_context(telling)
            return starts.pop()

        def label(job: Job, check: Callable[[], None]) -> Receipt:
            from pipeline.label import Driver  # brings Ray
            from pipeline.screen import Screen

            since = begin()
            with Screen() as screen:
                observe = _checked(check, telling.beside(screen.observe))
                receipt = Driver(job, observe=observe, started=since, stay=stack if len(days) > 1 else None).label()
            telling.receipt(receipt)
            return receipt

        try:
            nights = run_nights(template, days, label=label, say=say, if_running=if_running)
        except NightlabelError:  # the lease's store, or what the table needs
            begin()
            raise
        if nights:  # none of which may have come so far as to label
            begin()
        telling.account.exit_code = gravest(night.exit_code for night in nights)
    return nights


def _checked(check: Callable[[], None], observe: Observer) -> Observer:
    """Whatever happens is an occasion to look whether another run takes over."""

    def checked(event: str, fields: dict[str, Any]) -> None:
        check()
        observe(event, fields)

    return checked


def print_nights(nights: list[Night], *, as_json: bool, path: Path) -> int:
    """A receipt, or a table of days; the exit code. Raises what stopped a single one."""
    code = gravest(night.exit_code for night in nights)
    if not nights:
        _print_skipped(as_json)
    elif len(nights) == 1:
        _print_night(nights[0], as_json=as_json, path=path)
    elif as_json:
        print_json({"exit_code": code, "days": [night.as_dict() for night in nights]})
    else:
        for night in nights:
            put(night.line())
    return code


def _print_skipped(as_json: bool) -> None:
    if as_json:
        print_json({"skipped": True, "exit_code": ExitCode.DONE})
    else:
        put("skipped: another run is at it. --if-running queue, replace or share do otherwise")


def _print_night(night: Night, *, as_json: bool, path: Path) -> None:
    from pipeline.nights.nightly import with_table

    if isinstance(night.outcome, NightlabelError):
        raise night.outcome
    if as_json:
        print_json(night.outcome.as_dict() | with_table(night.outcome.exit_code, night.table))
        return
    print_receipt(night.outcome, as_json=False, job=f"{shlex.quote(str(path))}{f' --date {night.date}' if night.date else ''}")
    _print_table(night.table)


def _print_table(table: Table) -> None:
    """Its line; raises what it failed of."""
    if isinstance(table, NightlabelError):
        raise table
    if table is not None:
        put(table.line())


def print_receipt(receipt: Receipt, *, as_json: bool, job: str) -> None:
    """The receipt of one run and what to do next; `job` is what stands behind `nightlabel run`."""
    if as_json:
        print_json(receipt.as_dict())
        return
    for line in receipt.lines():
        put(line)
    if receipt.exit_code not in COMPLETE:
        put(f"next    mend what is named above, then again: nightlabel run {job}")
        return
    put(f"next    nightlabel validate {job}")
    place = receipt.where.replace("'", "''")
    rows = f"from '{place}/data/*.parquet'"
    put(_in_duckdb(f"select label, count(*) {rows} group by label"))
    if receipt.failed:
        put(_in_duckdb(f"select source, key, error_class, error {rows} where status = 'failed'"))


def _in_duckdb(query: str) -> str:
    """For a shell, whatever the name of the output holds."""
    escaped = re.sub(r'([\\$`"])', r"\\\1", query)
    return f'        duckdb -c "{escaped}"'
