"""A decoder that does on command what a poison image does to a real one; give it to `Preprocess` as `decode`.

No file of the corpora kills Pillow 13 or libjpeg-turbo 3, so the tests bring their own poison. The first line of the data is the
command (abort, hang, hog, exit, pid, slow); a second line, when there is one, is a file to create first, which tells a test that
it began, or at the end of what is slow.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np

from pipeline import decode as real


def decode(data, *, max_pixels: int) -> np.ndarray:
    command, _, rest = bytes(data[:4096]).partition(b"\n")
    if command in (b"abort", b"hang", b"hog", b"exit") and rest:
        Path(os.fsdecode(rest.strip())).touch()
    if command == b"slow":
        time.sleep(0.3)
        Path(os.fsdecode(rest.strip())).touch()
    if command == b"abort":
        os.abort()
    if command == b"exit":
        os._exit(3)
    if command == b"hang":
        threading.Event().wait()
    if command == b"hog":  # 4 GiB at most, so that a limit that does not hold fails a test and not the machine
        hoard = [np.ones(2**24, dtype=np.uint8) for _ in range(256)]
        return hoard[0][:3].reshape(1, 1, 3)
    if command == b"pid":
        return np.array(os.getpid())
    return real.decode(data, max_pixels=max_pixels)


def see(block, *, max_pixels: int):
    """Stands in for `look.see` with this module's decoder."""
    from pipeline.prepare import look

    look.decode = decode  # in a child of its own, which ends with it
    return look.see(block, max_pixels=max_pixels)


def make_preprocess(job, preprocessing, careful, share):
    """Stands in for `stages.make_preprocess` with this module's decoder."""
    from pipeline.careful import CarefulLimits
    from pipeline.lanes import Lanes
    from pipeline.preprocess import Preprocess  # not above: it would bring torch, seconds, into each child of test_careful

    limits = CarefulLimits(job.limits.decode_timeout, job.limits.decode_memory) if careful else None
    preprocess = Preprocess(preprocessing, max_pixels=job.limits.max_pixels, careful=limits, decode=decode)
    return preprocess if share is None else Lanes(preprocess, preprocessing, job.limits.max_pixels, share)


def make_predict_elsewhere(job, digest, share):
    """Stands in for `stages.make_predict` on a worker whose CPU has none of the instructions that a model may be made for."""
    from pipeline import stages
    from pipeline.engines import cpu

    cpu.lacks = lambda *_: True  # a CPU of that kind cannot be had for a test
    return stages.make_predict(job, digest, share)


def make_predict(job, digest, share):
    """Stands in for `stages.make_predict`: raises for the image whose key is `cursed`."""
    from pipeline import stages

    stage = stages.make_predict(job, digest, share)

    def predict(table):
        if "cursed" in table.column("key").to_pylist():
            raise ValueError("cursed\nindeed")
        return stage(table)

    return predict
