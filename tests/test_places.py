"""Where inputs and outputs lie: folders with odd names, inputs that are absent or cannot be looked at, outputs of which something
was taken away. By the command line, with passes in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from inprocess import without_ray
from shards import picture, tar_bytes, write_parquet, write_tars
from test_plan import log_at, objects, pairs
from typer.testing import CliRunner

from pipeline import plan, verify
from pipeline.cli import app
from pipeline.disk import Disk
from pipeline.errors import NightlabelError, PermissionDenied, Temporary, Unidentified
from pipeline.plan import make_plan
from pipeline.start import present
from pipeline.unit import Part


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def job(model: str, **fields: Any) -> None:
    """Writes job.yaml into the working folder."""
    content = {"name": "places", "model": {"uri": model}, "output": {"uri": "labels"}, "input": {"uri": "in"}}
    Path("job.yaml").write_text(yaml.safe_dump(content | fields))


def nightlabel(*words: str) -> tuple[int, str]:
    """(exit code, what was said) of a command on job.yaml."""
    done = CliRunner().invoke(app, [words[0], "job.yaml", *words[1:]])
    if isinstance(done.exception, NightlabelError):
        return done.exception.exit_code, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def rows() -> list[dict[str, Any]]:
    return [row for path in sorted(Path("labels").rglob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", b"caf\xe9"])
def test_a_working_folder_of_any_name(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, name: str | bytes) -> None:
    """`a[1]` as a glob is the folder beside it, whose labels are none of ours."""
    write_tars(tmp_path / "in", shards=2, images=3)
    schedule = {"cron": "0 2 * * *"}
    for folder in (tmp_path / "a1", tmp_path / os.fsdecode(name)):
        folder.mkdir()
        monkeypatch.chdir(folder)
        job(model, input={"uri": str(tmp_path / "in")}, schedule=schedule)
        code, said = nightlabel("run")
        assert (code, "done: 6 in = 6 ok + 0 failed" in said) == (0, True), said
        assert len(rows()) == 6
        assert len(list(Path("labels").rglob("manifest.json"))) == 1
        code, said = nightlabel("run")
        assert (code, "nothing to do" in said) == (0, True), said
        assert nightlabel("validate")[1].startswith("valid: 6 in = 6 ok + 0 failed, 2 units")


def test_a_run_with_failed_images_says_how_to_see_which(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / 'the "$5" `x` of a job\'s').mkdir()
    monkeypatch.chdir(folder)
    Path("in").mkdir()
    Path("in/x.tar").write_bytes(tar_bytes({"a.jpg": picture(1), "b.jpg": b"no image"}))
    job(model, limits={"max_failed": "100%"})
    _, said = nightlabel("run")
    commands = [line.strip() for line in said.splitlines() if line.strip().startswith("duckdb -c")]
    query = subprocess.run(["sh", "-c", commands[1].replace("duckdb -c", "printf %s")], stdout=subprocess.PIPE, check=True).stdout
    found = duckdb.sql(query.decode()).fetchall()
    assert found == [(f"{folder}/in/x.tar", "b", "NOT_AN_IMAGE", "starts like no image format: b'no image'")]


def test_keys_are_relative_to_a_folder_that_is_not_utf8(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "in").mkdir(parents=True)
    (folder / "in/1.jpg").write_bytes(picture(1))
    monkeypatch.chdir(folder)
    job(model, input={"uri": "in", "format": "images"})
    assert nightlabel("run")[0] == 0
    assert [row["key"] for row in rows()] == ["1.jpg"]


def test_an_input_that_is_missing_costs_no_other_its_labels(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "in", shards=2, images=3)
    job(model, input={"uri": ["in/000.tar", "in/9*.tar", "nowhere/", "in/001.tar"]})
    code, said = nightlabel("plan")
    assert (code, said.count("missing ")) == (3, 2), said
    assert json.loads(nightlabel("plan", "--json")[1])["exit_code"] == 3
    code, said = nightlabel("run")
    assert code == 3
    assert "not finished: 6 in = 6 ok + 0 failed, 2 of 2 units" in said
    assert f"left    INPUT_MISSING: {tmp_path}/in/9*.tar: nothing there" in said
    assert f"left    INPUT_MISSING: {tmp_path}/nowhere: " in said
    assert len(rows()) == 6
    code, said = nightlabel("run")
    assert (code, "nothing to do: every other input of places is labelled" in said) == (3, True)
    assert nightlabel("plan")[1].startswith("nothing to do: every other input is labelled\nmissing ")
    job(model, input={"uri": ["in/8*.tar", "nowhere/"]})
    assert nightlabel("run")[0] == 3
    job(model)
    assert nightlabel("run")[0] == 0


@pytest.mark.parametrize(
    "words",
    [["run"], ["plan"], ["validate"], ["retry-failed", "--class", "CORRUPT"], ["render"], ["submit"]],
    ids=lambda words: words[0],
)
def test_a_date_that_fills_nothing_is_refused(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job("model")
    told = "job.yaml: --date today fills nothing; required: {date} in a uri of the job. Add it, or leave out --date."
    assert nightlabel(*words, "--date", "today") == (2, told)
    job("model", input={"uri": "in/{date}"})
    assert "fills nothing" not in nightlabel(*words, "--date", "today")[1]


def test_a_date_that_fills_nothing_of_a_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("{kind: finetune, name: x, data: {train: {uri: in/}}, output: {uri: out/}}")
    code, said = nightlabel("run", "--date", "2026-11-01")
    assert (code, said.split(";")[0]) == (2, "job.yaml: --date 2026-11-01 fills nothing")
    Path("job.yaml").write_text("{kind: finetune, name: x, data: {train: {uri: 'in/{date}/'}}, output: {uri: out/}}")
    assert nightlabel("run", "--date", "2026-11-01")[0] == 3


@pytest.mark.parametrize("words", [["submit"], ["apply"], ["wait"], ["logs"], ["status"], ["stop"]], ids=lambda words: words[0])
def test_a_job_that_no_cluster_takes_is_refused_before_one_is_asked(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    Path("job.yaml").write_text("{kind: finetune, name: x, data: {train: {uri: in/}}, output: {uri: out/}}")
    code, said = nightlabel(*words)
    assert (code, said.split(".", 2)[1]) == (2, "yaml: kind is finetune; required: label"), said


def test_an_absent_input_is_graver_than_too_many_failures_in_every_attempt(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name, data in (("1.jpg", picture(1)), ("2.jpg", b"<html>")):
        Path(f"in/{name}").write_bytes(data)
    job(model, input={"uri": ["in", "gone"], "format": "images"})
    assert [nightlabel("run", *again)[0] for again in ((), (), ("--again",))] == [3, 3, 3]
    job(model, input={"uri": ["in"], "format": "images"})
    assert [nightlabel("run", *again)[0] for again in ((), ("--again",))] == [0, 4]


def test_a_link_that_leads_nowhere_costs_itself(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in range(3):
        Path(f"in/{number}.jpg").write_bytes(picture(number))
    Path("in/latest").symlink_to("nowhere")
    Path("in/3.jpg").symlink_to("nowhere")
    job(model, input={"uri": "in", "format": "images"}, limits={"max_failed": "50%"})
    assert nightlabel("run")[0] == 0
    assert [(row["key"], row["error_class"]) for row in sorted(rows(), key=lambda row: row["key"])] == [
        ("0.jpg", None),
        ("1.jpg", None),
        ("2.jpg", None),
        ("3.jpg", "FETCH_FAILED"),
    ]


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_what_was_taken_from_a_finished_run_is_made_again(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "in", shards=4, images=2)
    job(model)
    assert nightlabel("run")[0] == 0
    broken = next(iter(Path("labels").rglob("data/*.parquet")))
    assert nightlabel("validate", "--deep")[1].startswith("valid: 8 in")
    column, rotten = pq.read_metadata(broken).row_group(0).column(0), bytearray(data := broken.read_bytes())
    rotten[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    broken.write_bytes(rotten)
    assert nightlabel("validate")[0] == 0, "of the footers alone it cannot be told"
    code, said = nightlabel("validate", "--deep")
    assert (code, f"{broken.name}: not a unit of nightlabel" in said) == (6, True)
    broken.write_bytes(data[:-8] + b"12345678")
    code, said = nightlabel("validate")
    assert (code, "move it away, and the manifest of its run if there is one; then run again" in said) == (6, True)
    broken.unlink()
    code, said = nightlabel("validate")
    told = (
        f"manifest.json: 1 of its 4 units are gone, {broken.absolute()} first. Restore them, or move this manifest away and run"
    )
    assert (code, told in said) == (6, True)
    next(iter(Path("labels").rglob("manifest.json"))).unlink()
    others = written(broken.parent)
    assert len(others) == 3
    assert nightlabel("run")[0] == 0
    assert written(broken.parent) == others | {broken: written(broken.parent)[broken]}, "it alone is written"
    assert pq.read_table(broken).equals(pq.read_table(BytesIO(data)))
    assert nightlabel("validate")[1].startswith("valid: 8 in = 8 ok + 0 failed, 4 units")


def test_a_run_that_ends_while_an_output_is_validated_is_no_fault(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "in", shards=2, images=2)
    job(model)
    assert nightlabel("run")[0] == 0
    write_tars(tmp_path / "in", shards=2, images=2, first=2)
    listed = verify._footers

    def and_then(log: Any, *, deep: bool) -> Any:
        found = listed(log, deep=deep)
        assert nightlabel("run")[0] == 0
        return found

    monkeypatch.setattr(verify, "_footers", and_then)
    code, said = nightlabel("validate")
    assert (code, "NOT VALID" in said) == (0, False), said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "valid: 8 in" in nightlabel("validate")[1]


def test_an_output_that_is_not_there_is_not_valid(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "in", shards=1, images=1)
    job(model)
    code, said = nightlabel("validate")
    assert (code, "no run of this job is here" in said) == (6, True)
    assert nightlabel("run")[0] == 0
    job(model, output={"uri": "labels", "top_k": 3})
    assert nightlabel("validate")[0] == 6, "another way of labelling, whose output is another"


def test_a_large_file_counts_once(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = pa.table({"key": [str(number) for number in range(40)], "image": [bytes([number]) * 4000 for number in range(40)]})
    Path("in").mkdir()
    pq.write_table(table, "in/a.parquet", row_group_size=4, compression="none")
    job(model, input={"uri": "in", "format": "parquet"}, resources={"read": {"tasks": 2}})
    facts = json.loads(nightlabel("plan", "--json")[1])
    size = Path("in/a.parquet").stat().st_size
    assert facts["units"] > 4
    assert (facts["bytes"], facts["todo_bytes"]) == (size, size)


def test_one_large_file_that_cannot_be_opened_is_planned_as_it_is(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in "abc":
        write_parquet(Path(f"in/{name}.parquet"), [picture(number) for number in range(20)])
    read = Disk.read

    def failing(store: Disk, uri: str, **wanted: Any) -> bytes:
        if uri.endswith("b.parquet"):
            raise Temporary("a disk that fails")
        return read(store, uri, **wanted)

    monkeypatch.setattr(Disk, "read", failing)
    job(model, input={"uri": "in", "format": "parquet"})
    code, said = nightlabel("run")
    assert (code, len(rows())) == (75, 40), said


class Unsure(Disk):
    """A disk on which nothing can be looked at."""

    def __init__(self, error: Exception) -> None:
        object.__setattr__(self, "error", error)

    def head(self, uri: str) -> Any:
        raise self.error  # type: ignore[attr-defined]


def test_an_input_that_cannot_be_looked_at_is_not_gone() -> None:
    part = Part("/x", "1", 2)
    assert present(Unsure(PermissionDenied("403")), part)
    assert present(Unsure(Temporary("503")), part)
    with pytest.raises(Unidentified):
        present(Unsure(Unidentified("who?")), part)


def test_forty_drivers_plan_at_the_same_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_PAUSE_S", 0.5)
    found: list[Any] = []

    def begin(name: str) -> None:
        try:
            listing = objects(name)
            found.append(make_plan(log_at(tmp_path), listing, pairs, present=lambda _: True, retire=lambda _: True).run_id)
        except NightlabelError as error:
            found.append(error)

    drivers = [threading.Thread(target=begin, args=(f"x{number:02d}",)) for number in range(40)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(map(str, found)) == [f"{number:06d}" for number in range(1, 41)]


def test_a_full_disk_of_the_log_is_no_matter_and_one_of_the_result_is(tmp_path: Path, model: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.jpg": picture(1)}))
    words = [sys.executable, "-m", "pipeline", "model", "show", model]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stdout=subprocess.DEVNULL, stderr=full, check=False).returncode == 0
        done = subprocess.run([*words[:3], "plan", "absent.yaml"], stdout=subprocess.PIPE, stderr=full, check=False)
        assert (done.returncode, done.stdout) == (2, b"")
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    got = "nightlabel: the result cannot be written to where stdout leads: No space left on device."
    assert (done.returncode, done.stderr) == (75, f"{got} Make room there, then run again; what is committed stays.\n")


def test_a_working_folder_that_is_gone_is_one_sentence(tmp_path: Path, model: str) -> None:
    fields = {"name": "x", "input": {"uri": "in/"}, "model": {"uri": model}, "output": {"uri": "out/"}}
    (tmp_path / "job.yaml").write_text(json.dumps(fields))
    gone = tmp_path / "gone"
    gone.mkdir()
    plan = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -m pipeline plan "{tmp_path}/job.yaml"'
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["sh", "-c", plan], env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a path from the folder that the command runs in, which has been removed; required" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_what_is_closed_from_the_start_is_no_file_of_ours(closed: str) -> None:
    """A daemon may begin a run so. Libraries write to descriptor 2, and the next socket would have that number."""
    code = (
        "import os, sys\nfrom pipeline.commands.printing import outlive_readers\noutlive_readers()\n"
        "print('x', file=sys.stderr, flush=True)\nassert os.open(os.devnull, os.O_RDONLY) > 2\n"
    )
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, check=False).returncode == 0
