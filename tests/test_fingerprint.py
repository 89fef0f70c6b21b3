"""The names of outputs and of models stay what they are: under another one every archive would be labelled again, in silence."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from pipeline import start
from pipeline.artifact import FILES, Artifact, digest_of
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.spec import Job

LEAST: dict[str, Any] = {"name": "x", "input": {"uri": "photos/"}, "model": {"uri": "model/"}, "output": {"uri": "labels/"}}
GPU = {"resources": {"predict": {"gpus_per_actor": 1}}}
ARTIFACT = Artifact(
    "sha256:" + "4f" * 32, Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512), 3), ("a", "b", "c"), Preprocessing(), {}
)
PLAIN = "0705e102aff1"
#: What a job says beside the least, and its fingerprint.
GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({}, PLAIN),
    ({"model": {"precision": "bfloat16"}}, "27a859f7d1ea"),
    ({"model": {"engine": "onnxruntime"}}, "476d17d659b9"),
    ({"output": {"top_k": 3}}, "7a130fc5f937"),
    ({"output": {"embeddings": True}}, "f87cb2edb0e3"),
    ({"output": {"probabilities": True}}, "2ae6a093a4ad"),
    ({"output": {"embeddings": True, "probabilities": True}}, "e9663e182518"),
    ({"decode": "fast"}, "56cb1398c845"),
    ({"input": {"keep": ["cls"]}}, "c72196d2f952"),
    ({"input": {"keep": ["cls", "json"]}}, "6285fc13c5b2"),
    ({"input": {"format": "parquet", "image_column": "photo"}}, "9a5b5a54eb64"),
    ({"input": {"format": "parquet", "key_column": None}}, "93b1a70fbd74"),
]
#: What changes no label.
SAME: list[dict[str, Any]] = [
    {"name": "y"},
    {"input": {"uri": "more/", "format": "images"}},
    {"input": {"format": "parquet"}},
    {"model": {"uri": "s3://models/it/", "digest": ARTIFACT.digest}},
    {"output": {"uri": "s3://labels/", "layout": "hive"}},
    {"limits": {"max_failed": "5%"}, "schedule": {"cron": "0 2 * * *"}},
    GPU,
    {"decode_lane": "gpu", **GPU},  # which has the CPU's bytes
    {"decode_lane": "both", **GPU},
]


def fingerprint(said: dict[str, Any], artifact: Artifact = ARTIFACT) -> str:
    sections = {name: {**LEAST[name], **value} if isinstance(LEAST.get(name), dict) else value for name, value in said.items()}
    return start.fingerprint(artifact, Job.model_validate(LEAST | sections))


@pytest.mark.parametrize(("said", "name"), GOLDEN, ids=str)
def test_what_changes_a_label_has_a_name_of_its_own_for_good(said: dict[str, Any], name: str):
    assert fingerprint(said) == name
    assert [other for _, other in GOLDEN].count(name) == 1


@pytest.mark.parametrize("said", SAME, ids=str)
def test_what_changes_no_label_changes_no_name(said: dict[str, Any]):
    assert fingerprint(said) == PLAIN


def test_model_preprocessing_and_schema_are_in_the_name(monkeypatch):
    names = {PLAIN, fingerprint({}, replace(ARTIFACT, digest="sha256:" + "50" * 32))}
    for version in ("PREPROCESSING_VERSION", "OUTPUT_SCHEMA_VERSION"):
        monkeypatch.setattr(start, version, 99)
        names.add(fingerprint({}))
    assert len(names) == 4


def test_the_digest_of_the_same_bytes_stays_the_same():
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in FILES}
    assert digest_of(sums) == "sha256:71eaab3f1f80edefba8889453bd60bd68c4c0d5cba2be6520548a634a79cadb2"
    assert digest_of(dict(reversed(sums.items()))) == digest_of(sums)
    assert (
        digest_of({name: sums[name] for name in FILES[:3]})
        == "sha256:9f4118c75174c0e6dd8756947b4ac29389f4e3457b40ae5abbedd87b24daf9ed"
    )
