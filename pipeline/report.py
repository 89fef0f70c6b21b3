"""Do the counts add up, where did the time go, what failed and why: one receipt, as manifest, JSON, lines for a screen, page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.cut import count_suffixes
from pipeline.errors import COMPLETE, ExitCode, gravest, kind_of
from pipeline.footer import Totals
from pipeline.job.quantity import exceeds
from pipeline.spec import Job

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class UnitTrouble:
    """Why a unit has no object: `error_class` is one of rows.UnitError, an error's class, or LOST (its blocks never arrived).
    With no unit, "": why an input of the job is in none."""

    unit: str
    inputs: tuple[str, ...]
    error_class: str
    error: str


@dataclass(frozen=True)
class Receipt:
    """The account of one attempt at a run. `rows_in = ok + failed` over `units_done` units; seconds are wall clock."""

    job: str
    where: str
    fingerprint: str
    artifact: str
    precision: str
    run: str | None
    units: int
    units_done: int
    units_before: int
    rows_in: int
    ok: int
    failed: int
    failures: Mapping[str, int]
    labels: Mapping[str, int]
    labelled_now: int
    written: int
    started: str
    """In UTC as ISO 8601 has it, `2026-11-26T02:00:05Z`, as `ended` is; both are of this attempt."""
    ended: str
    seconds: float
    first_seconds: float | None
    images_per_second: float | None
    seam_seconds: Mapping[str, float]
    passes: int
    decode: str = "exact"
    lane: str = "cpu"
    compared: int = 0
    same_label: int = 0
    kept_nothing: tuple[str, ...] = ()
    """Columns of `input.keep` that are null in all rows of this attempt."""
    empty: tuple[str, ...] = ()
    """Inputs of this attempt in which there was nothing to label: a tar without a member named like an image, no rows."""
    cautions: tuple[str, ...] = ()
    """What is to be known of the CPUs that labelled: the model's arithmetic is slow there, or not what it was."""
    imageless: Mapping[str, int] = field(default_factory=dict)
    """Samples of this attempt's tars that have no image, by the suffix of their first member."""
    trouble: tuple[UnitTrouble, ...] = ()
    exit_code: int = ExitCode.DONE
    events: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        fields = asdict(replace(self, events=()))  # which would be copied, one by one
        del fields["events"]
        return fields

    def manifest(self, job: Job, *, code: str) -> bytes:
        """The last object of a run. Raises AssertionError when the counts do not add up."""
        if self.units_done != self.units or self.rows_in != self.ok + self.failed or sum(self.failures.values()) != self.failed:
            raise AssertionError(f"the counts do not add up: {self}")
        content = {
            "version": MANIFEST_VERSION,
            "job": self.job,
            "run": self.run,
            "code": code,
            "fingerprint": self.fingerprint,
            "artifact": self.artifact,
            "precision": self.precision,
            "input": list(job.input.uris),
            "units": self.units,
            "rows": {"in": self.rows_in, "ok": self.ok, "failed": self.failed},
            "failures": dict(self.failures),
            "decode": {"mode": self.decode, "lane": self.lane, "compared": self.compared, "same_label": self.same_label},
            "cautions": list(self.cautions),
            "started": self.started,
            "ended": self.ended,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(content, indent=1).encode()

    def lines(self) -> list[str]:
        """The receipt for a screen."""
        adds_up = f"{self.rows_in:,} in = {self.ok:,} ok + {self.failed:,} failed"
        failed, left = failed_lines(self.failures), left_lines(self.trouble)
        failed += [f"over    {self.over}"] if self.over else []
        if self.run is None:
            every = "every other input" if left else "every input"
            return [f"nothing to do: {every} of {self.job} is labelled", *failed, *left, f"where   {self.where}"]
        state = "done" if self.exit_code in COMPLETE else "not finished"
        lines = [f"{state}: {adds_up}, {self.units_done} of {self.units} units", *failed]
        if self.decode == "fast" or self.lane != "cpu":
            lines.append(f"decode  {self.agreement}")
        if not self.rows_in and not self.trouble:
            lines.append(
                "empty   none of them holds an image; required: images of input.format. Check input.uri and input.format"
            )
        lines += [f"empty   {self.unlabelled}"] if self.empty else []
        lines += [f"caution {text}" for text in self.cautions]
        lines += [f"ignored {self.ignored}"] if self.imageless else []
        lines += [f"kept    nothing of {name}: no image had it" for name in self.kept_nothing]
        lines += [*left, f"where   {self.where}", f"run     {self.run}, {self.passes} {'pass' if self.passes == 1 else 'passes'}"]
        took = f"took    {self.seconds:.1f} s"
        if self.first_seconds is not None:
            took += f", first prediction after {self.first_seconds:.1f} s, {self.labelled_now:,} images now"
        if self.images_per_second is not None:
            took += f", {self.images_per_second:,.0f} img/s from the first block to the last"
        lines.append(took)
        if self.seam_seconds:
            lines.append(
                "seams   " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seam_seconds.items()) + " (summed)"
            )
        return lines

    @property
    def unlabelled(self) -> str:
        """In which inputs there was nothing to label, the first three by name; empty for none."""
        more = f" and {len(self.empty) - 3:,} more" if len(self.empty) > 3 else ""
        return f"nothing to label in {', '.join(self.empty[:3])}{more}" if self.empty else ""

    @property
    def ignored(self) -> str:
        """What of tars was passed over."""
        return f"{count_suffixes(self.imageless, 'sample')} without an image"

    @property
    def over(self) -> str:
        """Why a run that has done it all ends with 4; else empty."""
        if self.exit_code != ExitCode.TOO_MANY_FAILED:
            return ""
        return f"{self.failed / self.rows_in:.2%} failed, more than limits.max_failed allows: exit code {self.exit_code:d}"

    @property
    def when(self) -> str:
        """From when to when, for people."""
        return f"{self.started} to {self.ended}".replace("T", " ").replace("Z", " UTC")

    @property
    def agreement(self) -> str:
        """What fast decoding and the GPU's lane have done to the labels, over all units of the run."""
        ways = {"fast": self.decode == "fast", "by the GPU": self.lane != "cpu"}
        how = " and ".join(way for way, taken in ways.items() if taken)
        if not self.compared:
            why = "was large enough to come out otherwise" if self.lane == "cpu" else "was labelled both ways"
            return f"{how}: of the images looked at, one in 64, none {why}"
        share = f"{self.same_label / self.compared:.1%}"
        return f"{how}: {share} kept their label, of {self.compared:,} labelled both ways"

    def page(self) -> bytes:
        """report.html: one file, nothing loaded from elsewhere."""
        from jinja2 import Environment, PackageLoader

        template = Environment(autoescape=True, loader=PackageLoader("pipeline", ".")).get_template("report.html.j2")
        most = max(self.labels.values(), default=1)
        top = sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:25]
        return template.render(r=self, top=top, most=most, rate=self.images_per_second).encode()

    def event_lines(self) -> bytes:
        """events.jsonl"""
        return b"".join(json.dumps(event).encode() + b"\n" for event in self.events)


