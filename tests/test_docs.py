"""The documents are true: commands exist and are documented, the map names every module, the demo's job is the job in jobs/."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from conftest import ROOT
from test_layers import LADDER

from pipeline.cli import app
from pipeline.demo import job_text, model_text
from pipeline.errors import ExitCode, Interrupted, gravest
from pipeline.job.jobfile import load_label_job
from pipeline.nights import generation
from pipeline.rows import PREDICTION, Failure, UnitError

README = (ROOT / "README.md").read_text()
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "jobs/README.md", "infra/README.md")}
NIGHTLABEL: Any = typer.main.get_command(app)


def command_lines(text: str) -> list[str]:
    """The lines of a document that begin with the command."""
    return re.findall(r"^nightlabel .*", text, re.MULTILINE)


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
    for trouble in (*Failure, *UnitError):
        assert trouble in README
    table = "\n".join(re.findall(r"^\| [\d, ]+ \|", README, re.MULTILINE))
    assert sorted(map(int, re.findall(r"\d+", table))) == list(ExitCode)
    stopped = [Interrupted("x", signal_number=number).exit_code for number in (signal.SIGINT, signal.SIGTERM)]
    assert stopped == [ExitCode.INTERRUPTED, ExitCode.TERMINATED]


def test_of_several_troubles_the_readme_names_the_gravest_as_it_is():
    (order,) = re.findall(r"the gravest of ([\d, ]+), in this order", README)
    codes = [int(code) for code in order.split(", ")]
    assert {*codes, ExitCode.DONE, ExitCode.INTERRUPTED, ExitCode.TERMINATED} == set(ExitCode), (
        "an interrupted run has one trouble"
    )
    for place, code in enumerate(codes):
        assert gravest([ExitCode.DONE, *reversed(codes[place:])]) == code


def test_the_readmes_first_job_is_one(tmp_path):
    (text,) = re.findall(r"^cat > job\.yaml <<END[^\n]*\n(.*?)^END$", README, re.MULTILINE | re.DOTALL)
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job = load_label_job(path)
    assert (len(text.splitlines()), job.input.format) == (4, "images")
    assert "four lines are enough" in README


def test_the_newest_version_of_a_row_is_asked_for_as_the_module_says_it():
    """tests/test_publish.py runs the module's."""
    (query,) = re.findall(r"^    select key, label from (.*?)\n\n", generation.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert " ".join(query.split()) in README


def commands(command: Any, *words: str) -> Iterator[str]:
    """Every command of the command line, with the names of its groups."""
    if not hasattr(command, "commands"):
        yield " ".join(words)
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *words, name)


@pytest.mark.parametrize("command", sorted(commands(NIGHTLABEL)))
def test_commands_have_help_and_are_documented(command):
    shown = typer.testing.CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 5
    assert re.search(rf"\bnightlabel {command}\b", "".join(DOCUMENTS.values()) + (ROOT / "Makefile").read_text())


@pytest.mark.parametrize(("document", "line"), [(name, line) for name, text in DOCUMENTS.items() for line in command_lines(text)])
def test_command_lines_in_documents_are_commands(document, line):
    words: list[str] = shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
    command: Any = NIGHTLABEL
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def test_help_lists_first_what_a_user_needs_first():
    done = subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=True)
    names = re.findall(r"^. ([a-z-]+)  +[A-Z]", done.stdout, re.MULTILINE)
    assert names[:5] == ["run", "plan", "validate", "retry-failed", "submit"]
    assert {"list", "prepare", "model", "schema"} <= set(names)


def test_the_version_is_that_of_the_distribution():
    shown = typer.testing.CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"nightlabel {importlib.metadata.version('nightlabel')}\n")


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
