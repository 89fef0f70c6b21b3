"""A signal ends the process with one sentence, and leaves no lock taken wherever it comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, os, signal, subprocess, sys, time
from pipeline.commands.interrupt import end_by_signals
from pipeline.errors import Interrupted

def stop():
    os.kill(os.getpid(), signal.{signal})
    for _ in range(100):  # a handler runs between two of them, if it may
        pass
    sys.whole = True

class Handler(logging.Handler):
    def emit(self, record):
        stop()

sys.whole, sys.stop = False, stop
end_by_signals()
try:
    {here}
    time.sleep(20)
    print("lost")
except Interrupted as error:
    print(sys.whole, error.exit_code, error)
"""
PLACES = {
    "import": "import stops_itself",
    "logging": "logging.getLogger('x').addHandler(Handler()); logging.getLogger('x').warning('y')",
    "fork": "os.register_at_fork(after_in_parent=stop); subprocess.run(['true'], preexec_fn=int)",
}


def said(folder: Path, here: str, number: str = "SIGINT") -> str:
    (folder / "stops_itself.py").write_text("import sys\nsys.stop()\n")
    command = [sys.executable, "-c", SCRIPT.format(here=here, signal=number)]
    path = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}"}
    return subprocess.run(command, env=path, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("place", PLACES)
def test_where_a_lock_would_stay_taken_a_signal_waits(tmp_path: Path, place: str) -> None:
    assert said(tmp_path, PLACES[place]).startswith("True 130 stopped by SIGINT. What is committed stays;")


def test_elsewhere_it_comes_at_once(tmp_path: Path) -> None:
    assert said(tmp_path, "stop()", "SIGTERM").startswith("False 143 stopped by SIGTERM.")
