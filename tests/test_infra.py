"""infra/: every file before its reader, or what stands for it: hadolint, the schema of compose, Kubernetes, Ray, a real S3."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
import yaml
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from conftest import ROOT
from seaweed import NOBODIES, Seaweed

INFRA = ROOT / "infra"
SCRIPTS = Path(sysconfig.get_path("scripts"))
FILL = {
    "MY_ACCOUNT": "111122223333",
    "MY_REGION": "eu-central-1",
    "MY_BUCKET": "bucket",
    "MY_ADDRESS": "192.0.2.7",
    "MY_IMAGE": "ami-0123456789abcdef0",
}

#: What has its own test, below or in test_monitoring.py.
LISTED = """
README.md Dockerfile Dockerfile.dockerignore compose.yaml kuberay-values.yaml
aws/bucket-policy.json aws/ec2-trust.json aws/head-policy.json aws/lifecycle.json aws/ray-cluster.yaml
kubernetes/namespace.yaml kubernetes/pushgateway.yaml
monitoring/alerts.yaml monitoring/alerts.test.yaml monitoring/prometheus.yaml
monitoring/dashboard.json monitoring/grafana-dashboards.yaml monitoring/grafana-datasource.yaml
"""
CHECKED = LISTED.split()

#: The top level of the values of the chart kuberay-operator, 1.7.0.
CHART = """
nameOverride fullnameOverride componentOverride replicas image imagePullSecrets nodeSelector priorityClassName labels
annotations affinity tolerations serviceAccount logging batchScheduler configuration featureGates metrics operatorCommand
useKubernetesProxy leaderElectionEnabled reconcileConcurrency kubeClient rbacEnable crNamespacedRbacEnable
singleNamespaceInstall watchNamespace env resources livenessProbe readinessProbe podSecurityContext securityContext service
"""


def filled(name: str, **values: str) -> str:
    """A file of infra/aws with the README's placeholders replaced."""
    text = (INFRA / "aws" / name).read_text()
    for word, value in (FILL | values).items():
        text = text.replace(word, value)
    return text


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text()))


