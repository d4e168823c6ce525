"""The front-end's side of the back-end's own requests: a thread that answers them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import vhost_protocol as vp


class ChannelServer:
    """Answers what the back-end asks on its channel, each message by a handler for its class.

    A handler returns whether it succeeded. Messages without a handler are answered with failure.
    `received` keeps every message in order.
    """

    def __init__(
        self,
        frontend: vp.Frontend,
        handlers: dict[type[vp.Message], Callable[[vp.Message], bool]] | None = None,
    ) -> None:
        self.received: list[vp.Message] = []
        self._handlers = handlers or {}
        self._arrived = threading.Condition()
        self._channel = frontend.open_backend_channel()
        self._thread = threading.Thread(target=self._run, name="back-end channel", daemon=True)

    def start(self) -> None:
        """Answer, on a thread, until the back-end hangs up."""
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                received = self._channel.receive()
            except (vp.ProtocolError, OSError):
                return
            if received is None:
                return
            with received:
                with self._arrived:
                    self.received.append(received.message)
                    self._arrived.notify_all()
                handler = self._handlers.get(type(received.message))
                try:
                    ok = handler is not None and handler(received.message)
                    self._channel.acknowledge(received, ok)
                except (vp.ProtocolError, OSError):
                    return  # the session is being closed

    def wait_for(self, kind: type[vp.Message], timeout: float = 5.0) -> vp.Message:
        """The first message of that class, once it is there. Raises `TimeoutError`."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._find(kind) is not None, timeout):
                raise TimeoutError(f"no {kind.request_name} within {timeout:g} s")
            message = self._find(kind)
            assert message is not None
            return message

    def _find(self, kind: type[vp.Message]) -> vp.Message | None:
        return next((message for message in self.received if isinstance(message, kind)), None)

    def join(self, timeout: float = 5.0) -> None:
        """Wait for the thread, after the back-end has hung up."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._channel.close()
