"""Careful mode with real child processes: a poison image costs one row, and no child outlives its parent."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import poison
import pytest
from PIL import Image

from pipeline.careful import CarefulDecoder, CarefulLimits
from pipeline.decode import BadImage
from pipeline.errors import UnfitError

LIMITS = CarefulLimits(timeout_s=20, memory_bytes=2**28)
DECODE = functools.partial(poison.decode, max_pixels=10**6)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), (200, 100, 50)).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def ends(pid: int):
    """The process ends by the end of the block, or within a minute of it; a zombie that nobody reaps counts as ended."""
    watch = os.pidfd_open(pid)
    yield
    assert select.select([watch], [], [], 60)[0], f"process {pid} lives"
    os.close(watch)


@pytest.fixture
def careful():
    decoder = CarefulDecoder(DECODE, LIMITS)
    yield decoder
    decoder.close()


def test_same_result_and_same_failure_as_in_process(careful):
    np.testing.assert_array_equal(careful(picture()), DECODE(picture()))
    for bad in (b"", b"no image", picture()[:45], b"<svg>"):
        with pytest.raises(BadImage) as direct:
            DECODE(bad)
        with pytest.raises(BadImage) as child:
            careful(bad)
        assert (child.value.failure, child.value.message) == (direct.value.failure, direct.value.message)


def test_one_child_for_all_images(careful):
    assert careful(b"pid") == careful(b"pid") != os.getpid()


def test_poison_costs_one_image(careful):
    poisons = [
        (b"abort", "DECODER_CRASH", "SIGABRT"),
        (b"exit", "DECODER_CRASH", "exit code 3"),
        (b"hog", "DECODER_CRASH", "memory"),
    ]
    for command, failure, says in poisons:
        with pytest.raises(BadImage, match=says) as error:
            careful(command)
        assert error.value.failure == failure
        assert careful(picture()).shape == (5, 7, 3)


def test_a_hang_is_killed():
    decoder = CarefulDecoder(DECODE, LIMITS)
    with ends(int(decoder(b"pid"))):
        decoder._limits = replace(LIMITS, timeout_s=0.5)  # not before: a busy child takes its time to say who it is
        with pytest.raises(BadImage, match="not decoded within") as error:
            decoder(b"hang")
        assert error.value.failure == "DECODE_TIMEOUT"


def test_after_many_hangs_in_a_row_patience_is_short_until_an_image_is_decoded(monkeypatch):
    monkeypatch.setattr("pipeline.careful._PATIENCE", 2)
    monkeypatch.setattr("pipeline.careful._LEAST_S", 0.02)
    decoder = CarefulDecoder(DECODE, CarefulLimits(timeout_s=0.6, memory_bytes=2**28))
    waited, poll, command = [], Connection.poll, b""
    # The one that does not hang is given what a busy machine takes.
    monkeypatch.setattr(Connection, "poll", lambda pipe, allowed: poll(pipe, allowed if command == b"hang" else 120.0))
    for command in (b"hang", b"hang", b"hang", b"no image", b"hang"):
        with pytest.raises(BadImage) as error:
            decoder(command)
        waited.append(error.value.message.rpartition("within ")[2])
    assert waited[:3] == ["0.6 s", "0.6 s", "0.06 s"]
    assert waited[4] == "0.6 s"


def test_a_child_that_dies_between_images_is_replaced(careful):
    pid = int(careful(b"pid"))
    with ends(pid):
        os.kill(pid, signal.SIGKILL)
    assert careful(picture()).shape == (5, 7, 3)


def test_close_and_collection_end_the_child():
    decoder = CarefulDecoder(DECODE, LIMITS)
    with ends(int(decoder(b"pid"))):
        decoder.close()
    with ends(int(decoder(b"pid"))):
        del decoder


@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_no_orphans(state, tmp_path):
    began = tmp_path / "began"
    code = f"""
import functools, poison
from pipeline.careful import CarefulDecoder, CarefulLimits
decoder = CarefulDecoder(functools.partial(poison.decode, max_pixels=1), CarefulLimits(timeout_s=5, memory_bytes=2**28))
print(decoder(b"pid"), flush=True)
{f"decoder(b'hang' + bytes([10]) + {bytes(began)!r})" if state == "hanging" else "input()"}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with parent, ends(int(parent.stdout.readline())):
        deadline = time.monotonic() + 60
        while state == "hanging" and not began.exists():
            assert time.monotonic() < deadline, "the hang has not begun"
            threading.Event().wait(0.02)
        parent.kill()


def test_ctrl_c_in_a_terminal_is_for_the_parent_alone():
    code = """
import functools, poison, signal
from pipeline.careful import CarefulDecoder, CarefulLimits
signal.signal(signal.SIGINT, lambda *_: None)
decoder = CarefulDecoder(functools.partial(poison.decode, max_pixels=1), CarefulLimits(timeout_s=60, memory_bytes=2**28))
print(decoder(b"pid"), flush=True)
input()
print(decoder(b"pid"))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True, **pipes) as parent:
        first = parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        assert parent.communicate(b"\n", timeout=60) == (first, b""), "the same child, and no traceback"


def test_a_child_that_cannot_start_is_our_users_error():
    module = type(poison)("only_here")
    exec("def decode(data): return data", module.__dict__)
    sys.modules["only_here"] = module  # the parent can pickle it by name, the child cannot import it
    try:
        with pytest.raises(UnfitError, match="did not start"):
            CarefulDecoder(module.decode, LIMITS)(b"x")
    finally:
        del sys.modules["only_here"]


@pytest.mark.parametrize(("timeout_s", "memory_bytes"), [(0, 1), (1, 0), (float("inf"), 1), (float("nan"), 1)])
def test_limits_are_checked(timeout_s, memory_bytes):
    with pytest.raises(ValueError, match="over 0"):
        CarefulLimits(timeout_s=timeout_s, memory_bytes=memory_bytes)
