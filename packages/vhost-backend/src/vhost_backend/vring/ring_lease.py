"""The lock of a ring that one worker serves from C, while other threads need it now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from virtqueue import Server

from .state import VringState

#: Seconds between two looks at a worker that was called back. The worker comes at once, unless a
#: handler in C has just begun: then the visitor can borrow the ring at the next look.
CALL_BACK_INTERVAL: Final = 0.0005
#: Seconds after which a visitor assumes that the worker is blocked by its call descriptor.
CALL_BACK_PATIENCE: Final = 1.0


class RingLease:
    """Mutual exclusion between a ring's worker and its visitors, and their order.

    The *worker* may hold the ring as long as it serves it from C, asleep or not. A *visitor* is any
    thread that enters this context, the worker itself on its long way included. There is one
    worker, and any number of visitors. The states::

                    claim              a handler in C begins
            FREE ----------> SERVED ------------------------> HANDLED
             |^ <----------   |^  <------------------------      |
             ||     end       ||     it ends, unvisited          | enter
        enter||leave   release||reclaim                          v
             v|               v|      it ends, claim          BORROWED <--.
           VISITED          LENT      .-------------             | leave  | enter
                             |^       | to SERVED |              v        |
                        enter||leave  '---------- '------- RETURNED ------'
                             v|
                           VISITED

    ======== ================= =================================================================
    state    the ring is       meanwhile
    ======== ================= =================================================================
    FREE     the next one's    the worker does something else
    SERVED   the worker's      C looks at the ring, takes, completes or sleeps
    LENT     the next one's    the device works in Python on a batch
    HANDLED  the next one's    the device's handler works in C on a batch, as long as a disk may
    VISITED  one visitor's     the worker waits in `claim` or `reclaim`, or is not interested
    BORROWED one visitor's     the handler goes on; when it ends, the worker waits in `claim`
    RETURNED the next one's    the handler goes on; when it ends, the worker claims
    ======== ================= =================================================================

    Three rules carry it.

    - *Say, then look.* A visitor sets `wanted` before it looks for a server to interrupt. The
      worker shows its server (`begin`) before it looks at `wanted`. One of them sees the other.
    - *Visitors go first.* A visitor keeps its turn from entering to leaving, and `claim` needs the
      turn. So the worker cannot have the ring back before a visitor that it has let in.
    - *Look again.* The worker looks at `wanted` after C and after each `reclaim`. When `wanted` is
      set, a visitor may have stopped or moved the ring, so the worker compares the generation
      before it completes its batch. After C a visitor may still borrow the ring, so the worker
      gives way first.
    """

    def __init__(self, state: VringState) -> None:
        self.state: VringState = state
        self._ring = threading.Lock()
        self._turn = threading.Lock()
        # The visitor: its thread, and how often it has entered again without leaving.
        self._visitor = 0
        self._depth = 0
        #: The server from which the present visitor has borrowed the ring.
        self._lender: Server | None = None
        #: A visitor has come since the worker claimed.
        self.wanted: bool = False
        #: The server that serves the ring from C now.
        self.server: Server | None = None
        #: Ends the server's sleep.
        self.wake: Callable[[], None] = _nobody_sleeps
        #: The worker calls this to let visitors in while the device works on a batch.
        self.release: Callable[[], None] = self._ring.release
        #: The worker calls this to have the ring again, even before visitors that wait. It must
        #: look at `wanted` next.
        self.reclaim: Callable[[], object] = self._ring.acquire

    # -- the worker -----------------------------------------------------------------------------

    def claim(self) -> VringState:
        """Wait for the visitors that are here, then have the ring until `end` or `release`."""
        self._turn.acquire()
        self._ring.acquire()
        # With the turn held: a later visitor sets `wanted` again, and cannot borrow any more.
        self.wanted = False
        if self.server is not None:
            self.server.own()
        self._turn.release()
        return self.state

    def begin(self, server: Server) -> bool:
        """Show `server` to visitors; False when a visitor waits that may not have seen it."""
        self.server = server
        return not self.wanted

    def give_way(self) -> None:
        """Let waiting visitors in and claim again; also waits for a visitor that has borrowed."""
        self._ring.release()
        self.claim()

    def end(self) -> None:
        """Leave the ring."""
        self.server = None
        self._ring.release()

    # -- visitors -------------------------------------------------------------------------------

    def __enter__(self) -> VringState:
        thread = threading.get_ident()
        # Safe without a lock: only this thread ever writes its own number there.
        if self._visitor == thread:
            self._depth += 1
            return self.state
        self._turn.acquire()
        self.wanted = True
        if not self._ring.acquire(False):
            try:
                self._call_back()
            except BaseException:  # a signal's, on the main thread
                self._turn.release()
                raise
        self._visitor = thread
        return self.state

    def _call_back(self) -> None:
        """Get the ring from the worker, which is in C (asleep or not) or for a moment in Python."""
        patience = time.monotonic() + CALL_BACK_PATIENCE
        drained = False
        while True:
            server = self.server
            if server is not None:
                server.interrupt()
                self.wake()
                if server.borrow():
                    self._lender = server
                    break
            if self._ring.acquire(timeout=CALL_BACK_INTERVAL):
                break
            if server is not None and time.monotonic() > patience:
                # A hostile front-end can fill the call eventfd and make it blocking. The worker
                # then waits in its write, and reading the eventfd lets it go.
                self.state.drain_call()
                drained = True
        if drained:
            # The driver may wait for the signal that was read away.
            self.state.signal_call()

    def __exit__(self, *exc: object) -> None:
        if self._depth:
            self._depth -= 1
            return
        self._visitor = 0
        lender, self._lender = self._lender, None
        if lender is not None:
            lender.give_back()
        else:
            self._ring.release()
        self._turn.release()


def _nobody_sleeps() -> None:
    """Stands for `wake` before there is a server."""
