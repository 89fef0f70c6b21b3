"""Which day a run is for, and what a night does when the last one still runs.

A day is asked for as `--date 2026-11-01`, `today`, `yesterday`, or `A..B` with both ends; today is today in `schedule.timezone`,
so a run at two in the morning labels the same day wherever its machine stands. In a pod that a schedule made, today is the day of
its tick, so nodes that come late and an attempt after midnight are for the same day too.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import islice, pairwise, takewhile
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator

from pipeline.job.fields import Cron, plain_cron
from pipeline.job.quantity import Model, Seconds, between, in_seconds

IfRunning = Literal["skip", "queue", "replace"]
Policy = Literal[IfRunning, "share"]  # of a run, which may do without a lease
WAIT_S = 6 * 3600.0
_TICKS, _YEARS = 8_000, 9  # looked at: five days of minutes and a weekend, or two 29ths of February
TICK = "NIGHTLABEL_TICK"  # the name of what a schedule has made, in its pods
#: A CronJob's Job is called after the minute since 1970, a RayCronJob's RayJob too, and its cluster after that one.
_MINUTE = re.compile(r"-([0-9]{8})(-[a-z0-9]{5})?\Z")
FORMS = "YYYY-MM-DD, today, yesterday, or two of them with .. between"


def _zone(name: str) -> tzinfo:
    try:
        return UTC if name == "UTC" else ZoneInfo(name)  # not every container has a time zone database
    except (OSError, KeyError, ValueError):
        raise ValueError("a time zone such as Europe/Berlin, of the database on this machine") from None


def _timezone(value: str) -> str:
    _zone(value)
    return value


class Schedule(Model):
    """When to run, and what a run does when the last one still runs. A job with a schedule runs under a lease."""

    cron: Cron
    """Five cron fields, for `render` and `apply` with a target that is scheduled; `run` and `submit` begin at once."""
    timezone: Annotated[str, AfterValidator(_timezone)] = "UTC"
    """Time zone of `cron`, and of `--date today`, which on Kubernetes is the day of the tick."""
    if_running: IfRunning = "skip"
    """What to do when another run of the job is still going. skip: end with a sentence and exit code 0. queue: wait for it.
    replace: ask it to stop, and go on from where it was."""
    wait: Seconds = WAIT_S
    """`if_running: queue`: how long to wait for the other one."""
    catch_up: Annotated[Seconds, between(in_seconds, "1d", "366d")] | None = None
    """With `--date today` or `yesterday`: label missed days too, up to so many whole days back, such as `7d`. A day for which no
    uri has input is passed over; looking at one that is labelled costs a listing."""

    @property
    def queues_for(self) -> float:
        """Seconds that a run may wait for another one before it begins."""
        return self.wait if self.if_running == "queue" else 0.0


def days_of(text: str, timezone: str = "UTC", *, now: datetime | None = None) -> tuple[str, ...]:
    """The days that `--date` names, oldest first, as YYYY-MM-DD. Raises ValueError: it names none."""
    first, dots, last = text.partition("..")
    if now is None and {first, last} & {"today", "yesterday"}:
        now = _begun(_zone(timezone))  # once: between two looks may be midnight
    start = _day(first, text, now)
    stop = _day(last, text, now) if dots else start
    if stop < start:
        raise ValueError(f"--date is {text!r}; required: the older day first. Give {last}..{first}")
    return tuple((start + timedelta(number)).isoformat() for number in range((stop - start).days + 1))


def _day(word: str, text: str, now: datetime | None) -> date:
    if now is not None and word in ("today", "yesterday"):
        return now.date() - timedelta(word == "yesterday")
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", word):  # fromisoformat takes weeks too
            raise ValueError
        return date.fromisoformat(word)
    except ValueError:
        raise ValueError(f"--date is {text!r}; required: {FORMS}. Give a day such as 2026-11-01") from None


def _begun(zone: tzinfo) -> datetime:
    """When the schedule had this run begin, however late it came to; now, where none did. A name that somebody else has given may
    end with eight digits too: it is years away."""
    now, minute = datetime.now(zone), _MINUTE.search(os.environ.get(TICK, ""))
    tick = datetime.fromtimestamp(60 * int(minute[1]), zone) if minute else now
    return tick if abs(now - tick) < timedelta(366) else now


def looks_back(text: str, schedule: Schedule | None) -> bool:
    """Whether a run with this `--date` looks for missed days, which it does for `today` and `yesterday` alone."""
    return text in ("today", "yesterday") and schedule is not None and schedule.catch_up is not None


def settled(text: str, days: tuple[str | None, ...], schedule: Schedule | None) -> str:
    """`--date` for a run that begins elsewhere and later: the days themselves, so that one after midnight is for the same ones.
    Where it looks back, the word."""
    if looks_back(text, schedule):
        return text
    return "..".join(dict.fromkeys(day for day in (days[0], days[-1]) if day))


def looked_back(day: str, schedule: Schedule | None) -> tuple[str, ...]:
    """The days before `day` that `schedule.catch_up` reaches, oldest first."""
    days = int((schedule.catch_up or 0.0) // 86_400) if schedule else 0
    last = date.fromisoformat(day)
    return tuple((last - timedelta(number)).isoformat() for number in range(days, 0, -1))


def longest_gap(cron: str) -> float:
    """Seconds between the two neighbouring ticks that lie farthest apart, summer time left out."""
    from cronsim import CronSim  # not above: workers read jobs too, and ask nothing of a schedule

    first = datetime(2024, 1, 1)
    ticks = takewhile(lambda tick: tick.year < first.year + _YEARS, CronSim(plain_cron(cron), first))
    return max((later - earlier).total_seconds() for earlier, later in pairwise(islice(ticks, _TICKS)))
