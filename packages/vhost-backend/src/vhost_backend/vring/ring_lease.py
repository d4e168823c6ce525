"""The lock of a ring that one worker serves from C, and everybody else wants now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from virtqueue import Server

from .state import VringState

#: Seconds between two looks at a worker that was called back. It comes at once, unless a handler in
#: C has just begun: then the ring can be borrowed at the next look.
CALL_BACK_INTERVAL: Final = 0.0005
#: Seconds after which the worker is taken to be held up by its call descriptor.
CALL_BACK_PATIENCE: Final = 1.0


class RingLease:
    """Mutual exclusion between a ring's worker and its visitors, and who goes first.

    The *worker* may hold the ring while it serves it from C, asleep or not. A *visitor* is any
    thread that enters this context, the worker itself on its long way included. One worker, any
    number of visitors. The states::

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
    - *Visitors go first.* They keep their turn from coming to going, and `claim` needs the turn. So
      the worker cannot have the ring back before a visitor that it has let in.
    - *Look again.* After C, and after each `reclaim`, the worker looks at `wanted`. When it is set
      the ring may have been stopped or moved: the worker compares the generation before it
      completes what it had taken. After C the ring may still be borrowed, too: the worker gives way
      first.
    """

    def __init__(self, state: VringState) -> None:
        self.state: VringState = state
        self._ring = threading.Lock()
        self._turn = threading.Lock()
        # The visitor: its thread, and how often it came again without going.
        self._visitor = 0
        self._depth = 0
        #: What the present visitor has borrowed the ring from.
        self._lender: Server | None = None
        #: A visitor has come since the worker claimed.
        self.wanted: bool = False
        #: What serves the ring from C now.
        self.server: Server | None = None
        #: Ends the server's sleep.
        self.wake: Callable[[], None] = _nobody_sleeps
        #: The worker lets visitors in, while the device works on a batch.
        self.release: Callable[[], None] = self._ring.release
        #: The worker has the ring again, also before visitors that wait. It looks at `wanted` next.
        self.reclaim: Callable[[], object] = self._ring.acquire

    # -- the worker -----------------------------------------------------------------------------

    def claim(self) -> VringState:
        """Have the ring until `end` or `release`, after the visitors that are here."""
        self._turn.acquire()
        self._ring.acquire()
        # With the turn: a visitor that comes later is noticed, and cannot borrow any more.
        self.wanted = False
        if self.server is not None:
            self.server.own()
        self._turn.release()
        return self.state

    def begin(self, server: Server) -> bool:
        """Show visitors what to interrupt; False when one waits that has not seen it."""
        self.server = server
        return not self.wanted

    def give_way(self) -> None:
        """Let waiting visitors in, and claim again; also after a visitor that has borrowed."""
        self._ring.release()
        self.claim()

    def end(self) -> None:
        """Go without the ring."""
        self.server = None
        self._ring.release()

    # -- visitors -------------------------------------------------------------------------------

    def __enter__(self) -> VringState:
        thread = threading.get_ident()
        # Only this thread sets its own number there.
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
        """The worker has the ring: in C, asleep or at work, or for a moment in Python."""
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
                # A hostile front-end can fill the call eventfd and make it blocking, so that the
                # worker waits to signal. Reading it lets the worker go.
                self.state.drain_call()
                drained = True
        if drained:
            # It may have been a signal that the driver waits for.
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
    """What wakes a server before there is one."""
