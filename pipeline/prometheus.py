"""A run told to Prometheus: posted to a Pushgateway, or left in the folder that node_exporter's textfile collector reads.

A nightly run is over before anyone scrapes it and its cluster may be gone with it, so it tells by itself, every 30 s and at its
end. What only an end can know (exit code, last success, rate) is told only then: both ways keep the older value until the next.
Telling never changes how a run ends; what could not be told is a line for the user.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pipeline.errors import ExitCode, Interrupted, JobError, NightlabelError
from pipeline.job.schedule import longest_gap
from pipeline.spec import Job

if TYPE_CHECKING:
    from pipeline.attempt import Observer
    from pipeline.job.jobfile import AnyJob
    from pipeline.report import Receipt

EVERY_S = 30.0
_PATIENCE_S = 5.0
_WORK_S = 7200.0  # of a scheduled run, when limits.deadline gives it no longer
_LAST_TRIES_S = (0.0, 1.0, 2.0)

#: name without the prefix → (type, help). The label `name` is the job's; `job` belongs to Prometheus.
_FAMILIES = {
    "running": ("gauge", "1 from the start of a run to its end; one that was killed leaves 1 behind."),
    "run_start_timestamp_seconds": ("gauge", "When the last run began."),
    "progress_timestamp_seconds": ("gauge", "When the last run moved: planned, waits for nodes, a block or a commit came."),
    "units_planned": ("gauge", "Units of the run."),
    "units_done": ("gauge", "Units that are committed, by this attempt or before it."),
    "images_total": ("counter", "Rows that arrived in this attempt, by status."),
    "max_failed_ratio": ("gauge", "limits.max_failed of the job."),
    "exit_code": ("gauge", "Exit code of the last run that ended."),
    "run_duration_seconds": ("gauge", "Wall clock of the last run that ended."),
    "images_per_second": ("gauge", "Rate of the last run that labelled, from its first block to its last."),
    "last_success_timestamp_seconds": ("gauge", "When a run last ended with 0."),
    "success_every_seconds": ("gauge", "How long after a success the next is due; only of a job with a schedule."),
}


@dataclass
class Account:
    """What is known of a run. Times are seconds since 1970; None is not told."""

    name: str
    start: float
    moved: float | None = None
    max_failed: float | None = None
    every: float | None = None
    planned: int = 0
    done: int = 0
    ok: int = 0
    failed: int = 0
    images_per_second: float | None = None
    exit_code: int | None = None
    ended: float | None = None

    def text(self) -> str:
        """In Prometheus's text format 0.0.4, which a Pushgateway and a textfile collector both take."""
        values: dict[str, float | None] = {
            "running": float(self.ended is None),
            "run_start_timestamp_seconds": self.start,
            "progress_timestamp_seconds": self.moved,
            "units_planned": self.planned,
            "units_done": self.done,
            "max_failed_ratio": self.max_failed,
            "exit_code": self.exit_code,
            "run_duration_seconds": None if self.ended is None else self.ended - self.start,
            "images_per_second": self.images_per_second,
            "last_success_timestamp_seconds": self.ended if self.exit_code == ExitCode.DONE else None,
            "success_every_seconds": self.every,
        }
        samples = {name: [("", value)] for name, value in values.items() if value is not None}
        if self.ok or self.failed:  # a run that finds nothing to do takes back nothing of what the one before it told
            samples["images_total"] = [(',status="ok"', self.ok), (',status="failed"', self.failed)]
        return "".join(_family(name, self.name, samples[name]) for name in _FAMILIES if name in samples)


def _family(name: str, job: str, samples: list[tuple[str, float]]) -> str:
    kind, text = _FAMILIES[name]
    lines = [f"# HELP nightlabel_{name} {text}", f"# TYPE nightlabel_{name} {kind}"]
    lines += [f'nightlabel_{name}{{name="{job}"{labels}}} {value}' for labels, value in samples]
    return "\n".join(lines) + "\n"


