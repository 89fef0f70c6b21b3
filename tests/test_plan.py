"""The plan and the commit: an input belongs to one unit, a unit is committed once, the counts add up, whoever comes when."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import log, storage
from pipeline import plan as planning
from pipeline.commit import Provenance, Seen, UnitBuffer, commit_unit, retire_unit, serialise
from pipeline.disk import Disk
from pipeline.errors import Conflict, InputMissing, JobError, StoreError, Temporary
from pipeline.footer import Footer
from pipeline.log import Log, Standing
from pipeline.nights.generation import Generation, newest, to_plan, validate_all
from pipeline.plan import Plan
from pipeline.plan import make_plan as plan_for
from pipeline.rows import PREDICTION, SAME_LABEL, TIMINGS
from pipeline.storage import Object
from pipeline.unit import Part, Unit
from pipeline.verify import open_runs, validate, verify

OURS = Provenance("f" * 12, "attempt-1", "0")


def log_at(path: Path) -> Log:
    return Log(Disk(), str(path / OURS.fingerprint))


def objects(*names: str, etag: str = "1") -> list[Object]:
    return [Object(f"/in/{name}", 10, etag) for name in names]


def make_plan(log: Log, listing: list[Object], cut=None, *, gone: tuple[str, ...] = (), write: bool = True) -> Plan:
    return plan_for(
        log,
        listing,
        cut or pairs,
        present=lambda part: part.uri not in gone,
        retire=lambda unit: not write or retire(log, unit),
        write=write,
    )


def retire(log: Log, unit: Unit) -> bool:
    return retire_unit(log, unit, schema=PREDICTION, why="a test", provenance=OURS)


def pairs(listing: list[Object]) -> list[Unit]:
    """Cuts two inputs to a unit."""
    parts = [Part(item.uri, item.etag, item.size) for item in listing]
    return [Unit(tuple(parts[at : at + 2])) for at in range(0, len(parts), 2)]


def prediction_rows(count: int, *, failed: int = 0) -> pa.Table:
    rows = [
        {"key": f"k{number}", "source": "s", "index": number}
        | (
            {"status": "failed", "error_class": "CORRUPT", "error": "x"}
            if number < failed
            else {"status": "ok", "label": "cat", "label_id": 0}
        )
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=PREDICTION)


def commit(log: Log, unit: Unit, *, by: Provenance = OURS, count: int = 4):
    return commit_unit(log, unit, prediction_rows(count, failed=1), by)


def finish(log: Log, plan: Plan) -> None:
    rows = {"in": 4 * len(plan.units), "ok": 3 * len(plan.units), "failed": len(plan.units)}
    assert log.store.create(log.run_key(plan.run_id, "manifest.json"), json.dumps({"rows": rows}).encode())


def owners(plan: Plan) -> dict[str, list[str]]:
    return {unit.id: [part.uri for part in unit.parts] for unit in plan.units}


def test_a_plan_is_stored_once_and_found_again(tmp_path):
    log = log_at(tmp_path)
    first = make_plan(log, objects("a", "b", "c"))
    assert (first.run_id, len(first.units), first.committed) == ("000001", 2, frozenset())
    assert make_plan(log, objects("c", "b", "a")) == first
    assert len(log.runs()) == 1


def test_showing_a_plan_writes_nothing(tmp_path):
    plan = make_plan(log_at(tmp_path), objects("a"), write=False)
    assert (plan.run_id, len(plan.todo)) == ("new", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_leaves_nothing_to_do_and_a_grown_prefix_only_what_is_new(tmp_path):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("b", "d"))
    commit(log, plan.units[0])
    assert make_plan(log, objects("b", "d")).todo == ()
    finish(log, plan)
    assert make_plan(log, objects("b", "d")).run_id is None
    grown = make_plan(log, objects("a", "b", "c", "d", "e"))
    assert grown.run_id == "000002"
    assert sorted(uri for uris in owners(grown).values() for uri in uris) == ["/in/a", "/in/c", "/in/e"]


def test_growth_before_the_end_keeps_units_as_they_are(tmp_path):
    log = log_at(tmp_path)
    first = make_plan(log, objects("b", "d", "f"))
    commit(log, first.units[0])
    grown = make_plan(log, objects("a", "b", "d", "f"))
    assert grown.run_id == "000002"
    assert owners(first).items() <= owners(grown).items()
    assert grown.committed == {first.units[0].id}
    assert make_plan(log, objects("a", "b", "d", "f")) == grown


def test_a_changed_input_takes_its_neighbours_along_unless_they_are_committed(tmp_path):
    log = log_at(tmp_path)
    first = make_plan(log, objects("a", "b", "c", "d"))
    commit(log, first.units[0])
    changed = [*objects("a", "c"), *objects("b", "d", etag="2")]
    second = make_plan(log, changed, gone=("/in/b", "/in/d"))
    assert first.units[0].id in second.committed
    todo = [(part.uri, part.etag) for unit in second.todo for part in unit.parts]
    assert sorted(todo) == [("/in/b", "2"), ("/in/c", "1"), ("/in/d", "2")]


def test_a_broken_unit_is_split_and_stays_split(tmp_path):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("a", "b", "c"))
    assert retire(log, plan.units[0])
    after = make_plan(log, objects("a", "b", "c"))
    assert sorted(owners(after).values()) == [["/in/a"], ["/in/b"], ["/in/c"]]
    assert make_plan(log, objects("a", "b", "c")) == after
    for unit in after.units:
        commit(log, unit)
    assert (sorted(footer.unit for footer in validate(log)[0]), validate(log)[1]) == (sorted(owners(after)), [])


def test_what_another_driver_listed_stays_in_its_unit_but_what_is_gone_breaks_it(tmp_path):
    log = log_at(tmp_path)
    both = make_plan(log, objects("a", "b"))
    assert make_plan(log, objects("a")) == both
    alone = make_plan(log, objects("a"), gone=("/in/b",))
    assert list(owners(alone).values()) == [["/in/a"]]


def test_two_nights_into_one_output_do_not_disturb_each_other(tmp_path):
    log = log_at(tmp_path)
    monday = make_plan(log, objects("mon/a", "mon/b"))
    tuesday = make_plan(log, objects("tue/a"))
    assert (monday.run_id, tuesday.run_id) == ("000001", "000002")
    assert make_plan(log, objects("mon/a", "mon/b")) == monday
    assert len(log.runs()) == 2


def test_drivers_that_plan_at_once_never_share_an_input(tmp_path):
    log = log_at(tmp_path)
    plans: list[Plan] = []

    def drive(number: int) -> None:
        names = [f"{letter}{copy}" for letter in "abcdef" for copy in range(number % 3 + 1)]
        plans.append(make_plan(log_at(tmp_path), objects(*names)))

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    units = {unit.id: unit for plan in plans for unit in plan.units}
    inputs = [part.pin for unit in units.values() for part in unit.parts]
    assert len(plans) == 8
    assert len(inputs) == len(set(inputs)), "one input in two units"
    assert log.runs()


def test_who_is_always_overtaken_may_try_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_PAUSE_S", 0.0)
    monkeypatch.setattr(Log, "append", lambda self, units, *, after: None)
    with pytest.raises(Temporary, match="other runs were planned"):
        make_plan(log_at(tmp_path), objects("a"))


def test_a_job_that_lists_less_does_not_take_a_larger_plan_for_its_own(tmp_path):
    log = log_at(tmp_path)
    both = make_plan(log, objects("a", "b", "c", "d"))
    less = make_plan(log, objects("a", "b"))
    assert (less.run_id, less.units) == ("000002", both.units[:1]), "whose manifest would say that all of it is done"


INPUTS = "abcde"


class World:
    """Inputs that change, three drivers that plan, split and commit in any order, and one log."""

    def __init__(self, folder: Path) -> None:
        self.log = log_at(folder)
        self.now = {f"/in/{name}": 1 for name in INPUTS}
        self.plans: dict[int, Plan] = {}

    def listing(self, names: set[str]) -> list[Object]:
        return [Object(uri, 10, str(etag)) for uri, etag in self.now.items() if uri[-1] in names]

    def plan(self, driver: int, names: set[str]) -> Plan:
        def present(part: Part) -> bool:
            return str(self.now.get(part.uri)) == part.etag

        plan = plan_for(self.log, self.listing(names), triples, present=present, retire=lambda unit: retire(self.log, unit))
        self.plans[driver] = plan
        return plan

    def commit(self, driver: int, number: int) -> None:
        """As a driver does: of an old plan, without a look at what has happened since."""
        plan = self.plans[driver]
        if plan.units:
            footer, _ = commit(self.log, plan.units[number % len(plan.units)])
            assert footer.split or footer.rows_in == 4

    def split(self, driver: int, number: int) -> None:
        units = [unit for unit in self.plans[driver].units if len(unit.parts) > 1]
        if units:
            retire(self.log, units[number % len(units)])

    def finish(self, driver: int) -> None:
        plan = self.plans[driver]
        done = self.log.standing([unit.id for unit in plan.units]).committed
        if plan.run_id is not None and len(done) == len(plan.units):
            rows = {"in": 4 * len(done), "ok": 3 * len(done), "failed": len(done)}
            self.log.store.create(self.log.run_key(plan.run_id, "manifest.json"), json.dumps({"rows": rows}).encode())

    def committed(self) -> list[tuple[str, str, int]]:
        units = {unit.id: unit for run in self.log.runs() for unit in run.units}
        done = self.log.standing(units).committed
        return [part.pin for unit_id in done for part in units[unit_id].parts]


def triples(listing: list[Object]) -> list[Unit]:
    parts = [Part(item.uri, item.etag, item.size) for item in listing]
    return [Unit(tuple(parts[at : at + 3])) for at in range(0, len(parts), 3)]


_STEP = st.tuples(  # what, which driver, which unit or input, what is not listed
    st.sampled_from(["plan", "plan", "commit", "commit", "split", "finish", "replace", "remove"]),
    st.integers(0, 1),
    st.integers(0, 5),
    st.sampled_from(["", "", "", *INPUTS]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(_STEP, min_size=4, max_size=20))
def test_whatever_happens_no_input_is_committed_twice_and_none_is_lost(tmp_path_factory, steps):
    world = World(tmp_path_factory.mktemp("log"))
    for action, driver, number, hidden in steps:
        if action == "plan" or driver not in world.plans:
            world.plan(driver, set(INPUTS) - {hidden})
        elif action == "commit":
            world.commit(driver, number)
        elif action == "split":
            world.split(driver, number)
        elif action == "finish":
            world.finish(driver)
        elif action == "replace":  # back to the old version now and then, as S3's etags do when the bytes are the same
            uri = f"/in/{INPUTS[number % len(INPUTS)]}"
            world.now[uri] = 3 - world.now.get(uri, 1)
        elif len(world.now) > 1:
            world.now.pop(f"/in/{INPUTS[number % len(INPUTS)]}", None)
    plan = world.plan(0, set(INPUTS))
    for unit in plan.todo:
        assert not commit(world.log, unit)[0].split, "a unit with a tombstone was planned"
    world.finish(0)
    inputs = world.committed()
    assert len(inputs) == len(set(inputs)), "one input in two committed units"
    assert {(item.uri, item.etag, item.size) for item in world.listing(set(INPUTS))} <= set(inputs)
    assert validate(world.log)[1] == []
    assert world.plan(0, set(INPUTS)).run_id is None


def test_a_listing_that_misses_an_entry_and_shows_the_next_is_not_believed(tmp_path, monkeypatch):
    log = log_at(tmp_path)
    for number, name in enumerate("abc"):
        log.append(pairs(objects(name)), after=log.runs())
        assert len(log.runs()) == number + 1
    listings = []

    def torn(store: Disk, uri: str, *, glob: bool = True) -> Iterator[Object]:
        listings.append(uri)
        return (item for item in whole(store, uri, glob=glob) if len(listings) > 1 or "/000002/" not in item.uri)

    whole = Disk.list
    monkeypatch.setattr(Disk, "list", torn)
    assert [run.id for run in log.runs()] == ["000001", "000002", "000003"]
    shutil.rmtree(Path(log.run_key("000002", "plan.parquet")).parent)
    assert [run.id for run in log.runs()] == ["000001", "000003"], "somebody took it away"
    assert log.append(pairs(objects("d")), after=log.runs()) == "000004"


@pytest.mark.parametrize("options", [{"row_group_size": 1}, {"write_statistics": False}])
def test_an_input_is_found_wherever_in_a_plan_it_stands(tmp_path, options):
    """A plan of more than a million inputs has several row groups; what wrote one without statistics says nothing of its span."""
    log_of_runs, units = log_at(tmp_path), pairs(objects("b", "c", "d", "e"))
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(log._dump(units))), sink, **options)
    log_of_runs.store.create(log_of_runs.run_key("000001", "plan.parquet"), sink.getvalue())
    for name, found in {"a": [], "b": units[:1], "c": units[:1], "d": units[1:], "e": units[1:], "f": []}.items():
        (run,) = log_of_runs.runs(frozenset([f"/in/{name}"]))
        assert run.units == found
        assert run.whole == 2 or not found


def test_what_plans_hold_is_looked_up_in_what_is_listed_and_not_the_other_way_round(tmp_path):
    """Of a prefix that grows every night each plan is small, and what is listed is all of them."""

    class Listed(frozenset[str]):
        asked = 0

        def __contains__(self, uri: object) -> bool:
            Listed.asked += 1
            return super().__contains__(uri)

    log = log_at(tmp_path)
    for name in "acbd":
        log.append(pairs(objects(f"{name}1", f"{name}2")), after=log.runs())
    assert [len(run.units) for run in log.runs(Listed(item.uri for item in objects("a1", "b1", "d2")))] == [1, 0, 1, 1]
    assert Listed.asked == 2 * 4


def test_what_else_lies_in_an_output_is_no_run_and_no_unit(tmp_path):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("a", "b"))
    for name in ("runs/copy of 000001/plan.parquet", "runs/000002/notes.json", "runs/000001/notes.json", "data/README", "x"):
        log.store.create(f"{log.root}/{name}", b"mine")
    commit(log, plan.units[0])
    assert [(run.id, run.finished) for run in log.runs()] == [("000001", False)]
    assert list(log.objects()) == [plan.units[0].id]


def test_tombstones_of_any_size_are_told_from_a_strangers_object(tmp_path):
    log = log_at(tmp_path)
    large = Unit(tuple(Part(f"/in/{'x' * 50}{number}", "1", 10) for number in range(200)))
    small, strange, done = pairs(objects("a", "b", "c", "d", "e", "f"))
    for unit in (large, small):
        retire(log, unit)
    assert log.objects()[large.id].size > log.objects()[small.id].size
    Path(log.data_key(strange.id)).write_bytes(b"x" * log.objects()[small.id].size)
    commit(log, done)
    standing = log.standing([unit.id for unit in (large, small, strange, done, pairs(objects("z"))[0])])
    assert standing == Standing(frozenset({strange.id, done.id}), frozenset({large.id, small.id}))


def test_a_plan_whose_ids_are_not_those_of_its_inputs_is_not_believed(tmp_path):
    log_of_runs, (unit,) = log_at(tmp_path), pairs(objects("a"))
    table = pq.read_table(io.BytesIO(log._dump([unit]))).set_column(0, "unit", pa.array(["0" * 32]))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    log_of_runs.store.create(log_of_runs.run_key("000001", "plan.parquet"), sink.getvalue())
    with pytest.raises(StoreError, match="ids do not follow"):
        make_plan(log_of_runs, objects("a"))


def test_a_damaged_plan_is_named(tmp_path):
    log = log_at(tmp_path)
    make_plan(log, objects("a"))
    path = Path(log.run_key("000001", "plan.parquet"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StoreError, match=r"plan\.parquet: not a plan"):
        make_plan(log, objects("a"))


def test_unit_id_follows_from_the_parts_alone():
    """The recipe is a promise: an id computed elsewhere, from the contract, must be the same."""
    unit = Unit((Part("s3://b/ü.tar", "etag", 5), Part("s3://b/2", "e", 6, 0, 10)))
    recipe = '[["s3://b/ü.tar","etag",5,null,null],["s3://b/2","e",6,0,10]]'
    assert unit.id == hashlib.sha256(recipe.encode()).hexdigest()[:32]
    assert Unit(tuple(reversed(unit.parts))).id != unit.id


def test_second_commit_of_a_unit_accepts_what_stands(tmp_path):
    log, unit = log_at(tmp_path), pairs(objects("a"))[0]
    footer, ours = commit(log, unit)
    assert (footer.rows_in, footer.ok, footer.failed, footer.failures, ours) == (4, 3, 1, {"CORRUPT": 1}, True)
    assert commit(log, unit) == (footer, True), "a lost reply: what stands there is ours"
    other = Provenance(OURS.fingerprint, "attempt-2", "0")
    assert commit(log, unit, by=other) == (footer, False)
    assert list(verify(log, [unit])) == [footer]
    with pytest.raises(Conflict, match="of unit"):
        commit(log, unit, by=Provenance("e" * 12, "attempt-1", "0"))
    assert not retire(log, unit)
    (retired,) = pairs(objects("b"))
    assert [retire(log, retired), retire(log, retired)] == [True, True], "whoever did it"
    footer, ours = commit(log, retired, by=other)
    assert (footer.split, footer.rows_in, ours) == ("a test", 0, False)
    assert footer.inputs == (("/in/b", "1", 10),)


def test_something_else_in_our_place_is_a_conflict(tmp_path):
    log = log_at(tmp_path)
    one, two, three, four = pairs(objects("a", "b", "c", "d", "e", "f", "g", "h"))
    commit(log, one)
    sound = Path(log.data_key(one.id)).read_bytes()
    Path(log.data_key(two.id)).write_bytes(sound)
    Path(log.data_key(three.id)).write_bytes(b"hello")
    length = 8 + int.from_bytes(sound[-8:-4], "little")  # of what pyarrow cannot read, and raises OSError
    Path(log.data_key(four.id)).write_bytes(sound[:-length] + bytes(length - 8) + sound[-8:])
    for unit in (two, three, four):
        with pytest.raises(Conflict) as caught:
            commit(log, unit)
        assert caught.value.exit_code == 6
    assert Path(log.data_key(three.id)).read_bytes() == b"hello"
    with pytest.raises(Conflict):
        commit(log, one, count=5)


@pytest.mark.parametrize("left", [0, 1], ids=["no plan is left", "a later one is left"])
def test_inputs_whose_plan_was_taken_away_are_not_labelled_again(tmp_path, left):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("a", "b"))
    commit(log, plan.units[0])
    finish(log, plan)
    other = make_plan(log, objects("c", "d"))
    assert retire(log, other.units[0])
    for run_id in ("000001", "000002")[: 2 - left]:
        shutil.rmtree(Path(log.root, "runs", run_id))
    (Path(log.root) / "data" / f"{'0' * 32}.parquet").write_bytes(b"a stranger's")
    if left:
        assert make_plan(log, objects("c", "d", "e")).todo, "nothing of it is labelled"
    else:
        with pytest.raises(Conflict):
            make_plan(log, objects("e"))
    with pytest.raises(Conflict, match=f"/in/[ab] is labelled in .*{plan.units[0].id}.parquet, and no plan under .* says so"):
        make_plan(log, objects("b", "e"))


def test_validate_finds_what_is_wrong(tmp_path):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("a", "b", "c", "d"))
    for unit in plan.units:
        commit(log, unit)
    finish(log, plan)
    footers, problems = validate(log)
    assert (len(footers), problems) == (2, [])
    commit(log, pairs(objects("z"))[0])
    path = Path(log.data_key(plan.units[0].id))
    path.unlink()
    _, problems = validate(log)
    assert any("1 of its 2 units are gone" in problem for problem in problems)
    assert any("in no plan" in problem for problem in problems)
    path.write_bytes(b"PAR1 damaged")
    assert any("not a unit of nightlabel" in problem for problem in validate(log)[1])


def test_validate_holds_no_inputs_of_units_and_counts_a_unit_of_two_plans_once(tmp_path):
    log = log_at(tmp_path)
    for names in ("ab", "abcd"):  # the second plan takes over the unit of the first
        plan = make_plan(log, objects(*names))
    for unit in plan.units:
        commit(log, unit)
    assert [len(run.units) for run in log.runs()] == [1, 2]
    footers, problems = validate(log)
    assert ([footer.inputs for footer in footers], problems) == ([(), ()], [])


def test_validate_deep_holds_rows_against_their_account(tmp_path):
    log = log_at(tmp_path)
    one, two = make_plan(log, objects("a", "b", "c", "d")).units
    commit(log, one)
    path, rows = Path(log.data_key(two.id)), prediction_rows(4, failed=1)
    account = Footer(two.id, log.fingerprint, 4, 3, 1, {"CORRUPT": 1}).metadata
    other_class = rows.set_column(rows.schema.get_field_index("error_class"), "error_class", pa.array(["TRUNCATED", *[None] * 3]))
    for told, wrong in ((rows, 0), (prediction_rows(4), 1), (pa.concat_tables([rows[:3], rows[:1]]), 1), (other_class, 1)):
        pq.write_table(told.replace_schema_metadata(account), path)
        assert validate(log)[1] == []
        problems = validate(log, deep=True)[1]
        assert len(problems) == wrong
        assert all(": its rows are not those of its account; required: 3 ok and 1 failed, numbered" in said for said in problems)


def test_validate_says_of_lost_rows_what_their_account_says_and_no_more(tmp_path):
    log = log_at(tmp_path)
    unit = pairs(objects("a", "b"))[0]
    commit(log, unit)
    path = Path(log.data_key(unit.id))
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    (said,) = validate(log)[1]
    assert ": 3 rows, its account says 4 in = 3 ok + 1 failed, CORRUPT 1; required: an account that adds up. Find out" in said


def test_validate_names_open_runs_and_damaged_manifests(tmp_path):
    log = log_at(tmp_path)
    plan = make_plan(log, objects("a", "b", "c", "d"))
    commit(log, plan.units[0])
    assert open_runs(log, lambda part: part.uri == "/in/d") == [f"run {plan.run_id}: 1 of 2 units"]
    assert open_runs(log, lambda part: part.uri in ("/in/a", "/in/b")) == [], "what is left was replaced: nobody can complete it"
    commit(log, plan.units[1])
    assert (open_runs(log, lambda part: True), validate(log)[1]) == ([], [])
    finish(log, plan)
    moved = Path(log.data_key(plan.units[0].id)).rename(tmp_path / "moved")
    assert open_runs(log, lambda part: True) == [], "its manifest says that it is over; what is wrong validate says"
    moved.rename(log.data_key(plan.units[0].id))
    manifest = Path(log.run_key(plan.run_id, "manifest.json"))
    for damaged in (b"", b"[]", b'{"rows": {"in": 8}}', b"\xff"):
        manifest.write_bytes(damaged)
        assert ["manifest.json: not a manifest" in problem for problem in validate(log)[1]] == [True], damaged


def finished(folder: Path, *names: str) -> tuple[Log, Plan]:
    """A run of these inputs that is over."""
    log = log_at(folder)
    plan = make_plan(log, objects(*names))
    for unit in plan.units:
        commit(log, unit)
    finish(log, plan)
    return log, plan


def test_the_newest_version_of_a_unit_counts_and_every_one_is_validated(tmp_path):
    log, plan = finished(tmp_path, "a", "b", "c")
    retried, other = plan.units
    for number, failed in ((1, 0), (2, 2)):
        assert to_plan(log, ("CORRUPT",)).number == number
        generation = Generation(log, number)
        assert generation.begin(("CORRUPT",), [retried])
        assert not generation.begin(("CORRUPT",), [retried]), "planned once"
        with pytest.raises(JobError, match="CORRUPT is not finished"):
            to_plan(log, ("TRUNCATED",))
        commit_unit(generation, retried, prediction_rows(4, failed=failed), OURS)
        footers, problems = validate_all(log)
        assert ({footer.unit: footer.failed for footer in footers}, problems) == ({retried.id: failed, other.id: 1}, [])
        rows = json.dumps({"rows": {"in": 4, "ok": 4 - failed, "failed": failed}})
        assert generation.store.create(generation.run_key("000001", "manifest.json"), rows.encode())
    third = Generation(log, 3)
    third.store.create(third.note_key, json.dumps({"classes": ["TRUNCATED"]}).encode())
    with pytest.raises(JobError, match="TRUNCATED is not finished"):
        third.begin(("CORRUPT",), [retried])
    assert third.runs() == [], "its note is another's"
    places = [newest(log, before=before)[retried.id].uri for before in (1, 2, 3, None)]
    logs = [log, Generation(log, 1), Generation(log, 2), Generation(log, 2)]
    assert places == [version.data_key(retried.id) for version in logs]
    path = Path(places[-1])
    path.write_bytes(serialise(prediction_rows(3), retried, OURS)[0])
    problems = validate_all(log)[1]
    assert any("3 rows of a unit that has 4" in problem for problem in problems)
    path.write_bytes(b"hello")
    assert any(f"{path}: not a unit of nightlabel" in problem for problem in validate_all(log)[1])


def test_nothing_else_is_verified_as_a_unit(tmp_path):
    log = log_at(tmp_path)
    foreign, retired, other = pairs(objects("a", "b", "c", "d", "e", "f"))
    commit(log, other)
    Path(log.data_key(foreign.id)).write_bytes(Path(log.data_key(other.id)).read_bytes())
    retire(log, retired)
    for unit, words in ((foreign, f"holds unit {other.id}"), (retired, "holds a tombstone")):
        with pytest.raises(Conflict, match=words):
            list(verify(log, [unit]))
    commit(log, (strange := pairs(objects("g"))[0]), by=Provenance("e" * 12, "attempt-1", "0"))
    with pytest.raises(Conflict, match="fingerprint eeeeeeeeeeee"):
        list(verify(log, [strange]))
    problems = validate(log)[1]
    for unit, words in ((foreign, f"is of unit {other.id}"), (strange, f"is of unit {strange.id}, eeee")):
        assert any(log.data_key(unit.id) in problem and words in problem for problem in problems)


def test_rows_that_are_in_two_committed_units_are_told_and_ranges_that_meet_are_fine(tmp_path):
    log_of_runs = log_at(tmp_path)
    ranges = [(0, 50), (50, 70), (70, None)]
    units = [Unit((Part("/in/a.parquet", "1", 10, start, stop),)) for start, stop in ranges]
    log_of_runs.append(units, after=[])
    for unit in units:
        commit(log_of_runs, unit)
    assert validate(log_of_runs)[1] == []
    for start, stop in ((60, 65), (None, 10), (80, 90)):
        folder = tmp_path / f"{start}"
        shutil.copytree(tmp_path / OURS.fingerprint, folder / OURS.fingerprint)
        log, twice = log_at(folder), Unit((Part("/in/a.parquet", "1", 10, start, stop),))
        log.append([twice], after=log.runs())
        assert validate(log)[1] == [], "planned is not labelled"
        commit(log, twice)
        (problem,) = validate(log)[1]
        assert problem.startswith("/in/a.parquet: labelled twice")
        assert twice.id in problem


def test_a_manifest_is_held_against_its_units(tmp_path):
    log, plan = finished(tmp_path, "a", "b", "c")
    manifest = Path(log.run_key(plan.run_id, "manifest.json"))
    for name in ("in", "ok", "failed"):
        manifest.write_text(json.dumps({"rows": {"in": 8, "ok": 6, "failed": 2} | {name: 0}}))
        (problem,) = validate(log)[1]
        assert "its units hold {'in': 8, 'ok': 6, 'failed': 2}" in problem


def test_a_run_that_ends_while_it_is_validated_is_no_mistake(tmp_path, monkeypatch):
    log_of_runs = log_at(tmp_path)
    plan = make_plan(log_of_runs, objects("a", "b"))
    listed = Log.objects

    def ends(self: Log) -> dict[str, Object]:
        found = listed(self)
        commit(self, plan.units[0])
        finish(self, plan)
        return found

    monkeypatch.setattr(Log, "objects", ends)
    assert validate(log_of_runs) == ([], [])


def test_what_validate_cannot_read_is_a_problem_and_a_store_that_is_away_is_not(tmp_path, monkeypatch):
    log_of_runs = log_at(tmp_path)
    (unit,) = make_plan(log_of_runs, objects("a")).units
    commit(log_of_runs, unit)
    for error in (InputMissing("somebody moved it"), Temporary("the store is away")):

        def fail(self: Log, unit_id: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Log, "footer", fail)
        if isinstance(error, Temporary):
            with pytest.raises(Temporary):
                validate(log_of_runs)
        else:
            assert validate(log_of_runs) == ([], ["somebody moved it."])


ACCOUNT = Footer("u" * 32, OURS.fingerprint, rows_in=4, ok=3, failed=1, failures={"CORRUPT": 1})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, None),
        ({"rows_in": 5, "ok": 4}, "adds up"),
        ({"ok": 2}, "adds up"),
        ({"failures": {"CORRUPT": 2}}, "adds up"),
        ({"split": "a tombstone, with rows"}, "adds up"),
        ({"inputs": [["/in/a"]]}, "not a unit of nightlabel"),
        ({"inputs": None}, "not a unit of nightlabel"),
        ({"of another day": 1}, "not a unit of nightlabel"),
    ],
)
def test_an_account_that_does_not_add_up_is_a_conflict(tmp_path, wrong, words):
    log, account = log_at(tmp_path), json.dumps({**asdict(ACCOUNT), **wrong})
    for metadata, said in (({"nightlabel": account}, words), ({"nightlabel": "no JSON"}, "not a unit"), (None, "not a unit")):
        sink = io.BytesIO()
        pq.write_table(prediction_rows(4, failed=1).replace_schema_metadata(metadata), sink, store_schema=bool(metadata))
        Path(log.data_key(ACCOUNT.unit)).parent.mkdir(parents=True, exist_ok=True)
        Path(log.data_key(ACCOUNT.unit)).write_bytes(sink.getvalue())
        if said is None:
            assert log.footer(ACCOUNT.unit) == ACCOUNT
            continue
        with pytest.raises(Conflict, match=said):
            log.footer(ACCOUNT.unit)


def test_counts_that_do_not_add_up_are_not_written():
    unit = pairs(objects("a"))[0]
    gap = prediction_rows(4).filter(pa.array([True, False, True, True]))
    status = pa.array(["ok", "failed", "ok", None])
    unknown = prediction_rows(4).set_column(PREDICTION.get_field_index("status"), "status", status)
    for rows in (gap, unknown, prediction_rows(4).take([1, 0, 2, 3])):
        with pytest.raises(AssertionError, match="do not add up"):
            serialise(rows, unit, OURS)


def rotten(data: bytes) -> Iterator[bytes]:
    """The Parquet file with one bit of a column wrong, of each column once."""
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
        broken = bytearray(data)
        broken[start + column.total_compressed_size - 1] ^= 1
        yield bytes(broken)


def test_rot_is_seen_in_every_column_of_a_unit_and_of_a_plan(tmp_path):
    data, _ = serialise(prediction_rows(40, failed=20), pairs(objects("a"))[0], OURS)
    for broken in rotten(data):
        with pytest.raises(OSError, match="CRC"):
            pq.read_table(io.BytesIO(broken), page_checksum_verification=True)
    log = log_at(tmp_path)
    make_plan(log, objects("a", "b", "c"))
    path = Path(log.run_key("000001", "plan.parquet"))
    for broken in rotten(path.read_bytes()):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match="CRC"):
            log.runs()


def end(count: int, error_class: str | None = None) -> dict:
    return {"index": count, "error_class": error_class, "error": error_class}


@given(st.permutations(range(6)), st.integers(min_value=1, max_value=3))
def test_a_unit_is_complete_when_all_rows_are_there_in_any_order_even_twice(order, block: int):
    fields = pa.schema([field.with_nullable(True) for field in PREDICTION])
    rows = prediction_rows(5).to_pylist()
    items = [end(5) if number == 5 else rows[number] for number in order]
    buffer = UnitBuffer()
    for at in range(0, len(items), block):
        assert not buffer.complete
        table = pa.Table.from_pylist(items[at : at + block], schema=fields)
        buffer.add(table)
        if at + block < len(items):
            buffer.add(table)
    assert buffer.complete
    assert buffer.table() == prediction_rows(5)


def test_kept_text_of_more_than_two_gigabytes_is_put_in_order():
    """Arrow's offsets of text have 32 bits. The buffers share one text, so the memory that it takes is that of the result."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**33:
        pytest.skip("needs 8 GiB of free memory")
    text, buffer = pa.array(["x" * 2**20] * 64), UnitBuffer()
    numbers = random.Random(0).sample(range(2112), 2112)
    rows = prediction_rows(2112)
    for at in range(0, 2112, 64):
        buffer.add(rows.take(pa.array(numbers[at : at + 64])).append_column("html", text))
    table = buffer.table()
    assert table.select(PREDICTION.names) == rows
    assert table.column("html").nbytes > 2**31


