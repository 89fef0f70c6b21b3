"""A pass under watch: left, it ends; hanging, it is noticed; what its blocks were lost to is one line."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import watch
from pipeline.errors import Stalled, Temporary
from pipeline.watch import in_a_line, watched


def same(error: BaseException) -> BaseException:
    return error


@pytest.mark.parametrize("taken", [1, 12])
def test_a_pass_that_is_left_ends_though_nobody_takes_its_blocks(taken):
    ended = threading.Event()

    def blocks():
        try:
            yield from range(10_000)
        finally:
            ended.set()

    items = watched(blocks, stall_s=60, explain=same)
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    assert ended.wait(30), "the pass still holds its CPUs"


def test_time_without_a_block_is_told_and_a_hang_is_noticed(monkeypatch):
    monkeypatch.setattr(watch, "_TICK_S", 0.01)
    monkeypatch.setattr(watch, "_END_S", 0.01)
    end = threading.Event()

    def blocks():
        yield 1
        end.wait()

    items = watched(blocks, stall_s=0.1, explain=same)
    assert next(items) == 1
    assert next(items) is None
    with pytest.raises(Stalled, match=r"no block arrived for 0\.1 s"):
        list(items)
    end.set()


def test_a_pass_that_hangs_is_ended_and_one_that_is_over_is_not(monkeypatch):
    monkeypatch.setattr(watch, "_TICK_S", 0.01)
    end, ended, left = threading.Event(), threading.Event(), []

    def blocks():
        yield 1
        end.wait()
        ended.set()

    def leave():
        left.append("hung")
        end.set()

    with pytest.raises(Stalled):
        list(watched(blocks, stall_s=0.1, explain=same, leave=leave))
    assert ended.is_set(), "its thread is in Ray's core, which is about to be shut down"
    assert list(watched(blocks, stall_s=60, explain=same, leave=leave)) == [1]
    assert left == ["hung"]


def test_time_that_the_driver_takes_is_no_hang():
    def blocks():
        yield from range(3)

    items = watched(blocks, stall_s=0.3, explain=same)
    for number in range(3):
        assert next(items) == number
        time.sleep(0.4)
    assert list(items) == []


def test_what_a_pass_dies_of_is_raised_in_the_driver():
    def blocks():
        yield 1
        raise RuntimeError("out of memory")

    items = watched(blocks, stall_s=60, explain=lambda error: Temporary(f"died: {error}"))
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
