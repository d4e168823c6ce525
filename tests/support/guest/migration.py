"""A guest on its way to another QEMU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .guest import Guest

#: Bytes a second that leave time to interfere with a migration.
SLOW = 4 << 20

#: The same once a guest runs at its target, which can then be seen to ask for pages itself; those
#: it asks for are not held up.
UNHURRIED = 32 << 20


class MigrationError(Exception):
    """QEMU gave up; the message ends with what both QEMUs said last."""


class Migration:
    """A migration from its start on; `finish()`, `cancel()` or wait for its failure.

    `capabilities` are QEMU's ("postcopy-ram", "return-path"), switched on at both ends;
    `bandwidth` limits it to so many bytes a second until `finish()`. With postcopy-ram, pages that
    the target has not asked for follow at `UNHURRIED`.
    """

    def __init__(
        self,
        source: Guest,
        target: Guest,
        *,
        capabilities: Sequence[str] = (),
        bandwidth: int = 0,
    ) -> None:
        self.source = source
        self.target = target
        wanted = [{"capability": name, "state": True} for name in capabilities]
        for guest in (source, target):
            if wanted:
                guest.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        limits = {"max_bandwidth": bandwidth or 1 << 40}
        if "postcopy-ram" in capabilities:
            limits["max_postcopy_bandwidth"] = UNHURRIED
        source.qmp.execute("migrate-set-parameters", **limits)
        with tempfile.TemporaryDirectory(prefix="migrate-") as folder:
            uri = f"unix:{folder}/s"
            target.qmp.execute("migrate-incoming", uri=uri)
            source.qmp.execute("migrate", uri=uri)
            # From then on they are connected and need no path.
            self.await_status("active", "device", "completed")

    def state(self) -> dict[str, Any]:
        """What the source says of it (QMP's query-migrate)."""
        state: dict[str, Any] = self.source.qmp.execute("query-migrate")
        return state

    def await_status(self, *wanted: str, limit: float = 120) -> dict[str, Any]:
        """Wait until it has one of these states; returns QEMU's figures.

        Raises MigrationError when it ends in another one, TimeoutError after `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while True:
            state = self.state()
            status = state.get("status")
            if status in wanted:
                return state
            if status in ("completed", "failed", "cancelled"):
                raise MigrationError(self._describe(state))
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {limit} s\n{self._describe(state)}")
            time.sleep(0.02)

    def await_bytes(self, amount: int, limit: float = 60) -> None:
        """Wait until that many bytes of memory are through and the migration still goes on."""
        deadline = time.monotonic() + limit
        while True:
            state = self.await_status("active", "setup", limit=limit)
            if state.get("ram", {}).get("transferred", 0) >= amount:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {limit} s\n{self._describe(state)}")
            time.sleep(0.02)

    def switch_to_postcopy(self) -> None:
        """Let the target run now and fetch what it misses from the source."""
        self.source.qmp.execute("migrate-start-postcopy")
        self.await_status("postcopy-active", "completed")

    def cancel(self, limit: float = 30) -> None:
        """Give it up and wait until QEMU has; the guest stays where it is."""
        self.source.qmp.execute("migrate_cancel")
        self.await_status("cancelled", limit=limit)

    def finish(self, limit: float = 120) -> dict[str, Any]:
        """Wait for the end and return QEMU's figures; the target takes commands from then on.

        Commands that were running go on in the guest, but nobody hears their answers.
        """
        self.source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 40)
        state = self.await_status("completed", limit=limit)
        self.target.qmp.wait_event("RESUME", limit=limit)
        self.target.arrived()
        return state

    def _describe(self, state: dict[str, Any]) -> str:
        return f"migration: {state}\n{self.source.describe()}\n{self.target.describe()}"
