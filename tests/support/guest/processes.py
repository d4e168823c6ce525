"""Child processes of the tests: their output in a file, ended by pid, gone when the tests are."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .assets import tool


class Child:
    """A running program whose output goes to a file.

    `command` is its argument vector, `log` takes both its output streams (appended), `pass_fds`
    stay open in it. The kernel kills it when the thread that started it ends, so that killed
    tests leave nothing behind.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        leash = tool("setpriv")
        prefix = [leash, "--pdeathsig", "KILL"] if leash else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(pass_fds),
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, limit: float = 30) -> int:
        """Await the end and return the exit status. Raises TimeoutError after `limit` seconds."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"{self.command[0]} (pid {self.pid}) has not ended in {limit} s\n{self.tail()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        self._process.wait()

    def terminate(self, limit: float = 10) -> int:
        """SIGTERM, then wait; returns the exit status."""
        self._process.terminate()
        return self.wait(limit)

    def close(self, limit: float = 5) -> None:
        """End it one way or the other."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(limit)
        if self._process.poll() is None:
            self.kill()

    def tail(self, lines: int = 40) -> str:
        """The last lines of its output."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])
