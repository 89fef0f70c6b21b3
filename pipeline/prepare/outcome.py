"""What a preparation job hands back: lines for a screen, facts for machines, and an exit code; and what it finds of before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifact import Artifact, load_artifact
from pipeline.errors import ExitCode, ModelError
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


def made_before(output: Folder, *, weights: bool = False) -> Artifact:
    """The artifact in the folder that the result is to go to. Raises ModelError, which says so, for one that is broken."""
    try:
        return load_artifact(output.uri, output.s3, weights=weights)
    except ModelError as error:
        do = "Give another output.uri, or remove what is there"
        raise ModelError(f"output.uri {error.got}", need=error.need, do=do) from error
