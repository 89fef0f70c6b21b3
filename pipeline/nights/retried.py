"""The account of a retry, as manifest, JSON, lines for a screen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import ExitCode
from pipeline.footer import Footer, totals
from pipeline.report import MANIFEST_VERSION, UnitTrouble, counted, failed_lines, left_lines
from pipeline.start import CODE_VERSION


@dataclass(frozen=True)
class Retried:
    """The account of a retry: of `retried` images `mended` are labelled now. `generation` None: there was nothing to retry, and
    `failures` are those of other classes."""

    job: str
    where: str
    classes: tuple[str, ...]
    started: str
    """In UTC as ISO 8601 has it, as `ended` is; both are of this attempt."""
    ended: str
    generation: int | None = None
    units: int = 0
    units_done: int = 0
    retried: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)
    """How many of the retried images had failed, by class."""
    mended: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    trouble: tuple[UnitTrouble, ...] = ()
    exit_code: int = ExitCode.DONE

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def manifest(self, footers: Iterable[Footer]) -> bytes:
        """The last object of a generation. `footers` of all its units."""
        fields = {name: value for name, value in self.as_dict().items() if name not in ("trouble", "exit_code")}
        return json.dumps(
            {"version": MANIFEST_VERSION, "code": CODE_VERSION, **fields, "rows": totals(footers).rows}, indent=1
        ).encode()

    def lines(self) -> list[str]:
        """For a screen."""
        left = left_lines(self.trouble)
        if self.generation is None:
            what = f"no image of {self.job} failed with {', '.join(self.classes)}, of inputs that are still there"
            return [f"nothing to retry: {what}", *failed_lines(self.failures), *left]
        state = "done" if self.units == self.units_done else "not finished"
        taken = counted({name: self.taken.get(name, 0) for name in self.classes})
        done = f"{state}: {self.retried:,} images retried ({taken}), {self.mended:,} labelled now"
        failed = failed_lines(self.failures)
        if self.exit_code == ExitCode.TOO_MANY_FAILED:
            failed.append(f"over    more of all images failed than limits.max_failed allows: exit code {self.exit_code:d}")
        units = f"units   {self.units_done} of {self.units}, generation {self.generation}"
        return [done, *failed, *left, f"where   {self.where}", units]
