"""In CI a skip that CI could have run is a failure (BKPOOL_CI=1). Signals are as in a terminal, wherever we run."""

from __future__ import annotations

import os
import signal

import pytest

EXCUSED = (
    "BKPOOL_ZIPAPP names no bkpool.pyz",
    "this machine has none of python",
    "this cluster's network plugin enforces no NetworkPolicy",
)
"""Reasons that are fine in CI: another session of the same run does it; old interpreters are no part of a machine,
nor is a network plugin one of CI's own way to a cluster."""

_skipped: list[str] = []


def pytest_configure() -> None:
    """Programs started in the background inherit ignored signals; tests of Ctrl-C would wait for ever."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    unexcused = [skip for skip in _skipped if not any(reason in skip for reason in EXCUSED)]
    if os.environ.get("BKPOOL_CI") and unexcused:
        print("\nskipped, although CI could have run it:", *unexcused, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