def test_a_unit_error_completes_the_unit_and_an_empty_unit_has_no_rows():
    fields = pa.schema([field.with_nullable(True) for field in PREDICTION])
    broken, empty = UnitBuffer(), UnitBuffer()
    broken.add(pa.Table.from_pylist([end(7, "TAR_NO_EOF")], schema=fields))
    assert broken.complete
    assert broken.error == ("TAR_NO_EOF", "TAR_NO_EOF")
    empty.add(pa.Table.from_pylist([end(0)], schema=fields))
    assert empty.complete
    assert empty.table().num_rows == 0
    assert serialise(empty.table(), pairs(objects("a"))[0], OURS)[1].rows_in == 0


def test_a_buffer_sums_what_it_has_and_an_end_row_adds_nothing():
    fields = [*(field.with_nullable(True) for field in PREDICTION), *((name, pa.float32()) for name in TIMINGS.values())]
    schema, buffer = pa.schema([*fields, (SAME_LABEL, pa.bool_())]), UnitBuffer()
    rows = [row | dict.fromkeys(TIMINGS.values(), 0.5) for row in prediction_rows(4, failed=1).to_pylist()]
    for row, same in zip(rows, (None, True, False, True), strict=True):
        buffer.add(pa.Table.from_pylist([row | {SAME_LABEL: same}], schema=schema))
    buffer.add(pa.Table.from_pylist([end(4)], schema=schema))
    assert (len(buffer), buffer.failed(), buffer.seen()) == (4, 1, Seen(compared=3, same_label=2))
    assert buffer.seconds() == dict.fromkeys(TIMINGS, 2.0)
    assert buffer.table() == prediction_rows(4, failed=1), "what is on its way to the driver only is not committed"


