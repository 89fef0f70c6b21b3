"""What commands share: arguments, options, and how they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file in YAML; jobs/README.md lists its fields.")]
Date = Annotated[str | None, typer.Option(help="Fills {date} in the job's URIs: YYYY-MM-DD, today or yesterday.")]
Dates = Annotated[
    str | None, typer.Option(help="Fills {date} in the job's URIs: YYYY-MM-DD, today, yesterday, or A..B: every day from A to B.")
]
IfRunning = Annotated[
    Literal["skip", "queue", "replace", "share"] | None,
    typer.Option(
        help="When another run of the job is at it: overrules schedule.if_running; share takes no lease and works beside it."
    ),
]
Again = Annotated[
    bool,
    typer.Option(
        "--again",
        help="For what tries again by itself: where an earlier attempt has done it all, end as that one did, with 4 too.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(value: dict[str, Any]) -> None:
    """A result, for machines."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    """A line about what is happening, beside the result."""
    typer.echo(text, err=True)
