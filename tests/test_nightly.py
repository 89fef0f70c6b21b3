"""Nights: days of a range, missed days, what another run's lease does to them, and who hears of it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from faults import Fault, fault_proxy
from inprocess import without_ray
from shards import write_tars
from test_lease import FAST, until
from test_run import LIGHT, cli, files, job, problems, table
from typer.testing import CliRunner

from pipeline import cluster
from pipeline.cli import app
from pipeline.commands.nightly import label_nights
from pipeline.cut import list_inputs
from pipeline.errors import InputMissing, Interrupted, JobError, Temporary, UnfitError, UnitsLeft, gravest
from pipeline.job.jobfile import at_day, parse_job
from pipeline.job.schedule import Schedule, days_of, looked_back
from pipeline.label import Driver
from pipeline.nights import nightly, notify
from pipeline.nights.lease import LeaseStore, LeaseTiming
from pipeline.nights.nightly import Day, Night, asked, lease_folder, run_nights
from pipeline.prometheus import Metrics
from pipeline.report import Receipt
from pipeline.spec import Job, Notify
from pipeline.storage import open_store

DAILY = {"cron": "0 2 * * *"}
LATE = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)


def template(folder: Path, **fields: Any) -> Job:
    return job(folder / "in/{date}/", str(folder / "model"), folder / "out", **fields)


def receipt(name: str = "test", *, run: str | None = "000001", exit_code: int = 0) -> Receipt:
    counts = dict.fromkeys(
        ("units", "units_done", "units_before", "rows_in", "ok", "failed", "labelled_now", "written", "passes"), 0
    )
    nothing: dict[str, Any] = {"failures": {}, "labels": {}, "seam_seconds": {}, "first_seconds": None, "images_per_second": None}
    names = {"job": name, "where": "out/f", "fingerprint": "f", "artifact": "a", "precision": "float32", "run": run}
    times = {"started": "2026-11-26T02:00:05Z", "ended": "2026-11-26T02:00:05Z"}
    return Receipt(**names, **counts, **nothing, **times, seconds=0.0, exit_code=exit_code)


@pytest.mark.parametrize(
    ("text", "zone", "days"),
    [
        ("2026-11-01", "UTC", ["2026-11-01"]),
        ("2026-02-27..2026-03-01", "UTC", ["2026-02-27", "2026-02-28", "2026-03-01"]),
        ("today", "UTC", ["2026-11-25"]),
        ("yesterday", "UTC", ["2026-11-24"]),
        ("yesterday..today", "UTC", ["2026-11-24", "2026-11-25"]),
        ("2026-11-24..today", "UTC", ["2026-11-24", "2026-11-25"]),
        ("2026-11-01..2026-11-01", "UTC", ["2026-11-01"]),
    ],
)
def test_days(text, zone, days):
    assert list(days_of(text, zone, now=LATE)) == days


def test_today_is_today_where_the_schedule_is(monkeypatch):
    from pipeline.job import schedule

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return LATE.astimezone(tz)

    monkeypatch.setattr(schedule, "datetime", Clock)
    assert days_of("today", "Asia/Tokyo") == ("2026-11-26",)
    assert days_of("today", "America/New_York") == ("2026-11-25",)


def test_a_range_that_is_read_at_midnight_is_of_one_day(monkeypatch):
    from pipeline.job import schedule

    ticks = iter((LATE, datetime(2026, 11, 26, tzinfo=UTC)))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return next(ticks).astimezone(tz)

    monkeypatch.setattr(schedule, "datetime", Clock)
    assert days_of("yesterday..today") == ("2026-11-24", "2026-11-25")


@pytest.mark.parametrize(
    ("name", "zone", "days"),
    [
        ("nightly-29927400", "UTC", ("2026-11-24", "2026-11-25")),  # of 22:00, by a CronJob
        ("nightly-29927400-x7k2p", "UTC", ("2026-11-24", "2026-11-25")),  # by a RayCronJob
        ("nightly-29927400", "Asia/Tokyo", ("2026-11-25", "2026-11-26")),
        ("nightly-29918760", "UTC", ("2026-11-18", "2026-11-19")),  # was missed, and is made up for
        ("nightly-20261101", "UTC", ("2026-11-26", "2026-11-27")),  # kubectl create job nightly-20261101 --from=cronjob/nightly
        ("by-hand", "UTC", ("2026-11-26", "2026-11-27")),
        ("", "UTC", ("2026-11-26", "2026-11-27")),
    ],
)
def test_in_a_pod_of_a_schedule_today_is_the_day_of_its_tick(name, zone, days, monkeypatch):
    """Its nodes came, or its second attempt began, 27 hours later."""
    from pipeline.job import schedule

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 11, 27, 1, tzinfo=UTC).astimezone(tz)

    monkeypatch.setattr(schedule, "datetime", Clock)
    monkeypatch.setenv(schedule.TICK, name)
    assert days_of("yesterday..today", zone) == days


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-13-01",
        "2026-02-30",
        "2026-W01-1",
        "20261101",
        "tomorrow",
        "2026-11-01..",
        "..2026-11-01",
        "2026-11-02..2026-11-01",
    ],
)
def test_odd_dates_are_a_sentence(text):
    with pytest.raises(ValueError, match="--date is"):
        days_of(text)


def test_what_a_schedule_and_a_notice_can_hold():
    base = b"name: x\ninput: {uri: 'a/{date}/'}\nmodel: {uri: m}\noutput: {uri: o}\n"
    for more, words in (
        (b"schedule: {cron: '0 2 * * *', timezone: Mars/Base}", "schedule.timezone is 'Mars/Base'"),
        (b"schedule: {cron: '0 2 * * *', catch_up: 23h}", "schedule.catch_up is '23h'; required: 1d to 366d"),
        (b"schedule: {cron: '0 2 * * *', catch_up: 367d}", "schedule.catch_up is '367d'; required: 1d to 366d"),
        (b"notify: {}", "names nobody"),
        (b"notify: {webhook: 'http://example.com/x'}", "https"),
        (b"notify: {webhook: 'https://me:secret@example.com/x'}", "without credentials"),
    ):
        with pytest.raises(JobError, match=words) as caught:
            parse_job(base + more, date="today")
        assert "secret" not in str(caught.value).replace("holds the secret", "")


def test_a_range_needs_a_job_with_a_date(tmp_path):
    days = asked(template(tmp_path), "2026-11-01..2026-11-03", name="j")
    assert [day.date for day in days] == ["2026-11-01", "2026-11-02", "2026-11-03"]
    with pytest.raises(JobError, match=r"^j: .*\{date\}.* needs a date"):  # by its file, before the lease is looked at
        asked(template(tmp_path), None, name="j")
    with pytest.raises(JobError, match="is 2 days"):
        parse_job(b"name: x\ninput: {uri: 'a/{date}/'}\nmodel: {uri: m}\noutput: {uri: o}", date="2026-11-01..2026-11-02")


def test_a_day_that_fails_stops_no_other_and_the_gravest_code_is_the_outcome(tmp_path):
    wanted = template(tmp_path)
    outcomes = {"01": receipt(), "02": InputMissing("in/02 is absent"), "03": Temporary("slow"), "04": receipt(exit_code=4)}
    seen: list[str] = []

    def label(one: Job, check: Any) -> Receipt:
        seen.append(one.input.uris[0].rstrip("/")[-2:])
        outcome = outcomes[seen[-1]]
        if isinstance(outcome, Receipt):
            return outcome
        raise outcome

    nights = run_nights(wanted, asked(wanted, "2026-11-01..2026-11-04", name="j"), label=label, say=lambda text: None)
    assert seen == ["01", "02", "03", "04"]
    assert [night.exit_code for night in nights] == [0, 3, 75, 4]
    assert gravest(night.exit_code for night in nights) == 3
    assert nights[1].line() == "2026-11-02   3  in/02 is absent."


def test_the_gravest_of_two_days_is_what_somebody_must_mend():
    for milder, graver in combinations((0, 4, 5, 75, 3, 77, 2, 6, 70), 2):
        assert gravest([milder, graver]) == gravest([graver, milder]) == graver
    assert gravest([]) == 0


def test_a_table_that_fails_leaves_the_labels_and_says_so(tmp_path, monkeypatch):
    wanted = template(tmp_path, publish={"format": "delta"})
    asked_for: list[str] = []

    def refuse(one: Job, log: Any) -> None:
        asked_for.append(log.root)
        raise Temporary("the table is busy")

    monkeypatch.setattr(nightly, "publish", refuse)
    nights = run_nights(wanted, (Day("2026-11-01"),), label=lambda one, check: receipt(), say=print)
    assert (asked_for, gravest(night.exit_code for night in nights)) == ([str(Path("out/f").absolute())], 75)
    assert nights[0].line().endswith("; the table is busy.")
    assert nights[0].as_dict()["table"] == {"error": "the table is busy."}
    run_nights(wanted, (Day("2026-11-01"),), label=lambda one, check: receipt(exit_code=3), say=print)
    assert len(asked_for) == 1, "what is not finished is not published"
    (night,) = run_nights(wanted, (Day("2026-11-01"),), label=lambda one, check: receipt(exit_code=4), say=print)
    assert (len(asked_for), night.exit_code) == (2, 75), "too many failed, and everything is committed"


def test_a_publisher_that_is_not_installed_is_found_before_the_images(tmp_path, monkeypatch):
    wanted = template(tmp_path, publish={"format": "delta"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def label(one: Job, check: Any) -> Receipt:
        raise AssertionError("labelled")

    with pytest.raises(UnfitError, match=r"pip install 'nightlabel\[delta\]'"):
        run_nights(wanted, (Day("2026-11-01"),), label=label, say=print)


@pytest.mark.parametrize("when", ["while a day is labelled", "between two days"])
def test_who_is_told_to_stop_labels_no_other_day(tmp_path, monkeypatch, when):
    """What fails because of it is no failure of the day, and nobody hears of it."""
    wanted, seen, over = template(tmp_path, notify={"command": ["false"], "when": "always"}), list[str](), list[str]()
    monkeypatch.setattr(nightly, "tell", lambda wanted, content, *, say: seen.append(f"told of {content['day']}"))

    def check() -> None:
        if over:
            raise UnitsLeft("another run took over")

    @contextmanager
    def held(*_: object, **__: object) -> Iterator[Any]:
        yield check

    def label(one: Job, check: Any) -> Receipt:
        seen.append(Path(one.input.uris[0]).name)
        over.append("asked to stop")
        if when == "between two days":
            return receipt()
        raise Temporary("the pass was left")

    monkeypatch.setattr(nightly, "leased", held)
    with pytest.raises(UnitsLeft, match="took over"):
        run_nights(wanted, asked(wanted, "2026-11-01..2026-11-02", name="j"), label=label, say=print)
    assert seen == (["2026-11-01", "told of 2026-11-01"] if when == "between two days" else ["2026-11-01"])


def test_an_input_that_is_missing_is_graver_than_failures_of_an_attempt_before(tmp_path):
    missing = receipt(run=None, exit_code=3)
    assert nightly._as_it_stands(template(tmp_path), missing) is missing


def test_a_signal_stops_all_days_and_gives_the_lease_back(tmp_path):
    wanted = template(tmp_path, schedule=DAILY)

    def label(one: Job, check: Any) -> Receipt:
        raise Interrupted("stopped by SIGTERM", signal_number=15)

    days = asked(wanted, "2026-11-01..2026-11-04", name="j")
    with pytest.raises(Interrupted):
        run_nights(wanted, days, label=label, say=lambda text: None)
    assert run_nights(wanted, days[:1], label=lambda one, check: receipt(), say=lambda text: None)


def test_catch_up_labels_missed_days_and_passes_over_days_without_input(tmp_path, monkeypatch, one_day):
    told: list[str] = []
    monkeypatch.setattr(nightly, "tell", lambda wanted, content, *, say: told.append(content["day"]))
    wanted = template(tmp_path, schedule=DAILY | {"catch_up": "3d"})
    days = asked(wanted, "today", name="j")
    assert [day.behind for day in days] == [True, True, True, False]
    assert days[-1].date == one_day
    for day in (days[0], days[2]):
        write_tars(tmp_path / "in" / str(day.date), shards=1, images=1)
    seen: list[str] = []

    def label(one: Job, check: Any) -> Receipt:
        seen.append(Path(one.input.uris[0]).name)
        return receipt(run=None if seen[1:] else "000001")

    nights = run_nights(wanted, days, label=label, say=lambda text: None)
    assert seen == [days[0].date, days[2].date, one_day], "today is run whatever it has: a night without input is an error"
    assert [night.date for night in nights] == seen
    assert told == [days[0].date, one_day], "a day that was looked at and has nothing left is no news"
    assert asked(wanted, "2026-11-01", name="j") == (Day("2026-11-01"),), "a day by its name is that day alone"
    again = [day.again for day in asked(wanted, "today", name="j", again=True)]
    assert again == [False, False, False, True], "a day that was labelled in another night is not this run's failure"


def test_a_day_that_cannot_be_looked_at_is_not_passed_over(tmp_path, monkeypatch):
    """The run says what is wrong."""

    def away(*_: object, **__: object) -> None:
        raise Temporary("the store is slow")

    monkeypatch.setattr(nightly, "list_inputs", away)
    wanted, seen = template(tmp_path, schedule=DAILY | {"catch_up": "1d"}), list[str]()

    def label(one: Job, check: Any) -> Receipt:
        seen.append(Path(one.input.uris[0]).name)
        raise Temporary("the store is slow")

    days = asked(wanted, "today", name="j")
    nights = run_nights(wanted, days, label=label, say=lambda text: None)
    assert (seen, [night.exit_code for night in nights]) == ([day.date for day in days], [75, 75])


@pytest.mark.parametrize(("reach", "days"), [("1d", ["2026-03-01"]), ("71h", ["2026-02-28", "2026-03-01"]), (None, [])])
def test_catch_up_reaches_whole_days_before_the_one_asked_for(reach, days):
    schedule = Schedule.model_validate(DAILY | {"catch_up": reach})
    assert list(looked_back("2026-03-02", schedule)) == days
    assert looked_back("2026-03-02", None) == ()


def test_catch_up_passes_over_no_day_of_which_one_source_is_there(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/model.tar").write_bytes(b"x")
    sources = [str(tmp_path / name) for name in ("a/{date}", "b/{date}/", "all")]
    wanted = template(tmp_path, input={"uri": sources}, schedule=DAILY | {"catch_up": "3d"})
    days = asked(wanted, "yesterday", name="j")
    for source, day in (("a", days[0]), ("b", days[2])):
        write_tars(tmp_path / source / str(day.date), shards=1, images=1)
    (tmp_path / "a" / str(days[1].date)).mkdir()

    def label(one: Job, check: Any) -> Receipt:
        list_inputs(open_store(one.input.uris[0]), one.input)
        raise AssertionError("labelled")

    nights = run_nights(wanted, days, label=label, say=lambda text: None)
    assert [night.date for night in nights] == [days[0].date, days[2].date, days[3].date]
    assert [night.exit_code for night in nights] == [3, 3, 3]
    assert [f"{source}/{night.date}" in night.line() for source, night in zip("baa", nights, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("out", "folder"),
    [
        ("s3://labels/products/", "s3://labels/products/leases/test"),
        ("s3://labels/date={date}/x", "s3://labels/leases/test"),
        ("{date}/labels", "{here}/leases/test"),
        ("labels-{date}/x", "{here}/leases/test"),
        ("file://labels-{date}/x", "{here}/leases/test"),
        ("file:///labels-{date}/x", "/leases/test"),
        ("/labels-{date}", "/leases/test"),
        ("/labels/{date}", "/labels/leases/test"),
    ],
)
def test_the_lease_lies_above_the_days_so_that_one_night_sees_another(out, folder):
    assert lease_folder(job("in", "m", out)) == folder.replace("{here}", str(Path().absolute()))


def test_days_in_buckets_of_their_own_have_no_place_for_a_lease(tmp_path):
    text = b"name: x\ninput: {uri: 'a/{date}/'}\nmodel: {uri: m}\noutput: {uri: 's3://labels-{date}/x/'}\n"
    words = r"s3://labels-\{date\}/x/; required: one bucket for all days"
    with pytest.raises(JobError, match=words):
        parse_job(text + b"schedule: {cron: '0 2 * * *'}", date="today")
    loaded = parse_job(text, date="today")
    assert isinstance(loaded, Job), "each day by itself, without a lease"
    wanted = template(tmp_path, output={"uri": "s3://labels-{date}/x/"})
    with pytest.raises(JobError, match=words), nightly.leased(wanted, say=print, if_running="queue"):
        pass


def test_a_beat_does_not_wait_long_for_an_answer(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(nightly, "SILENCE_S", 0.5)
    monkeypatch.setattr(nightly, "LeaseStore", partial(LeaseStore, pace=LeaseTiming(beat=0.1)))
    with fault_proxy(s3.port) as proxy:
        out = f"s3://{s3.bucket()}/labels"
        wanted = template(tmp_path, output={"uri": out, "s3": {"endpoint": proxy.endpoint, "region": "us-east-1"}})
        proxy.script(Fault("hang", "PUT", "/beats/"))
        with nightly.leased(wanted, say=print, if_running="queue"):
            until(lambda: any("/beats/" in item.uri for item in open_store("s3://", s3.options).list(f"{out}/", glob=False)))
        assert not proxy.pending


def test_what_another_run_at_it_does(tmp_path):
    wanted = template(tmp_path, schedule=DAILY)
    said: list[str] = []
    calls: list[str] = []

    def label(one: Job, check: Any) -> Receipt:
        calls.append("labelled")
        return receipt()

    leases = LeaseStore(open_store(wanted.output.uri), lease_folder(wanted), FAST)
    with leases.acquire("skip", wait=0.0, say=said.append):
        assert run_nights(wanted, (Day("2026-11-01"),), label=label, say=said.append) == []
        assert calls == []
        (tmp_path / "metrics").mkdir()
        code, out, err = cli("run", write(tmp_path, wanted), "--date", "2026-11-01", "--metrics", tmp_path / "metrics")
        assert (code, out.split(":")[0]) == (0, "skipped"), err
        assert list((tmp_path / "metrics").iterdir()) == [], "a run that is skipped is no success to tell of"
        assert len(run_nights(wanted, (Day("2026-11-01"),), label=label, say=said.append, if_running="share")) == 1
        held = leases.state()
        unscheduled = wanted.model_copy(update={"schedule": None})
        assert len(run_nights(unscheduled, (Day("2026-11-01"),), label=label, say=said.append)) == 1
        assert leases.state().term == held.term, "a job without a schedule takes no lease"
    assert len(run_nights(wanted, (Day("2026-11-01"),), label=label, say=said.append)) == 1


def write(folder: Path, wanted: Job) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps(wanted.model_dump(mode="json")))
    return path


def invoke(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_backfill_and_again(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    for number in (1, 2):
        write_tars(tmp_path / f"in/2026-11-0{number}", shards=1, images=3, first=number)
    (tmp_path / "in/2026-11-02/002.tar").write_bytes(b"<html>")
    wanted = template(tmp_path, model={"uri": model}, schedule=DAILY)
    path = write(tmp_path, wanted)
    code, out, err = invoke("run", path, "--date", "2026-11-01..2026-11-03")
    assert code == 3, err
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [["2026-11-01", "0"], ["2026-11-02", "3"], ["2026-11-03", "3"]]
    assert "3 in = 3 ok + 0 failed" in lines[0]
    assert "in/2026-11-03" in lines[2]
    before = {name: stamp for name, stamp in files(tmp_path / "out").items() if "/leases/" not in name}
    for number in (2, 3):
        write_tars(tmp_path / f"in/2026-11-0{number}", shards=1, images=3, first=number)
    code, out, err = invoke("run", path, "--date", "2026-11-01..2026-11-03", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [day["receipt"]["labelled_now"] for day in told["days"]] == [0, 3, 3], "only what is new or changed is labelled"
    (where,) = (path for path in (tmp_path / "out").iterdir() if path.name != "leases")
    assert sorted({row["key"][:3] for row in table(where).to_pylist()}) == ["001", "002", "003"]
    assert table(where).num_rows == 9
    assert files(tmp_path / "out").items() >= before.items()
    assert problems(at_day(wanted, "2026-11-01")) == []


THREADS_AT_THE_END = """
import atexit, contextlib, os, sys, time
from pipeline.__main__ import main

