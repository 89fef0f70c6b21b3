"""The logs of a run are beside its papers when the cluster is gone, however the run ended."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from shards import write_tars
from test_run import job, label

from pipeline import keep
from pipeline.errors import UnitsLeft


def kept(out: Path) -> tuple[list[str], list[str]]:
    """(events, names in the tarballs) of the one attempt of the one run."""
    (folder,) = out.glob("*/runs/000001/logs/*")
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    (node,) = folder.glob("*.tar.gz")
    with tarfile.open(node) as tar:
        return events, tar.getnames()


def test_logs_of_a_run_are_in_its_folder(tmp_path, model, on_ray, monkeypatch):
    monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", "1")
    write_tars(tmp_path / "in", shards=1, images=3)
    wanted = job(tmp_path / "in", model, tmp_path / "out")
    assert label(wanted).exit_code == 0
    events, names = kept(tmp_path / "out")
    assert events[:2] == ["planned", "pass"]
    assert "commit" in events
    assert "raylet.out" in names
    assert label(wanted).exit_code == 0  # nothing to do brings no cluster up, so there are no logs of it
    assert len(list((tmp_path / "out").glob("*/runs/*/logs/*"))) == 1


def test_logs_of_a_run_that_failed_too_and_none_unasked(tmp_path, model, on_ray, monkeypatch):
    write_tars(tmp_path / "in", shards=1, images=3)
    wanted = job(tmp_path / "in", model, tmp_path / "out", limits={"deadline": "0.01s"})
    with pytest.raises(UnitsLeft):
        label(wanted)
    assert not list((tmp_path / "out").glob("*/runs/*/logs"))
    monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", "1")
    with pytest.raises(UnitsLeft):
        label(wanted)
    assert kept(tmp_path / "out")[0][0] == "planned"


def test_logs_that_cannot_be_kept_fail_nothing(tmp_path, model, on_ray, monkeypatch):
    monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", "1")

    def broken() -> dict[str, bytes]:
        raise OSError("no space left on device")

    monkeypatch.setattr(keep, "_collect", broken)
    write_tars(tmp_path / "in", shards=1, images=3)
    receipt = label(job(tmp_path / "in", model, tmp_path / "out"))
    assert receipt.exit_code == 0
    assert [event["error"] for event in receipt.events if event["event"] == "logs"] == ["no space left on device"]


def test_packed_logs_are_bounded_and_the_drivers_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "_FILE", 10)
    monkeypatch.setattr(keep, "_NODE", 25)
    for age, name in enumerate(["old.log", "job-driver-1.log", "sub/worker.out", "raylet.out"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name:>40}")
        os.utime(path, (age, age))
    with tarfile.open(fileobj=io.BytesIO(keep.pack(tmp_path))) as tar:
        assert [(member.name, member.size) for member in tar] == [
            ("job-driver-1.log", 10),
            ("raylet.out", 10),
            ("sub/worker.out", 5),
        ]
        file = tar.extractfile("sub/worker.out")
        assert file
        assert file.read() == b"r.out"
