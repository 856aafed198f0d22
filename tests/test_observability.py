"""The dashboard, the alerts and their page name metrics, labels and reasons that exist, and all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from bkpool.api import ApiMetrics, Service
from bkpool.controller.metrics import ControllerMetrics, Result
from bkpool.core.names import LABEL_POOL, LABEL_PURPOSE, PURPOSE_GATEWAY, Key
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.session.metrics import GatewayMetrics, Meter
from bkpool.install.manifests import Install, render
from bkpool.telemetry.log_metrics import LogMetrics
from bkpool.telemetry.loop_metrics import LoopMetrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "observability"
TARGET = {"job", "instance", "namespace"}  # labels that a scrape adds

_METRIC = re.compile(r"((?:buildkit|bkpool)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def _rules():
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def _dashboard():
    return json.loads((DOCS / "dashboard.json").read_text())


RULES = {rule["alert"]: rule for rule in _rules()}
PANELS = {panel["title"]: panel for panel in _dashboard()["panels"] if panel["type"] != "row"}
EXPRESSIONS = {name: [rule["expr"]] for name, rule in RULES.items()} | {
    title: [target["expr"] for target in panel["targets"]] for title, panel in PANELS.items()
}


@pytest.fixture(scope="module")
def samples():
    """Every sample with the names of its labels, of a registry in which each event has happened once."""
    metrics, meter = GatewayMetrics(), Meter(Key("default", "p"), "p-worker-0", PeerStream())
    metrics.relay_started(meter)
    metrics.relay_ended(meter, 1.0)
    metrics.relay_started(meter)
    metrics.refused(Key("default", "p"), "Waited")
    metrics.handshake_done(0.1, ok=True)
    metrics.dial_done(Key("default", "p"), 0.1, "reached")
    metrics.count_pending(+1)
    metrics.set_draining(False)
    LogMetrics(metrics.registry, lambda: 1)
    loops = LoopMetrics(metrics.registry)
    loops.heartbeat("main", 0.1)
    loops.blocked("main")
    api = ApiMetrics(metrics.registry, waiting=lambda _pool: 1, pools=[Key("default", "p")], workers={})
    api.ended("/health", "GET", "200", 0.1)
    controller = ControllerMetrics(metrics.registry)
    controller.decided(1)
    controller.lagged(0.1)
    families = list(metrics.registry.collect())
    assert all(family.samples for family in families), "a metric has no sample"
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def _used(expression):
    """Returns the samples of an expression, each with its matchers."""
    return [(name, dict(_MATCHER.findall(matchers))) for name, matchers in _METRIC.findall(expression)]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_metric_and_label_of_an_expression_exists(samples, where):
    for expression in EXPRESSIONS[where]:
        used = _used(expression)
        assert used, expression
        known = set(TARGET)
        for name, matchers in used:
            assert name in samples, f"{where}: there is no {name}"
            assert matchers.keys() <= samples[name] | TARGET, f"{where}: {name} has no such label"
            known |= samples[name]
        for labels in _GROUPING.findall(expression):
            assert set(re.split(r",\s*", labels)) <= known, f"{where}: {labels}"


def test_every_metric_is_on_the_dashboard_and_on_the_page(samples):
    shown = {name for title in PANELS for expression in EXPRESSIONS[title] for name, _ in _used(expression)}
    page = set(re.findall(r"^\| `(\w+)`", (DOCS / "README.md").read_text(), re.MULTILINE))
    ours = {name for name in samples if not name.endswith("_created")}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in ours}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} == families
    assert page == families


def test_every_alert_is_on_the_page():
    named = re.findall(r"`((?:Buildkit|Bkpool)[A-Z]\w+)`", (DOCS / "README.md").read_text())
    assert set(named) == set(RULES)


def test_every_reason_of_an_alert_is_one_of_the_gateway():
    source = "".join(path.read_text() for path in (ROOT / "bkpool").rglob("*.py"))
    reasons = {
        reason
        for where in EXPRESSIONS
        for expression in EXPRESSIONS[where]
        for _, matchers in _used(expression)
        for reason in matchers.get("reason", "").split("|")
        if reason
    }
    assert "WaitedAgain" in reasons
    assert {reason for reason in reasons if f'"{reason}"' not in source and f"class {reason}(" not in source} == set()


def test_every_route_and_result_of_an_alert_exists():
    """An alert that names a route which was renamed would never fire."""
    service = object.__new__(Service)  # its routes do not depend on what it was made from
    known = {"route": {route.path for route in service.routes()}, "result": {result.value for result in Result}}
    used = {
        (label, matchers[label])
        for rule in RULES.values()
        for _, matchers in _used(rule["expr"])
        for label in known.keys() & matchers.keys()
    }
    assert {label for label, _ in used} == known.keys()
    assert [one for one in used if not any(re.fullmatch(one[1], value) for value in known[one[0]])] == []


@pytest.mark.parametrize("name", RULES)
def test_the_text_of_an_alert_only_uses_its_own_labels(name):
    rule = RULES[name]
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    kept = {label for labels in _GROUPING.findall(rule["expr"]) for label in re.split(r",\s*", labels)}
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept | {"instance"}


def test_the_pod_monitor_selects_the_gateways_by_their_labels():
    spec = yaml.safe_load((DOCS / "podmonitor.yaml").read_text())["spec"]
    assert spec["selector"]["matchLabels"] == {LABEL_PURPOSE: PURPOSE_GATEWAY}
    assert spec["jobLabel"] == LABEL_POOL


def test_the_pod_monitor_of_the_controller_selects_the_pods_of_the_manifests():
    spec = yaml.safe_load((DOCS / "podmonitor-controller.yaml").read_text())["spec"]
    documents = yaml.safe_load_all(render(Install()))
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert spec["jobLabel"] in pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} <= ports


def test_the_dashboard_can_be_imported_into_any_grafana():
    """All panels use the data source variable, no two have the same id, and none overlaps another."""
    dashboard = _dashboard()
    (source,) = (variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource")
    parts = [*dashboard["panels"], *(variable for variable in dashboard["templating"]["list"] if variable != source)]
    sources = [part["datasource"] for part in parts if "datasource" in part]
    sources += [target["datasource"] for panel in PANELS.values() for target in panel["targets"]]
    assert {used["uid"] for used in sources} == {"${datasource}"}
    assert source["name"] == "datasource"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
