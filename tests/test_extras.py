"""Without an extra: one sentence that names it, exit 2, and nothing heavy imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # None: Python finds no such module
from pipeline.cli import main
main()
"""
TRAINING = "data: {train: {uri: in/}}\noutput: {uri: out/}\n"
JOBS = {
    "finetune": TRAINING,
    "distill": TRAINING + "teacher: {uri: t/}\n",
}


@pytest.mark.parametrize(
    ("kind", "absent", "words"),
    [
        ("finetune", "lightning", "finetune needs lightning, and there is no lightning. Install the extra: pip install"),
        ("distill", "lightning", "pip install 'nightlabel[train]'."),
        ("demo", "sklearn", "there is no sklearn. Install the extra: pip install 'nightlabel[demo]'."),
    ],
)
def test_a_missing_extra_is_one_sentence(tmp_path: Path, kind: str, absent: str, words: str):
    command = [kind]
    if kind in JOBS:
        (tmp_path / "job.yaml").write_text(f"kind: {kind}\nname: x\n{JOBS[kind]}")
        command = ["run", str(tmp_path / "job.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, f"{absent},torch", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("nightlabel: ")
    assert done.stderr.count("\n") == 1