class Metrics:
    """Tells `to`, a Pushgateway's URL or a folder, of the run of `job` inside the `with`; nobody when it is None.

    `say` gets a line when that did not work at the end. Raises JobError for a destination that cannot be one.
    """

    def __init__(self, to: str | None, job: AnyJob, *, say: Callable[[str], None]) -> None:
        if to is not None:
            _check(to)
        self.account = Account(job.name, time.time())
        if isinstance(job, Job):  # the others are not heard of before their end, and would look stuck
            self.account.moved, self.account.max_failed = self.account.start, job.limits.max_failed
            self.account.every = _due(job)
        self._to, self._say = to, say
        self._trouble: str | None = None
        self._end = threading.Event()
        # Beside the run, and left behind at its end: a destination that hangs holds nobody up.
        self._teller = threading.Thread(target=self._tell_on, daemon=True)

    def __enter__(self) -> Metrics:
        if self._to is not None:
            self._teller.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        account = self.account
        account.exit_code = _code(error) if error is not None else account.exit_code or ExitCode.DONE
        account.ended = time.time()
        self._end.set()
        if self._to is None:
            return
        self._teller.join(sum(_LAST_TRIES_S) + 2 * _PATIENCE_S)
        trouble = "no answer in time" if self._teller.is_alive() else self._trouble
        if trouble:
            self._say(f"metrics: {self._to} was not told how the run ended ({trouble}), which changes nothing of the run")

    def beside(self, observe: Observer) -> Observer:
        """An observer of the driver that keeps the account and tells the other one too."""

        def both(event: str, fields: dict[str, Any]) -> None:
            self.observe(event, fields)
            observe(event, fields)

        return both

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the driver's events."""
        account = self.account
        account.moved = time.time()
        if event in ("planned", "replanned"):
            account.planned, account.done = fields["units"], fields["done"]
        elif event == "rows":
            account.ok += fields["images"] - fields["failed"]
            account.failed += fields["failed"]
        elif event == "commit":
            account.done += 1

    def receipt(self, receipt: Receipt) -> None:
        """How the run ends, when it comes that far."""
        self.account.exit_code, self.account.images_per_second = receipt.exit_code, receipt.images_per_second

    def _tell_on(self) -> None:
        self._tell()
        while not self._end.wait(EVERY_S):
            self._tell()
        for pause in _LAST_TRIES_S:  # nothing after this one would make up for it
            time.sleep(pause)
            if self._tell():
                return

    def _tell(self) -> bool:
        to = self._to or ""
        try:
            if "://" in to:
                _post(to, self.account)
            else:
                _write(Path(to), self.account)
        except (OSError, HTTPException, ValueError) as error:
            self._trouble = str(error) or type(error).__name__
            return False
        self._trouble = None
        return True


def _due(job: Job) -> float | None:
    """Seconds from a success to when the next must be there: the schedule's longest gap, time to work, and to wait for a run of
    before, where the schedule has it wait."""
    if job.schedule is None:
        return None
    return longest_gap(job.schedule.cron) + job.schedule.queues_for + max(_WORK_S, job.limits.deadline or 0.0)


def _check(to: str) -> None:
    if "://" not in to:
        return
    if "@" in to.split("/")[2]:
        raise JobError("--metrics holds a user name", need="a URL without credentials", do="Let the network say who may post")
    try:
        url = urlsplit(to)
        fits = url.scheme in ("http", "https") and url.hostname
    except ValueError:  # a bracket that does not close
        fits = None
    if not fits:
        need = "a Pushgateway's http:// or https:// URL, or a folder"
        raise JobError(f"--metrics is {to}", need=need, do="Mend it or leave it out")


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return error.exit_code if isinstance(error, (NightlabelError, Interrupted)) else ExitCode.BUG


def _post(gateway: str, account: Account) -> None:
    """POST replaces the families that it names and keeps the others of the group."""
    request = urllib.request.Request(
        f"{gateway.rstrip('/')}/metrics/job/nightlabel/name/{quote(account.name, safe='')}",
        data=account.text().encode(),
        headers={"Content-Type": "text/plain; version=0.0.4"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE_S):
        pass


def _write(folder: Path, account: Account) -> None:
    """As POST does: the families that are not told now stay. Renamed into place, for a collector reads when it likes."""
    path, text = folder / f"nightlabel_{account.name}.prom", account.text()
    with contextlib.suppress(FileNotFoundError):
        text += "".join(line for line in path.read_text().splitlines(keepends=True) if f"TYPE {_named(line)} " not in text)
    aside = folder / f".{path.name}.{os.getpid()}"
    aside.write_text(text)
    aside.replace(path)


def _named(line: str) -> str:
    found = re.match(r"(?:# (?:HELP|TYPE) )?(\w+)", line)
    return found[1] if found else ""