def succeed(*command: str | Path, **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_checked():
    assert {str(path.relative_to(INFRA)) for path in INFRA.rglob("*") if path.is_file()} == set(CHECKED)


@pytest.mark.parametrize("name", CHECKED)
def test_images_go_by_short_names(name):
    """Where they come from is each one's own choice."""
    assert not re.search(r"ghcr\.|quay\.|gcr\.|docker\.io|\.dkr\.|pypi\.|pytorch\.org", (INFRA / name).read_text())


def dockerfile() -> list[str]:
    """Its instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (INFRA / "Dockerfile").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_hadolint_has_no_objection():
    succeed(SCRIPTS / "hadolint", "--failure-threshold", "style", INFRA / "Dockerfile")


def test_what_the_image_copies_is_there_and_nothing_else_is_sent():
    copies = [shlex.split(line)[1:-1] for line in dockerfile() if line.startswith("COPY ") and "--from" not in line]
    names = {name.removeprefix("./") for names in copies for name in names}
    assert all((ROOT / name).exists() for name in names)
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == names


def test_the_image_runs_as_nobody_in_particular():
    last = dockerfile()[dockerfile().index("FROM ${BASE}") :]
    assert "USER 1000:1000" in last
    assert not [line for line in last if line.startswith("RUN") and "pip" in line]


def test_uv_takes_the_images_own_commands(tmp_path):
    """`uv sync` of the Dockerfile on what it copies; dry and without network, for a build takes 12 minutes and 36 GB."""
    uv = shutil.which("uv", path=f"{os.environ['PATH']}:{ROOT}/.uv/bin")
    if uv is None:
        pytest.skip("uv is absent")
    for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE", "pipeline/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {"UV_PROJECT_ENVIRONMENT": str(tmp_path / "env"), "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_OFFLINE": "1"}
    syncs = [shlex.split(line)[2:] for line in dockerfile() if line.startswith("RUN uv sync")]
    assert [words[0] for words in syncs] == ["sync", "sync"]
    for words in syncs:
        succeed(uv, *words, "--dry-run", "--python", sys.executable, cwd=tmp_path, env={"HOME": str(tmp_path), **environment})


def test_compose_is_compose_and_only_on_loopback():
    succeed(SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")
    content = documents("compose.yaml")[0]
    published = [port for service in content["services"].values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for service in content["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in content["volumes"] or (INFRA / source).exists(), volume


def test_the_commands_of_compose_are_words_that_ray_and_seaweedfs_know():
    from ray.scripts.scripts import healthcheck, start

    services = documents("compose.yaml")[0]["services"]
    cpus = [start.make_context("start", services[name]["command"][2:]).params["num_cpus"] for name in ("head", "worker")]
    assert cpus == [0, 2]
    healthcheck.make_context("health-check", services["head"]["healthcheck"]["test"][3:])
    known = subprocess.run([SCRIPTS / "weed", "help", "server"], capture_output=True, text=True, check=False)
    flags = set(re.findall(r"^  (-\S+)", known.stdout + known.stderr, re.MULTILINE))
    assert {word.split("=")[0] for word in services["s3"]["command"][1:]} <= flags


def blocks(kind: str) -> list[str]:
    """What stands between fences of that kind in infra/README.md."""
    return re.findall(rf"```{kind}\n(.*?)```", (INFRA / "README.md").read_text(), re.DOTALL)


def test_the_readmes_first_job_fits_the_laptops_cluster(tmp_path):
    from pipeline.job.jobfile import load_label_job

    path = tmp_path / "job.yaml"
    path.write_text(blocks("yaml")[0])
    worker = documents("compose.yaml")[0]["services"]["worker"]
    assert load_label_job(path).resources.cpus <= 2 * worker["deploy"]["replicas"]


def test_two_nights_of_the_readmes_job_fit_the_namespace(tmp_path):
    from pipeline.job.jobfile import load_label_job
    from pipeline.kube.render import RenderOptions, render

    nightly = yaml.safe_load((ROOT / "jobs/nightly-products.yaml").read_text())
    for section, fields in yaml.safe_load(blocks("yaml")[1]).items():
        nightly[section] |= fields
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(nightly))
    job = load_label_job(path, date="2026-11-01")
    things = render(job, path.read_text(), RenderOptions("rayjob", "2026-11-01"))
    assert {thing["metadata"]["namespace"] for thing in things} == {"labelling"}
    spec = things[-1]["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups] + [spec["submitterPodTemplate"]["spec"]]
    accounts = {document["metadata"]["name"] for document in documents("kubernetes/namespace.yaml")[1:2]}
    assert {pod["serviceAccountName"] for pod in pods} == accounts
    quota = documents("kubernetes/namespace.yaml")[2]["spec"]["hard"]
    for name in ("cpu", "memory", "nvidia.com/gpu"):
        night = sum(_amount(pod["containers"][0]["resources"]["requests"].get(name, "0")) for pod in pods)
        assert 2 * night <= _amount(quota[f"requests.{name}"]) < 3 * night


def _amount(text: str) -> float:
    """A quantity of Kubernetes, as far as they occur here."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", text).groups()
    return float(number) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30}[unit]


