"""Serving the counters to Prometheus, where the caller asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from .base import DaemonBase


@contextlib.contextmanager
def served_metrics(where: str | None, daemons: Sequence[DaemonBase]) -> Iterator[None]:
    """Serve the counters of `daemons` meanwhile, unless `where` is None; see `MetricsServer`."""
    if where is None:
        yield
        return
    from .prometheus import MetricsServer

    with MetricsServer(where, daemons):
        yield
