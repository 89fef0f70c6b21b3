"""The driver without Ray: passes are scripted, the store is the disk. What does it do when units break, creates fail, another
driver is faster, nothing arrives?"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from faults import Fault, fault_proxy
from inprocess import without_ray
from models import small_artifact
from shards import picture, tar_bytes, write_parquet

from pipeline import label, run, start
from pipeline.attempt import Attempt
from pipeline.commands import interrupt
from pipeline.commit import Provenance, UnitBuffer, commit_unit
from pipeline.committer import Committer
from pipeline.disk import Disk
from pipeline.errors import Interrupted, Stalled, StoreError, Temporary, Unidentified, UnitsLeft, gravest
from pipeline.footer import Footer, Totals
from pipeline.label import TRIES, Driver
from pipeline.log import Log
from pipeline.plan import Plan
from pipeline.report import Receipt, UnitTrouble, exit_code
from pipeline.rows import PREDICTION, TIMINGS
from pipeline.spec import Job
from pipeline.start import load_model, plan_job
from pipeline.unit import Unit
from pipeline.verify import validate

ROWS = 3  # of each input
SECONDS = dict.fromkeys(TIMINGS.values(), 0.5)  # of each row

Answer = Callable[[Unit], "tuple[str, str] | None"]


def sound(unit: Unit) -> None:
    return None


def broken(name: str, error_class: str) -> Answer:
    """Units with this input arrive with an error."""
    return lambda unit: (error_class, f"{name} is it") if any(Path(part.uri).name == name for part in unit.parts) else None


def arrival(unit: Unit, error: tuple[str, str] | None = None, *, rows: int | None = None, each: int = ROWS) -> pa.Table:
    """A block of all rows of a unit, `each` for each input, and its end; or of the first `rows` of them without it."""
    keys = [(Path(part.uri).name, number) for part in unit.parts for number in range(each)]
    ok = {"unit": unit.id, "status": "ok", **SECONDS}
    found = [
        {**ok, "key": f"{name}/{number}", "source": name, "index": index, "label": name}
        for index, (name, number) in enumerate(keys)
    ]
    end = {"unit": unit.id, "index": len(found), "error_class": error and error[0], "error": error and error[1]}
    schema = pa.schema(
        [
            ("unit", pa.string()),
            *(column.with_nullable(True) for column in PREDICTION),
            *((name, pa.float32()) for name in SECONDS),
        ]
    )
    return pa.Table.from_pylist([*([] if error else found), end] if rows is None else found[:rows], schema=schema)


@dataclass
class Passes:
    """Stands in for `run.run_pass`. `answer` gives a unit's error, or None; `lose` says which units do not arrive at all."""

    answer: Answer = sound
    lose: Callable[[Unit], bool] = lambda unit: False
    before: Callable[[], object] = lambda: None
    """Called once, when the first pass has begun."""
    because: str = ""
    seen: list[list[Unit]] = field(default_factory=list)
    careful: list[bool] = field(default_factory=list)

    def __call__(self, units: list[Unit], *, careful: bool, lost: list[str]):
        self.seen.append(units)
        self.careful.append(careful)
        if len(self.seen) == 1:
            self.before()
        for unit in units:
            if self.lose(unit):
                lost += [self.because] if self.because else []
            else:
                yield arrival(unit, self.answer(unit))
            yield None


class FailingDisk(Disk):
    """A disk whose first `times` creates of units fail."""

    def __init__(self, error: Exception, *, times: int) -> None:
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "left", Counter({"all": times}))

    def create(self, uri: str, data: bytes) -> bool:
        if "/data/" in uri and self.left["all"] > 0:  # type: ignore[attr-defined]
            self.left["all"] -= 1  # type: ignore[attr-defined]
            raise self.error  # type: ignore[attr-defined]
        return super().create(uri, data)


@pytest.fixture
def begin(tmp_path, model):
    """Makes `shards` inputs, two of them to a unit when there are eight, and a driver that has planned."""

    def make(shards: int = 8, **fields: object) -> tuple[Driver, Log, Plan]:
        (tmp_path / "in").mkdir(exist_ok=True)
        for number in range(shards):
            if not (path := tmp_path / f"in/{number}.tar").exists():
                path.write_bytes(b"x" * 100)
        content = {"name": "test", "input": {"uri": str(tmp_path / "in")}, "model": {"uri": model}}
        content |= {"output": {"uri": str(tmp_path / "out")}, "resources": {"read": {"tasks": 1}}}
        job = Job.model_validate(content | fields)
        driver = Driver(job, observe=lambda event, fields: None, started=time.perf_counter())
        driver.artifact = load_model(job, weights=False)
        return driver, *plan_job(job, driver.artifact)

    return make