def test_files_of_one_unit_whose_types_do_not_go_together_are_a_job_error():
    buffer = UnitBuffer()
    for index, label in enumerate((pa.array([1]), pa.array(["one"]))):
        buffer.add(prediction_rows(2).slice(index, 1).append_column("caption", label))
        buffer.add(prediction_rows(0).append_column("caption", pa.array([], pa.binary())))
        assert index or buffer.table().column("caption").to_pylist() == [1], "a table without rows has any types"
    with pytest.raises(JobError, match="inputs of one unit differ"):
        buffer.table()


def test_footer_is_read_back(tmp_path):
    log, unit = log_at(tmp_path), pairs(objects("a", "b"))[0]
    footer, _ = commit(log, unit)
    assert log.footer(unit.id) == footer
    assert footer.inputs == (("/in/a", "1", 10), ("/in/b", "1", 10))


def test_what_refuses_a_create_and_then_is_not_there_is_no_fault_of_an_input(tmp_path):
    """Replicas of a store that differ, or a hand between the two looks."""

    class Differing(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            return False

    log, unit = Log(Differing(), str(tmp_path / "0123456789ab")), pairs(objects("a", "b"))[0]
    for act in (commit, retire):
        with pytest.raises(Temporary, match="was there when it was to be created"):
            act(log, unit)


def test_a_unit_is_in_a_plan_once_and_a_plan_that_names_one_twice_is_read(tmp_path):
    """As two empty row groups of a large file once made it."""
    log_of_runs, unit = log_at(tmp_path), Unit((Part("/in/a.parquet", "1", 10, 100, 100),))
    with pytest.raises(AssertionError, match="twice"):
        log_of_runs.append([unit, unit], after=[])
    log_of_runs.store.create(log_of_runs.run_key("000001", "plan.parquet"), log._dump([unit, unit]))
    (run,) = log_of_runs.runs()
    assert (run.units, run.whole) == ([unit], 1)


def test_footers_are_read_back_slice_by_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_AHEAD", 2)
    log_of_runs, units, read = log_at(tmp_path), pairs(objects(*"abcdefghij")), []
    for unit in units:
        commit(log_of_runs, unit)
    monkeypatch.setattr(Log, "footer", lambda self, unit_id, footer=Log.footer: (read.append(unit_id), footer(self, unit_id))[1])
    footers = verify(log_of_runs, units)
    first = [next(footers).unit, next(footers).unit]
    assert sorted(read) == sorted(first)
    assert [*first, *(footer.unit for footer in footers)] == [unit.id for unit in units]
