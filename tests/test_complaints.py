"""What a wrong job file is told: whole sentences, each with what was got, what is required, what to do."""

from __future__ import annotations

import pytest

from pipeline.errors import JobError
from pipeline.job.jobfile import parse_job
from pipeline.spec import Job

LABEL = {"name": "name: n", "input": "input: {uri: in/}", "model": "model: {uri: m/}", "output": "output: {uri: out/}"}
FINETUNE = {"kind": "kind: finetune", "name": "name: n", "data": "data: {train: {uri: in/}}", "output": "output: {uri: out/}"}
EVALUATE = {"kind": "kind: evaluate", "name": "name: n", "model": "model: {uri: m/}", "data": "data: {input: {uri: in/}}"}
BASES = {"label": LABEL, "finetune": FINETUNE, "evaluate": EVALUATE | {"output": "output: {uri: out/}"}}
DNS = "1 to 63 lower case letters, digits and dashes, a letter or a digit at either end. Change it."
VALUE = "at most 63 letters, digits, dots, dashes and underscores, a letter or a digit at either end. Change it."
NAME = "1 to 50 lower case letters, digits and dashes, no dash at either end. Change it."
FIELDS = "kind, name, input, model, output, decode, decode_lane, resources, cluster, limits, schedule, publish, notify"


