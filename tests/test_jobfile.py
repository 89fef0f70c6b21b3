"""The job file: what it takes, what it refuses and in which words, and that jobs/ and its reference are true."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cut import list_inputs
from pipeline.disk import Disk
from pipeline.errors import JobError
from pipeline.footer import Totals
from pipeline.job.arithmetic import Precision, engine_for
from pipeline.job.demand import Node, check_demand
from pipeline.job.jobfile import dump_job, load_job, parse_job
from pipeline.job.quantity import _BYTES, _percent, in_bytes, in_percent, in_pixels, in_seconds, quantity, text
from pipeline.job.reference import _FILES, json_schema, reference
from pipeline.job.resources import Pool, Resources
from pipeline.job.training import FinetuneJob
from pipeline.job.uris import absolute_input
from pipeline.report import exit_code

SIX_LINES = b"""
kind: label
name: nightly
input: {uri: photos/}
model: {uri: model/}
output: {uri: labels/}
"""
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def refusal(more: bytes, base: bytes = SIX_LINES) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(base + more, name="x.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_six_lines_are_a_job_and_survive_being_written_out():
    job = parse_job(SIX_LINES)
    assert (job.input.format, job.model.precision, job.resources.cpus) == ("webdataset", "float32", 1.75)
    assert parse_job(dump_job(job)) == job


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_file_is_valid_and_round_trips(path: Path):
    job = load_job(path, date="2026-11-01")
    assert parse_job(dump_job(job)) == job
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_every_job_file_is_in_the_reference():
    assert {path.name for path in JOBS} == set(_FILES)


def test_reference_is_generated():
    """Regenerate: nightlabel schema --markdown > jobs/README.md; nightlabel schema > jobs/schema.json"""
    assert (ROOT / "jobs" / "README.md").read_text() == reference()
    assert (ROOT / "jobs" / "schema.json").read_text() == json_schema()
    assert {"Job", "FinetuneJob", "DistillJob", "QuantizeJob", "EvaluateJob"} <= set(json.loads(json_schema())["$defs"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (b"limts: {}", ["x.yaml:7: unknown field limts. Did you mean limits?"]),
        (b"resources: {predict: {batch_sise: 3}}", ["resources.predict.batch_sise", "Did you mean batch_size?"]),
        (b"resources: {predict: {colour: 3}}", ["Known here: actors, cpus_per_actor"]),
        (b"limits: {max_failed: 5}", ["limits.max_failed is 5; required: a number with a unit of %"]),
        (b"limits: {deadline: 6 parsecs}", ["limits.deadline is '6 parsecs'", "6h"]),
        (b"resources: {read: {tasks: 0}}", ["resources.read.tasks is 0; required: 1 or more"]),
        (b"input: {uri: again}", ["x.yaml:7: the key input stands twice"]),
        (b"limits: &a {}\nschedule: *a", ["x.yaml:8: an alias"]),
        (b"name: [", ["x.yaml"]),
        (b"limits:\n\tmax_failed: 1%", ["x.yaml:8: ", "plain YAML. Indent with spaces, YAML takes no tabs."]),
        (b"---\nname: y", ["x.yaml:7: ", "plain YAML. Leave one job in the file: what follows --- is another one."]),
        (b"schedule: {cron: daily}", ["schedule.cron is 'daily'; required: five cron fields"]),
        (b"schedule: {cron: 0 2 * * *, timezone: Nowhere}", ["schedule.timezone is 'Nowhere'; required: a time zone"]),
        (b"limits: {decode_timeout: 0s}", ["limits.decode_timeout is '0s'; required: 0.1s to 1d"]),
        (b"limits: {max_failed: 101%}", ["required: 0% to 100%"]),
        (b"resources: {object_store: 74MiB}", ["resources.object_store is '74MiB'; required: 75MiB to"]),
        (b"resources: {read: {tasks: true}}", ["resources.read.tasks is true; required: a whole number"]),
        (b"resources: {predict: {cpus_per_actor: .inf}}", ["cpus_per_actor is inf; required: a finite number"]),
    ],
)
def test_refusals_name_line_field_and_way_out(more, words):
    sentence = refusal(more)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("precision: float16", b"", "precision is float16, which needs a GPU"),
        (
            "precision: bfloat16, engine: onnxruntime",
            b"",
            "precision is bfloat16; required for engine onnxruntime: float32, int8",
        ),
        ("precision: int8, engine: torch", b"", "required for engine torch: float32, float16, bfloat16"),
        ("precision: int8", b"resources: {predict: {gpus_per_actor: 1}}", "precision is int8, which runs on CPUs"),
        ("engine: openvino", b"resources: {predict: {gpus_per_actor: 1}}", "engine is openvino, which runs on CPUs"),
    ],
)
def test_an_engine_that_cannot_is_refused(source: str, more: bytes, words: str):
    assert words in refusal(more, SIX_LINES.replace(b"{uri: model/}", f"{{uri: model/, {source}}}".encode()))


def test_a_pool_of_nobody_needs_no_room():
    alone = b"resources: {preprocess: {actors: 0, cpus_per_actor: 64}}\ncluster: {workers: {cpus: 2}}"
    assert parse_job(SIX_LINES + alone).resources.preprocess.actors == 0


def test_a_password_is_refused_and_not_repeated():
    sentence = refusal(b"", SIX_LINES.replace(b"photos/", b"s3://me:hunter2@photos/"))
    assert "credentials" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("uri", ["s3://KEY:sec/ret@photos/", "s3://KEY:secret@photos/", "file://me:secret@host/x"])
def test_a_secret_with_a_slash_is_refused_too(uri: str):
    sentence = refusal(b"", SIX_LINES.replace(b"photos/", uri.encode()))
    assert "without credentials" in sentence
    assert "ret@" not in sentence


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{uri: []}", "input.uri is []; required: a URI"),
        ("{uri: [s3://bucket/a, /b]}", "input: uri names S3 and the disk; required: one of them"),
        ("{uri: [a, '']}", "input.uri.1 is ''; required: one character or more"),
        ("{uri: s3:/bucket}", "required: two slashes after s3:"),
        ("{uri: s3://b\u00fc/}", "required: s3:// and the name of a bucket"),
        ('{uri: "a\\0b"}', "holds NUL"),
        (
            "{uri: a, format: images, keep: [cls]}",
            "input: keep is set for loose images; required: webdataset or parquet",
        ),
        ("{uri: a, keep: [cls, cls]}", "input: keep names one twice"),
        ("{uri: a, keep: ['']}", "input.keep.0 is ''"),
        ("{uri: a, keep: [_read_s]}", "input.keep names _read_s"),
        ("{uri: a, keep: [_same_label]}", "input.keep names _same_label"),
        ("{uri: a, keep: [embedding, probabilities, room]}", "input.keep names embedding, probabilities, room"),
        ("{uri: a, format: parquet, key_column: ''}", "input.key_column is ''"),
        ("{uri: s3://bucket/, s3: {endpoint: 'minio:9000'}}", "input.s3.endpoint is 'minio:9000'; required: http:// or https://"),
        (
            "{uri: s3://bucket/, s3: {endpoint: 'https://me:secret@minio'}}",
            "required: http:// or https:// and a host, without cred",
        ),
        ("{uri: s3://bucket/, s3: {region: eu west}}", "input.s3.region is 'eu west'"),
    ],
)
def test_inputs_that_cannot_be_are_refused(source: str, words: str):
    sentence = refusal(b"", SIX_LINES.replace(b"{uri: photos/}", source.encode()))
    assert words in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize(
    ("source", "output", "inside"),
    [
        ("photos/", "photos/labels/", True),
        ("photos", "./photos", True),
        ("file://photos/", "photos/../photos/x", True),
        ("s3://bucket/a/", "s3://bucket/a/labels", True),
        ("photos/**", "photos/labels", True),
        ("photos/*.parquet", "photos/labels", False),
        ("photos/", "photos-labels/", False),
        ("s3://bucket/a/", "s3://bucket/a-labels", False),
        ("labels/in/", "labels/", False),
    ],
)
def test_labels_do_not_go_where_parquet_is_read(source: str, output: str, inside: bool):
    text = SIX_LINES.replace(b"photos/", f"'{source}', format: parquet".encode()).replace(b"labels/", output.encode())
    if inside:
        assert "inside of the input: the next run would read these labels as images" in refusal(b"", text)
    else:
        parse_job(text)
    parse_job(text.replace(b"parquet}", b"webdataset}"))


def test_paths_are_absolute_before_they_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = parse_job(SIX_LINES.replace(b"photos/", b"[photos/, 'p/*/', file://x/y]").replace(b"labels/", b"s3://bucket/labels/"))
    away = job.from_root()
    assert away.input.uris == (f"{tmp_path}/photos/", f"{tmp_path}/p/*/", f"{tmp_path}/x/y")
    assert (away.model.uri, away.output.uri) == (f"{tmp_path}/model/", "s3://bucket/labels/")


def test_a_working_folder_that_reads_as_a_glob_is_a_sentence(tmp_path, monkeypatch):
    odd = tmp_path / "a[b]"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(JobError, match=r"photos/: lies in .*a\[b\], which reads as a glob; required: a working folder without"):
        parse_job(SIX_LINES).from_root()
    assert absolute_input("../x/*.tar") == f"{tmp_path}/x/*.tar"
    (odd / "photos").mkdir()
    with pytest.raises(JobError, match="reads as a glob"):
        list_inputs(Disk(), parse_job(SIX_LINES).input)
    assert parse_job(SIX_LINES.replace(b"photos/", b"/data/*.tar")).from_root().input.uris == ("/data/*.tar",)


def test_loose_images_have_the_label_of_their_folder_alone():
    text = b"kind: evaluate\nname: x\nmodel: {uri: m}\ndata: {input: {uri: a, format: images}%s}\noutput: {uri: o}\n"
    assert "data: label is cls, and loose images have no sidecars; required: folder" in refusal(b"", text % b"")
    assert parse_job(text % b", label: folder").data.label == "folder"
    train = b"kind: %s\nname: x\n%sdata: {%s}\noutput: {uri: o}\n"
    for data in (b"train: {uri: a, format: images}", b"train: {uri: a}, validation: {uri: b, format: images}"):
        assert "data: label is cls, and loose images" in refusal(b"", train % (b"finetune", b"", data))
    distill = train % (b"distill", b"teacher: {uri: t}\n", b"train: {uri: a, format: images}, label: null")
    assert parse_job(distill).data.label is None


LABELLED = {
    "evaluate": "model: {uri: m}\ndata: {input: {uri: a}, label: %s}",
    "quantize": "model: {uri: m}\ncalibration: {uri: a}\ndata: {input: {uri: a}, label: %s}",
    "finetune": "data: {train: {uri: a}, label: %s}",
    "distill": "teacher: {uri: m}\ndata: {train: {uri: a}, label: %s}",
}


@pytest.mark.parametrize("kind", LABELLED)
def test_a_label_is_named_after_no_column_of_an_image_row(kind: str):
    def text(label: str) -> bytes:
        return f"kind: {kind}\nname: x\noutput: {{uri: o}}\n{LABELLED[kind] % label}\n".encode()

    for name in ("index", "source", "unit", "error", "bytes", "key", "width", "pixels"):
        words = f"data.label is '{name}'; required: a name that image rows have no column of already. Change it."
        assert words in refusal(b"", text(name))
    for name in ("label", "status", "score", "truth"):
        parse_job(text(name))


def test_a_part_of_a_byte_is_rounded():
    assert parse_job(SIX_LINES + b"resources: {object_store: 1.1GiB}").resources.object_store == round(1.1 * 2**30)


def test_missing_and_foreign_fields():
    assert "model is missing" in refusal(b"", b"name: x\ninput: {uri: a}\noutput: {uri: o}")
    assert "data is missing" in refusal(b"", SIX_LINES.replace(b"kind: label", b"kind: finetune"))
    assert "Did you mean finetune?" in refusal(b"", SIX_LINES.replace(b"kind: label", b"kind: fintune"))
    assert "a mapping" in refusal(b"", b"- 1")
    assert "1,000,000" in refusal(b"#" * 1_000_001)


@pytest.mark.parametrize(
    ("more", "base", "words"),
    [
        (b"output-uri: x", SIX_LINES, "unknown field output-uri"),
        (b"limits: {max-failed: 1%}", SIX_LINES, "unknown field limits.max-failed. Did you mean max_failed?"),
        (b"", SIX_LINES.replace(b"kind: label", b"kind: [label]"), "kind is ['label']"),
        (b"", SIX_LINES.replace(b"nightly", b"2026-02-30"), "cannot be read"),
        (b"? [a]\n: b", SIX_LINES, "a"),
        (b"x: " + b"[" * 5000, SIX_LINES, "x.yaml"),
        (b"", SIX_LINES.replace(b"labels/", b"'labels [v2]/'"), "a folder, no pattern"),
    ],
)
def test_odd_files_are_a_sentence_too(more: bytes, base: bytes, words: str):
    assert words in refusal(more, base)


def test_demand_is_held_against_the_cluster():
    sentence = refusal(b"resources: {preprocess: {actors: 70}}\ncluster: {workers: {count: 8, cpus: 4}}")
    assert "asks for 36.25 CPUs" in sentence
    assert "has 32 (8 workers × 4)" in sentence
    sentence = refusal(b"resources: {predict: {gpus_per_actor: 1, actors: 3}}\ncluster: {workers: {count: 2, cpus: 4, gpus: 1}}")
    assert "asks for 3 GPUs (3 actors × 1)" in sentence
    sentence = refusal(b"resources: {preprocess: {actors: 9}}\ncluster: {head: {cpus: 4}}")
    assert "the cluster has 4 on the head, there are no workers" in sentence
    sentence = refusal(b"resources: {preprocess: {memory_per_actor: 9GiB}}\ncluster: {head: {cpus: 4}}")
    assert "the largest has 8 GiB of memory (the head, there are no workers)" in sentence


def test_labels_are_held_against_nodes_that_have_them():
    pool = {"actors": 2, "gpus_per_actor": 1, "gpu_type": "L4", "labels": {"zone": "a"}}
    resources = Resources.model_validate({"predict": pool})
    l4 = Node(4, 1, labels={"ray.io/accelerator-type": "L4", "zone": "a"})
    plain = Node(8, 4, labels={"ray.io/accelerator-type": "A100", "zone": "a"})
    check_demand(resources, [plain, l4, l4], where="3 nodes")
    assert resources.pools()[2].options["label_selector"] == {"zone": "a", "ray.io/accelerator-type": "L4"}
    with pytest.raises(ValueError, match=r"ask for a node labelled zone=a, ray.io/accelerator-type=L4, none of 2 nodes is"):
        check_demand(resources, [plain, plain], where="2 nodes")
    with pytest.raises(ValueError, match="1 of 2 predict actors find no node with 1 CPUs and 1 GPUs and zone=a, ray"):
        check_demand(resources, [plain, l4], where="2 nodes")


@pytest.mark.parametrize(
    ("resources", "workers", "words"),
    [
        (
            "{preprocess: {cpus_per_actor: 8}}",
            "{count: 4, cpus: 4}",
            "a preprocess actor asks for 8 CPUs of one node, the largest",
        ),
        (
            "{read: {cpus_per_task: 5}}",
            "{count: 4, cpus: 4}",
            "a read task asks for 5 CPUs of one node, the largest has 4 (4 workers)",
        ),
        (
            "{predict: {gpus_per_actor: 2}}",
            "{count: 4, cpus: 4, gpus: 1}",
            "asks for 2 GPUs and 1 CPUs of one node, the largest has 1",
        ),
        ("{predict: {gpus_per_actor: 1, cpus_per_actor: 5}}", "{count: 2, cpus: 4, gpus: 1}", "asks for 1 GPUs and 5 CPUs"),
        # 9 CPUs of 12, but each node holds one actor of 3, and 4 do not fit on 3 nodes; 0.6 of a GPU fits once on a GPU.
        (
            "{preprocess: {actors: 4, cpus_per_actor: 2.5}}",
            "{count: 3, cpus: 4}",
            "1 of 4 preprocess actors find no node with 2.5 CPUs",
        ),
        (
            "{predict: {actors: 3, gpus_per_actor: 0.6}}",
            "{count: 1, cpus: 8, gpus: 2}",
            "1 of 3 predict actors find no node with 1 CPUs and",
        ),
        (
            "{preprocess: {memory_per_actor: 9GiB}}",
            "{count: 2, cpus: 4, memory: 8GiB}",
            "a preprocess actor asks for 9 GiB of memory of one node, the largest has 8 GiB of memory (2 workers). "
            "Lower preprocess.memory_per_actor",
        ),
        (
            "{preprocess: {actors: 3, memory_per_actor: 5GiB}}",
            "{count: 2, cpus: 4, memory: 8GiB}",
            "1 of 3 preprocess actors find no node with 0.5 CPUs and 5 GiB of memory left",
        ),
        (
            "{predict: {memory_per_actor: 4TiB}}",
            "{count: 1, cpus: 4, memory: 16000MB}",
            "a predict actor asks for 4,096 GiB of memory of one node, the largest has 14.9 GiB of memory (1 worker)",
        ),
        (
            "{predict: {gpus_per_actor: 1.5}}",
            "{count: 1, cpus: 8, gpus: 2}",
            "gpus_per_actor is 1.5; required: 0, a part of one GPU",
        ),
    ],
)
def test_what_fits_on_no_node_is_refused_though_the_sum_is_there(resources: str, workers: str, words: str):
    assert words in refusal(f"resources: {resources}\ncluster: {{workers: {workers}}}".encode())


@pytest.mark.parametrize(
    "preprocess",
    ["actors: 9, cpus_per_actor: 0.1", "actors: 3, cpus_per_actor: 0.3", "actors: 1, cpus_per_actor: 0.9", "actors: 0"],
)
def test_what_fits_exactly_is_taken(preprocess: str):
    """In parts of 10,000: in binary 0.1 + 9 × 0.1 is less than 1, and 3 × 0.3 as well."""
    pools = f"{{read: {{cpus_per_task: 0.1}}, preprocess: {{{preprocess}}}, predict: {{actors: 4, gpus_per_actor: 0.5}}}}"
    assert parse_job(SIX_LINES + f"resources: {pools}\ncluster: {{workers: {{count: 1, cpus: 5, gpus: 2}}}}".encode())
    resources = Resources.model_validate({"preprocess": {"cpus_per_actor": 0.29}, "predict": {"cpus_per_actor": 0.58}})
    check_demand(resources, [Node(0.25 + 0.29 + 0.58)], where="1 node")
    over = {"read": {"cpus_per_task": 0.1}, "preprocess": {"cpus_per_actor": 2.7}, "predict": {"cpus_per_actor": 0.2}}
    assert Resources.model_validate(over).cpus > 3, "in binary"
    check_demand(Resources.model_validate(over), [Node(3)], where="1 node")


def fits(pools: list[Pool], nodes: list[Node]) -> bool:
    """By trial of everything: is there a place for each?"""
    pieces = [pool for pool in pools for _ in range(pool.size)]

    def place(at: int, free: list[tuple[float, list[float], float]]) -> bool:
        if at == len(pieces):
            return True
        pool = pieces[at]
        for number, (cpus, gpus, memory) in enumerate(free):
            able = [one for one, left in enumerate(gpus) if left >= min(pool.gpus, 1)][: max(1, int(pool.gpus))]
            if not nodes[number].has(pool.labels) or pool.cpus > cpus or pool.memory > memory or len(able) < pool.gpus:
                continue
            taken = [left - min(pool.gpus, 1) * (one in able) for one, left in enumerate(gpus)]
            rest = [*free[:number], (cpus - pool.cpus, taken, memory - pool.memory), *free[number + 1 :]]
            if place(at + 1, rest):
                return True
        return False

    return place(0, [(node.cpus, [1.0] * int(node.gpus), node.memory) for node in nodes])


HALVES = st.integers(1, 6).map(lambda number: number / 2)
LABELS = st.sampled_from([{}, {}, {"zone": "a"}])


@settings(max_examples=300)
@given(
    st.tuples(HALVES, st.integers(1, 2), st.integers(0, 2), LABELS, st.just(0)),
    st.tuples(HALVES, st.integers(0, 2), st.integers(0, 2), LABELS, st.just(0)),
    st.tuples(HALVES, st.integers(1, 2), st.integers(0, 2), LABELS, st.sampled_from([0, 0.5, 0.75, 1, 2])),
    st.lists(
        st.builds(
            Node,
            st.integers(1, 8),
            st.integers(0, 2),
            st.integers(0, 4).map(lambda gib: float(gib * 2**30)),
            st.sampled_from([{"zone": "a"}, {"zone": "b"}]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_what_is_taken_has_a_place_for_each(read: Any, preprocess: Any, predict: Any, nodes: list[Node]):
    pools = [
        Pool(name, size, cpus, gpus, memory * 2**30, labels)
        for name, (cpus, size, memory, labels, gpus) in (("read", read), ("preprocess", preprocess), ("predict", predict))
    ]

    class Wanted(Resources):
        def pools(self) -> Any:
            return tuple(pools)

    if not fits(pools, nodes):
        with pytest.raises(ValueError, match=r"^resources: "):
            check_demand(Wanted(), nodes, where="so many")
        return
    with nullcontext() if len(nodes) == 1 else suppress(ValueError):  # in rare cases another order would find room
        check_demand(Wanted(), nodes, where="so many")


def test_who_is_hardest_to_place_is_placed_first():
    here, elsewhere = Node(4, labels={"zone": "a"}), Node(4, labels={"zone": "b"})
    labelled = {"read": {"cpus_per_task": 3}, "preprocess": {"cpus_per_actor": 2, "labels": {"zone": "a"}}}
    check_demand(Resources.model_validate(labelled), [here, elsewhere], where="2 nodes")
    large = {"read": {"tasks": 2, "cpus_per_task": 1, "memory_per_task": "2GiB"}, "preprocess": {"cpus_per_actor": 4}}
    check_demand(Resources.model_validate(large), [Node(4, memory=2**31), Node(4, memory=2**33)], where="2 nodes")
    on_gpu = {"preprocess": {"cpus_per_actor": 3}, "predict": {"gpus_per_actor": 1, "cpus_per_actor": 2}}
    check_demand(Resources.model_validate(on_gpu), [Node(4, 1), Node(4)], where="2 nodes")
    with pytest.raises(ValueError, match=r"asks for 1 GPUs and 5 CPUs of one node, the largest has 1 and 4 \(2 nodes\)"):
        check_demand(
            Resources.model_validate({"predict": {"gpus_per_actor": 1, "cpus_per_actor": 5}}),
            [Node(16), Node(4, 1)],
            where="2 nodes",
        )
    with pytest.raises(ValueError, match=r"asks for 21 CPUs .*, the cluster has 20 on 2 nodes\. Lower"):
        check_demand(Resources.model_validate({"predict": {"cpus_per_actor": 20.25}}), [Node(16), Node(4)], where="2 nodes")


def test_precision_and_device_must_agree():
    assert "needs a GPU" in refusal(b"", SIX_LINES.replace(b"model/", b"model/, precision: float16"))
    assert "runs on CPUs" in refusal(
        b"resources: {predict: {gpus_per_actor: 1}}", SIX_LINES.replace(b"model/", b"model/, precision: int8")
    )
    measure = b"kind: evaluate\nname: x\ndata: {input: {uri: in/}}\noutput: {uri: out/}\n"
    for sources in (b"model: {uri: m, precision: float16}\n", b"model: {uri: m}\ncompare: {uri: n, precision: float16}\n"):
        assert "precision is float16, which needs a GPU. Set gpus to 1" in refusal(b"", measure + sources)
        assert parse_job(measure + sources + b"gpus: 1")
    assert parse_job(SIX_LINES.replace(b"model/", b"model/, precision: float16") + b"resources: {predict: {gpus_per_actor: 0.5}}")


@pytest.mark.parametrize("lane", ["gpu", "both"])
def test_a_lane_of_the_gpu_needs_one_and_a_cpu_beside_it(lane: str):
    base, gpu = SIX_LINES + f"decode_lane: {lane}\n".encode(), b"predict: {gpus_per_actor: 0.5}"
    assert f"decode_lane is {lane}, which needs a GPU" in refusal(b"", base)
    assert parse_job(base + b"resources: {" + gpu + b"}")
    alone = b"resources: {preprocess: {actors: 0}, " + gpu + b"}"
    if lane == "gpu":  # what is not for the GPU is decoded where it is read
        assert parse_job(base + alone)
    else:
        assert "resources.preprocess.actors is 0; required: 1 or more" in refusal(alone, base)


def test_auto_is_the_fastest_of_a_plain_install():
    on_cpu, on_gpu = (
        {precision: engine_for("auto", precision, gpu=gpu) for precision in get_args(Precision)} for gpu in (False, True)
    )
    assert on_cpu == {"float32": "onnxruntime", "float16": "torch", "bfloat16": "torch", "int8": "onnxruntime"}
    assert on_gpu == {"float32": "torch", "float16": "torch", "bfloat16": "torch", "int8": "onnxruntime"}


def test_keep_cannot_shadow_the_output():
    assert "input.keep names label" in refusal(b"", SIX_LINES.replace(b"photos/", b"photos/, keep: [label]"))


def test_date_is_filled_or_asked_for(tmp_path):
    path = tmp_path / "j.yaml"
    path.write_bytes(SIX_LINES.replace(b"photos/", b"'photos/{date}/'"))
    assert load_job(path, date="2026-11-01").input.uris == ("photos/2026-11-01/",)
    with pytest.raises(JobError, match="--date"):
        load_job(path)
    with pytest.raises(JobError, match="--date is ''; required: YYYY-MM-DD"):
        load_job(path, date="")


def test_date_is_filled_in_every_uri_of_every_kind():
    asked = b"""
