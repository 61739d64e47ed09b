"""Rules, alerts and dashboard are valid, use metrics that exist, and are explained in the runbook.

tests/integration/test_fleet.py asks a running Prometheus every query of the dashboard.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics
from service.settings import Settings
from tests.observability import (
    ALERTS,
    DASHBOARD,
    REPLICA_METRIC,
    RULES,
    alert_names,
    dashboard,
    queries,
    recorded_names,
)
from tests.paths import ROOT
from tests.programs import tool
from tests.waiting import PATIENCE_S

RULE_TESTS = ROOT / "deploy" / "prometheus" / "tests" / "rules.yml"
RUNBOOK = ROOT / "deploy" / "README.md"
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def promtool(*arguments: str | Path) -> None:
    checked = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def exported_names() -> set[str]:
    return {
        family.name + suffix for family in Metrics().registry.collect() for suffix in SUFFIXES.get(family.type, ("",))
    }


def rule_queries() -> list[str]:
    return [rule["expr"] for path in RULES for group in read_yaml(path)["groups"] for rule in group["rules"]]


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def table(text: str) -> list[list[str]]:
    """Return the cells of the only table of a text, by row."""
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_rules_and_alerts_pass_their_tests() -> None:
    promtool("test", "rules", RULE_TESTS)


def test_a_replica_may_start_for_as_long_as_compose_waits_and_no_fault_falls_between_two_alerts() -> None:
    rules = {rule["alert"]: rule for rule in read_yaml(ALERTS)["groups"][0]["rules"]}
    gpu = read_yaml(ROOT / "docker-compose.gpu.yml")["services"]["api"]["healthcheck"]["start_period"]
    minutes = int(rules["ReplicaNotStarted"]["for"].removesuffix("m"))
    assert minutes * 60 > int(gpu.removesuffix("s"))
    for name in ("ReplicaDown", "ReplicaNotReady"):  # they end when the window has passed; ReplicaNotStarted follows
        window = re.search(r"\[(\d+)m\]", rules[name]["expr"])
        assert window is not None
        assert int(window[1]) >= minutes


def test_every_alert_is_tested_both_firing_and_silent() -> None:
    checks = [check for case in read_yaml(RULE_TESTS)["tests"] for check in case["alert_rule_test"]]
    fires = {check["alertname"] for check in checks if check.get("exp_alerts")}
    silent = {check["alertname"] for check in checks if not check.get("exp_alerts")}
    assert fires == silent == set(alert_names())


def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


@pytest.mark.parametrize("source", [rule_queries, queries], ids=["rules", "dashboard"])
def test_every_metric_of_a_query_exists(source: Any) -> None:
    known = exported_names()
    recorded = set(recorded_names())
    for query in source():
        assert set(re.findall(r"\w+:\w+:\w+", query)) <= recorded, query
        names = set(re.findall(r"(?<![:\w])iddpm_\w+", query))
        assert names <= known, query
        assert names or re.search(r":iddpm_|haproxy_|ALERTS|up\{", query), query


def test_every_query_about_replicas_is_about_the_chosen_ones() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["name"], variable["multi"], variable["includeAll"]) == ("replica", True, True)
    assert variable["query"]["query"] == f"label_values({REPLICA_METRIC}, instance)"
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            selectors = re.findall(r"(?:instance:)?\biddpm_\w+(?::\w+)?(\{[^}]*\})?", target["expr"])
            assert all('{instance=~"$replica"' in selector for selector in selectors), target["expr"]
            assert selectors or re.search(r"haproxy_|ALERTS", target["expr"]), target["expr"]
    chosen = [query for query in queries("10.0.0.1:8000") if "iddpm_" in query]
    assert all(r'instance=~"10\\.0\\.0\\.1:8000"' in query for query in chosen)
    assert all('instance=~".*"' in query for query in queries() if "iddpm_" in query)


@pytest.mark.parametrize("title", ["Latency of requests", "Stage: queue", "Stage: network calls", "Stage: encoding"])
def test_each_stage_has_three_percentiles_of_all_replicas_and_of_each(title: str) -> None:
    (panel,) = [panel for panel in dashboard()["panels"] if panel["title"] == title]
    found = []
    for target in panel["targets"]:
        quantile = re.match(r"histogram_quantile\((0\.\d+), sum by \((.*?)\)", target["expr"])
        assert quantile is not None
        found.append((target["legendFormat"], *quantile.groups()))
    quantiles = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}
    assert found == [
        *((name, value, "le") for name, value in quantiles.items()),
        *((f"{name} {{{{instance}}}}", value, "instance, le") for name, value in quantiles.items()),
    ]


def test_every_recorded_series_is_used() -> None:
    used = " ".join(rule_queries() + queries())
    unused = [name for name in recorded_names() if not re.search(rf"{name}\b", used)]
    assert not unused


def test_panels_do_not_overlap_and_ask_the_provisioned_prometheus() -> None:
    (source,) = read_yaml(ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    observability, compose = (
        read_yaml(ROOT / name)["services"] for name in ("docker-compose.observability.yml", "docker-compose.yml")
    )
    mounts = dict(mount.split(":")[:2] for mount in observability["grafana"]["volumes"])
    (provider,) = read_yaml(ROOT / "deploy/grafana/provisioning/dashboards/iddpm.yml")["providers"]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = observability["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    (source,) = read_yaml(ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    config = read_yaml(ROOT / "deploy/prometheus/prometheus.yml")
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert "prometheus" in compose
    assert all(port.startswith("127.0.0.1:") for port in observability["grafana"]["ports"])


def test_prometheus_of_compose_reads_the_rules() -> None:
    mounts = read_yaml(ROOT / "docker-compose.yml")["services"]["prometheus"]["volumes"]
    assert "./deploy/prometheus/rules:/etc/prometheus/rules:ro" in mounts
    assert read_yaml(ROOT / "deploy/prometheus/prometheus.yml")["rule_files"] == ["rules/*.yml"]
    assert ALERTS in RULES


@pytest.mark.parametrize(
    ("title", "columns", "names"),
    [
        ("Alerts", ["alert", "cause", "remedy"], [f"`{name}`" for name in alert_names()]),
        (
            "Dashboard",
            ["panel", "shows", "cause when abnormal", "remedy"],
            [panel["title"] for panel in dashboard()["panels"]],
        ),
    ],
)
def test_the_runbook_explains_every_alert_and_every_panel(title: str, columns: list[str], names: list[str]) -> None:
    heading, line, *rows = table(section(title))
    assert heading == columns
    assert set(line) == {"---"}
    assert [row[0] for row in rows] == names
    for row in rows:
        assert len(row) == len(columns), row
        assert all(re.search(r"\w{2}", cell) for cell in row), row


def test_the_runbook_names_alerts_panels_and_settings_that_exist() -> None:
    text = section("Dashboard") + section("Alerts")
    titles = [panel["title"] for panel in dashboard()["panels"]]
    for quoted in re.findall(r'"([A-Z][a-z][^"]+)"', text):
        assert any(title.startswith(quoted) for title in titles), quoted
    for alert in re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", text):
        assert alert in alert_names()
    for setting in re.findall(r"`IDDPM_(\w+)", text):
        assert setting.lower() in Settings.model_fields