def complaint(kind: str, lines: str) -> str:
    """What a sound job is told when these lines stand in the place of its own, or behind them."""
    base = dict(BASES[kind])
    for line in lines.splitlines():
        base[line.partition(":")[0]] = line
    with pytest.raises(JobError) as caught:
        parse_job("\n".join(base.values()).encode(), name="j")
    return str(caught.value)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("notify: {}", "j:5: notify: it names nobody; required: command or webhook. Give one."),
        ("notify: 5", "j:5: notify is 5; required: a mapping. It holds when, command, webhook."),
        ("notify: {command: x}", "j:5: notify.command is 'x'; required: a list. Change it."),
        ("notify: {command: [a, '']}", "j:5: notify.command.1 is ''; required: one character or more. Change it."),
        (
            "notify: {webhook: ftp://x}",
            "j:5: notify.webhook is 'ftp://x'; required: an https:// URL without credentials; NIGHTLABEL_WEBHOOK_TOKEN holds "
            "the secret. Change it.",
        ),
        (
            "publish: {format: iceberg}",
            "j:5: publish: format is iceberg and table is missing; required: namespace.table. Add it.",
        ),
        (
            "publish: {format: delta, table: a.b}",
            "j:5: publish: table is a.b and format is delta; required: iceberg for a table by name. Drop one.",
        ),
        ("publish: {format: hudi}", "j:5: publish.format is 'hudi'; required: 'delta' or 'iceberg'. Change it."),
        ("publish: {}", "j:5: publish.format is missing, it is required. Add it; jobs/README.md says what it holds."),
        (
            "publish: {format: delta}\noutput: {uri: out/, probabilities: true}",
            "j: publish: Delta and Iceberg have no float16, as output.probabilities are. Drop one of the two.",
        ),
        (
            "model: {uri: m/, precision: int8, engine: torch}",
            "j:3: model: precision is int8; required for engine torch: float32, float16, bfloat16. Take one of these, or engine "
            "auto.",
        ),
        (
            "model: {uri: m/, precision: float16}",
            "j: model: precision is float16, which needs a GPU. Set resources.predict.gpus_per_actor, or take bfloat16.",
        ),
        (
            "model: {uri: m/, precision: half}",
            "j:3: model.precision is 'half'; required: 'float32', 'float16', 'bfloat16' or 'int8'. Change it.",
        ),
        (
            "model: {uri: m/, digest: abc}",
            "j:3: model.digest is 'abc'; required: sha256: and 64 digits of 0-9 and a-f. Change it.",
        ),
        ("name: A_b", f"j:1: name is 'A_b'; required: {NAME}"),
        ("name: ''", f"j:1: name is ''; required: {NAME}"),
        ("name: 5", "j:1: name is 5; required: text. Change it."),
        ("name: [a]", "j:1: name is ['a']; required: text. Change it."),
        ("input: in/", "j:2: input is 'in/'; required: a mapping. Write input: {uri: 'in/'}."),
        ("model: ' '", "j:3: model is ' '; required: a mapping. Write model: {uri: ' '}."),
        ("model: {uri: ' '}", "j:3: model.uri is ' '; required: a path or a URI that is not blank. Change it."),
        (
            "resources: {read: two}",
            "j:5: resources.read is 'two'; required: a mapping. It holds tasks, cpus_per_task, memory_per_task, labels.",
        ),
        ("input: {uri: []}", "j:2: input.uri is []; required: a URI, or a list of one or more. Change it."),
        ("input: {uri: [5]}", "j:2: input.uri.0 is 5; required: text. Change it."),
        ("input: {uri: [a, '']}", "j:2: input.uri.1 is ''; required: one character or more. Change it."),
        (
            "input: {uri: in/, s3: {region: eu west}}",
            "j:2: input.s3.region is 'eu west'; required: a region such as eu-central-1: lower case letters, digits and dashes. "
            "Change it.",
        ),
        (
            "input: {uri: in/, s3: {anonymous: maybe}}",
            "j:2: input.s3.anonymous is 'maybe'; required: true or false. Change it.",
        ),
        ("input: {uri: in/, keep: [cls, cls]}", "j:2: input: keep names one twice; required: each once. Drop one."),
        ("input: {uri: in/, keep: [label]}", "j: input.keep names label, which the output has already. Rename or drop it."),
        (
            "input: {uri: in/, keep: [Fingerprint]}\noutput: {uri: out/, layout: hive}",
            "j: input.keep names Fingerprint, which output.layout: hive makes a column of its own. Rename or drop it.",
        ),
        ("resources: {read: {tasks: 0}}", "j:5: resources.read.tasks is 0; required: 1 or more. Change it."),
        ("resources: {read: {tasks: 1.5}}", "j:5: resources.read.tasks is 1.5; required: a whole number. Change it."),
        ("resources: {read: {tasks: true}}", "j:5: resources.read.tasks is true; required: a whole number. Change it."),
        (
            "resources: {read: {tasks: 3000000000}}",
            "j:5: resources.read.tasks is 3000000000; required: less than 2147483648. Change it.",
        ),
        (
            "resources: {read: {cpus_per_task: 0}}",
            "j:5: resources.read.cpus_per_task is 0; required: 0.0001 or more. Change it.",
        ),
        (
            "resources: {predict: {gpus_per_actor: 1.5}}",
            "j:5: resources.predict.gpus_per_actor is 1.5; required: 0, a part of one GPU, or a whole number of them. Change it.",
        ),
        (
            "resources: {predict: {cpus_per_actor: .nan}}",
            "j:5: resources.predict.cpus_per_actor is nan; required: a finite number. Change it.",
        ),
        (
            "resources: {predict: {gpu_type: L 4}}",
            f"j:5: resources.predict.gpu_type is 'L 4'; required: {VALUE}",
        ),
        (
            "cluster: {workers: {count: 20000, cpus: 1}}",
            "j:5: cluster.workers.count is 20000; required: 10000 or less. Change it.",
        ),
        (
            "cluster: {kubernetes: {image: 'A b'}}",
            "j:5: cluster.kubernetes.image is 'A b'; required: an image's name such as ghcr.io/you/nightlabel, with @sha256: and "
            "its digest. Change it.",
        ),
        ("cluster: {kubernetes: {namespace: A_b}}", f"j:5: cluster.kubernetes.namespace is 'A_b'; required: {DNS}"),
        ("cluster: {kubernetes: {secrets: [A]}}", f"j:5: cluster.kubernetes.secrets.0 is 'A'; required: {DNS}"),
        (
            "cluster: {kubernetes: {labels: {a b: x}}}",
            f"j:5: cluster.kubernetes.labels.a b is 'a b'; required: a label's name such as zone or example.com/zone: {VALUE}",
        ),
        ("cluster: {kubernetes: {labels: {a: x y}}}", f"j:5: cluster.kubernetes.labels.a is 'x y'; required: {VALUE}"),
        ("limits: {max_failed: 101%}", "j:5: limits.max_failed is '101%'; required: 0% to 100%. Change it."),
        (
            "limits: {max_failed: 1}",
            "j:5: limits.max_failed is 1; required: a number with a unit of %, such as 0.1%. Change it.",
        ),
        (
            "schedule: {cron: daily}",
            "j:5: schedule.cron is 'daily'; required: five cron fields, such as \"0 2 * * *\". Change it.",
        ),
        (  # no secret stands before its @
            "schedule: {cron: '@daily'}",
            "j:5: schedule.cron is '@daily'; required: five cron fields, such as \"0 2 * * *\". Change it.",
        ),
        (
            "schedule: {cron: 0 2 * * *, catch_up: 800000d}",
            "j:5: schedule.catch_up is '800000d'; required: 1d to 366d. Change it.",
        ),
        (
            "schedule: {cron: 0 2 * * *, catch_up: 12h}",  # no day, of which a run that is submitted would look back
            "j:5: schedule.catch_up is '12h'; required: 1d to 366d. Change it.",
        ),
        ("decode: quick", "j:5: decode is 'quick'; required: 'exact' or 'fast'. Change it."),
        ("output: {uri: null}", "j:4: output.uri is null; required: text. Change it."),
        ("decode: true", "j:5: decode is true; required: 'exact' or 'fast'. Change it."),
        (
            "output: {uri: ~/labels}",
            "j:4: output.uri is '~/labels'; required: a path from / or from here; ~ means a home to a shell alone, and ./~ a "
            "folder of that name. Change it.",
        ),
        ("5: x", f"j: unknown field 5. Known here: {FIELDS}."),
        (
            "colour: x\nlimts: {}\nnotify: {}",
            "j:7: notify: it names nobody; required: command or webhook. Give one.\n"
            "j:5: unknown field colour. Did you mean cluster?\n"
            "j:6: unknown field limts. Did you mean limits?",
        ),
        (
            "resources: {predict: {tint: 3}, read: {tasks: 0}}",
            "j:5: resources.read.tasks is 0; required: 1 or more. Change it.\n"
            "j:5: unknown field resources.predict.tint. Known here: actors, cpus_per_actor, gpus_per_actor, gpu_type, "
            "memory_per_actor, labels, batch_size.",
        ),
    ],
)
def test_a_job_that_labels(lines: str, told: str):
    assert complaint("label", lines) == told


