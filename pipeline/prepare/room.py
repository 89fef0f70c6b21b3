"""Whether the images of a training fit into memory or on the disk: said after the first shards, not in the last one.

A listing knows how large shards are, and not how much of them is images, so what is to come is judged by what has come.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from pipeline.cut import list_inputs
from pipeline.errors import JobError
from pipeline.prepare.outcome import Say
from pipeline.spec import Input
from pipeline.storage import open_input

EVERY_S = 10.0
ENOUGH = 256 * 2**20  # bytes of shards read to their end that the rest is judged by
_SHARE = 0.9  # of what is free: the training wants some too
_EASILY = 0.5  # of the memory that is free
_UNLIMITED = 2**60


class Room:
    """Images of `wanted` on their way to one of `beside` workers on this machine: into memory where they fit with ease, or where
    the disk of `folder` has less room, and there is none without a `folder`; else there."""

    def __init__(self, wanted: Input, *, folder: Path | None, beside: int, say: Say) -> None:
        self._sizes = {item.uri: item.size for item in list_inputs(open_input(wanted), wanted).inputs}
        self._where, self._say, self._beside = ", ".join(wanted.uris), say, beside
        self._total, self._loose = sum(self._sizes.values()), wanted.format == "images"
        memory, disk = free_memory(), 0 if folder is None else free_disk(folder)
        self.in_memory = memory is None or self._total * beside <= _EASILY * memory or disk <= memory
        self._free, self._of = (memory, "memory") if self.in_memory else (disk, f"the disk of {folder}")
        self._images = self._held = self._finished = self._held_of_finished = 0
        self._source, self._told = "", time.monotonic()

    def add(self, source: str, *, images: int, held: int) -> None:
        """So many more, of `held` bytes, from the shard `source`; says how far it is now and then. Raises JobError as soon as it
        is clear that they will not all fit: of loose images at once."""
        if source != self._source:
            self._finished += self._sizes.get(self._source, 0)
            self._held_of_finished, self._source = self._held, source
        self._images += images
        self._held += held
        if self._loose:  # many are in a block, and each takes what it is
            grown, self._finished = float(self._total), self._held
        else:
            grown = self._held_of_finished / self._finished * self._total if self._finished >= ENOUGH else 0
        self._check(max(grown, self._held))
        if time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            self._say(f"{self._images:,} images read, {self._finished / max(1, self._total):.0%} of {self._total / 1e9:,.1f} GB")

    def _check(self, size: float) -> None:
        if self._free is None or size * self._beside <= _SHARE * self._free:
            return
        each = f" for each of {self._beside} workers on this machine" if self._beside > 1 else ""
        raise JobError(
            f"{self._where}: the images take {_giga(size)}{each}, and {_giga(self._free)} of {self._of} are free",
            need="room for all of them, in memory or where the checkpoints are",
            do="Name fewer shards, pack smaller images, or take a larger disk",
        )


def fits(size: int, *, beside: int) -> bool:
    """Whether each of `beside` workers on this machine may hold `size` bytes in memory."""
    free = free_memory()
    return free is None or size * beside <= _EASILY * free


def free_disk(folder: Path) -> int:
    """Bytes that may be written there, whether or not it is there yet."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


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
