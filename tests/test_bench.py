"""What bench/ shows: figures of a run end up where they belong, and the small parts run. No test judges a figure."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench import busy, decisions, kind_writes, plot, scale, table
from bench.cluster_figures import ClusterFigures, ClusterSize
from bench.cluster_figures import rows as cluster_rows
from bench.installation import Filling
from bench.loop_steps import LIMIT, recorded

pytestmark = [pytest.mark.slow, pytest.mark.any_python]

FIGURES = {"nginx": [2.0, 4.0, 1.0], "HAProxy": [1.0, None, 1.0], "ghostunnel": [None] * 3, "bkpool": [3.0, 4.0, 0.5]}


def document(figures: dict[str, list[float | None]] = FIGURES) -> dict[str, Any]:
    row = {"leg": "unix", "load": "up", "title": "up", "unit": "GB", "more_is_better": True, "figures": figures}
    row |= {"busy": {"nginx": [0.9]}, "ciphers": {}}
    machine = {"what": "2 cores", "load": 0.0}
    return {"machine": machine, "runs": 3, "gateway": [row], "notes": ["no ghostunnel"], "figures": {"CLI, ms": "5"}}


def test_a_ratio_is_of_two_figures_of_the_same_run() -> None:
    [row] = document()["gateway"]
    assert table.ratios(row, "bkpool") == [1.5, 1.0, 0.5]
    assert table.ratios(row, "HAProxy") == [0.5, 1.0], "the run that gave no figure counts for nothing"


def test_the_table_has_nginx_and_bkpool_as_measured_and_the_others_as_ratios() -> None:
    heading, compared, _, appliance = table.lines(document())
    assert heading == ("TLS → Unix socket", "", "", "", "", "")
    assert compared == ("up; GB", "2 (1 – 4)", "0.75 (0.5 – 1)", "–", "1 (0.5 – 1.5)", "3 (0.5 – 4)")
    assert appliance == ("CLI, ms", "", "", "", "", "5")


@pytest.mark.parametrize("form", [table.text, table.markdown])
def test_a_proxy_that_is_missing_is_said_below_the_table(form: Any) -> None:
    assert "no ghostunnel" in form(document()).splitlines()[-1]


def test_without_nginx_there_are_no_ratios_and_no_picture() -> None:
    alone = document({"bkpool": [1.0]})
    assert table.lines(alone)[1] == ("up; GB", "–", "–", "–", "–", "1")
    with pytest.raises(ValueError, match="no comparison"):
        plot.svg(alone)


def test_the_picture_has_a_mark_for_each_proxy_that_was_measured() -> None:
    root = ET.fromstring(plot.svg(document()))
    kinds = [mark.get("class") for mark in root if mark.tag.endswith("}line")]
    assert (kinds.count("bkpool"), kinds.count("HAProxy"), kinds.count("ghostunnel")) == (1, 1, 0)
    lines = {mark.get("class"): mark for mark in root if mark.tag.endswith("}line")}
    nginx = float(lines["nginx"].get("x1", ""))
    assert float(lines["bkpool"].get("x1", "")) < nginx < float(lines["bkpool"].get("x2", ""))


def test_each_size_has_every_figure() -> None:
    [row] = scale.by_size([Filling(2, 3)], seconds=0.1)
    assert (row["pools"], row["each"]) == (2, 3)
    assert all(figure > 0 for figure in row.values())
    assert row["looks"] > 1, "a look follows at least the lease and its end"
    assert row["tables"] > 1


def test_sizes_and_decisions_have_tables_of_their_own() -> None:
    size = {"pools": 10, "each": 1000, "p50": 8.12, "p99": 30, "cpu": 17, "look": 0.35, "looks": 6, "table": 0.4}
    size |= {"tables": 4, "rate": 57}
    took = [{"workers": count, "what": "steady", "ms": [2.0, 1.0, 3.0]} for count in (1000, 3000)]
    shown = table.markdown(
        {"machine": {"what": "2 cores", "load": 0.0}, "runs": 3, "sizes": [size], "decisions": took}
    )
    assert "| 10 × 1,000 | 10,000 | 8.12 / 30 | 17 | 0.35 | 6 | 0.4 | 4 | 57 |" in shown.splitlines()
    assert "| one decision, ms | 1,000 workers | 3,000 workers |" in shown.splitlines()
    assert "| steady | 2 (1 – 3) | 2 (1 – 3) |" in shown.splitlines()


async def test_all_events_happen_in_a_small_installation() -> None:
    fillings = [Filling(2, 2), Filling(1, 6, leased=True), Filling(1, 2, leased=True)]
    rows = await busy.measured(fillings, seconds=0.1, waiters=8)
    assert [row["what"] for row in rows] == list(busy.events(0.1, 8))
    assert all(row["steps"] > 0 and row["longest"] > 0 for row in rows)


async def test_a_long_step_is_counted_and_named() -> None:
    async def long() -> None:
        begin = time.thread_time()
        while time.thread_time() < begin + 2 * LIMIT:
            pass

    async def driver() -> None:
        await long()
        await asyncio.create_task(long())

    with recorded(but=driver.__qualname__) as steps:
        await asyncio.create_task(driver())
    assert steps.beyond == {long.__qualname__: 1}, "that of the driver is not counted"
    assert steps.longest_what == long.__qualname__


def test_the_steps_of_loops_have_a_table() -> None:
    row = {"what": "a pool changes", "steps": 1200, "beyond": 1, "longest": 12.34, "longest_what": "f"}
    head, shown = table.steps([row | {"collecting": 3.21}])
    assert shown == ("a pool changes", "1,200", "1", "12.3 (f)", "3.21")
    assert len(head) == len(shown)


def test_the_decisions_that_are_timed_decide_what_their_names_say() -> None:
    found = {what: [len(decide().actions) for _ in range(2)] for what, decide in decisions.decisions(20).items()}
    assert found == {
        "steady": [0, 0],
        "one worker has changed": [0, 0],
        "all workers are surplus": [20, 20],
        "max lowered to 1": [20, 20],
        "floor from nothing": [20, 20],
    }


def cluster_figures(**given: Any) -> ClusterFigures:
    counts = {
        "requests": [
            ["control", "update", "buildkitworkers", 20],
            ["gateways", "update", "buildkitworkers/status", 10],
            ["control", "get", "buildkitworkers", 5],
            ["driver", "create", "buildkitpools", 999],
        ],
        "watch_bytes": [["control", "buildkitworkers", 40_000], ["gateways", "buildkitworkers", 60_000]],
        "watch_events": [["control", "buildkitworkers", 30]],
        "probes": 1,
    }
    cpu = {"control": 0.1, "gateways": 0.02, "the API server": 0.03}
    found = ClusterFigures(ClusterSize(), took=[0.01] * 10, lasted=2.0, cpu=cpu, memory=[100.0, 90.0], counts=counts)
    return dataclasses.replace(found, **given)


def test_what_a_lease_costs_in_a_cluster_is_counted_without_the_driver() -> None:
    shown = {what: (bar, figure) for what, bar, figure in cluster_rows(cluster_figures())}
    assert shown["writes per lease"] == ("12", "3.00")
    assert shown["GETs / LISTs per lease"] == ("", "0.50 / 0.00")
    assert shown["bytes of watches per lease, KB"] == ("250", "10.0")
    assert shown["CPU of 2 control replicas per lease, ms"] == ("12", "10.0")
    assert shown["leases/s, as many as the machine carries"] == ("", "5.0")
    assert shown["per lease: control, update buildkitworkers"] == ("", "2.00")
    assert shown["at 200 leases/s, extrapolated: writes/s"] == ("", "600")


def test_what_has_failed_in_a_cluster_is_shown() -> None:
    shown = cluster_rows(cluster_figures(failed=Counter({"too many": 3})))
    assert ("failed: too many", "", "3") in shown
    document = {"machine": {"what": "2 cores", "load": 0.0}, "runs": 1, "cluster": {"what": "1 pool", "rows": shown}}
    assert "| writes per lease | 12 | 3.00 |" in table.markdown(document).splitlines()


def test_a_lease_on_kind_is_compared_with_the_bare_writes_of_the_same_burst() -> None:
    writes = {1: [[0.008]], 20: [[0.05] * 20, [0.2] * 20]}
    named = {1: [[0.012]], 20: [[0.1] * 20, [0.2] * 20]}
    found = kind_writes.shown(
        {
            kind_writes.WRITE: writes,
            kind_writes.WITH_JOB: named,
            kind_writes.WITHOUT_JOB: writes,
        }
    )
    assert found["warm allocate with a jobId, one at a time, ms p50 / p99"] == "12.0 / 12.0"
    assert found["warm allocate with a jobId ÷ bare write, one at a time, medians"] == "1.5"
    assert found["warm allocate with a jobId ÷ bare write, 20 at once, medians"] == "1.5 (1 – 2)"
    assert found["warm allocate with a jobId ÷ bare write, the last of 20"] == "1.5 (1 – 2)"
    assert found["warm allocate ÷ bare write, 20 at once, medians"] == "1 (1 – 1)"
