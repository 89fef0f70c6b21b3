"""`nightlabel run` of job files, as a user does it, several at a time, and what has come out so far, whatever ends the benchmark.

Every job writes to a log of its own in the folder of the models. What is done is printed and written the moment it is; when a
signal ends it all, the last epoch of what was not done stands in the results too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from result import write_result

ROOT = Path(__file__).resolve().parents[2]
_EPOCH = re.compile(r"^epoch .*$", re.MULTILINE)

Rows = list[dict[str, Any]]


def gpu_name() -> str | None:
    """As the driver says it: to import torch for that would cost seconds."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


class Bench:
    """Jobs in `folder`, at most `parallel` at a time. `rows` makes a table of what is `done`: name of a model → its figures."""

    def __init__(self, folder: Path, what: str, *, parallel: int, facts: dict[str, Any]) -> None:
        self.folder, self._what = folder, what
        self.rows: Callable[[dict[str, dict[str, Any]]], Rows] = lambda done: list(done.values())
        self.done: dict[str, dict[str, Any]] = {}
        self._facts = {**facts, "gpu": gpu_name(), "torch": importlib.metadata.version("torch")}
        self._pool, self._lock = ThreadPoolExecutor(parallel), threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call it as soon as there is a place."""
        return self._pool.submit(function, *arguments)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job to its end; what --json prints, with the seconds of the whole command."""
        name, since = job["name"], time.perf_counter()
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "pipeline", "run", str(path), "--json"]
        there = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (self.folder / f"{name}.log").open("wb") as log:
            with self._lock:
                if self._ended:
                    raise RuntimeError(f"{name}: not begun")
                env = os.environ | {"PYTHONPATH": os.pathsep.join(there)}
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env)
                self._running[name] = process
            out, _ = process.communicate()
            with self._lock:
                del self._running[name]
        if process.returncode:
            tail = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError("\n".join([f"{name}: exit code {process.returncode}", *tail]))
        return json.loads(out) | {"seconds": time.perf_counter() - since}

    def note(self, name: str, **figures: Any) -> None:
        """Say what a model came to, and write all there is so far."""
        with self._lock:
            self.done.setdefault(name, {}).update(figures)
            told = ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
            )
            print(f"{name}: {told}", flush=True)
            self._write()

    def end(self) -> None:
        """What still runs is told to stop; its last epoch is written with the rest."""
        with self._lock:
            self._ended = True
            unfinished = dict(self._running)
            for process in unfinished.values():
                process.terminate()
            last = {name: _EPOCH.findall((self.folder / f"{name}.log").read_text(errors="replace")) for name in unfinished}
            left = {name: lines[-1] if lines else "no epoch yet" for name, lines in last.items()}
            self._write(unfinished=left or None)
        self._pool.shutdown(cancel_futures=True)

    def table(self) -> Rows:
        """Of what is done."""
        return self.rows(self.done)

    def _write(self, **more: Any) -> None:
        rows = self.table()
        whole = {**self._facts, "rows": rows, **({"models": self.done} if rows != list(self.done.values()) else {}), **more}
        if self.done or any(more.values()):
            write_result(f"training-{self._what}", {key: value for key, value in whole.items() if value is not None})
