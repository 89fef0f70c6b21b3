"""What commands share: arguments, options, and how they print."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import one_line
from pipeline.job.schedule import Policy

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file in YAML; jobs/README.md lists its fields.")]
Date = Annotated[str | None, typer.Option(help="Fills {date} in the job's URIs: YYYY-MM-DD, today or yesterday.")]
Dates = Annotated[
    str | None, typer.Option(help="Fills {date} in the job's URIs: YYYY-MM-DD, today, yesterday, or A..B: every day from A to B.")
]
IfRunning = Annotated[
    Policy | None,
    typer.Option(
        help="What to do, in place of schedule.if_running, when another run of the job is going: skip ends with 0, queue waits "
        "for it, replace asks it to stop, share works beside it without a lease."
    ),
]
Again = Annotated[
    bool,
    typer.Option(
        "--again",
        help="For a caller that tries again on every exit code but 0: where an earlier attempt has labelled everything, end with "
        "that attempt's exit code, 0 or 4. Without it that is 0.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nightlabel {importlib.metadata.version('nightlabel')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class _Unheard(io.FileIO):
    """A descriptor to write to, whatever becomes of who reads there, or of the disk that a log lies on."""

    def write(self, data: Any) -> int:
        """As FileIO's, but once the pipe is broken, the terminal gone or the disk full, what is written here or by children goes
        nowhere."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and (error.errno, self.fileno()) != (errno.ENOSPC, 2):
                raise  # a result that has no room on its disk is missed, what was said meanwhile is not
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
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
