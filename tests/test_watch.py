"""A pass under watch: left, it ends; hanging, it is noticed; what its blocks were lost to is one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

import pytest

from pipeline import watch
from pipeline.errors import Stalled, Temporary
from pipeline.watch import in_a_line, watched

T = TypeVar("T")


def same(error: BaseException) -> BaseException:
    return error


def come(items: Iterator[T | None]) -> Iterator[T]:
    """The items, without what is told of the seconds between them: a busy machine takes its time."""
    return (item for item in items if item is not None)


class Clock:
    """Stands in for the module `time`; it stands still."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(watch, "time", clock := Clock())
    return clock


@pytest.mark.parametrize("taken", [1, 12])
def test_a_pass_that_is_left_ends_though_nobody_takes_its_blocks(taken):
    ended = threading.Event()

    def blocks():
        try:
            yield from range(10_000)
        finally:
            ended.set()

    items = watched(blocks, stall_s=60, explain=same)
    assert list(islice(come(items), taken)) == list(range(taken))
    items.close()
    assert ended.wait(30), "the pass still holds its CPUs"


def test_time_without_a_block_is_told_and_a_hang_is_noticed(monkeypatch, clock):
    monkeypatch.setattr(watch, "_TICK_S", 0.01)
    monkeypatch.setattr(watch, "_END_S", 0.01)
    end = threading.Event()

    def blocks():
        yield 1
        end.wait()

    items = watched(blocks, stall_s=60, explain=same)
    assert next(come(items)) == 1
    assert next(items) is None
    clock.now += 59
    assert next(items) is None
    clock.now += 1
    with pytest.raises(Stalled, match="no block arrived for 60 s"):
        next(items)
    end.set()


def test_a_pass_that_hangs_is_ended_and_one_that_is_over_is_not(monkeypatch, clock):
    monkeypatch.setattr(watch, "_TICK_S", 0.01)
    end, ended, left = threading.Event(), threading.Event(), []

    def blocks():
        yield 1
        end.wait()
        ended.set()

    def leave():
        left.append("hung")
        end.set()

    monkeypatch.setattr(watch, "_END_S", 60.0)
    items = watched(blocks, stall_s=60, explain=same, leave=leave)
    assert next(come(items)) == 1
    assert next(items) is None, "from here on it counts"
    clock.now += 60
    with pytest.raises(Stalled):
        next(items)
    assert ended.is_set(), "its thread is in Ray's core, which is about to be shut down"
    assert list(come(watched(blocks, stall_s=60, explain=same, leave=leave))) == [1]
    assert left == ["hung"]


def test_time_that_the_driver_takes_is_no_hang(clock):
    def blocks():
        yield from range(3)

    items = come(watched(blocks, stall_s=60, explain=same))
    for number in range(3):
        assert next(items) == number
        clock.now += 61
    assert list(items) == []


def test_what_a_pass_dies_of_is_raised_in_the_driver():
    def blocks():
        yield 1
        raise RuntimeError("out of memory")

    items = come(watched(blocks, stall_s=60, explain=lambda error: Temporary(f"died: {error}")))
    assert next(items) == 1
    with pytest.raises(Temporary, match="died: out of memory"):
        next(items)


THROUGH_RAY = """\x1b[36mray::MapWorker(MapBatches(P)).submit()\x1b[39m (pid=670, ip=192.0.2.2)
  File "x.py", line 27, in __call__
    if i==0: raise ValueError("one\\nbad thing")
             ^^^^^
ValueError: one
bad thing

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(MapBatches(P)).submit()\x1b[39m (pid=670, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block."""


def test_an_exception_is_a_line():
    assert in_a_line(RuntimeError(THROUGH_RAY)) == "ValueError: one bad thing"
    assert (
        in_a_line(RuntimeError("\x1b[36mray::f()\n  File x\nKeyError: 'a'\nFailed to apply UDF transform after 1/1 attempts"))
        == "KeyError: 'a'"
    )
    assert in_a_line(OSError("the worker\ndied")) == "OSError: the worker died"
    assert len(in_a_line(OSError("x " * 1000))) <= 300
