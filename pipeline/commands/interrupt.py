"""Ctrl-C and SIGTERM: one sentence and an exit code; a second one ends the process at once.

Python raises what a handler raises wherever the main thread is. Within an import, or within logging, that can leave a lock taken
for good, and Ray, which imports and logs in threads, waits for it for ever. Where a process has just been forked it is lost, for
nobody is there to catch it. So in such places the handler asks again a little later.
"""

from __future__ import annotations

import logging
import signal
from functools import partial
from types import FrameType

from pipeline.errors import Interrupted

_AGAIN_S = 0.05
_PATIENCE = 400  # times: 20 s of one import on end


def end_by_signals() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread, once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler. Raises Interrupted, or has itself asked again."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once; even that loses nothing
    _end(number, _PATIENCE, signal.SIGALRM, frame)


def _end(number: int, patience: int, _: int, frame: FrameType | None) -> None:
    if patience and is_fragile(frame):
        signal.signal(signal.SIGALRM, partial(_end, number, patience - 1))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        return
    do = "What is committed stays; the same command goes on from there"
    raise Interrupted(f"stopped by {signal.Signals(number).name}", signal_number=number, do=do)


def is_fragile(frame: FrameType | None) -> bool:
    """Is this within an import, within logging, or within subprocess where it forks?"""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_filename == logging.__file__:
            return True
        if code.co_name == "_execute_child":
            return True
        frame = frame.f_back
    return False
