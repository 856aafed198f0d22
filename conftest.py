"""In CI (BKPOOL_CI=1) an avoidable skip is a failure. Signals are handled as in a terminal."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator

import pytest

EXCUSED = (
    "BKPOOL_ZIPAPP names no bkpool.pyz",
    "this machine has none of python",
    "this cluster's network plugin enforces no NetworkPolicy",
)
"""Reasons that are accepted in CI: another session of the same run does the test, the machine has no old
interpreters, or the cluster of CI has no network plugin that enforces policies."""

_skipped: list[str] = []


def pytest_configure() -> None:
    """Restores the handling of signals.

    Programs in the background inherit ignored ones, and tests of Ctrl-C would not end.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector from what is imported and collected, as the appliance does with what it imports.

    Else it goes through all of that again and again, also in tests that need a full run: a third of a second each.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    unexcused = [skip for skip in _skipped if not any(reason in skip for reason in EXCUSED)]
    if os.environ.get("BKPOOL_CI") and unexcused:
        print("\nskipped, although CI could have run it:", *unexcused, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
