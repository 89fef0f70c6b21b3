"""A pass under watch: it can be left at any moment, a hang in it is seen, and what its blocks were lost to is heard."""

from __future__ import annotations

import logging
import queue
import re
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Generic, TypeVar

from pipeline.errors import Stalled

T = TypeVar("T")

_TICK_S = 1.0
_END_S = 5.0
#: What Python and Ray Data add to an exception's text.
_COMMENT = re.compile(r"\n+(?=The above exception was|Failed to apply UDF)")
_QUEUED = 8  # blocks that wait for the driver; beyond that Ray's own back pressure holds the pass


def watched(
    start: Callable[[], Generator[T, None, None]],
    *,
    stall_s: float,
    explain: Callable[[BaseException], BaseException],
    leave: Callable[[], object] = lambda: None,
) -> Generator[T | None, None, None]:
    """Runs the generator that `start` returns in a thread, and yields its items, and None for every second without one. What it
    raises is raised here, as `explain` puts it.

    Closing this generator calls `leave`, which should make the other one end, and waits a few seconds for its thread; a thread
    that hangs all the same is left behind, and ends by itself once it has its next item.
    Raises Stalled when nothing arrives for `stall_s` seconds.
    """
    feed = _Feed(start)
    thread = threading.Thread(target=feed.run, daemon=True)
    thread.start()
    over = False
    try:
        since = time.monotonic()
        while time.monotonic() - since < stall_s:
            try:
                item = feed.arrived.get(timeout=min(_TICK_S, stall_s))
            except queue.Empty:
                yield None
                continue
            over = item is feed or isinstance(item, BaseException)
            if item is feed:
                return
            if isinstance(item, BaseException):
                raise explain(item) from item
            yield item
            since = time.monotonic()
        raise Stalled(f"no block arrived for {stall_s:g} s", do="Run again; what is committed stays")
    finally:
        feed.left.set()
        if not over:
            leave()
        thread.join(_END_S)  # so that a pass that was left has given its CPUs back before the next one


class _Feed(Generic[T]):
    """The thread's side: `arrived` gets the items, then the exception or, at a good end, the feed itself, until `left` is set."""

    def __init__(self, start: Callable[[], Generator[T, None, None]]) -> None:
        self._start = start
        self.arrived: queue.Queue[Any] = queue.Queue(_QUEUED)
        self.left = threading.Event()

    def run(self) -> None:
        try:
            with closing(self._start()) as items:
                for item in items:
                    self._put(item)
                    if self.left.is_set():
                        return
            self._put(self)
        except BaseException as error:  # noqa: BLE001  # raised again by `watched`, in the thread that can do something about it
            self._put(error)

    def _put(self, item: object) -> None:
        while not self.left.is_set():
            try:
                self.arrived.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


@contextmanager
def losses(lost: list[str]) -> Iterator[None]:
    """While this is entered, what blocks are lost to is added to `lost`, a line each. Ray Data tells it to its log alone."""
    logger = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
    before = logger.level, logger.propagate
    handler = _Losses(lost)
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Losses(logging.Handler):
    def __init__(self, lost: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.lost = lost

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.lost.append(in_a_line(record.exc_info[1]))


def in_a_line(error: BaseException) -> str:
    """What an exception says, without the tracebacks that Ray puts into the text of one from a worker; of a chain the cause."""
    lines = _COMMENT.split(str(error), maxsplit=1)[0].strip().splitlines()
    traceback = max((number for number, line in enumerate(lines) if line.startswith((" ", "\x1b["))), default=-1)
    said = " ".join(lines[traceback + 1 :])
    return textwrap.shorten(said if traceback >= 0 else f"{type(error).__name__}: {said}", 300)