def finish(driver: Driver, log: Log, plan: Plan, run_pass: Callable[..., object]) -> Receipt:
    before = len(plan.committed)
    return driver.finish(log, driver.passes(log, plan, run_pass), before)


def commit(log: Log, unit: Unit, *, each: int = ROWS) -> None:
    """As another driver does, for which the inputs hold `each` rows."""
    buffer = UnitBuffer()
    buffer.add(arrival(unit, each=each).drop_columns(["unit"]))
    commit_unit(log, unit, buffer.table(), Provenance(log.fingerprint, "another", "0"))


def tombstones(log: Log) -> frozenset[str]:
    return log.standing(log.objects()).split


def rows_of(log: Log) -> list[str]:
    tables = (pq.read_table(io.BytesIO(log.store.read(item.uri))) for item in log.objects().values())
    return [key for table in tables for key in table.column("key").to_pylist()]


def all_rows(*names: int) -> list[str]:
    return sorted(f"{name}.tar/{number}" for name in names for number in range(ROWS))


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_unit_is_never_committed_beside_its_pieces(begin, place, request, tmp_path):
    """Driver A splits a joined unit, for one of its inputs is broken, while driver B holds it with all its rows."""
    output = {"uri": str(tmp_path / "out")}
    if place == "s3":
        s3 = request.getfixturevalue("s3")
        output = {"uri": f"s3://{s3.bucket()}/out", "s3": {"endpoint": s3.endpoint, "region": "us-east-1"}}
    a, log, plan = begin(output=output)
    b, _, same = begin(output=output)
    assert same == plan
    first = Passes(broken("1.tar", "TAR_CORRUPT"))
    receipts = []
    second = Passes(before=lambda: receipts.append(finish(a, log, plan, first)))
    receipts.append(finish(b, log, same, second))
    assert (receipts[0].exit_code, receipts[1].exit_code) == (3, 0)
    assert [[Path(part.uri).name for part in unit.parts] for unit in second.seen[1]] == [["1.tar"]], "B goes on with A's plan"
    assert sorted(rows_of(log)) == all_rows(*range(8))
    assert validate(log)[1] == []
    assert receipts[0].labelled_now + receipts[1].labelled_now == 8 * ROWS


def test_an_input_that_is_replaced_frees_its_neighbour_and_a_slow_driver_gives_way(begin, tmp_path):
    slow, log, plan = begin()

    def replace_and_run() -> None:
        (tmp_path / "in/1.tar").write_bytes(b"other bytes")
        fast, _, newer = begin()
        assert newer.run_id != plan.run_id
        assert finish(fast, log, newer, Passes()).exit_code == 0

    receipt = finish(slow, log, plan, Passes(before=replace_and_run))
    assert receipt.exit_code == 0
    assert receipt.labelled_now == 0
    assert sorted(rows_of(log)) == all_rows(*range(8))
    assert validate(log)[1] == []


def test_a_tombstone_has_the_columns_of_the_others_and_says_why(begin, tmp_path):
    driver, log, plan = begin(output={"uri": str(tmp_path / "out"), "embeddings": True})
    finish(driver, log, plan, Passes(broken("1.tar", "TAR_CORRUPT")))
    tombs = [path for path in Path(log.root, "data").iterdir() if pq.read_metadata(path).num_rows == 0]
    assert len(tombs) == 1
    assert pq.read_schema(tombs[0]).names == [*PREDICTION.names, "embedding"]
    assert log.standing([tombs[0].stem]).split == {tombs[0].stem}
    assert "TAR_CORRUPT" in log.footer(tombs[0].stem).split


def test_duckdb_and_pandas_read_a_folder_with_a_tombstone(begin):
    driver, log, plan = begin()
    finish(driver, log, plan, Passes(broken("1.tar", "TAR_CORRUPT")))
    assert duckdb.sql(f"select count(*), count(distinct key) from '{log.root}/data/*.parquet'").fetchall() == [(21, 21)]
    assert len(pd.read_parquet(f"{log.root}/data")) == 21


@pytest.mark.parametrize(
    ("error_class", "code", "passes"), [("TAR_CORRUPT", 3, 2), ("UNFIT", 2, 2), ("PERMISSION_DENIED", 77, 2)]
)
def test_only_the_culprit_is_left(begin, error_class, code, passes):
    driver, log, plan = begin()
    receipt = finish(driver, log, plan, Passes(broken("5.tar", error_class)))
    assert (receipt.exit_code, receipt.passes, receipt.rows_in) == (code, passes, 7 * ROWS)
    assert (receipt.units_done, receipt.units) == (4, 5)
    assert [(item.inputs, item.error_class) for item in receipt.trouble] == [((plan.units[2].parts[1].uri,), error_class)]


