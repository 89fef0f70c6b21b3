"""Careful mode: each image is prepared in a child process that can be killed, so a poison image costs one row.

A decoder that aborts, hangs or eats the memory takes its process with it; no `except` helps. The price is a copy of the bytes
into the child and of the pixels back and, after each poison, a new child (seconds: it imports torch). So it is only for units
that two passes did not complete, or one that hung, and for a retry of images that have hung or crashed a decoder. It is a guard
against accidents, not a sandbox.

The child is a fresh interpreter, not a fork: forking a process with threads (Ray, torch) can deadlock the child.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from pipeline.decode import BadImage
from pipeline.errors import UnfitError
from pipeline.rows import Failure

T = TypeVar("T")

#: Importing torch on a busy machine has taken 20 s.
_START_TIMEOUT_S = 120.0
_ORPHAN_GRACE_S = 2.0
#: After so many hangs in a row an image gets a tenth of its time, though not under a second, until one is decoded: a shard of a
#: thousand hanging images would take a night else.
_PATIENCE = 10
_LEAST_S = 1.0
_CHILD = """
import sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
sys.path[:] = pipe.recv()
from pipeline.careful import serve
serve(pipe)
"""


@dataclass(frozen=True, slots=True)
class CarefulLimits:
    """What one image may take. Raises ValueError for limits that nothing can keep."""

    timeout_s: float
    """Seconds; an image that takes longer fails with DECODE_TIMEOUT."""
    memory_bytes: int
    """Bytes on top of what the child holds before the first image; an image that needs more fails with DECODER_CRASH."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf or self.memory_bytes <= 0:
            raise ValueError(f"{self}, required: seconds and bytes over 0")


class CarefulDecoder(Generic[T]):
    """`prepare(data)` called in a killable child process, with the same result or the same BadImage.

    `prepare` is pickled once. Beyond what it raises itself, BadImage is raised with DECODE_TIMEOUT (the child was killed) or
    DECODER_CRASH (it died, or ran out of memory); the next image gets a new child. UnfitError: the child did not start.
    """

    def __init__(self, prepare: Callable[[bytes], T], limits: CarefulLimits) -> None:
        self._prepare = pickle.dumps((prepare, limits))
        self._limits = limits
        self._child: _Child | None = None
        self._hangs = 0  # in a row

    def __call__(self, data: bytes | memoryview) -> T:
        if self._child is None or self._child.process.poll() is not None:  # died idle: not this image's fault
            self.close()
            self._child = _Child(self._prepare)
        allowed = self._allowed()
        try:
            self._child.pipe.send_bytes(data)
            if not self._child.pipe.poll(allowed):
                self.close()
                raise self._timed_out(allowed)
            done, value = self._child.pipe.recv()
        except (EOFError, ConnectionError):
            ended = self._child.ended()
            self.close()
            if ended == "SIGALRM":
                raise self._timed_out(allowed) from None
            raise BadImage(Failure.DECODER_CRASH, f"the decoder died of {ended}") from None
        self._hangs = 0
        if not done:
            raise BadImage(*value)
        return value  # type: ignore[no-any-return]

    def _allowed(self) -> float:
        """Seconds for the next image."""
        full = self._limits.timeout_s
        return full if self._hangs < _PATIENCE else min(full, max(_LEAST_S, full / 10))

    def _timed_out(self, allowed: float) -> BadImage:
        self._hangs += 1
        return BadImage(Failure.DECODE_TIMEOUT, f"not decoded within {allowed:g} s")

    def close(self) -> None:
        """End the child now; it also ends with this object, and with this process."""
        if self._child is not None:
            self._child.stop()
            self._child = None


class _Child:
    """One child process and the pipe to it."""

    def __init__(self, prepare: bytes) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _CHILD, str(theirs.fileno())]
            # One image at a time; a thread pool would only count against the memory limit.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            # A group of its own: Ctrl-C in a terminal is for the parent, who ends the child; that would print a traceback.
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, process_group=0
            )
        self.stop = weakref.finalize(self, _stop, self.process, self.pipe)
        try:
            self.pipe.send(sys.path)
            self.pipe.send_bytes(prepare)
            ready = self.pipe.poll(_START_TIMEOUT_S) and self.pipe.recv_bytes() == b"ready"
        except (EOFError, ConnectionError):
            ready = False
        if not ready:
            self.stop()
            raise UnfitError(
                "careful mode: the child process that decodes did not start",
                need="an interpreter that can import what this process imports",
                do="Look for its error above this message",
            )

    def ended(self) -> str:
        """How the child ended, in words."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "a closed pipe"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _stop(process: subprocess.Popen[bytes], pipe: Connection[Any, Any]) -> None:
    pipe.close()
    process.kill()
    process.wait()


def serve(pipe: Connection[Any, Any]) -> None:
    """The child's loop: an image in, a result or (failure, message) out, until the pipe closes because the parent is gone."""
    os.dup2(2, 1)  # what a decoder prints is not ours to print
    prepare, limits = pickle.loads(pipe.recv_bytes())
    soft = _address_space() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a poison image is expected to crash: no core file for it
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            data = pipe.recv_bytes()
            # The parent kills at timeout_s. The alarm ends a hanging child whose parent has died and cannot.
            signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + _ORPHAN_GRACE_S)
            try:
                answer = (True, prepare(data))
            except BadImage as bad:
                answer = (False, (bad.failure, bad.message))
            except MemoryError:
                answer = (False, (Failure.DECODER_CRASH, f"needs more than {limits.memory_bytes / 2**20:g} MiB of memory"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)


def _address_space() -> int:
    """Bytes this process has mapped (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
