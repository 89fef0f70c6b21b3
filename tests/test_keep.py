"""The logs of a run are beside its papers when the cluster is gone, however the run ended."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from shards import write_tars
from test_run import job, label

from pipeline import keep
from pipeline.cluster import start_ray
from pipeline.errors import UnitsLeft
from pipeline.label import Driver
from pipeline.start import load_model, plan_job
from pipeline.storage import open_store


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


def test_the_report_of_a_run_with_units_left_is_kept_too(tmp_path, model, monkeypatch):
    write_tars(tmp_path / "in", shards=2, images=3)
    wanted = job(tmp_path / "in", model, tmp_path / "out")
    artifact = load_model(wanted, weights=False)
    log, plan = plan_job(wanted, artifact)
    for asked in ("0", "1"):
        monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", asked)
        driver = Driver(wanted, observe=lambda event, fields: None, started=time.perf_counter())
        driver.artifact = artifact
        assert driver.finish(log, plan, 0).exit_code == 5
        assert len(list((tmp_path / "out").glob("*/runs/000001/logs/*/report.html"))) == int(asked)


def told(tmp_path: Path, collect: Callable[[], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a run that fails tells while its logs are kept."""
    monkeypatch.setattr(keep, "_collect", collect)
    events: list[dict[str, Any]] = [{"event": "planned"}]

    def tell(event: str, **fields: Any) -> None:
        events.append({"event": event, **fields})

    with pytest.raises(UnitsLeft), keep.kept_logs(open_store(str(tmp_path)), str(tmp_path / "logs"), events, tell):
        raise UnitsLeft("the deadline has passed")
    return events


def test_logs_of_a_run_that_failed_are_kept_too_and_none_unasked(tmp_path, monkeypatch):
    assert told(tmp_path, lambda: {"node.tar.gz": b"1"}, monkeypatch) == [{"event": "planned"}]
    assert not (tmp_path / "logs").exists()
    monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", "1")
    events = told(tmp_path, lambda: {"node.tar.gz": b"1"}, monkeypatch)
    assert [json.loads(line) for line in (tmp_path / "logs/events.jsonl").read_text().splitlines()] == events
    assert (tmp_path / "logs/node.tar.gz").read_bytes() == b"1"


def test_logs_that_cannot_be_kept_do_not_hide_how_the_run_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("NIGHTLABEL_KEEP_LOGS", "1")

    def broken() -> dict[str, bytes]:
        raise OSError("no space left on device")

    assert told(tmp_path, broken, monkeypatch)[-1]["error"] == "no space left on device"


def test_a_node_that_has_just_gone_takes_no_other_nodes_logs_with_it(on_ray, monkeypatch):
    start_ray(object_store=2**27)
    try:
        known = [{"NodeID": "ab" * 28, "Alive": True}, *ray.nodes()]  # as Ray tells it until it has missed some beats
        monkeypatch.setattr(ray, "nodes", lambda: known)
        packed = keep._collect()
    finally:
        ray.shutdown()
    assert list(packed) == [f"{known[1]['NodeID'][:12]}.tar.gz"]


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
