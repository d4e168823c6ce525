"""What the queues have done: as values, and as lines for a person."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .base import DaemonBase


class QueueReport(NamedTuple):
    """One queue of one daemon at one moment."""

    device: str
    queue: int
    running: bool
    in_flight: int
    counters: dict[str, int]


def report(daemons: Iterable[DaemonBase]) -> list[QueueReport]:
    """The queues of these daemons."""
    reports = []
    for daemon in daemons:
        for index, vring in enumerate(daemon.vrings):
            with vring.get_ref() as state:
                reports.append(
                    QueueReport(
                        daemon.name,
                        index,
                        state.running,
                        state.in_flight,
                        state.counters.as_dict(),
                    )
                )
    return reports


def lines(daemons: Iterable[DaemonBase]) -> Iterator[str]:
    """The same for a person: a line for each queue."""
    for entry in report(daemons):
        state = "running" if entry.running else "stopped"
        counts = " ".join(f"{name}={value}" for name, value in entry.counters.items())
        yield f"{entry.device} queue {entry.queue}: {state} in_flight={entry.in_flight} {counts}"


@contextlib.contextmanager
def served_metrics(where: str | None, daemons: Sequence[DaemonBase]) -> Iterator[None]:
    """Serve the same to Prometheus meanwhile, unless `where` is None; see `MetricsServer`."""
    if where is None:
        yield
        return
    from .prometheus import MetricsServer

    server = MetricsServer(where, daemons)
    try:
        yield
    finally:
        server.close()