@pytest.mark.parametrize(
    "uri", ["in/{day}/", "in/{Date}/", "s3://bucket/{date:%Y}/", "in/{{date}}/", "${DATE}", "{date}/{ name }/"]
)
@pytest.mark.parametrize("field", ["input", "model", "output"])
def test_a_placeholder_that_is_none_is_no_folder(field: str, uri: str):
    need = "no other placeholder than {date}; in input.uri, a brace that is meant is written [{]"
    assert complaint("label", f"{field}: {{uri: '{uri}'}}").endswith(f" {field}.uri is '{uri}'; required: {need}. Change it.")


@pytest.mark.parametrize(
    "name", ["{date}", "{6F9619FF-8B86-D011-B42D-00C04FC964FF}", "[{]day}", "{a,b}", "{000..099}", "{}", "a{b"]
)
def test_a_name_with_braces_is_a_name(name: str):
    job = parse_job(
        "\n".join([LABEL["name"], f"input: {{uri: 'in/{name}/'}}", LABEL["model"], LABEL["output"]]).encode(), date="2026-11-01"
    )
    assert isinstance(job, Job)
    assert job.input.uri == f"in/{name}/".replace("{date}", "2026-11-01")


@pytest.mark.parametrize(
    ("cron", "need"),
    [
        *[(cron, 'five cron fields, such as "0 2 * * *"') for cron in ("0 2 * *", "0 0 2 * * *", "@every 1h")],
        *[
            (f"{minute} 2 * * *", "minutes of 0 to 59")
            for minute in ("60", "-1", "5-1", "*/0", "1,,2", "1/2/3", "*-5", "9999999")
        ],
        *[(f"0 {hour} * * *", "hours of 0 to 23") for hour in ("24", "25", "noon", "2h", "٣")],
        *[(f"0 2 {day} * *", "days of the month of 1 to 31") for day in ("0", "32", "L", "15W")],
        *[(f"0 2 * {month} *", "months of 1 to 12 or JAN to DEC") for month in ("0", "13", "JUNE", "ABC", "*-3")],
        *[
            (f"0 2 * * {day}", "days of the week of 0 to 6 or SUN to SAT")
            for day in ("7", "MOO", "MONDAY", "FRI-MON", "1#1", "5L")
        ],
        *[(f"0 2 {day} {months} *", "a day that one of its months has") for day, months in (("31", "2"), ("30-31", "FEB"))],
        *[(f"0 2 31 {months} ?", "a day that one of its months has") for months in ("4-6/2", "2,APR,6")],
    ],
)
def test_a_schedule_that_kubernetes_refuses_or_never_meets(cron: str, need: str):
    """Its own dialect: robfig/cron, where Sunday is not 7, and neither L nor # is known."""
    told = complaint("label", f"schedule: {{cron: '{cron}'}}")
    assert told.startswith(f"j:5: schedule.cron is '{cron}'; required: {need}")
    assert told.endswith(". Change it.")


@pytest.mark.parametrize("cron", ["0  2 * * *", "*/1,5-9/2 ? 1-31/2 jan-Mar,DEC sun", "0 2 31 2 MON", "0 2 29 2 *"])
def test_a_schedule_that_kubernetes_takes(cron: str):
    job = parse_job("\n".join([*LABEL.values(), f"schedule: {{cron: '{cron}'}}"]).encode())
    assert isinstance(job, Job)
    assert job.schedule is not None
    assert job.schedule.cron == cron


