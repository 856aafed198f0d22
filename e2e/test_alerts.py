"""promtool checks the alerts, the queries of the dashboard and the metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from bkpool.toolchain import default_cache
from harness import HERE, eventually, only_on

pytestmark = only_on("process", "the metrics do not depend on the backend")

DOCS = HERE.parent / "docs" / "observability"


@pytest.fixture(scope="module")
def promtool():
    """Returns a function that runs promtool. scripts/test puts it into the cache of bkpool."""
    program = shutil.which("promtool") or default_cache() / "e2e" / "promtool"
    if not os.access(program, os.X_OK):
        pytest.skip("promtool is not installed: run scripts/test, or install Prometheus")

    def run(*arguments, text=None):
        done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_prometheus_accepts_the_alerts(promtool):
    promtool("check", "rules", DOCS / "alerts.yaml")


def test_each_alert_fires_at_the_right_time(promtool):
    promtool("test", "rules", HERE / "alerts_test.yaml")


def test_each_alert_has_a_test_in_which_it_fires():
    tested = (HERE / "alerts_test.yaml").read_text()
    fires = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:", tested))
    assert fires == set(re.findall(r"alert: (\w+)", (DOCS / "alerts.yaml").read_text()))


def test_prometheus_accepts_every_query_of_the_dashboard(promtool, tmp_path):
    panels = json.loads((DOCS / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    filled = [query.replace("$__rate_interval", "1m") for query in queries]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(filled)]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", file)


def test_promtool_accepts_the_metrics_of_a_running_appliance(promtool, appliance, context):
    """They have names and descriptions, include those of the watchdog, and count the bytes of a build."""
    certificates = appliance.allocate()
    appliance.build(appliance.builder(certificates, "measured"), context.dockerfile("say measured")).ok()
    appliance.release(certificates.lease).ok()
    lag = '\nbkpool_loop_lag_seconds_count{loop="main"} '
    eventually(lambda: lag in appliance.metrics(), "the main loop is watched")
    scraped = appliance.metrics()
    assert re.search(
        r'^buildkit_gateway_bytes_total\{direction="up",pool="default",pool_namespace="default"\} [1-9]',
        scraped,
        re.MULTILINE,
    ), scraped
    assert "\nbuildkit_gateway_draining 0.0\n" in scraped
    promtool("check", "metrics", text=scraped)
