"""What a preparation job hands back: lines for a screen, facts for machines, and an exit code. And has what it makes a place?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ExitCode, PermissionDenied, StoreError
from pipeline.job.recipe import Folder

#: Takes one line about what is happening, such as an epoch.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a finetune, distill, quantize or evaluate job."""

    lines: tuple[str, ...]
    """The receipt, for a screen."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same for machines, as JSON holds it: `where`, `digest` of a new artifact, metrics."""
    exit_code: int = ExitCode.DONE


def check_place(output: Folder) -> None:
    """Before hours of work, not after them: raises StoreError where a file on disk is in the way of the folder, PermissionDenied
    where it cannot be written. What a bucket allows is seen when something is written there."""
    if output.uri.startswith("s3://"):
        return
    path = Path(output.uri.removeprefix("file://")).absolute()
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not there.is_dir():
        raise StoreError(f"output.uri {output.uri}: {there} is no folder", need="a folder, or none", do="Give another output.uri")
    if not os.access(there, os.W_OK | os.X_OK):
        got = f"output.uri {output.uri}: {there} cannot be written"
        raise PermissionDenied(got, need="the right to write there", do="Change the rights, or give another output.uri")
