"""Prometheus's own programs, from Debian, on loopback: whoever wants one that is absent is skipped."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from raylets import NOT_YET, free_port

T = TypeVar("T")


@contextmanager
def serving(program: str, *options: str) -> Iterator[str]:
    """Its address, host:port, while it runs; it answers soon after."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is absent; Debian has it")
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--web.listen-address={address}", "--log.level=error", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield address
        finally:
            process.kill()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def wait_for(what: Callable[[], T], *, seconds: float = 120.0) -> T:
    """What it returns once that is true, and no error of a server that is half up; the last answer or error when time is up."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if (found := what()) or time.monotonic() > deadline:
                return found
        except NOT_YET:
            if time.monotonic() > deadline:
                raise
        threading.Event().wait(0.05)
