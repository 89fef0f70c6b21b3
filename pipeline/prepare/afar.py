"""Where the state of a training lies: in a folder of this machine and, when the model goes to S3, copies of it there too, so that
a pod that is made anew elsewhere goes on. They are made after the first epoch, and after one that ends when two minutes have gone
by since the last ones were made.

They are no result: each replaces the one before, and all are removed when the model is saved. Nothing else of ours in a store is
replaced or removed, so what does it is here and not in `Store`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import NightlabelError, PermissionDenied, Unidentified
from pipeline.prepare.checkpoint import BEST, LAST, content_of, parsed, read
from pipeline.prepare.checkpoint import replace as write
from pipeline.prepare.outcome import Say
from pipeline.s3 import S3Store, bucket_and_key
from pipeline.spec import S3
from pipeline.storage import Object, below, join, read_if_there

EVERY_S = 120.0  # 134 MB of a ResNet-18 with its optimiser at 100 MB/s are a hundredth of it


class Scratch(S3Store):
    """A store that replaces and removes too. Raises what `Store` raises."""

    def write(self, uri: str, data: bytes) -> None:
        """An object as it is from now on, whole."""
        self._put(uri, data, {})

    def remove(self, uri: str) -> None:
        """No object, whether there was one or not."""
        bucket, key = bucket_and_key(uri)

        async def attempt(client: Any) -> None:
            await client.delete_object(Bucket=bucket, Key=key, **self._payer)

        self._retry(attempt, uri, writing=True)


@dataclass(frozen=True)
class Checkpoints:
    """Of one training, `last.ckpt` and `best.ckpt`: in `folder`, and at the URI `afar` on S3 unless that is empty."""

    folder: Path
    afar: str = ""
    s3: S3 = field(default_factory=S3)

    def __truediv__(self, name: str) -> Checkpoints:
        return replace(self, folder=self.folder / name, afar=self.afar and join(self.afar, name))

    def stand(self) -> bool:
        """Whether any are there. Raises what `Store` raises."""
        here = any(self.folder.rglob(LAST))
        return here or any(item.uri.endswith(f"/{LAST}") for item in self._copies())

    def fetch(self, say: Say) -> None:
        """The copies into the folder, where they are of a later epoch than what is there, if anything is. What may not be read is
        told, for then none were made either. Raises what `Store` and `checkpoint` raise."""
        if not self.afar:
            return
        store = Scratch(self.s3)
        try:  # the last epoch first: a best one that another run of this job makes meanwhile is a later one
            last, best = (read_if_there(store, join(self.afar, name)) for name in (LAST, BEST))
        except Unidentified:
            raise
        except PermissionDenied as error:
            say(f"no copies of the checkpoints: {error}")
            return
        if last is None or best is None or _epoch(parsed(last, join(self.afar, LAST))) <= self._here():
            return
        say(f"going on from the checkpoints in {self.afar}")
        write(self.folder / BEST, best)
        write(self.folder / LAST, last)

    def _here(self) -> int:
        """The epoch of what is in the folder; -1 where nothing of use is."""
        there = all((self.folder / name).exists() for name in (LAST, BEST))
        return _epoch(read(self.folder / LAST)) if there else -1

    def copying(self, say: Say) -> Callable[[str], None]:
        """To be called with the name of each checkpoint that is newly in the folder."""
        return _Copying(self, say).kept if self.afar else lambda _: None

    def remove(self) -> None:
        """The folder, and the one above it when no other job's is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def remove_copies(self) -> tuple[str, ...]:
        """All of them; a line about what could not be."""
        try:
            for item in self._copies():
                Scratch(self.s3).remove(item.uri)
        except NightlabelError as error:
            return (f"copies of the checkpoints, if there are any, are left: {error}",)
        return ()

    def _copies(self) -> list[Object]:
        return below(S3Store(self.s3), self.afar) if self.afar else []


class _Copying:
    """Copies the last epoch's state, and before it the best one's when that is new. What cannot be copied is told, and tried
    again when the next is due: the training itself does not need it."""

    def __init__(self, checkpoints: Checkpoints, say: Say) -> None:
        self._from, self._say, self._store = checkpoints, say, Scratch(checkpoints.s3)
        self._new = {BEST}  # of an earlier start, too, which may have ended before it was copied
        self._at = -math.inf

    def kept(self, name: str) -> None:
        self._new.add(name)
        if name != LAST or time.monotonic() < self._at + EVERY_S:
            return
        try:
            for each in (BEST, LAST):
                if each in self._new:
                    self._store.write(join(self._from.afar, each), content_of(self._from.folder / each))
                    self._new.remove(each)
        except NightlabelError as error:
            self._say(f"the checkpoints are not copied: {error}")
        self._at = time.monotonic()


def _epoch(state: dict[str, Any]) -> int:
    return int(state["epoch"])
