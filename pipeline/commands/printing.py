"""How commands print: whatever becomes of who reads, and nothing that a terminal would obey."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from typing import Any

import typer

from pipeline.errors import Temporary, one_line

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class _Unheard(io.FileIO):
    """A descriptor to write to, whatever becomes of who reads there, or of the disk that a log lies on."""

    def write(self, data: Any) -> int:
        """As FileIO's, but once the pipe is broken, the terminal gone or the disk full, what is written here or by children goes
        nowhere. Raises Temporary, once, where a result has no room on its disk: that is missed, what is said meanwhile is not."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, *_NO_ROOM):
                raise
            missed = error if error.errno in _NO_ROOM and self.fileno() == 1 else None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if missed is not None:
            got = f"the result cannot be written to where stdout leads: {missed.strerror}"
            raise Temporary(got, do="Make room there, then run again; what is committed stays") from missed
        return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on nothing fails because nobody reads what it prints: hours of labelling do not end with a `| head`, and the exit
    code says what was done."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed from the start: the next file or socket would be one of them
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Unheard(number, "w", closefd=False))
            manner = (old.encoding, old.errors, None, old.line_buffering) if old is not None else ("utf-8", "replace")
            setattr(sys, name, io.TextIOWrapper(raw, *manner))


def print_json(value: dict[str, Any]) -> None:
    """A result, for machines."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    typer.echo(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))  # what JSON allows and a terminal obeys


def put(text: str) -> None:
    """A line of a result, for people."""
    typer.echo(one_line(text))


def say(text: str) -> None:
    """A line about what is happening, beside the result."""
    typer.echo(one_line(text), err=True)
