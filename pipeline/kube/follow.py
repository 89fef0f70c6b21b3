"""How a run on Kubernetes stands, read from its RayJob's status, and the exit code that it comes to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ExitCode

_EXIT = re.compile(r"failed with exit code (-?\d+)")  # Ray's words, in which KubeRay hands on how the driver ended
_ENDED = ("Complete", "Failed", "ValidationFailed")
#: KubeRay's reasons for an end without one. No nodes in time, or a cluster lost: the same command may fare better.
_REASONS = {"DeadlineExceeded": ExitCode.UNITS_LEFT, "ValidationFailed": ExitCode.UNFIT}


@dataclass(frozen=True)
class Progress:
    """KubeRay's words: `state` is jobDeploymentStatus, `job` jobStatus. `failed` counts the attempts that did."""

    state: str
    job: str = ""
    reason: str = ""
    message: str = ""
    cluster: str = ""
    failed: int = 0

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def exit_code(self) -> int:
        """As `nightlabel run` would have ended; TEMPORARY when it did not get so far, TERMINATED when somebody stopped it."""
        if self.state == "Complete":
            return ExitCode.TERMINATED if self.job == "STOPPED" else ExitCode.DONE
        told = _EXIT.search(self.message)
        if told:
            return int(told[1]) if int(told[1]) >= 0 else 128 - int(told[1])  # a signal's number, below zero
        return _REASONS.get(self.reason or self.state, ExitCode.TEMPORARY)

    def line(self) -> str:
        """What a person wants to know of it."""
        attempt = f", attempt {self.failed + 1}" if self.failed and not self.ended else ""
        where = f", cluster {self.cluster}" if self.cluster and not self.ended else ""
        why = f": {self.reason}" if self.reason else ""
        told = f": {self.message.splitlines()[0].partition(', last available logs')[0]}" if self.message and self.ended else ""
        return f"{self.state.lower() or 'created'}{attempt}{where}{why}{told}"


def is_object(found: Any) -> bool:
    """Does it look like an object of Kubernetes? What stands before an API server tells other things."""
    parts = [found.get("metadata"), found.get("status") or {}] if isinstance(found, dict) else [None]
    return all(isinstance(part, dict) for part in parts)


def progress_of(ray_job: dict[str, Any]) -> Progress:
    status = ray_job.get("status") or {}
    return Progress(
        state=status.get("jobDeploymentStatus", ""),
        job=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        cluster=status.get("rayClusterName", ""),
        failed=status.get("failed", 0),
    )
