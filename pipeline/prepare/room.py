"""Whether images that are to be held fit into memory: said after the first shards, not by the kernel in the last one.

A listing knows how large shards are, and not how much of them is images, so what is to come is judged by what has come.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.cut import list_inputs
from pipeline.errors import JobError
from pipeline.prepare.outcome import Say
from pipeline.spec import Input
from pipeline.storage import open_store

EVERY_S = 10.0
ENOUGH = 256 * 2**20  # bytes of shards read to their end that the rest is judged by
_SHARE = 0.9  # of what is free: the training wants some too
_UNLIMITED = 2**60


class Room:
    """Images of `wanted` that one of `beside` workers on this machine is to hold, on their way in."""

    def __init__(self, wanted: Input, *, say: Say, beside: int) -> None:
        inputs = list_inputs(open_store(wanted.uris[0], wanted.s3), wanted).inputs
        self._sizes = {item.uri: item.size for item in inputs}
        self._where, self._say, self._beside, self._free = ", ".join(wanted.uris), say, beside, free_memory()
        self._total = sum(self._sizes.values())
        self._images = self._held = self._finished = self._held_of_finished = 0
        self._source, self._told = "", time.monotonic()

    def add(self, source: str, *, images: int, held: int) -> None:
        """So many more, of `held` bytes, from the shard `source`; says how far it is now and then. Raises JobError as soon as it
        is clear that they will not all fit."""
        if source != self._source:
            self._finished += self._sizes.get(self._source, 0)
            self._held_of_finished, self._source = self._held, source
        self._images += images
        self._held += held
        grown = self._held_of_finished / self._finished * self._total if self._finished >= ENOUGH else 0
        check_room(f"{self._where}: the images", max(grown, self._held), free=self._free, beside=self._beside)
        if time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            self._say(f"{self._images:,} images read, {self._finished / max(1, self._total):.0%} of {self._total / 1e9:,.1f} GB")


def check_room(what: str, size: float, *, free: int | None, beside: int) -> None:
    """Raises JobError where each of `beside` workers on a machine is to hold `size` bytes, and `free` are not enough."""
    if free is None or size * beside <= _SHARE * free:
        return
    each = f" for each of {beside} workers on this machine" if beside > 1 else ""
    raise JobError(
        f"{what} take {_giga(size)}{each}, and {_giga(free)} of memory are free",
        need="room for all of them, since a training holds its images in memory",
        do="Name fewer shards, pack smaller images, or take a machine with more memory",
    )


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine, or what limits this container, still gives; None where nothing says so."""
    found = [*_of_machine(root / "proc/meminfo"), *_of_container(root / "sys/fs/cgroup")]
    return min(found, default=None)


def _of_machine(path: Path) -> list[int]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _of_container(root: Path) -> list[int]:
    """cgroup v2, or v1. Files that were read lie in what is used, and are given up when it gets tight."""
    for limit, used, cached in (
        (root / "memory.max", root / "memory.current", "inactive_file"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        text = limit.read_text().strip() if limit.exists() else "max"
        if text != "max" and int(text) < _UNLIMITED:
            stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            return [max(0, int(text) - int(used.read_text()) + int(stat.get(cached, 0)))]
    return []


def _giga(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
