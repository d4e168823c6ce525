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
    log = logging.getLogger("vhost_backend.test_flush")

    def said() -> list[str]:  # timers of other tests may say something meanwhile
        return [record.getMessage() for record in caplog.records if record.name == log.name]

    limited = RateLimited(log, burst=2, period=3600.0)
    for number in range(5):
        limited.warning("fault %d", number)
    assert said() == ["fault 0", "fault 1"]
    limited.flush()
    limited.flush()
    assert said()[2:] == ["3 similar messages were left out"]
    limited.warning("fault 5")
    assert said()[3:] == ["fault 5"]
