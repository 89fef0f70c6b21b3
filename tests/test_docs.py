"""The documents are true: commands exist and are documented, the map names every module, the demo's job is the job in jobs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_layers import LADDER

from pipeline import errors
from pipeline.demo import job_text, model_text
from pipeline.rows import PREDICTION, Failure

README = (ROOT / "README.md").read_text()


def test_readme_is_short_and_complete():
    assert len(README.splitlines()) <= 150
    assert "make demo" in README
    assert "make test" in README


def test_the_map_names_every_module_or_its_folder():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `pipeline/"))
    parts = {f"{name.partition('.')[0]}/" if "." in name else f"{name}.py" for name in LADDER}
    missing = [part for part in sorted(parts) if part not in rows]
    assert missing == []
    assert "`pipeline/prepare/`" in rows
    named = set(re.findall(r"([a-z0-9_]+)\.py", rows))
    assert named <= set(LADDER)


def test_columns_failures_and_exit_codes_are_documented():
    for field in PREDICTION:
        assert f"`{field.name}`" in README
    for failure in Failure:
        assert failure in README
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.NightlabelError)
    }
    codes.add(errors.Interrupted("x").exit_code)
    table = "\n".join(re.findall(r"^\| [\d, ]+ \|", README, re.MULTILINE))
    assert {str(code) for code in codes} <= set(re.findall(r"\d+", table))


@pytest.mark.parametrize(
    "command",
    [
        *("run", "plan", "validate", "retry-failed", "demo", "schema", "prepare import", "model show"),
        *("submit", "status", "render", "apply"),
    ],
)
def test_commands_have_help_and_are_documented(command):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) > 5
    documents = README + (ROOT / "jobs/README.md").read_text() + (ROOT / "Makefile").read_text()
    assert f"nightlabel {command}" in documents


def test_the_demo_runs_the_job_files_in_jobs():
    """Regenerate: write `pipeline.demo.job_text(Path("demo-out"))` to jobs/demo.yaml, `model_text` to jobs/demo-model.yaml."""
    assert (ROOT / "jobs/demo.yaml").read_text() == job_text(Path("demo-out"))
    assert (ROOT / "jobs/demo-model.yaml").read_text() == model_text(Path("demo-out"))


def test_wrong_words_are_one_sentence_and_exit_2(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: x\ninput: {uri: a}\nmodel: {uri: m}\noutput: {uri: o}\noutptu: {}\n")
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"nightlabel: {path}:5: unknown field outptu. Did you mean output?\n"
    done = subprocess.run([sys.executable, "-m", "pipeline", "rnu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
