"""The counters as Prometheus metrics. Imported only when used, as it imports an HTTP server."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from ..errors import ListenError, VhostBackendError
from ..fds.listener import Listener
from .base import DaemonBase
from .report import QueueReport, report

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds that a client may be silent.
PATIENCE = 10.0


class MetricsServer:
    """Serves the counters to Prometheus, on `unix:PATH` or `HOST:PORT`.

    A thread serves them from `start`, or `with`, to `close`. Needs prometheus-client (the
    `[metrics]` extra). Accepts loopback addresses only, as the figures are for this machine.
    Raises `ListenError` or `VhostBackendError`.
    """

    def __init__(self, where: str, daemons: Iterable[DaemonBase]) -> None:
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError:
            raise VhostBackendError(
                "metrics need prometheus-client, the [metrics] extra: pip install prometheus-client"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(list(daemons)))
        self._listener: Listener | None = None
        if where.startswith("unix:"):
            self._listener = Listener(where.removeprefix("unix:"))
            self._server: _Server = _UnixServer(self._listener)
        else:
            self._server = _tcp_server(where)
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )

    def start(self) -> None:
        """Serve, on a thread, until `close`. The socket listens already."""
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port; 0 on a Unix socket."""
        return 0 if self._listener is not None else int(self._server.server_address[1])

    def __enter__(self) -> MetricsServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        if self._listener is not None:
            self._listener.close()


class _Collector:
    """Reads the counters when it is asked."""

    def __init__(self, daemons: list[DaemonBase]) -> None:
        self._daemons = daemons

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        reports = report(self._daemons)
        labels = ["device", "queue"]
        running = GaugeMetricFamily(
            "vhost_queue_running", "Whether the queue is being served", labels=labels
        )
        in_flight = GaugeMetricFamily(
            "vhost_queue_in_flight", "Requests taken and not completed", labels=labels
        )
        for entry in reports:
            place = _place(entry)
            running.add_metric(place, float(entry.running))
            in_flight.add_metric(place, entry.in_flight)
        yield running
        yield in_flight
        for name in reports[0].counters if reports else ():
            family = CounterMetricFamily(
                f"vhost_queue_{name}", f"{name.replace('_', ' ').capitalize()}", labels=labels
            )
            for entry in reports:
                family.add_metric(_place(entry), entry.counters[name])
            yield family


def _place(entry: QueueReport) -> list[str]:
    """The labels' values, as UTF-8 (Prometheus' text needs it; a path may be other bytes)."""
    return [entry.device.encode(errors="backslashreplace").decode(), str(entry.queue)]


class _Quiet(WSGIRequestHandler):
    """A handler without the request log that `WSGIRequestHandler` prints on stderr."""

    timeout = PATIENCE

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        """A Unix socket's peer has no address."""
        return "local"


def _pause() -> None:
    time.sleep(0.1)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A server with a thread for each client: a silent client delays neither others nor `close`."""

    daemon_threads = True
    block_on_close = False

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next client."""
        try:
            return self._accept()
        except OSError:  # too many open files, say: the client stays queued, so do not spin
            _pause()
            raise

    def _accept(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a client at DEBUG only."""
        log.debug("a client of the metrics was not served", exc_info=True)


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def __init__(self, listener: Listener) -> None:
        socketserver.BaseServer.__init__(self, listener.path or "", _Quiet)
        self.socket = listener.socket
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def _accept(self) -> tuple[socket.socket, Any]:
        connection, _ = self.socket.accept()
        return connection, ("local", 0)

    def server_close(self) -> None:
        """The listener closes its socket."""


def _tcp_server(where: str) -> _Server:
    host, colon, port = where.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise VhostBackendError(f"{where!r} is neither unix:PATH nor HOST:PORT")
    host = host.strip("[]") or "127.0.0.1"
    if host not in ("localhost", "::1") and not host.startswith("127."):
        raise VhostBackendError(f"metrics are served on loopback only, not on {host}")
    try:
        return _Server((host, int(port)), _Quiet)
    except OSError as error:
        raise ListenError(where, error.strerror or str(error)) from None
