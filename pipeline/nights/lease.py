"""Who works on an output now, a night or a retry, so that no two pay for the same images. Only economy: correctness rests on the
commits.

A lease is made of objects that are created if absent, like the plans; nothing is overwritten or deleted:

    <folder>/terms/000042.json          whoever creates it holds the lease: its 42nd holder
    <folder>/beats/000042/000007.json   the holder is alive; the last one says that it is done
    <folder>/stops/000042.json          somebody asks the holder to stop

Only the newest term counts: whoever keeps house may remove older ones, three beats a minute of every run.

Expiry compares no two clocks. Who finds the lease held watches it: a new beat within `LeaseTiming.dead` of the watcher's clock
means alive, silence means dead. The price is up to 90 s of looking after a holder was killed; none when that was on this machine,
where its process is seen to be gone, or when its last beat is an hour old, more than clocks are ever wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipeline.errors import NightlabelError, StoreError, Temporary, UnitsLeft
from pipeline.job.schedule import IfRunning
from pipeline.storage import Store, below, join, read_if_there

Say = Callable[[str], None]


@dataclass(frozen=True)
class LeaseTiming:
    """Seconds. Between beats; of silence after which a holder is dead; of age at which a beat need not be watched; that one who
    was asked to stop is given; between two looks."""

    beat: float = 20.0
    dead: float = 90.0  # four beats may be lost
    stale: float = 3600.0
    grace: float = 180.0  # a block may take a minute on its way, and what is complete is committed before the end
    look: float = 3.0


@dataclass(frozen=True)
class Heartbeat:
    """What an object of the lease says: who, and whether it is done."""

    who: str
    machine: str
    pid: int
    token: str
    at: float
    done: bool = False

    def dump(self, *, done: bool = False) -> bytes:
        return json.dumps(asdict(self) | {"at": time.time(), "done": done}).encode()


@dataclass(frozen=True)
class State:
    """The lease as it stands: its newest term, how many beats that has, the newest of them."""

    term: int
    beats: int
    last: Heartbeat


def _machine() -> str:
    """Names this boot of this machine and this space of process ids; "" where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_gone(beat: Heartbeat) -> bool:
    """A process of this machine that is no more."""
    if not beat.machine or beat.machine != _machine():
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's: alive
        pass
    return False


class Lease:
    """Held by this process until the `with` block ends. `check` is to be called now and then."""

    def __init__(self, leases: LeaseStore, term: int, me: Heartbeat) -> None:
        self._leases, self._term, self._me = leases, term, me
        self._over, self._end, self._beats = threading.Event(), "", 0
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(NightlabelError):  # then it ends by silence
            self._beat(done=True)

    def check(self) -> None:
        """Raises UnitsLeft when another run has asked this one to stop, or has taken over because it was silent for so long."""
        if self._end:
            raise UnitsLeft(self._end, do="What is committed stays, and the other one goes on from there")

    def _run(self) -> None:
        while not self._over.wait(self._leases.pace.beat):
            with contextlib.suppress(NightlabelError):  # a beat that fails is a beat late
                self._beat()
            if self._over.is_set():  # each request may take minutes, and whoever ends waits for them
                return
            overtaken = self._heard("terms", self._term + 1, "took over, having heard nothing from this run")
            self._end = overtaken or self._heard("stops", self._term, "asked this run to stop") or self._end

    def _heard(self, folder: str, number: int, what: str) -> str:
        """Who has left an object there, and what that means; "" when nobody has, or when that is not to be read: S3 answers 403
        for what is absent to who may not list."""
        with contextlib.suppress(NightlabelError):
            if other := self._leases.read(folder, f"{number:06d}"):
                return f"{other.who} {what}"
        return ""

    def _beat(self, *, done: bool = False) -> None:
        self._leases.create("beats", f"{self._term:06d}/{self._beats + 1:06d}", self._me.dump(done=done))
        self._beats += 1


