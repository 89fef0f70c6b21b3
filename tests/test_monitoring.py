"""Alerts, dashboard and Prometheus's own files: promtool, Grafana's types, and the names that a run really tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from programs import get, serving, wait_for

from pipeline import prometheus
from pipeline.errors import Conflict
from pipeline.prometheus import Metrics
from pipeline.spec import Job

MONITORING = ROOT / "infra/monitoring"
TOLD = {f"nightlabel_{name}" for name in prometheus._FAMILIES}


def content(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())  # JSON is YAML


def promtool(*words: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is absent (Debian: prometheus)")
    done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def panels() -> list[dict[str, Any]]:
    return content("dashboard.json")["panels"]


def queries() -> Iterator[str]:
    dashboard = content("dashboard.json")
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    yield from (annotation["expr"] for annotation in dashboard["annotations"]["list"])


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in content("alerts.yaml")["groups"] for rule in group["rules"]}


def test_prometheus_takes_its_file_and_the_alerts():
    promtool("check", "config", "prometheus.yaml")


def test_every_alert_fires_where_it_must_and_only_there():
    promtool("test", "rules", "alerts.test.yaml")


def test_a_conflict_wakes_whoever_is_on_call(tmp_path):
    """The whole way, with our files: a run that ends with 6, a Pushgateway, Prometheus, the alert."""
    config = content("prometheus.yaml")
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    job = {"name": "nightly", "input": {"uri": "in"}, "model": {"uri": "m"}, "output": {"uri": "o"}}
    with serving("prometheus-pushgateway") as gateway:
        wait_for(lambda: get(f"http://{gateway}/-/ready"))
        config["scrape_configs"] = [config["scrape_configs"][0] | {"static_configs": [{"targets": [gateway]}]}]
        path = tmp_path / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        with serving("prometheus", f"--config.file={path}", f"--storage.tsdb.path={tmp_path}/data") as server:
            with pytest.raises(Conflict), Metrics(f"http://{gateway}", Job.model_validate(job), say=pytest.fail):
                raise Conflict("another run's object stands there")
            firing = wait_for(lambda: _firing(f"http://{server}/api/v1/alerts"))
    assert firing == [{"alertname": "NightlabelConflict", "severity": "page", "job": "nightlabel", "name": "nightly"}]


def _firing(url: str) -> list[dict[str, str]]:
    return [alert["labels"] for alert in json.loads(get(url))["data"]["alerts"] if alert["state"] == "firing"]


def test_every_alert_is_tried_both_ways_and_says_what_to_do():
    tried: dict[str, set[bool]] = {name: set() for name in alerts()}
    for test in content("alerts.test.yaml")["tests"]:
        # A series beside the one that fires, and does not, is the other way.
        several = len({re.search(r'name="(\w+)"', series["series"])[1] for series in test["input_series"]}) > 1
        for case in test["alert_rule_test"]:
            fires = bool(case["exp_alerts"])
            tried[case["alertname"]] |= {fires, False} if several else {fires}
    assert all(ways == {True, False} for ways in tried.values()), tried
    assert all(set(rule["annotations"]) == {"summary", "do"} for rule in alerts().values())


def test_alerts_and_dashboard_speak_of_what_is_told():
    expressions = [rule["expr"] for rule in alerts().values()] + list(queries())
    named = {name for text in expressions for name in re.findall(r"\bnightlabel_\w+", text)}
    assert named <= TOLD
    assert {name for text in expressions for name in re.findall(r"\bray_\w+", text)} <= set(_ray_metrics())


def _ray_metrics() -> list[str]:
    """The names in the dashboards that Ray itself brings."""
    import ray

    folder = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    return [name for path in folder.glob("*.py") for name in re.findall(r"\bray_\w+", path.read_text())]


def test_every_query_of_the_dashboard_is_promql(tmp_path):
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(queries())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_the_dashboard_is_grafanas():
    """Through Grafana's own types and back: a key that they do not know is lost on the way."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    ours = content("dashboard.json")
    theirs = json.loads(json.dumps(Dashboard.from_json(ours), cls=JSONEncoder))
    assert list(_lost(ours, theirs)) == []


def _lost(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from _lost(value, theirs[key], f"{where}/{key}") if key in theirs else [f"{where}/{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _lost(one, other, f"{where}/{number}")
    elif ours != theirs:
        yield where


def test_no_panel_lies_on_another():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_grafana_finds_its_source_and_the_dashboard_where_compose_puts_it():
    (source,) = content("grafana-datasource.yaml")["datasources"]
    assert set(re.findall(r'"uid": "(\w+)"}', (MONITORING / "dashboard.json").read_text())) == {source["uid"]}
    services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert any(published.endswith(f":{port}") for published in services[host]["ports"])
    (provider,) = content("grafana-dashboards.yaml")["providers"]
    mounted = dict(volume.removesuffix(":ro").split(":") for volume in services["grafana"]["volumes"])
    assert Path(mounted["./monitoring/dashboard.json"]).parent == Path(provider["options"]["path"])


def test_prometheus_asks_services_that_compose_starts():
    services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    gateway, nodes = content("prometheus.yaml")["scrape_configs"]
    hosts = [target.split(":")[0] for config in gateway["static_configs"] for target in config["targets"]]
    hosts += [re.search(r"//(\w+):", config["url"])[1] for config in nodes["http_sd_configs"]]
    assert hosts == ["pushgateway", "head"]
    assert set(hosts) <= set(services)
    assert services["head"]["environment"]["NIGHTLABEL_METRICS"].endswith(gateway["static_configs"][0]["targets"][0])