def test_the_readmes_command_fills_every_file_in(tmp_path):
    for name in ("infra", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = blocks("sh")[1]
    command = text[text.index("mkdir") :]
    succeed("bash", "-euc", command, cwd=tmp_path, env=FILL | {"PATH": os.environ["PATH"]})
    for path in (INFRA / "aws").iterdir():
        assert "MY_" not in (tmp_path / "out/aws" / path.name).read_text().replace("begins with MY_", "")
    job = yaml.safe_load((tmp_path / "out/nightly.yaml").read_text())
    policy = (tmp_path / "out/aws/bucket-policy.json").read_text()
    for section, field in (("input", "photos"), ("model", "models"), ("output", "labels")):
        assert job[section]["uri"].startswith(f"s3://bucket/{field}/")
        assert f"arn:aws:s3:::bucket/{field}/*" in policy


def test_the_bucket_is_made_in_every_region():
    """us-east-1 refuses a LocationConstraint, every other region demands it; `aws s3 mb` knows which."""
    commands = "".join(blocks("sh"))
    assert "aws s3 mb s3://$MY_BUCKET\n" in commands
    assert "LocationConstraint" not in commands


@pytest.mark.parametrize("name", ["kubernetes/namespace.yaml", "kubernetes/pushgateway.yaml"])
def test_kubernetes_takes_it(name):
    for document in documents(name):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        assert document["metadata"].get("namespace", document["metadata"]["name"]) == "labelling"


def test_the_namespace_is_closed_but_for_what_is_named():
    policies = {document["metadata"]["name"]: document["spec"] for document in documents("kubernetes/namespace.yaml")[4:]}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    rules = [rule for spec in policies.values() for rule in spec.get("ingress", ())]
    assert all("from" in rule for rule in rules)


def test_kuberay_values_are_the_charts():
    values = documents("kuberay-values.yaml")[0]
    assert set(values) <= set(CHART.split())
    assert values["watchNamespace"] == ["labelling"]
    assert {"name": "RayCronJob", "enabled": True} in values["featureGates"]
    container = {"name": "operator", "image": "operator", "resources": values["resources"]}
    spec = {"containers": [container], "securityContext": values["podSecurityContext"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_ray_takes_the_cluster_file_and_ec2_its_nodes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(filled("ray-cluster.yaml")))
    validate_config(prepared)
    service = botocore.session.get_session().get_service_model("ec2")
    request = service.operation_model("RunInstances").input_shape
    for node in prepared["available_node_types"].values():
        report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), report.generate_report()
        assert node["node_config"]["InstanceType"] in service.shape_for("InstanceType").enum
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_the_cluster_file_brings_what_the_nightly_job_asks_for():
    from pipeline.job.jobfile import load_label_job

    workers = load_label_job(ROOT / "jobs/nightly-products.yaml", date="2026-11-01").cluster.workers
    worker = yaml.safe_load(filled("ray-cluster.yaml"))["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["resources"]) == (workers.count, {"CPU": workers.cpus, "GPU": workers.gpus})


def statements(name: str) -> list[dict[str, Any]]:
    policy = json.loads(filled(name))
    assert policy["Version"] == "2012-10-17"
    return policy["Statement"]


def test_the_heads_rights_are_operations_of_ec2_and_reach_its_own_instances_only():
    operations = botocore.session.get_session().get_service_model("ec2").operation_names
    granted = [(action, rule) for rule in statements("head-policy.json") for action in _list(rule["Action"])]
    assert {action.removeprefix("ec2:") for action, _ in granted} - set(operations) == {"iam:PassRole"}
    (passing,) = [rule for action, rule in granted if action == "iam:PassRole"]
    assert passing["Resource"] == "arn:aws:iam::111122223333:role/nightlabel-worker"
    assert not [action for action, rule in granted if rule["Resource"] == "*" and "Describe" not in action]


def head_may(action: str, context: dict[str, str]) -> bool:
    """May the head do that to an instance, by its policy? `context` are the keys of conditions that EC2 fills in."""
    rules = [rule for rule in statements("head-policy.json") if action in _list(rule["Action"])]
    assert all(rule["Effect"] == "Allow" and set(rule.get("Condition", {})) <= {"StringEquals"} for rule in rules)
    conditions = [rule.get("Condition", {}).get("StringEquals", {}) for rule in rules if "instance/*" in str(rule["Resource"])]
    return any(wanted.items() <= context.items() for wanted in conditions)


def test_the_head_makes_no_strangers_instance_its_own():
    """Ray names instances in the request that starts them, and tags them again as they come up (its node_provider.py)."""
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    key, own = f"ec2:ResourceTag/{TAG_RAY_CLUSTER_NAME}", yaml.safe_load(filled("ray-cluster.yaml"))["cluster_name"]
    assert head_may("ec2:CreateTags", {"ec2:CreateAction": "RunInstances"})
    assert not head_may("ec2:TerminateInstances", {"ec2:CreateAction": "RunInstances"})
    for action in ("ec2:CreateTags", "ec2:TerminateInstances"):
        assert head_may(action, {key: own})
        assert not head_may(action, {key: "another"})
        assert not head_may(action, {})


def test_only_ec2_may_take_the_roles():
    (rule,) = statements("ec2-trust.json")
    assert rule == {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_labels_are_created_under_a_condition_and_over_tls():
    """The two statements that the server below does not know, as they must stand."""
    rules = {rule["Sid"]: rule for rule in statements("bucket-policy.json")}
    assert rules["CreateLabels"]["Condition"] == {"Null": {"s3:if-none-match": "false"}}
    tls = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Condition": {"Bool": {"aws:SecureTransport": "false"}}}
    assert tls.items() <= rules["OnlyOverTls"].items()
    assert rules["OnlyOverTls"]["Resource"] == ["arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"]


def guarded_bucket(s3: Seaweed, *more: dict[str, Any]) -> str:
    """A bucket with objects and the policy, less what the server has not: the header as a condition, TLS; its roles are users."""
    name = s3.bucket()
    policy = json.loads(filled("bucket-policy.json", MY_BUCKET=name, MY_ACCOUNT="000000000000").replace(":role/", ":user/"))
    rules = [
        {key: rule[key] for key in rule if key != "Condition"} for rule in policy["Statement"] if rule["Sid"] != "OnlyOverTls"
    ]
    rules += [{**rule, "Resource": f"arn:aws:s3:::{name}/*"} for rule in more]
    s3.client.put_bucket_policy(Bucket=name, Policy=json.dumps(policy | {"Statement": rules}))
    for key in ("photos/x.tar", "models/m", "labels/l.parquet", "payroll/p"):
        s3.put(f"s3://{name}/{key}", b"x")
    return name


@pytest.fixture(scope="module")
def guarded(s3: Seaweed) -> str:
    return guarded_bucket(s3)


ASKED: dict[str, Callable[[Any, str], Any]] = {
    "read the input": lambda client, bucket: client.get_object(Bucket=bucket, Key="photos/x.tar"),
    "read a model": lambda client, bucket: client.get_object(Bucket=bucket, Key="models/m"),
    "list": lambda client, bucket: client.list_objects_v2(Bucket=bucket, Prefix="photos/"),
    "create a label": lambda client, bucket: client.put_object(Bucket=bucket, Key="labels/new", Body=b"", IfNoneMatch="*"),
    "write an input": lambda client, bucket: client.put_object(Bucket=bucket, Key="photos/new", Body=b""),
    "delete a label": lambda client, bucket: client.delete_object(Bucket=bucket, Key="labels/l.parquet"),
    "delete an input": lambda client, bucket: client.delete_object(Bucket=bucket, Key="photos/x.tar"),
    "read what is not its own": lambda client, bucket: client.get_object(Bucket=bucket, Key="payroll/p"),
}
READS = {"read the input", "read a model", "list"}


@pytest.mark.parametrize("who", NOBODIES)
def test_a_real_server_grants_what_a_run_needs_and_no_more(s3, guarded, who):
    client = s3.client_of(who)
    answers: dict[str, int] = {}
    for what, ask in ASKED.items():
        try:
            answers[what] = ask(client, guarded)["ResponseMetadata"]["HTTPStatusCode"]
        except ClientError as error:
            answers[what] = error.response["ResponseMetadata"]["HTTPStatusCode"]
        s3.client.delete_object(Bucket=guarded, Key="labels/new")
    assert set(answers.values()) == {200, 403}
    granted = {what for what, status in answers.items() if status == 200}
    assert granted == READS if who == "nightlabel-worker" else granted == READS | {"create a label"}
    with pytest.raises(ClientError, match="404"):  # an absent object is told from a forbidden one
        client.head_object(Bucket=guarded, Key="models/model.int8.onnx")


def test_nothing_is_deleted_whatever_else_is_granted(s3):
    everything = {"Sid": "Careless", "Effect": "Allow", "Principal": "*", "Action": "s3:*"}
    bucket = guarded_bucket(s3, everything)
    for who in NOBODIES:
        client = s3.client_of(who)
        assert ASKED["read what is not its own"](client, bucket)
        with pytest.raises(ClientError, match="AccessDenied"):
            ASKED["delete a label"](client, bucket)


def test_a_real_server_keeps_the_lifecycle(s3):
    name, wanted = s3.bucket(), json.loads((INFRA / "aws/lifecycle.json").read_text())
    s3.client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=wanted)
    kept = s3.client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert sorted(kept, key=lambda rule: rule["ID"]) == sorted(wanted["Rules"], key=lambda rule: rule["ID"])
    states = botocore.session.get_session().get_service_model("s3").shape_for("ExpirationStatus").enum
    assert {rule["Status"] for rule in kept} == {"Enabled"} < set(states)
    assert not [rule for rule in kept if "Expiration" in rule and rule["Filter"]["Prefix"] != "logs/"]