def count():
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read())
    return len([name for name in names if not name.startswith("jemalloc")])  # the allocator's own hold nothing of Python's

def tell():
    end = time.monotonic() + 5  # for threads of Python's own, which are ending
    while count() > 1 and time.monotonic() < end:
        time.sleep(0.05)
    print(count(), file=sys.stderr)

atexit.register(tell)
main()
"""


def test_what_has_read_an_output_ends_without_threads_of_arrows(tmp_path, model, monkeypatch):
    """Such a thread may let go of bytes of Python's when Python ends, and that aborts the process: 134 in place of 0."""
    without_ray(monkeypatch)
    write_tars(tmp_path / "in", shards=2, images=3)
    path = write(tmp_path, job(tmp_path / "in", model, tmp_path / "out"))
    assert invoke("run", path)[0] == 0
    for words in (["plan", path], ["validate", path, "--deep"]):
        command = [sys.executable, "-c", THREADS_AT_THE_END, *map(str, words)]
        alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy's, which hold nothing either
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "1\n"), done.stdout


def test_a_run_that_is_replaced_stops_resumably(tmp_path, model, monkeypatch):
    """The holder is in the middle of its images when another run asks for its place; that one labels the rest, nothing twice."""
    without_ray(monkeypatch)
    write_tars(tmp_path / "in", shards=8, images=4)
    wanted = job(tmp_path / "in", model, tmp_path / "out", resources=LIGHT | {"read": {"tasks": 2, "cpus_per_task": 0.1}})
    leases = LeaseStore(open_store(wanted.output.uri), lease_folder(wanted), FAST)
    taken: list[Any] = []
    other = threading.Thread(
        target=lambda: taken.append(LeaseStore(*place(wanted), FAST).acquire("replace", wait=0.0, say=print))
    )

    with leases.acquire("skip", wait=0.0, say=print) as lease:
        seen: list[int] = []

        def observe(event: str, fields: dict[str, Any]) -> None:
            seen.append(fields.get("images", 0))
            if sum(seen) > 12 and not other.is_alive():
                other.start()
                until(lambda: lease._end)
            lease.check()

        with pytest.raises(UnitsLeft, match="asked this run to stop"):
            Driver(wanted, observe=observe, started=0.0).label()
    other.join()
    done = len(list(Path(tmp_path, "out").rglob("data/*.parquet")))
    assert 0 < done < 8
    with taken[0]:
        rest = Driver(wanted, observe=lambda event, fields: taken[0].check(), started=0.0).label()
    assert (rest.exit_code, rest.rows_in, rest.written) == (0, 32, 8 - done)
    assert problems(wanted) == []


