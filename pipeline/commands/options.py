"""Arguments and options that commands share."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

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
