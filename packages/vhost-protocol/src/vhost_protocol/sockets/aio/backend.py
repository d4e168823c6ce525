"""The back-end's end of the main socket."""

from __future__ import annotations

import socket

from ...rules.session import Session
from ...rules.table import FRONTEND_TABLE
from .endpoint import AsyncAnsweringEndpoint


class AsyncBackendConnection(AsyncAnsweringEndpoint):
    """A back-end's connection: requests of a front-end arrive here and are answered.

    ``receive()`` gives each request as a value with the descriptors that came along.  What was
    negotiated is known from the requests and answers that passed (``session``); the features that
    are offered are those of the ``FeaturesReply`` and ``ProtocolFeaturesReply`` that are sent.

    Args:
        sock: a connected Unix stream socket; owned from here on.
        timeout: seconds a message may take once it has begun, and an answer to be taken, or None.
        session: shared state; a new one by default.
        strict: treat violations that are usually tolerated as errors.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(sock, FRONTEND_TABLE, session, timeout=timeout, strict=strict)

    async def __aenter__(self) -> AsyncBackendConnection:
        return self