def test_the_deadline_counts_neither_the_queue_nor_the_cluster(tmp_path, model, monkeypatch):
    """The command began an hour ago and queued; then the cluster takes an hour to come, for a retry too. The receipt has both."""
    without_ray(monkeypatch)
    clock, late = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    @contextmanager
    def slow_cluster(*_: object, **__: object) -> Iterator[None]:
        late[0] += 3600
        yield

    monkeypatch.setattr(cluster, "cluster", slow_cluster)
    write_tars(tmp_path / "in/2026-11-01", shards=1, images=3)
    with tarfile.open(tmp_path / "in/2026-11-01/broken.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    limits = {"deadline": "60s", "max_failed": "100%"}
    wanted = template(tmp_path, model={"uri": model}, schedule=DAILY | {"if_running": "queue"}, limits=limits)
    metrics = Metrics(None, wanted, say=print)
    (night,) = label_nights(wanted, (Day("2026-11-01"),), if_running=None, telling=metrics, started=time.perf_counter() - 3600)
    assert isinstance(night.outcome, Receipt), night.line()
    assert (night.exit_code, night.outcome.rows_in, night.outcome.failed) == (0, 4, 1)
    assert night.outcome.seconds > 7200
    assert night.outcome.first_seconds > 7200
    code, out, err = invoke("retry-failed", write(tmp_path, wanted), "--date", "2026-11-01", "--class", "NOT_AN_IMAGE")
    assert (code, late[0]) == (0, 7200), err
    assert "1 images retried" in out


def place(wanted: Job) -> tuple[Any, str]:
    return open_store(wanted.output.uri), lease_folder(wanted)


@contextmanager
def webhook(*codes: int) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers with each code once, then 200; (its URL, what came)."""
    came: list[Any] = []
    answers = list(codes)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            self.send_response(answers.pop(0) if answers else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tell(wanted: Notify, night: Night) -> list[str]:
    said: list[str] = []
    notify.tell(wanted, night.as_dict(), say=said.append, pause=0.01)
    return said


def test_a_command_gets_the_receipt(tmp_path):
    copy = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    wanted = Notify(command=(sys.executable, "-c", copy, str(tmp_path / "told; $(x)")))
    assert tell(wanted, Night("products", "2026-11-01", Temporary("the store is slow"))) == []
    told = json.loads((tmp_path / "told; $(x)").read_text())
    assert (told["job"], told["day"], told["exit_code"], told["error"]) == ("products", "2026-11-01", 75, "the store is slow.")
    assert (told["error_class"], told["receipt"]) == ("Temporary", None)
    (tmp_path / "told; $(x)").unlink()
    assert tell(wanted, Night("products", None, receipt())) == []
    assert not (tmp_path / "told; $(x)").exists(), "a success is not told unless it is asked for"
    assert tell(wanted.model_copy(update={"when": "always"}), Night("products", None, receipt())) == []
    assert json.loads((tmp_path / "told; $(x)").read_text())["receipt"]["run"] == "000001"


def test_what_fails_while_telling_is_a_line_and_no_more(tmp_path):
    night = Night("x", None, Temporary("slow"))
    assert tell(Notify(command=("/no/such/program",)), night) == ["notify.command /no/such/program: No such file or directory"]
    script = "import sys; sys.exit('no mail today')"
    assert tell(Notify(command=(sys.executable, "-c", script)), night) == [
        f"notify.command {sys.executable} ended with 1: no mail today"
    ]
    wanted = template(tmp_path, notify={"command": ["/no/such/program"], "when": "always"})
    said: list[str] = []
    nights = run_nights(wanted, (Day("2026-11-01"),), label=lambda one, check: receipt(), say=said.append)
    assert (gravest(night.exit_code for night in nights), len(said)) == (0, 1)


@pytest.mark.parametrize(("code", "said"), [(0, []), (3, ["notify.command sh ended with 3: no mail today"])])
def test_what_a_command_leaves_running_holds_no_run(code, said, monkeypatch):
    monkeypatch.setattr(notify, "COMMAND_S", 5.0)
    labels = {f"label {number}": number for number in range(20_000)}  # more than a pipe holds, and nobody reads it
    night = Night("x", None, replace(receipt(exit_code=4), labels=labels))
    script = f"sleep 8 <&0 & echo no mail today >&2; exit {code}"
    assert tell(Notify(command=("sh", "-c", script)), night) == said


def test_a_command_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(notify, "COMMAND_S", 2.0)
    wanted = Notify(command=("sh", "-c", 'echo $$ > "$1"; exec sleep 60', "sh", str(tmp_path / "pid")))
    assert tell(wanted, Night("x", None, Temporary("slow"))) == ["notify.command sh was ended after 2 s"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_command_that_does_not_stop_printing_fills_no_memory():
    wanted = Notify(command=("sh", "-c", "echo no mail today >&2; head -c 50000000 /dev/zero >&2 || exit 7"))
    (line,) = tell(wanted, Night("x", None, Temporary("slow")))
    assert line.startswith("notify.command sh ended with 7: ")


def test_a_webhook_that_drips_holds_no_run(monkeypatch):
    """Each byte comes well before the time limit of a silent server."""
    monkeypatch.setattr(notify, "WEBHOOK_S", 0.5)
    over, dripped = threading.Event(), list[bool]()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(200):
                    if over.wait(0.05):
                        break
                    connection.sendall(b"x")
                dripped.append(over.is_set())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/in"
        said = tell(Notify(webhook=url), Night("x", None, receipt(exit_code=4)))
        over.set()
        thread.join()
    assert dripped == [True], "nobody waited for the end"
    assert said == [f"notify.webhook {url}: no answer in 0.5 s"]


def test_a_webhook_is_tried_again_and_keeps_its_secret(monkeypatch):
    monkeypatch.setenv(notify.TOKEN, "hush")
    night = Night("x", "2026-11-01", receipt(exit_code=4))
    with webhook(503, 429) as (url, came):
        assert tell(Notify(webhook=url + "/in"), night) == []
        assert [(path, head) for path, head, _ in came] == [("/in", "Bearer hush")] * 3
        assert came[-1][2]["receipt"]["exit_code"] == 4
    with webhook(408, 500) as (url, came):
        assert tell(Notify(webhook=url, command=("/no/such/program",)), night) == [
            "notify.command /no/such/program: No such file or directory"
        ]
        assert len(came) == 3, "whoever is named beside it is told all the same"
    with webhook(500, 502, 503) as (url, came):
        assert tell(Notify(webhook=url), night) == [f"notify.webhook {url}: HTTP 503"]
        assert len(came) == 3
    with webhook() as (url, came):
        assert tell(Notify(webhook=url + "/{token}/x"), night) == []
        assert came[0][:2] == ("/hush/x", None)
    with webhook(404) as (url, came):
        assert tell(Notify(webhook=url + "/{token}"), night) == [f"notify.webhook {url}/{{token}}: HTTP 404"]
        assert len(came) == 1, "no means no"
    with webhook(307) as (url, came):
        assert tell(Notify(webhook=url), night) == [f"notify.webhook {url}: HTTP 307"]
        assert len(came) == 1, "the secret is not taken elsewhere"
    assert "hush" not in tell(Notify(webhook=url + "/{token}"), night)[0], "nobody listens there any more"


@pytest.mark.parametrize("place", ["/in", "/{token}/x"])
def test_a_secret_that_http_cannot_carry_is_not_printed(place, monkeypatch):
    night = Night("x", None, receipt(exit_code=4))
    with webhook() as (url, came):
        monkeypatch.setenv(notify.TOKEN, "  hush\r\n")
        assert tell(Notify(webhook=url + place), night) == []
        assert came[0][:2] == (("/in", "Bearer hush") if place == "/in" else ("/hush/x", None)), "the end of a line"
        for secret in ("hush\nhush", "hush hush\x7f", "hush…"):
            monkeypatch.setenv(notify.TOKEN, secret)
            (line,) = tell(Notify(webhook=url + place), night)
            assert line == f"notify.webhook {url}{place}: {notify.TOKEN} holds characters that HTTP does not carry"
        assert len(came) == 1


def test_a_server_that_speaks_no_http_is_a_line_and_no_more(monkeypatch):
    monkeypatch.setenv(notify.TOKEN, "hush")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(notify.ATTEMPTS):
                with server.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(b"220 hush mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/in"
        (line,) = tell(Notify(webhook=url), Night("x", None, receipt(exit_code=4)))
        thread.join()
    assert line.startswith(f"notify.webhook {url}: ")
    assert "hush" not in line


def test_an_interrupted_night_tells_nobody_and_a_bug_is_told(tmp_path):
    with webhook() as (url, came):
        wanted = template(tmp_path, notify={"webhook": url, "when": "always"})

        def label(one: Job, check: Any) -> Receipt:
            raise outcome

        for outcome, told in ((Interrupted("stopped"), 0), (ZeroDivisionError("x"), 1)):
            with pytest.raises(type(outcome)):
                run_nights(wanted, (Day("2026-11-01"),), label=label, say=print)
            assert len(came) == told
        assert came[0][2]["exit_code"] == 70


def test_who_is_to_hear_of_a_run_hears_of_one_that_cannot_begin(tmp_path):
    """The lease's place holds something else: no day is labelled, and nobody's alert waits for tomorrow."""
    (tmp_path / "metrics").mkdir()
    with webhook() as (url, came):
        wanted = template(tmp_path, notify={"webhook": url}, schedule=DAILY)
        store, folder = place(wanted)
        store.create(f"{folder}/terms/000001.json", b"a note")
        code, out, err = cli("run", write(tmp_path, wanted), "--date", "2026-11-01", "--metrics", tmp_path / "metrics")
    assert (code, out) == (2, "")
    assert err.startswith(f"nightlabel: {folder}/terms/000001.json: nothing that nightlabel wrote")
    assert [(told["day"], told["exit_code"], told["receipt"]) for _, _, told in came] == [("2026-11-01", 2, None)]
    assert 'nightlabel_exit_code{name="test"} 2\n' in (tmp_path / "metrics/nightlabel_test.prom").read_text()


def test_prometheus_hears_of_a_run_of_which_no_day_came_so_far_as_to_label(tmp_path, monkeypatch):
    def check(_: Job) -> None:
        raise UnfitError("no table has such a column")

    monkeypatch.setattr(nightly, "check_columns", check)
    telling = Metrics(str(tmp_path), wanted := template(tmp_path), say=print)
    (night,) = label_nights(wanted, (Day("2026-11-01"),), if_running=None, telling=telling, started=time.perf_counter())
    assert night.exit_code == 2
    assert 'nightlabel_exit_code{name="test"} 2\n' in (tmp_path / "nightlabel_test.prom").read_text()


def test_a_schedule_keeps_its_defaults():
    assert (Schedule(cron="0 2 * * *").wait, Schedule(cron="0 2 * * *").catch_up) == (21_600.0, None)
