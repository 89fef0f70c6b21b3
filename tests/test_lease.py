"""The lease: one holder at a time, on a disk and on a real S3 server; a dead holder is outlived, not waited for for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from seaweed import Seaweed

from pipeline.disk import Disk
from pipeline.errors import InputMissing, PermissionDenied, StoreError, Temporary, UnitsLeft
from pipeline.nights import lease
from pipeline.nights.lease import Heartbeat, Lease, LeaseStore, LeaseTiming
from pipeline.nights.nightly import SILENCE_S
from pipeline.storage import Object, Store, join, open_store

#: Whoever is alive is heard, on a busy machine too.
FAST = LeaseTiming(beat=0.1, dead=60.0, stale=600.0, grace=60.0, look=0.02)
SILENT = replace(FAST, dead=1.5)  # for who waits for the death of one that is dead
Folder = tuple[Store, str]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return open_store(str(tmp_path)), str(tmp_path / "leases")
    s3: Seaweed = request.getfixturevalue("s3")
    return open_store("s3://", s3.options), f"s3://{s3.bucket()}/labels/leases"


def take(
    place: Folder, if_running="skip", *, wait: float = 5.0, said: list[str] | None = None, pace: LeaseTiming = FAST
) -> Lease | None:
    return LeaseStore(*place, pace).acquire(if_running, wait=wait, say=(said if said is not None else []).append)


def until(true, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def end_and_only_then(held: Lease, free: threading.Event) -> None:
    """Give it back, and let the beat that is under way go on when that has begun."""
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(held.__exit__)
        until(held._over.is_set)
        free.set()
        end.result()


def test_a_free_lease_is_taken_skipped_by_others_and_free_again(place):
    said: list[str] = []
    with take(place, said=said) as held:
        assert said == []
        assert take(place, "skip", said=said) is None
        assert "holds this output" in said[0]
        held.check()
    since = time.monotonic()
    with take(place, said=said):
        assert time.monotonic() - since < FAST.dead
    assert len(said) == 1, "a lease that was given back is not taken over"


def test_of_many_one_holds_it(place):
    def ask(_: int) -> Lease | None:
        try:
            return take(place, "queue", wait=0.3)
        except Temporary:
            return None

    with ThreadPoolExecutor(6) as pool:
        held = [lease for lease in pool.map(ask, range(6)) if lease is not None]
    assert len(held) == 1
    held[0].__exit__()


def test_the_living_are_not_taken_for_dead():
    """A beat may wait for SILENCE_S and be one of four that are lost; who was asked to stop has the time of a block and more."""
    usual = LeaseTiming()
    assert 4 * usual.beat <= usual.dead - usual.look
    assert usual.beat + SILENCE_S < usual.dead < usual.grace < usual.stale


def test_queue_waits_its_turn_or_gives_up(place):
    first = take(place)
    with pytest.raises(Temporary, match="still runs after"):
        take(place, "queue", wait=0.2)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(take, place, "queue", wait=60.0)
        until(lambda: first._beats > 3)
        assert not second.done()
        first.__exit__()
        second.result().__exit__()


def test_who_lives_is_waited_for_however_long_it_takes(place):
    with take(place) as held:
        with pytest.raises(Temporary, match="still runs after"):
            take(place, "queue", wait=6.0, pace=replace(FAST, dead=4.0, grace=0.1))
        held.check()


def test_replace_asks_the_holder_to_stop_and_follows_it(place):
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with take(place) as first:
            second = pool.submit(take, place, "replace", said=said)
            until(lambda: first._end)
            with pytest.raises(UnitsLeft, match="asked this run to stop") as caught:
                first.check()
            assert caught.value.exit_code == 5
            assert not second.done(), "it is given time to end"
        second.result().__exit__()
    assert len(said) == 1


def test_who_does_not_stop_when_asked_is_overtaken_and_hears_of_it(place):
    with take(place) as first, take(place, "replace", pace=replace(FAST, grace=0.3)):
        until(lambda: "took over" in first._end)


class Clock:
    """Stands in for the module `time`: whoever sleeps is woken at once, so much later; what is to happen by then has."""

    def __init__(self, *then: tuple[float, Callable[[], object]]) -> None:
        self.now, self._then, self.time = 0.0, list(then), time.time

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self._then and self._then[0][0] <= self.now:
            self._then.pop(0)[1]()


def begin(place: Folder, term: int) -> None:
    """Somebody on another machine takes the lease."""
    beat = Heartbeat(f"elsewhere process {term}", "another boot", term, "token", time.time())
    assert LeaseStore(*place).create("terms", f"{term:06d}", beat.dump())


def test_who_has_followed_the_one_that_was_asked_to_stop_is_asked_too_and_given_as_long(tmp_path, monkeypatch):
    place = open_store(str(tmp_path)), str(tmp_path / "leases")
    begin(place, 1)
    monkeypatch.setattr(lease, "time", clock := Clock((6.0, lambda: begin(place, 2))))
    said: list[str] = []
    with take(place, "replace", said=said, pace=LeaseTiming(grace=10.0, look=1.0)):
        assert 16.0 < clock.now < 18.0
    assert said[-1] == "taking over from elsewhere process 2: asked to stop 10 s ago"
    assert sorted(path.name for path in (tmp_path / "leases/stops").iterdir()) == ["000001.json", "000002.json"]


def test_queue_waits_for_two_holders_no_longer_than_for_one(tmp_path, monkeypatch):
    place = open_store(str(tmp_path)), str(tmp_path / "leases")
    begin(place, 1)
    monkeypatch.setattr(lease, "time", clock := Clock((6.0, lambda: begin(place, 2))))
    with pytest.raises(Temporary, match="elsewhere process 2 still runs after 10 s"):
        take(place, "queue", wait=10.0, pace=LeaseTiming(look=1.0))
    assert 10.0 < clock.now < 12.0


def test_silence_is_death_by_the_watchers_clock_whatever_the_holders_says(place):
    said: list[str] = []
    beat = Heartbeat("elsewhere process 1", "another boot", 1, "token", 0.0)
    LeaseStore(*place).create("terms", "000001", beat.dump())
    since = time.monotonic()
    with take(place, "skip", said=said, wait=0.0, pace=SILENT):
        assert time.monotonic() - since >= SILENT.dead
    assert said[-1] == "taking over from elsewhere process 1: silent for 1.5 s"


def test_a_beat_of_long_ago_is_not_watched(place):
    LeaseStore(*place).create("terms", "000001", Heartbeat("elsewhere process 1", "another boot", 1, "token", 0.0).dump())
    with take(place, pace=replace(FAST, dead=600.0, stale=-1.0)):
        pass


def test_a_strangers_object_is_a_sentence(place):
    LeaseStore(*place).create("terms", "000001", b"[]")
    with pytest.raises(StoreError, match="--if-running share"):
        take(place)


STRAY = ("000001.json.bak", "old.json", "0000010.json", "000007 (copy).json", "copy/000007.json", "７７７７７７.json")


def test_what_else_lies_there_is_no_term(place):
    store, folder = place
    for name in STRAY:
        store.create(join(folder, "terms", name), b"{}")
    for number in (1, 2):
        with take(place, wait=0.0) as held:
            assert LeaseStore(*place).state().term == held._term == number
            for name in STRAY:
                store.create(join(folder, f"beats/{number:06d}", name), b"{}")
            until(lambda held=held: LeaseStore(*place).state().beats == held._beats > 1)


def test_who_comes_too_late_for_a_term_looks_again_in_a_while(tmp_path, monkeypatch):
    sleep, slept, looks = time.sleep, list[float](), list[int]()
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))

    class SlowToTell(Disk):
        """Its listings have what was created from the 5th on."""

        def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
            looks.append(len(slept))
            return super().list(uri, glob=glob) if len(looks) >= 5 else iter(())

    with take((open_store(str(tmp_path)), str(tmp_path / "leases"))):
        assert take((SlowToTell(), str(tmp_path / "leases"))) is None
    assert looks[:5] == [0, 1, 2, 3, 4], "without a pause it is a storm of requests"


def test_a_term_whose_reply_was_lost_is_ours(tmp_path):
    class Lossy(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            return super().create(uri, data) and "/terms/" not in uri

    with take((Lossy(), str(tmp_path / "leases"))) as held:
        assert held._term == 1


@pytest.mark.parametrize(("error", "gone"), [(None, False), (PermissionError(), False), (ProcessLookupError(), True)])
def test_a_process_of_somebody_else_is_alive(monkeypatch, error, gone):
    def kill(pid: int, signal_number: int) -> None:
        assert (pid, signal_number) == (7, 0)
        if error:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(lease, "_machine", lambda: "here")
    assert lease._is_gone(Heartbeat("x", "here", 7, "", 0.0)) == gone
    assert not lease._is_gone(Heartbeat("x", "elsewhere", 7, "", 0.0))
    monkeypatch.setattr(lease, "_machine", lambda: "")
    assert not lease._is_gone(Heartbeat("x", "", 7, "", 0.0)), "where machines have no names, it may be of another"


class Closed(Disk):
    """A disk that says of what is absent that it may not be read, as S3 does to who may not list."""

    def read(self, uri: str, **options: Any) -> bytes:
        try:
            return super().read(uri, **options)
        except InputMissing:
            raise PermissionDenied(f"{uri}: 403") from None


@pytest.mark.parametrize("asked", ["stops", "terms"])
def test_what_cannot_be_read_hides_nothing_else(asked, tmp_path):
    place = Closed(), str(tmp_path / "leases")
    with take(place) as held:
        other = Heartbeat("elsewhere process 1", "another boot", 1, "token", time.time())
        name, words = ("000001", "asked this run to stop") if asked == "stops" else ("000002", "took over")
        LeaseStore(*place).create(asked, name, other.dump())
        until(lambda: words in held._end)


def test_a_beat_that_fails_hides_no_stop(tmp_path):
    class NoBeats(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            if "/beats/" in uri:
                raise Temporary(f"{uri}: slow down")
            return super().create(uri, data)

    place = NoBeats(), str(tmp_path / "leases")
    with take(place) as held:
        LeaseStore(*place).create("stops", "000001", Heartbeat("elsewhere process 1", "", 1, "token", time.time()).dump())
        until(lambda: "asked this run to stop" in held._end)


def test_an_outage_that_the_watcher_sees_too_is_no_death_of_the_holder(tmp_path):
    """The store keeps both waiting for longer than a silent holder is given."""
    up, looks = threading.Event(), list[str]()
    up.set()

    class Store(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            assert up.wait(60)
            return super().create(uri, data)

    class Watched(Disk):
        def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
            found = [*super().list(uri, glob=glob)]
            looks.append(uri)
            if len(looks) == 4:  # of the second state
                up.clear()
                time.sleep(pace.dead + 0.2)
                up.set()
            return iter(found)

    folder, said, pace = str(tmp_path / "leases"), list[str](), replace(FAST, beat=0.5, dead=4.0)
    with take((Store(), folder), pace=pace) as held:
        until(lambda: held._beats)
        assert take((Watched(), folder), said=said, pace=pace) is None, said
        held.check()
    assert len(looks) > 4


def test_who_ends_does_not_listen_any_more(tmp_path):
    """On a store that hangs each of these requests would be minutes."""
    beats, free, reads = threading.Event(), threading.Event(), list[str]()

    class Slow(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            if "/beats/" in uri:
                beats.set()
                assert free.wait(120)
            return super().create(uri, data)

        def read(self, uri: str, **options: Any) -> bytes:
            reads.append(uri)
            return super().read(uri, **options)

    held = take((Slow(), str(tmp_path / "leases")))
    assert beats.wait(120)
    end_and_only_then(held, free)
    assert reads == []


def test_who_ends_says_so_after_the_beat_that_is_under_way(tmp_path):
    """Two of one number, and the one that is lost may be the one that says that it is over."""
    beats, free, created = threading.Event(), threading.Event(), threading.Event()

    class Slow(Disk):
        def create(self, uri: str, data: bytes) -> bool:
            if "/beats/" not in uri:
                return super().create(uri, data)
            if threading.current_thread().name != "lease":
                free.set()
                assert created.wait(120)
                return super().create(uri, data)
            beats.set()
            assert free.wait(120)
            done = super().create(uri, data)
            created.set()
            return done

    place = Slow(), str(tmp_path / "leases")
    held = take(place)
    assert beats.wait(120)
    end_and_only_then(held, free)
    state = LeaseStore(*place).state()
    assert (state.beats, state.last.done) == (2, True)


def test_who_was_asked_to_stop_does_not_forget_it(tmp_path):
    reads: list[str] = []

    class Forgetful(Disk):
        """What it has handed out once it cannot read again."""

        def read(self, uri: str, **options: Any) -> bytes:
            data = super().read(uri, **options)
            reads.append(uri)
            if "/stops/" in uri and reads.count(uri) > 1:
                raise Temporary(f"{uri}: slow down")
            return data

    place = Forgetful(), str(tmp_path / "leases")
    with take(place) as held:
        LeaseStore(*place).create("stops", "000001", Heartbeat("elsewhere process 1", "", 1, "token", time.time()).dump())
        until(lambda: len(reads) > 2)
        with pytest.raises(UnitsLeft, match="asked this run to stop"):
            held.check()


HOLD = """
import sys, time
from pipeline.nights.lease import LeaseStore
from pipeline.storage import open_store
with LeaseStore(open_store(sys.argv[1]), sys.argv[1]).acquire("skip", wait=0.0, say=print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_holder_killed_on_this_machine_is_not_waited_for(tmp_path):
    if not Path("/proc/self/ns/pid").exists():
        pytest.skip("this system does not tell one boot from another")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    place, said = (open_store(str(tmp_path)), str(tmp_path)), list[str]()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with take(place, pace=replace(FAST, dead=600.0), said=said):
        assert said[-1].endswith(f"process {process.pid}: its process is gone")