kind: finetune
name: nightly
data: {train: {uri: ["in/{date}/", "more/{date}/"]}, validation: {uri: "held/{date}/"}, label: "{date}"}
model: {uri: "models/{date}/"}
output: {uri: "out/{date}/"}
"""
    job = parse_job(asked, date="2026-11-01")
    assert isinstance(job, FinetuneJob)
    assert job.data.train.uris == ("in/2026-11-01/", "more/2026-11-01/")
    uris = [item.uri for item in (job.data.validation, job.model, job.output) if item is not None]
    assert uris == ["held/2026-11-01/", "models/2026-11-01/", "out/2026-11-01/"]
    assert job.data.label == "{date}", "no URI"
    with pytest.raises(JobError, match=r"^j: out/\{date\}/ contains \{date\}, which needs a date\. Give --date"):
        parse_job(asked, name="j")


def test_unreadable_file(tmp_path):
    with pytest.raises(JobError, match="No such file"):
        load_job(tmp_path / "absent.yaml")


def test_units_are_what_they_are_called():
    assert [in_seconds(text) for text in ("2s", "2m", "2min", "1.5h", "2d")] == [2, 120, 120, 5400, 172_800]
    assert [in_bytes(f"1.5{unit}") for unit in ("KB", "MB", "GB", "TB")] == [1500, 1_500_000, 1_500_000_000, 1_500_000_000_000]
    assert [in_bytes(f"1.5{unit}") for unit in ("KiB", "MiB", "GiB", "TiB")] == [1536 * 1024**power for power in range(4)]
    assert [in_pixels(text) for text in ("2px", "1.5MP", "1.5GP")] == [2, 1_500_000, 1_500_000_000]
    assert [in_bytes(text) for text in ("1.7B", "0.0006KiB")] == [2, 1]
    with pytest.raises(ValueError, match="a number with a unit"):
        in_bytes("٣GiB")


@pytest.mark.parametrize(("share", "taken"), [("0%", True), ("100%", True), ("100.1%", False)])
def test_a_share_is_none_of_it_up_to_all(share: str, taken: bool):
    if taken:
        parse_job(SIX_LINES + f"limits: {{max_failed: {share}}}".encode())
    else:
        assert "0% to 100%" in refusal(f"limits: {{max_failed: {share}}}".encode())


@given(st.integers(min_value=1, max_value=2**50))
def test_quantities_round_trip(number: int):
    assert quantity(_BYTES, "8GiB")(text(_BYTES)(number)) == number


@given(st.floats(min_value=0, max_value=1))
def test_percentages_round_trip(share: float):
    assert in_percent(_percent(share)) == share


@pytest.mark.parametrize("thousandths", range(1001))
def test_a_percentage_is_the_number_that_it_says_and_exactly_the_limit_is_not_over_it(thousandths: int):
    share = in_percent(f"{thousandths // 10}.{thousandths % 10}%")
    assert share == float(f"{thousandths / 1000:.3f}")
    ends = [(1000, thousandths), (1000, thousandths + 1), (7000, 7 * thousandths), (7000, 7 * thousandths + 1)]
    codes = [exit_code((), Totals(units=1, rows_in=rows, failed=failed), left=0, limit=share) for rows, failed in ends]
    assert codes == [0, 4, 0, 4]
