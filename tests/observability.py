"""The rules and the dashboard of deploy/, as tests read them."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tests.paths import ROOT

RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "iddpm.json"
WINDOW = "1m"
"""What Grafana inserts for $__rate_interval, at least."""
REPLICA_METRIC = "iddpm_ready"
"""The metric whose label `instance` has the values of the dashboard's variable `replica`."""


def _names(kind: str) -> list[str]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule[kind] for group in groups for rule in group["rules"] if kind in rule]


def alert_names() -> list[str]:
    """Return the names of the alerts, in the order of the file."""
    return _names("alert")


def recorded_names() -> list[str]:
    """Return the names of the recorded series."""
    return _names("record")


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    found = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def queries(replica: str | None = None) -> list[str]:
    """Return every query of the dashboard, as Prometheus gets it.

    Args:
        replica: the chosen replica, as its label `instance` names it; None: all.
    """
    (variable,) = dashboard()["templating"]["list"]
    chosen = variable["allValue"] if replica is None else replica.replace(".", r"\\.")
    return [
        target["expr"].replace("$__rate_interval", WINDOW).replace("$replica", chosen)
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]
