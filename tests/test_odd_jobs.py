"""Odd values in every field of every kind of job: sound, or one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.careful import CarefulLimits
from pipeline.cut import list_inputs
from pipeline.disk import Disk
from pipeline.errors import JobError, NightlabelError
from pipeline.job.complaints import nested_model
from pipeline.job.jobfile import KINDS, dump_job, parse_job
from pipeline.spec import Job
from pipeline.storage import open_store

_SHARDS = {"uri": "in/"}
JOBS: dict[str, dict[str, Any]] = {
    "label": {"input": _SHARDS, "model": {"uri": "m/"}},
    "finetune": {"data": {"train": _SHARDS}},
    "distill": {"data": {"train": _SHARDS}, "teacher": {"uri": "m/"}},
    "quantize": {"model": {"uri": "m/"}, "calibration": _SHARDS, "data": {"input": _SHARDS}},
    "evaluate": {"model": {"uri": "m/"}, "data": {"input": _SHARDS}},
}
#: Sections that are absent by default and have required fields.
SECTIONS = {
    "cluster": {"workers": {"cpus": 8}},
    "schedule": {"cron": "0 2 * * *"},
    "compare": {"uri": "m/"},
    "student": {"uri": "m/"},
}


def fields() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(kind, place) of every field of every model, once where several jobs share a model."""
    told: set[type[BaseModel]] = set()

    def inside(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, field in model.model_fields.items():
            yield (*path, name)
            inner = nested_model(field.annotation)
            if inner is not None and inner not in told:
                told.add(inner)
                yield from inside(inner, (*path, name))

    for kind, model in KINDS.items():
        yield from ((kind, path) for path in inside(model, ()))


FIELDS = list(fields())
ODD = [
    *(
        "",
        " ",
        "a",
        "ü/日本",
        "a\nb",
        "\0",
        "\ud800",
        "x" * 5000,
        "$(id)",
        "../..",
        "~",
        "-",
        "*",
        "[",
        "[z-a]",
        "{date}",
        "{",
        "~root",
    ),
    *(
        "s3://",
        "s3:/b",
        "s3://b",
        "s3://bucket",
        "s3://u:p@b/",
        "s3://k:a/b@c/x",
        "file://",
        "file:///",
        "http://x/",
        "s3://ü/",
        "S3://b/",
    ),
    *("http://h", "http://u:p@h", "h:9000", "https://h:99999", "http://", "http://[::1]:9"),
    *(
        "0s",
        "0.1s",
        "1d",
        "400d",
        "0%",
        "100%",
        "101%",
        "0.1B",
        "1.1GiB",
        "74MiB",
        "0px",
        "1e3GiB",
        "-1s",
        "9" * 400 + "GiB",
        "٣GiB",
        "%",
    ),
    *("* * * * *", "0 0 0 0", "float16", "int8", "images", "parquet"),
    *(0, -1, 1, 1.5, 0.5, 1e-9, 1e300, 2**31, 2**63, 2**70, math.nan, math.inf, -math.inf, True, False, None),
    *([], [""], [0], ["a", "a"], ["s3://bucket/a", "/b"], [[]], {}, {"a": 1}, {1: 2}, ["_id"], ["label"], ["_read_s"]),
]
anything = st.sampled_from(ODD) | st.text() | st.integers() | st.floats() | st.lists(st.text(max_size=3), max_size=3)


def job_with(kind: str, path: tuple[str, ...], value: object) -> bytes:
    job: dict[str, Any] = {"kind": kind, "name": "odd", "output": {"uri": "out/"}, **copy.deepcopy(JOBS[kind])}
    place = job
    for name in path[:-1]:
        place = place.setdefault(name, copy.deepcopy(SECTIONS.get(name, {})))
    place[path[-1]] = value
    return yaml.safe_dump(job, allow_unicode=False).encode()


def take(raw: bytes) -> None:
    """What a run does with a job before it starts anything. Raises NightlabelError."""
    job = parse_job(raw, date="2026-11-01")
    assert parse_job(dump_job(job)) == job
    if not isinstance(job, Job):
        return
    assert math.isfinite(job.resources.cpus + job.resources.gpus)
    CarefulLimits(job.limits.decode_timeout, job.limits.decode_memory)
    store = open_store(job.input.uris[0], job.input.s3)
    if isinstance(store, Disk) and all("/../" not in f"/{uri}/" and not uri.startswith(("/", "file:")) for uri in job.input.uris):
        list_inputs(store, job.input)


def outcome(kind: str, path: tuple[str, ...], value: object) -> NightlabelError | None:
    try:
        take(job_with(kind, path, value))
    except NightlabelError as error:
        return error
    except Exception as error:
        raise AssertionError(f"{kind} {path} {value!r}") from error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_odd_value_in_every_field_is_sound_or_a_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused = 0
    for _, path in (field for field in FIELDS if field[0] == kind):
        for value in ODD:
            error = outcome(kind, path, value)
            if isinstance(error, JobError):
                refused += 1
                assert error.exit_code == 2
                assert 10 < len(str(error)) < 2000, (path, value)
                assert "u:p@" not in str(error), "a password in a sentence"
    assert refused > 100


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FIELDS), anything)
def test_any_value_in_any_field_is_sound_or_a_sentence(tmp_path_factory, field: tuple[str, tuple[str, ...]], value: object):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        outcome(*field, value)
