"""What a run shows while it works, on stderr: one live line in images on a terminal, a plain line every 10 s elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.errors import Temporary, UnitsLeft, one_line
from pipeline.report import many

EVERY_S = 10.0
_SAID = {
    "ignored": "ignored: {text}, not of the input's format",
    "caution": "caution: {text}",
    "waiting": "waiting up to {seconds:.0f} s: {awaited}",
}


class Screen:
    """Observes a driver (`Driver(observe=screen.observe)`). Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        fancy = self._console.is_terminal
        self._live = Live("", console=self._console, refresh_per_second=4, transient=True) if fancy else None
        self._stop = threading.Event()
        self._images = self._failed = self._units = self._done = 0
        self._first = self._since = time.monotonic()
        self._unit_images = 0
        self._told = set[str]()  # what is wrong with units: it comes again in each pass, and of the pieces of one that was split

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()

    def _tick(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._say(self._line())

    def _say(self, text: str, *, style: str = "") -> None:
        self._console.print(Text(one_line(text), style=style))

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the driver's events: ignored, missing, planned, waiting, pass, first, caution, rows, commit, trouble, split,
        replanned, verified, logs; still_waiting is for others."""
        if event == "planned":
            self._planned(fields)
        elif event in _SAID:
            self._say(_SAID[event].format(**fields))
        elif event == "missing":
            for error in fields["errors"].values():
                self._say(f"missing: {error}")
        elif event == "pass":
            self._pass(fields)
        elif event == "rows":
            if self._images == 0:
                self._first = time.monotonic()
            self._images, self._failed = self._images + fields["images"], self._failed + fields["failed"]
        elif event == "commit":
            self._done, self._unit_images = self._done + 1, self._unit_images + fields["rows"]
        elif event in ("trouble", "split"):
            self._images, self._failed = self._images - fields["dropped"], self._failed - fields["dropped_failed"]
            # What was lost, or may pass by itself, comes again in the next pass.
            if event == "trouble" and fields["error_class"] not in (UnitsLeft.error_class, Temporary.error_class):
                self._trouble(f"{fields['error_class']}: {fields['error']}")
        elif event == "replanned":
            self._units += fields["units"] - fields["before"]
        if self._live is not None and self._live.is_started:
            self._live.update(Text(self._line()))

    def _trouble(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text, style="red")

    def _pass(self, fields: dict[str, Any]) -> None:
        careful = ", each image decoded in a child process" if fields["careful"] else ""
        if fields["number"] > 1 or careful:
            self._say(f"pass {fields['number']}: {many(fields['units'], 'unit')} left{careful}")
        else:
            self._say("starting workers")

    def _planned(self, fields: dict[str, Any]) -> None:
        self._units, self._done = fields["units"], 0
        if fields["run"] is None:
            return
        self._since = time.monotonic()
        if self._live is not None:
            self._live.start()
        else:
            threading.Thread(target=self._tick, daemon=True).start()
        if fields["done"]:
            self._say(f"resuming: {fields['done']} of {fields['units']} units done")
            self._units -= fields["done"]
        self._say(f"run {fields['run']}: {many(self._units, 'unit')} to do, {fields['todo_bytes'] / 1e6:,.0f} MB")

    def _line(self) -> str:
        """done/total, rate, what is left, failed. The total is an estimate from the units that are complete."""
        seconds = time.monotonic() - self._first
        if not self._images:
            return f"0 images, {time.monotonic() - self._since:.0f} s"
        rate = self._images / seconds if seconds > 1 else 0.0
        total, speed, eta = "", f", {rate:,.0f} img/s" if rate else "", ""
        if self._done:
            expected = max(self._images, round(self._unit_images / self._done * self._units))
            total = f"/{'~' if self._done < self._units else ''}{expected:,}"
            if rate:
                eta = f", {(expected - self._images) / rate:.0f} s left"
        return f"{self._images:,}{total} images{speed}{eta}, {self._failed:,} failed, {self._done}/{self._units} units"