@pytest.mark.parametrize(
    ("milder", "graver", "codes"),
    [
        ("LOST", "TEMPORARY", (5, 75)),
        ("TEMPORARY", "PARQUET_CORRUPT", (75, 3)),
        ("TAR_NO_EOF", "PERMISSION_DENIED", (3, 77)),
        ("INPUT_CHANGED", "UNFIT", (3, 2)),
        ("UNIDENTIFIED", "UNFIT", (77, 2)),
        ("UNFIT", "CONFLICT", (2, 6)),
    ],
)
def test_units_and_days_know_one_order_of_gravity(milder, graver, codes):
    trouble = [UnitTrouble(name, (), name, "") for name in (graver, milder)]
    ends = [exit_code(tuple(some), Totals(), left=2, limit=1.0) for some in (trouble[1:], trouble, trouble[::-1])]
    assert ends == [codes[0], codes[1], codes[1]]
    assert gravest(codes) == gravest(codes[::-1]) == codes[1]


def test_what_is_lost_again_and_again_is_split_too_and_says_why(begin):
    driver, log, plan = begin()
    passes = Passes(lose=lambda unit: any("3.tar" in part.uri for part in unit.parts), because="ValueError: cannot be")
    receipt = finish(driver, log, plan, passes)
    assert (receipt.exit_code, receipt.passes, receipt.rows_in) == (5, 2 * TRIES, 7 * ROWS)
    (left,) = receipt.trouble
    assert (left.error_class, len(left.inputs)) == ("LOST", 1)
    assert left.error.endswith("3.tar: its rows did not all arrive; ValueError: cannot be.")
    assert passes.careful == [False, False, True] * 2


@pytest.mark.parametrize(("error_class", "code"), [("TEMPORARY", 75), ("UNIDENTIFIED", 77)])
def test_a_store_that_is_away_or_knows_nobody_costs_no_unit_its_shape(begin, error_class, code):
    driver, log, plan = begin()
    receipt = finish(driver, log, plan, Passes(lambda unit: (error_class, "the store does not answer")))
    assert (receipt.exit_code, receipt.passes, receipt.units, len(log.runs())) == (code, TRIES, 4, 1)


@pytest.mark.parametrize("error", [Temporary("the pass ended early"), Stalled("nothing arrived")])
def test_a_pass_that_dies_is_temporary(begin, error):
    driver, log, plan = begin()

    def dies(units: list[Unit], *, careful: bool, lost: list[str]):
        yield arrival(units[0], rows=2)
        raise error

    receipt = finish(driver, log, plan, dies)
    assert (receipt.exit_code, receipt.rows_in, {item.error_class for item in receipt.trouble}) == (75, 0, {"TEMPORARY"})
    assert receipt.passes <= TRIES


def test_one_failed_create_is_its_own_units_trouble(begin):
    driver, log, plan = begin()
    log.store = FailingDisk(Temporary("no answer"), times=1)
    passes = Passes()
    receipt = finish(driver, log, plan, passes)
    assert (receipt.exit_code, receipt.rows_in) == (0, 8 * ROWS)
    assert [len(units) for units in passes.seen] == [4, 1]
    assert driver.attempt.arrived == 8 * ROWS, "what came twice counts once"


