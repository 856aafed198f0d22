"""Groups of threads for work on files."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest

from bkpool.home.threads import Threads


@pytest.fixture
def threads():
    made = Threads("of a test", 2)
    yield made
    made.close()


def test_no_more_run_at_once_than_there_may_be_and_all_get_their_turn(threads):
    running, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(2)

    def work(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(60)
        with lock:
            running -= 1
        return number

    assert [future.result(60) for future in [threads.submit(work, number) for number in range(20)]] == list(range(20))
    assert most == 2


def test_an_error_reaches_the_one_who_waits_and_no_one_else(threads):
    failed, well = threads.submit(int, "x"), threads.submit(int, "1")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result(60)
    assert well.result(60) == 1
    assert threads.submit(int, "2").result(60) == 2


def test_what_was_cancelled_before_its_turn_never_runs(threads):
    go_on, ran = threading.Event(), []
    busy = [threads.submit(go_on.wait, 60) for _ in range(2)]
    waiting = threads.submit(ran.append, 1)
    assert waiting.cancel()
    go_on.set()
    wait(busy, 5)
    assert threads.submit(len, ran).result(60) == 0


def test_a_group_can_be_used_after_it_was_closed_while_it_worked(threads):
    go_on = threading.Event()
    busy = [threads.submit(go_on.wait, 60) for _ in range(2)]
    threads.close()
    go_on.set()
    wait(busy, 5)
    for number in range(5):
        assert threads.submit(int, number).result(60) == number


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending():
    program = (
        "import threading; from bkpool.home.threads import Threads; Threads('t', 1).submit(threading.Event().wait)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
