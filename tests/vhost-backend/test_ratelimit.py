"""Messages that may come without end are passed on for a while, and the rest is counted."""

import logging
import threading

import pytest

from vhost_backend.rate_limited_log import RateLimited


def test_the_rest_is_counted_aloud_though_nothing_more_comes() -> None:
    told = threading.Event()
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if "left out" in lines[-1]:
                told.set()

    log = logging.getLogger("vhost_backend.test_ratelimit")
    handler = Handler()
    log.addHandler(handler)
    try:
        limited = RateLimited(log, burst=0, period=0.5)
        limited.warning("fault")
        assert told.wait(60)
        assert lines == ["1 similar messages were left out"]
    finally:
        log.removeHandler(handler)


def test_flush_says_it_and_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimited(logging.getLogger("vhost_backend"), burst=2, period=3600.0)
    for number in range(5):
        limited.warning("fault %d", number)
    assert caplog.messages == ["fault 0", "fault 1"]
    limited.flush()
    limited.flush()
    assert caplog.messages[2:] == ["3 similar messages were left out"]
    limited.warning("fault 5")
    assert caplog.messages[3:] == ["fault 5"]