def test_creates_that_fail_now_and_then_end_no_pass(begin):
    driver, log, plan = begin(40, resources={"read": {"tasks": 10}})
    failed, sound_units = set(), {unit.id for unit in plan.units[::2]}

    class Shaky(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            if "/data/" in uri and Path(uri).stem not in sound_units | failed:
                failed.add(Path(uri).stem)
                raise Temporary("no answer")
            return super().create(uri, data)

    log.store, arrived = Shaky(), Counter[int]()

    def counted(units: list[Unit], *, careful: bool, lost: list[str]):
        for unit in units:
            arrived[driver.attempt.passes] += 1
            yield arrival(unit)

    receipt = finish(driver, log, plan, counted)
    assert (receipt.exit_code, receipt.rows_in, dict(arrived)) == (0, 40 * ROWS, {1: 40, 2: 20})


def test_a_unit_that_the_store_refused_once_is_split_when_it_is_broken_later(begin):
    driver, log, plan = begin()
    log.store = FailingDisk(Temporary("no answer"), times=4)
    passes = Passes(lambda unit: broken("1.tar", "TAR_CORRUPT")(unit) if driver.attempt.passes > 1 else None)
    receipt = finish(driver, log, plan, passes)
    assert (receipt.exit_code, receipt.rows_in) == (3, 7 * ROWS)


@pytest.mark.parametrize(("error", "code"), [(Temporary("no answer"), 75), (StoreError("no room"), 2)])
def test_a_store_that_takes_nothing_ends_the_run(begin, error, code):
    driver, log, plan = begin(3)
    log.store = FailingDisk(error, times=10**9)
    receipt = finish(driver, log, plan, Passes())
    assert (receipt.exit_code, receipt.rows_in) == (code, 0)
    assert receipt.passes <= TRIES


def test_a_pass_is_left_when_one_create_after_the_other_fails(begin):
    driver, log, plan = begin(40, resources={"read": {"tasks": 10}})
    assert len(plan.units) == 40
    log.store = FailingDisk(Temporary("no answer"), times=12)
    taken: Counter[int] = Counter()

    def counted(units: list[Unit], *, careful: bool, lost: list[str]):
        for unit in units:
            taken[careful] += 1
            yield arrival(unit)

    receipt = finish(driver, log, plan, counted)
    assert (receipt.exit_code, receipt.rows_in) == (0, 40 * ROWS)
    assert sum(taken.values()) < 80, "work went on for a store that takes nothing"


def test_a_unit_is_told_of_when_it_is_committed(begin):
    driver, log, plan = begin()
    told: list[str] = []
    driver.attempt.observe = lambda event, fields: told.append(fields["unit"]) if event == "commit" else None

    def slow(units: list[Unit], *, careful: bool, lost: list[str]):
        for number, unit in enumerate(units, 1):
            yield arrival(unit)
            end = time.monotonic() + 60
            while len(told) < number and time.monotonic() < end:
                time.sleep(0.01)
                yield None
            assert told == [unit.id for unit in units[:number]]

    assert finish(driver, log, plan, slow).exit_code == 0


def test_a_deadline_ends_a_run_in_which_nothing_arrives(begin):
    driver, log, plan = begin(limits={"deadline": "0.1s"})
    ended = []

    def hangs(units: list[Unit], *, careful: bool, lost: list[str]):
        try:
            while True:
                time.sleep(0.01)
                yield None
        finally:
            ended.append(True)

    with pytest.raises(UnitsLeft, match="4 units left"):
        driver.passes(log, plan, hangs)
    assert ended, "the pass goes on without its driver"


def test_a_deadline_counts_all_units_that_are_left_and_not_those_of_the_pass_alone(begin, monkeypatch):
    monkeypatch.setattr(label, "_AT_ONCE", 1)
    driver, log, plan = begin(limits={"deadline": "1h"})

    def slow(units: list[Unit], *, careful: bool, lost: list[str]):
        yield arrival(units[0])
        driver.since -= 3601
        yield None

    with pytest.raises(UnitsLeft, match="3 units left"):
        driver.passes(log, plan, slow)


def test_what_was_committed_before_a_deadline_stays(begin):
    driver, log, plan = begin(limits={"deadline": "1h"})
    told: list[str] = []
    driver.attempt.observe = lambda event, fields: told.append(event)

    def slow(units: list[Unit], *, careful: bool, lost: list[str]):
        yield from (arrival(unit) for unit in units[:2])
        while True:
            time.sleep(0.01)
            if told.count("commit") == 2:
                driver.since -= 3601
            yield None

    with pytest.raises(UnitsLeft, match="2 units left"):
        driver.passes(log, plan, slow)
    committed = log.objects()
    assert len(committed) == 2
    driver, log, plan = begin()
    assert [len(plan.committed), len(plan.todo)] == [2, 2]
    receipt = finish(driver, log, plan, Passes())
    assert (receipt.exit_code, receipt.units_before, receipt.rows_in) == (0, 2, 8 * ROWS)
    assert committed.items() <= log.objects().items()
    assert sorted(rows_of(log)) == all_rows(*range(8))


def test_a_unit_whose_columns_do_not_go_together_is_split(begin):
    driver, log, plan = begin()

    def kept(units: list[Unit], *, careful: bool, lost: list[str]):
        for unit in units:
            rows = arrival(unit)
            for name in sorted({key.partition("/")[0] for key in rows.column("key").to_pylist() if key}):
                some = rows.filter(pc.starts_with(rows.column("key"), name))
                yield some.append_column("caption", pa.array([1 if name == "1.tar" else "one"] * len(some)))
            yield arrival(unit).slice(rows.num_rows - 1)

    receipt = finish(driver, log, plan, kept)
    assert (receipt.exit_code, receipt.rows_in, len(tombstones(log))) == (0, 8 * ROWS, 1)


def test_max_failed_is_of_all_rows_of_a_run_and_not_of_those_labelled_now(begin):
    _, log, plan = begin()
    for unit in plan.units[:2]:
        commit(log, unit)
    driver, log, plan = begin(limits={"max_failed": "10%"})

    def two_fail(units: list[Unit], *, careful: bool, lost: list[str]):
        for unit in units:
            rows = arrival(unit).to_pylist()
            rows[0] |= {"status": "failed", "error_class": "CORRUPT", "label": None}
            yield pa.Table.from_pylist(rows, schema=arrival(unit).schema)

    receipt = finish(driver, log, plan, two_fail)
    assert (receipt.exit_code, receipt.rows_in, receipt.labelled_now, receipt.failed) == (0, 8 * ROWS, 4 * ROWS, 2)
    assert (receipt.units_done, receipt.units_before, receipt.written) == (4, 2, 2)
    assert (receipt.failures, sum(receipt.labels.values())) == ({"CORRUPT": 2}, 4 * ROWS - 2)


def test_what_is_dropped_is_not_counted_as_arrived(begin):
    _, _, plan = begin()
    told: list[str] = []
    attempt, unit = Attempt(0.0, lambda event, fields: told.append(event)), plan.units[0]
    attempt.take_block(arrival(unit, ("TEMPORARY", "500")))
    assert (attempt.arrived, attempt.first, told) == (0, None, ["rows"]), "the end of a unit is no image"
    rows = arrival(unit)
    for _ in range(3):
        attempt.take_block(rows)
    assert (attempt.arrived, attempt.first_rows, told.count("first")) == (6 * ROWS, 2 * ROWS, 1)
    assert [event["event"] for event in attempt.events] == ["first"], "a million blocks are no events of a run"
    buffer = UnitBuffer()
    buffer.add(rows.drop_columns(["unit"]))
    attempt.blame(unit, "CONFLICT", "another's", buffer=buffer)
    attempt.drop(unit, "another's", buffer)
    assert (attempt.arrived, set(attempt.trouble)) == (2 * ROWS, {unit.id})
    attempt.take_commit(Footer(unit.id, "f", rows_in=6), buffer.table(), buffer, ours=False)
    assert (attempt.trouble, attempt.rows, attempt.written, attempt.labels) == ({}, 0, 0, {})


def test_what_comes_twice_counts_once(begin):
    driver, log, plan = begin()
    told: Counter[str] = Counter()
    driver.attempt.observe = lambda event, fields: told.update(
        {"shown": fields.get("images", 0) - fields.get("dropped", 0)} if event in ("rows", "trouble") else {}
    )

    def twice(units: list[Unit], *, careful: bool, lost: list[str]):
        for unit in units:
            if driver.attempt.passes == 1:
                yield arrival(unit, rows=4)
            else:
                yield arrival(unit)
        if driver.attempt.passes == 2:
            yield arrival(units[0])  # a task that ran again

    receipt = finish(driver, log, plan, twice)
    rows = [row for path in Path(log.root, "data").iterdir() for row in pq.read_table(path).to_pylist()]
    assert receipt.labels == Counter(row["label"] for row in rows)
    assert (receipt.labelled_now, receipt.rows_in, receipt.seam_seconds["read"]) == (len(rows), len(rows), len(rows) / 2)
    assert told["shown"] == len(rows) + 2 * ROWS, "the screen may count what a task repeats, and no more"


def test_a_large_unit_is_split_by_and_by(begin):
    driver, log, plan = begin(160)
    assert len(plan.units[0].parts) == 40
    receipt = finish(driver, log, plan, Passes(broken("7.tar", "TAR_NO_EOF")))
    assert (receipt.rows_in, len(receipt.trouble), receipt.passes) == (159 * ROWS, 1, 3)
    assert receipt.units < 25


def test_a_store_that_overwrites_is_refused_before_anything_is_labelled(begin, s3):
    with fault_proxy(s3.port) as proxy:
        options = {"endpoint": proxy.endpoint, "region": "us-east-1"}
        driver, log, plan = begin(output={"uri": f"s3://{s3.bucket()}/out", "s3": options})
        start.begin(log, plan.run_id, driver.job)
        start.begin(log, plan.run_id, driver.job)  # as a resume does: what stands there is not created again
        driver, log, plan = begin(output={"uri": f"s3://{s3.bucket()}/out", "s3": options})
        proxy.script(*[Fault("overwrite", "PUT", "spec.yaml")] * 2)
        with pytest.raises(StoreError, match=f"{proxy.endpoint} created it twice; required: a store that") as caught:
            start.begin(log, plan.run_id, driver.job)
        assert caught.value.exit_code == 2


def test_a_signal_while_creates_are_waited_for_ends_the_run_and_is_no_units_trouble(begin, monkeypatch):
    driver, log, plan = begin()
    waiting, heard = threading.Event(), threading.Event()
    settle = Committer.settle

    def watched(self: Committer, *most: int) -> None:
        if most == (0,):
            waiting.set()
        settle(self, *most)

    class Signalling(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            if "/data/" in uri and waiting.wait(30) and not heard.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
                heard.wait(30)
            return super().create(uri, data)

    def once(number: int, frame: object) -> None:
        if not heard.is_set():
            heard.set()
            interrupt.interrupt(number, None)

    monkeypatch.setattr(Committer, "settle", watched)
    log.store = Signalling()
    before = signal.signal(signal.SIGTERM, once)
    try:
        with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
            finish(driver, log, plan, Passes())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (caught.value.exit_code, driver.attempt.trouble) == (143, {})
    assert sorted(rows_of(log)) == all_rows(*range(8)), "what was on its way was not let through"


@pytest.mark.parametrize(("answer", "rows"), [(sound, 6), (broken("5.tar", "TAR_CORRUPT"), 5)])
def test_a_conflict_is_not_forgotten(begin, answer, rows):
    """Another driver has seen fewer rows in the same inputs. The second case plans again meanwhile."""
    driver, log, plan = begin()
    receipt = finish(driver, log, plan, Passes(answer, before=lambda: commit(log, plan.units[0], each=ROWS - 1)))
    assert (receipt.exit_code, receipt.rows_in) == (6, rows * ROWS)
    assert plan.units[0].id in {item.unit for item in receipt.trouble if item.error_class == "CONFLICT"}
    assert not any(run.finished for run in log.runs())
    assert plan.units[0].id not in tombstones(log)


def test_a_store_without_room_costs_no_unit_its_shape(begin):
    driver, log, plan = begin()
    log.store = FailingDisk(StoreError("no room"), times=1)
    receipt = finish(driver, log, plan, Passes())
    assert (receipt.exit_code, receipt.rows_in, len(receipt.trouble)) == (2, 6 * ROWS, 1)
    assert (tombstones(log), len(log.runs())) == (set(), 1)


def test_an_outage_costs_one_try(begin):
    driver, log, plan = begin(40, resources={"read": {"tasks": 10}})
    log.store = disk = FailingDisk(Temporary("no answer"), times=10**9)
    passes = Passes()

    def until_it_is_given_up(units: list[Unit], **how: object):
        if passes.seen:
            disk.left.clear()
        yield from passes(units, **how)

    receipt = finish(driver, log, plan, until_it_is_given_up)
    assert (receipt.exit_code, receipt.rows_in, passes.careful) == (0, 40 * ROWS, [False, False])


@pytest.mark.parametrize(("error_class", "code"), [("UNFIT", 2), ("PERMISSION_DENIED", 77)])
def test_a_store_that_is_not_ours_to_read_costs_one_unit_its_shape_for_a_probe(begin, error_class, code):
    driver, log, plan = begin(160)
    receipt = finish(driver, log, plan, Passes(lambda unit: (error_class, "another region")))
    assert (receipt.exit_code, receipt.passes, receipt.rows_in) == (code, 2, 0)
    assert len(log.objects()) == 1


def test_where_nothing_arrives_one_unit_is_split_for_a_probe_and_no_more(begin):
    driver, log, plan = begin(160)
    receipt = finish(driver, log, plan, Passes(lose=lambda unit: True, because="ModuleNotFoundError"))
    assert (receipt.exit_code, receipt.passes, receipt.rows_in) == (5, 2 * TRIES, 0)
    assert len(log.objects()) == 1


def test_a_probe_that_comes_through_frees_the_neighbours_of_all_that_is_bad(begin):
    _, log, plan = begin()
    for unit in plan.units[2:]:
        commit(log, unit)
    driver, log, plan = begin()
    receipt = finish(driver, log, plan, Passes(lose=lambda unit: any(part.uri[-5:] in ("1.tar", "3.tar") for part in unit.parts)))
    assert (receipt.exit_code, receipt.rows_in) == (5, 6 * ROWS)
    assert sorted(Path(item.inputs[0]).name for item in receipt.trouble) == ["1.tar", "3.tar"]


def test_an_input_that_its_store_never_hands_out_holds_no_neighbour_back(begin):
    driver, log, plan = begin()
    bad = {"1.tar", "3.tar"}

    def answer(unit: Unit) -> tuple[str, str] | None:
        return ("TEMPORARY", "500") if bad & {Path(part.uri).name for part in unit.parts} else None

    receipt = finish(driver, log, plan, Passes(answer))
    assert (receipt.exit_code, receipt.rows_in) == (75, 6 * ROWS)
    assert {Path(item.inputs[0]).name for item in receipt.trouble} == bad
    assert all(len(item.inputs) == 1 for item in receipt.trouble)


def test_a_store_that_goes_away_half_way_costs_one_unit_its_shape_for_a_probe(begin):
    driver, log, plan = begin(160)
    gone = {unit.id for unit in plan.units[1:]}
    receipt = finish(driver, log, plan, Passes(lambda unit: ("TEMPORARY", "no answer") if unit.id != plan.units[0].id else None))
    assert (receipt.exit_code, receipt.passes) == (75, 2 * TRIES)
    assert len(tombstones(log)) == 1
    assert tombstones(log) < gone


def test_inputs_that_are_written_over_all_the_time_are_left_in_the_end(begin):
    """So many that what they leave free is joined again, into units that nobody has tried."""
    driver, log, plan = begin()
    sizes = iter(range(200, 300))

    def rewrite(unit: Unit) -> tuple[str, str]:
        Path(unit.parts[-1].uri).write_bytes(b"y" * next(sizes))
        return "INPUT_CHANGED", "replaced"

    receipt = finish(driver, log, plan, Passes(rewrite))
    assert (receipt.exit_code, receipt.rows_in, receipt.passes) == (3, 0, label._REPLANS + 1)


def test_a_pass_gets_no_more_units_than_can_be_put_into_rays_store_in_time(begin, monkeypatch):
    monkeypatch.setattr(label, "_AT_ONCE", 3)
    driver, log, plan = begin()
    passes = Passes()
    assert finish(driver, log, plan, passes).exit_code == 0
    assert [len(units) for units in passes.seen] == [3, 1]


def test_a_ray_that_is_gone_is_temporary_and_no_other_is_started(begin, monkeypatch):
    driver, _, plan = begin()
    units = list(plan.units)
    with pytest.raises(Temporary, match="Ray is gone"):
        list(run.run_pass(units, driver.job, driver.artifact))
    assert not ray.is_initialized()

    def dies(*_: object, **__: object) -> None:
        raise ray.exceptions.RaySystemError("the raylet is dead")

    monkeypatch.setattr(run, "chain", dies)
    with pytest.raises(Temporary, match="the pass ended early"):
        list(run.run_pass(units, driver.job, driver.artifact))


def test_a_receipt_does_not_copy_the_events_that_it_leaves_out(begin):
    driver, log, plan = begin(1)
    receipt = replace(finish(driver, log, plan, Passes()), events=({"cannot be copied": threading.Lock()},))
    assert receipt.as_dict()["rows_in"] == ROWS
    assert "events" not in receipt.as_dict()


def test_a_sidecar_that_no_image_has_is_told(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": picture(1), "1.cls": b"cat", "2.jpg": picture(2)}))
    content = {"input": {"uri": str(tmp_path / "a.tar"), "keep": ["cls", "clss"]}, "output": {"uri": str(tmp_path / "out")}}
    job = Job.model_validate({"name": "test", "model": {"uri": model}} | content)
    receipt = Driver(job, observe=lambda event, fields: None, started=0.0).label()
    assert [line for line in receipt.lines() if line.startswith("kept ")] == ["kept    nothing of clss: no image had it"]
    assert "nothing of <code>clss</code>" in receipt.page().decode()


def test_samples_without_an_image_are_counted(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    (tmp_path / "in").mkdir()
    for name in "ab":
        files = {"1.jpg": picture(1), "x/1.raw1": b"1", "x/2.raw1": b"2", "x/2.json": b"{}", ".DS_Store": b"", "x/._3.raw1": b""}
        late = {"4.cls": b"1", "4.left.jpg": picture(4)}  # its image comes behind other samples
        (tmp_path / "in" / f"{name}.tar").write_bytes(tar_bytes({"4.json": b"", **files, "README": b"", **late}))
    content = {"input": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "out")}}
    job = Job.model_validate({"name": "test", "model": {"uri": model}} | content)
    receipt = Driver(job, observe=lambda event, fields: None, started=0.0).label()
    assert (receipt.exit_code, receipt.rows_in, receipt.empty) == (0, 4, ())
    told = "6 samples (4 .raw1, 2 without suffix) without an image"
    assert [line for line in receipt.lines() if line.startswith("ignored ")] == [f"ignored {told}"]
    assert told in receipt.page().decode()
    assert receipt.as_dict()["imageless"] == {"raw1": 4, "": 2}


def test_inputs_with_nothing_to_label_are_told(tmp_path, model, monkeypatch):
    without_ray(monkeypatch)
    (tmp_path / "in").mkdir()
    for name in "abcde":
        (tmp_path / "in" / f"{name}.tar").write_bytes(tar_bytes({"1.jpg" if name == "c" else "1.tar": picture(1)}))
    content = {"input": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "out")}}
    job = Job.model_validate({"name": "test", "model": {"uri": model}} | content)
    receipt = Driver(job, observe=lambda event, fields: None, started=0.0).label()
    named = ", ".join(f"{tmp_path}/in/{name}.tar" for name in "abd")
    assert (receipt.exit_code, receipt.rows_in) == (0, 1)
    assert [line for line in receipt.lines() if line.startswith("empty ")] == [f"empty   nothing to label in {named} and 1 more"]
    assert f"nothing to label in {named} and 1 more" in receipt.page().decode()