def failed_lines(failures: Mapping[str, int]) -> list[str]:
    """By class, how many images failed; no line when none did."""
    return [f"failed  {counted(failures)}"] if failures else []


def many(number: int, noun: str) -> str:
    """`1 unit`, `2,400 units`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def counted(failures: Mapping[str, int]) -> str:
    """`CORRUPT 3, TRUNCATED 2`."""
    return ", ".join(f"{name} {number:,}" for name, number in failures.items())


def left_lines(trouble: Sequence[UnitTrouble]) -> list[str]:
    """Why units are left: each sentence once, behind its unit, the first ten; how many more units there are."""
    units: dict[str, list[str]] = {}
    for item in trouble:
        units.setdefault(f"{item.error_class}: {item.error}", []).append(item.unit[:8])
    lines = [f"left    {_several(names)}{sentence}" for sentence, names in list(units.items())[:10]]
    rest = sum(map(len, list(units.values())[10:]))
    return [*lines, f"left    and {rest:,} more units"] if rest else lines


def _several(names: list[str]) -> str:
    """`1a2b3c4d  `, or with how many more; nothing for what is no unit."""
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{names[0]}{more}  " if names[0] else ""


def exit_code(trouble: tuple[UnitTrouble, ...], done: Totals, *, left: int, limit: float) -> int:
    """How a run has ended. With units left, or an input that is in none, the gravest trouble decides. With no unit left it is a
    failure that there was no image at all, or that more of them failed than `limit` allows."""
    if left or trouble:
        return gravest([ExitCode.UNITS_LEFT, *(kind_of(item.error_class).exit_code for item in trouble)])
    if done.units and not done.rows_in:
        return ExitCode.INPUT
    return ExitCode.TOO_MANY_FAILED if exceeds(done.failed, limit, of=done.rows_in) else ExitCode.DONE
