"""What a preparation job hands back: lines for a screen, facts for machines, and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ExitCode

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
