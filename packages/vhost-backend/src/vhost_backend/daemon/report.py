"""The counters of the queues, as values and as lines to read."""

from collections.abc import Iterable, Iterator
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
    """The same as text: a line for each queue."""
    for entry in report(daemons):
        state = "running" if entry.running else "stopped"
        counts = " ".join(f"{name}={value}" for name, value in entry.counters.items())
        yield f"{entry.device} queue {entry.queue}: {state} in_flight={entry.in_flight} {counts}"