def test_fast_decoding_is_another_output_whose_manifest_says_what_it_did_to_the_labels(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    model, photos = small_artifact(tmp_path), tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        (photos / f"{number}.jpg").write_bytes(picture(number, size=(400, 300)))
    receipts = {}
    for mode in ("exact", "fast"):
        fields = {
            "input": {"uri": str(photos), "format": "images"},
            "model": {"uri": model},
            "output": {"uri": str(tmp_path / "out")},
        }
        receipts[mode] = Driver(
            Job(name="photos", decode=mode, **fields), observe=lambda event, fields: None, started=0.0
        ).label()
    assert receipts["exact"].fingerprint != receipts["fast"].fingerprint
    said = {
        mode: json.loads(Path(receipt.where, "runs", receipt.run, "manifest.json").read_text())["decode"]
        for mode, receipt in receipts.items()
    }
    assert said["exact"] == {"mode": "exact", "lane": "cpu", "compared": 0, "same_label": 0}
    assert said["fast"] == {"mode": "fast", "lane": "cpu", "compared": 4, "same_label": 4}  # the first of every unit
    fast = receipts["fast"]
    assert "decode  fast: 100.0% kept their label, of 4 labelled both ways" in fast.lines()
    assert replace(fast, compared=0).agreement.endswith("one in 64, none was large enough to come out otherwise")
    on_gpu = replace(fast, decode="exact", lane="gpu", compared=0)
    assert "decode  by the GPU: of the images looked at, one in 64, none was labelled both ways" in on_gpu.lines()


@pytest.mark.parametrize("kind", ["images", "webdataset", "parquet"])
def test_workers_whose_credentials_are_not_taken_cost_no_image_its_label_and_no_unit_its_shape(
    tmp_path, model, s3, monkeypatch, kind
):
    """As when a session's token expires in the night, or a worker's clock is wrong, and the output is on another store."""
    without_ray(monkeypatch)
    bucket = s3.bucket()
    for number in range(12):
        if kind == "parquet":
            write_parquet(tmp_path / "one", [picture(number)])
        one = {"images": picture(number), "webdataset": tar_bytes({f"{number}.jpg": picture(number)})}
        suffix = {"images": "jpg", "webdataset": "tar"}.get(kind, "parquet")
        s3.put(f"s3://{bucket}/in/{number:02}.{suffix}", one.get(kind) or (tmp_path / "one").read_bytes())
    with fault_proxy(s3.port) as proxy:
        source = {"uri": f"s3://{bucket}/in/", "format": kind, "s3": {"endpoint": proxy.endpoint, "region": "us-east-1"}}
        content = {"name": "test", "input": source, "model": {"uri": model}, "output": {"uri": str(tmp_path / "out")}}
        job = Job.model_validate(content | {"resources": {"read": {"tasks": 1}}})
        proxy.script(*[Fault("status", "GET", f".{suffix}", status=403, code="RequestTimeTooSkewed")] * 200)
        receipts = []
        if kind == "parquet":  # of which the driver looks at a footer, with keys that are taken where the workers' are not
            with pytest.raises(Unidentified, match="RequestTimeTooSkewed"):
                Driver(job, observe=lambda event, fields: None, started=0.0).label()
            monkeypatch.setattr("pipeline.start.check_inputs", lambda *_: None)
        for _ in range(2):
            receipts.append(Driver(job, observe=lambda event, fields: None, started=0.0).label())
            proxy.forget()
    assert [(receipt.exit_code, receipt.units_done, receipt.ok) for receipt in receipts] == [
        (77, 0, 0),
        (0, receipts[0].units, 12),
    ]
    assert receipts[0].units == receipts[1].units < 12, "joined units keep their shape"
    assert {item.error_class for item in receipts[0].trouble} == {"UNIDENTIFIED"}
    assert "RequestTimeTooSkewed" in receipts[0].trouble[0].error


@pytest.mark.parametrize(("seconds", "rate"), [(0.04, None), (2.0, 50.0)])
def test_blocks_that_end_together_make_no_rate(seconds: float, rate: float | None):
    attempt = Attempt(0.0, lambda event, fields: None, first=10.0, last=10.0 + seconds, first_rows=20, arrived=120)
    assert attempt.steady_rate == (rate and pytest.approx(rate))