@pytest.mark.parametrize(
    ("kind", "lines", "told"),
    [
        (
            "finetune",
            "training: {epochs: 3, warmup_epochs: 3.5}",
            "j:5: training: warmup_epochs is 3.5 of 3 epochs; required: no more. Lower it.",
        ),
        ("finetune", "training: {mixup: 1.e-300}", "j:5: training.mixup is 1e-300; required: 0, or 0.01 to 1000. Change it."),
        ("finetune", "training: {cutmix: 0.001}", "j:5: training.cutmix is 0.001; required: 0, or 0.01 to 1000. Change it."),
        (
            "finetune",
            "data: {train: {uri: in/}, classes: [cat, ' ']}",
            "j:3: data.classes.1 is ' '; required: a name that is not blank. Change it.",
        ),
        (
            "label",
            "input: {uri: s3://photos/, s3: {region: '-'}}",
            "j:2: input.s3.region is '-'; required: a region such as eu-central-1: lower case letters, digits and dashes. "
            "Change it.",
        ),
        (
            "label",
            "output: {uri: s3://labels/, s3: {kms_key: alias/labels, encryption: AES256}}",
            "j:4: output.s3: kms_key is set and encryption is AES256; required: aws:kms or aws:kms:dsse beside a key. "
            "Set it, or leave the key out.",
        ),
        ("finetune", "training: {learning_rate: 0}", "j:5: training.learning_rate is 0; required: more than 0. Change it."),
        ("finetune", "training: {label_smoothing: 1}", "j:5: training.label_smoothing is 1; required: less than 1. Change it."),
        ("finetune", "training: {freeze: 6}", "j:5: training.freeze is 6; required: 5 or less. Change it."),
        (
            "finetune",
            "training: {augment: {crop: [1, 1, 1]}}",
            "j:5: training.augment.crop is [1, 1, 1]; required: a list of at most 2. Change it.",
        ),
        ("finetune", "network: {depth: 20}", "j:5: network.depth is 20; required: 18, 34, 50, 101 or 152. Change it."),
        (
            "finetune",
            "data: {train: {uri: in/}, validation_share: 100%}",
            "j:3: data.validation_share is '100%'; required: 0.01% to 99.99%. Change it.",
        ),
        (
            "finetune",
            "data: {train: {uri: in/}, label: null}",
            "j: data.label is null, so there is nothing to learn; required: the name of the labels. Set it, or distill.",
        ),
        (
            "evaluate",
            "data: {input: {uri: in/, format: images}}",
            "j:4: data: label is cls, and loose images have no sidecars; required: folder, the one that each lies in. Set label: "
            "folder, or pack them with their labels.",
        ),
        (
            "evaluate",
            "compare: {uri: m/, precision: float16}",
            "j: compare: precision is float16, which needs a GPU. Set gpus to 1, or take bfloat16.",
        ),
        (
            "evaluate",
            "compare: {uri: m/, precision: bfloat16, engine: onnxruntime}",
            "j:6: compare: precision is bfloat16; required for engine onnxruntime: float32, int8. Take one of these, or engine "
            "auto.",
        ),
    ],
)
def test_jobs_of_other_kinds(kind: str, lines: str, told: str):
    assert complaint(kind, lines) == told


@pytest.mark.parametrize("line", ["input: {uri: in/{date}/}", "input: {uri: [in/s02?.tar]}", "input: {uri: *.tar}"])
def test_text_that_yaml_takes_for_its_own_wants_quotation_marks(line: str):
    told = complaint("label", line)
    assert told.startswith("j:2: expected ")
    assert told.endswith("[, *, ?, % or : in it stands in quotation marks, such as 'in/{date}/'.")


@pytest.mark.parametrize(
    ("text", "got"), [("", "is empty"), ("- a", "is a list"), ("hello", "is one value"), ("7", "is one value")]
)
def test_a_file_that_is_no_mapping(text: str, got: str):
    with pytest.raises(JobError) as caught:
        parse_job(text.encode(), name="j")
    assert str(caught.value) == f"j: {got}; required: a mapping with kind, name, input, model, output. See jobs/README.md."


@pytest.mark.parametrize(
    "tag", ['!!int ""', '!!float ""', "!!bool foo", "!!timestamp foo", "!mine x", "!!map {a: b}", "!!set {a}"]
)
def test_a_tag_is_refused_with_its_line(tag: str):
    told = f"j:5: a tag ({tag.partition(' ')[0]}) is not allowed; required: plain YAML. Mend that line."
    assert complaint("label", f"decode: {tag}") == told


def test_what_is_wrong_on_one_day_alone_is_a_sentence_too():
    text = b"name: n\ninput: {uri: 'in/{date}/', format: parquet}\nmodel: {uri: m/}\noutput: {uri: in/2026-11-01/out/}\n"
    parse_job(text, date="2026-11-02")
    with pytest.raises(JobError, match=r"^j: output\.uri is .*, inside of the input: .* Take another output\.uri\.$"):
        parse_job(text, name="j", date="2026-11-01")
