"""What `down` shows of the builds that an appliance waits for."""

import threading
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.cli import drain_view
from bkpool.cli.drain_view import OpenBuild, view

from .conftest import forget_surroundings

NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, home):
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    monkeypatch.setattr(drain_view, "_clock_time", lambda moment: f"{moment:%H:%M:%S}")


def test_it_says_who_builds_for_how_long_and_until_when(api, appliance):
    def member(name, **more):
        return {"name": name, "phase": "Allocated", "requestedBy": "alice", "jobId": "", "connections": 0, **more}

    api.answers["pools"] = (
        200,
        {
            "pools": [
                {"name": "a", "namespace": "default", "connections": 3},
                {"name": "b", "namespace": "default", "connections": 0},
            ]
        },
    )
    api.answers["a"] = (
        200,
        {
            "name": "a",
            "connections": 3,
            "members": [
                member("a-worker-0", connections=1, jobId="job\x1b[2J7", allocatedAt="2030-01-01T11:59:00Z"),
                member("a-worker-1"),
                member("a-worker-2", connections=2, allocatedAt="2030-01-01T11:56:48Z"),
            ],
        },
    )
    seen = drain_view.look(NOW + timedelta(minutes=9), NOW)
    assert seen.headline == (
        "waiting for 2 builds, at most until 12:09:00; Ctrl-C stops waiting, `bkpool down --now` cuts them"
    )
    assert seen.lines == (
        "  a-worker-2: alice, 2 connections, leased 3m12s ago",
        "  a-worker-0: job job[2J7 of alice, 1 connection, leased 1m ago",
    )


def test_of_an_appliance_of_an_earlier_version_only_the_pool_is_known(api, appliance):
    api.answers["pools"] = (200, {"pools": [{"name": "a", "namespace": "default", "connections": 3}]})
    api.answers["a"] = (200, {"name": "a", "connections": 3, "members": [{"name": "a-worker-0"}]})
    assert drain_view.look(None, NOW).lines == ("  pool a: somebody, 3 connections",)


def test_an_api_that_is_dead_is_named(api, appliance):
    api.answers["pools"] = (503, {})
    assert drain_view.look(None, NOW).headline == "waiting for the appliance to end; its API does not answer"


def test_an_api_that_never_answers_costs_a_bounded_time(api, appliance, monkeypatch):
    monkeypatch.setattr(drain_view, "ANSWER_TIMEOUT", 0.1)
    over = threading.Event()
    api.answers["pools"] = (200, {"pools": []})  # without it, the thread's traceback may be in the next test's stderr
    api.before_answer["pools"] = lambda *_: over.wait(60)
    try:
        assert drain_view.look(None, NOW).headline == "waiting for the appliance to end; its API does not answer"
    finally:
        over.set()


def test_many_builds_are_counted():
    builds = [OpenBuild(f"w-{n}", "", "bob", 1, NOW) for n in range(1000)]
    seen = view(builds, None, NOW)
    assert len(seen.lines) == drain_view.MOST_LINES + 1
    assert seen.lines[-1] == "  and 990 more"