class LeaseStore:
    """The lease in one folder, for who wants it."""

    def __init__(self, store: Store, folder: str, pace: LeaseTiming | None = None) -> None:
        self.store, self.folder, self.pace = store, folder, pace or LeaseTiming()
        self._me = Heartbeat(f"{socket.gethostname()} process {os.getpid()}", _machine(), os.getpid(), secrets.token_hex(8), 0.0)

    def acquire(self, if_running: IfRunning, *, wait: float, say: Say) -> Lease | None:
        """The lease; None when another run is alive and `if_running` is skip. `queue` waits up to `wait` seconds, then raises
        Temporary; `replace` asks the other one to stop and gives it time to."""
        began = asked = since = time.monotonic()
        seen: State | None = None
        while True:
            asks = time.monotonic()
            state, now = self.state(), time.monotonic()
            since += now - asks  # a store that is slow to answer the watcher is slow to take the holder's beats
            free = self._why_free(state)
            if state is not None and not free:
                if seen is not None and state != seen and if_running == "skip":
                    return None
                if seen is None or state.term != seen.term:
                    self._greet(state, if_running, say)
                    asked = now
                if state != seen:
                    seen, since = state, now
                if now - since > self.pace.dead:
                    free = f"silent for {self.pace.dead:g} s"
                elif if_running == "replace" and now - asked > self.pace.grace:
                    free = f"asked to stop {self.pace.grace:g} s ago"
                elif if_running == "queue" and now - began > wait:
                    raise Temporary(f"{state.last.who} still runs after {wait:g} s", do="Run again, or raise schedule.wait")
            if free and (lease := self._take(state)):
                if state is not None and not state.last.done:
                    say(f"taking over from {state.last.who}: {free}")
                return lease
            time.sleep(self.pace.look)

    def state(self) -> State | None:
        """None: nobody ever held it."""
        terms = self._names("terms")
        if not terms:
            return None
        beats = self._names(f"beats/{terms[-1]}")
        last = self.read(f"beats/{terms[-1]}", beats[-1]) if beats else self.read("terms", terms[-1])
        return State(int(terms[-1]), len(beats), last) if last else None

    def read(self, folder: str, name: str) -> Heartbeat | None:
        """What an object says, None when it is not there."""
        key = join(self.folder, folder, f"{name}.json")
        data = read_if_there(self.store, key)
        try:
            return None if data is None else Heartbeat(**json.loads(data))
        except (ValueError, TypeError) as error:
            do = "Move it away, or go without a lease: --if-running share"
            raise StoreError(f"{key}: nothing that nightlabel wrote", need="a lease", do=do) from error

    def create(self, folder: str, name: str, content: bytes) -> bool:
        return self.store.create(join(self.folder, folder, f"{name}.json"), content)

    def _why_free(self, state: State | None) -> str:
        """Why the lease may be taken at once; "" when it may not."""
        if state is None or state.last.done:
            return "free"
        if _is_gone(state.last):
            return "its process is gone"
        age = time.time() - state.last.at
        return f"its last sign of life is of {_clock(state.last.at)}" if age > self.pace.stale else ""

    def _greet(self, state: State, if_running: IfRunning, say: Say) -> None:
        what = {"skip": "looking whether it is alive", "queue": "waiting for it", "replace": "asking it to stop"}[if_running]
        say(f"{state.last.who} holds this output, last heard of at {_clock(state.last.at)}: {what}")
        if if_running == "replace":
            self.create("stops", f"{state.term:06d}", self._me.dump())

    def _take(self, state: State | None) -> Lease | None:
        """The next term, or None when somebody else was faster."""
        term = state.term + 1 if state else 1
        if not self.create("terms", f"{term:06d}", self._me.dump()):
            standing = self.read("terms", f"{term:06d}")
            if standing is None or standing.token != self._me.token:  # else the reply to our own create was lost
                return None
        return Lease(self, term, self._me)

    def _names(self, folder: str) -> list[str]:
        """The numbers there, in order; not what somebody has put beside them, such as a copy of one."""
        numbers = re.compile(rf"/{folder}/([0-9]{{6}})\.json\Z")
        found = (numbers.search(item.uri) for item in below(self.store, self.folder, folder))
        return sorted(match[1] for match in found if match)


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
