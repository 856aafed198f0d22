"""The log of one test is not that of another: threads that are left, and loggers that an appliance has fixed."""

import threading

import pytest
import structlog

from bkpool.appliance import logs
from support import captured_logs
from support.captured_logs import capture_logs

log = structlog.get_logger()


def test_a_thread_of_an_earlier_test_is_not_captured_and_one_of_this_test_is():
    may_log = threading.Event()

    def say(event):
        may_log.wait(60)
        log.info(event)

    earlier = threading.Thread(target=say, args=["earlier"])
    earlier.start()
    captured_logs.begin_test()
    mine = threading.Thread(target=say, args=["mine"])
    mine.start()
    with capture_logs() as lines:
        may_log.set()
        for thread in (earlier, mine):
            thread.join()
        log.info("the test")
    assert [line["event"] for line in lines] == ["mine", "the test"]


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_logger_that_an_appliance_in_this_process_has_fixed_follows_the_next_configuration(turn, capsys):
    """The second turn would find the logger of the first one, which writes to a stderr that has ended."""
    with capture_logs() as lines:
        logs.log.info(turn)
    assert [line["event"] for line in lines] == [turn]
    writer = logs.configure_logging()
    logs.log.info("fixed")
    logs.flush()
    writer.close()
    assert '"event": "fixed"' in capsys.readouterr().err
