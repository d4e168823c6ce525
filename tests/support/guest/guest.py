"""A real Linux guest under QEMU that runs shell commands for a test."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from .assets import Assets, Qemu
from .migration import Migration
from .processes import Child
from .qmp import Qmp

# QEMU 7.2 under TCG may crash a guest in its first precopy migration, whatever its devices are,
# unless the RAM size is an odd multiple of 8 KiB.
MEMORY_KIB = 192 * 1024 + 8

# A guest that shares two cores with other tests may be slow, not dead.
BOOT_LIMIT = 90.0

# With a kernel at random addresses a reboot takes half as long under QEMU 7.2: code that was
# translated for the last kernel does not get in the way of unpacking the next.
_KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable "
    "random.trust_cpu=on rcupdate.rcu_expedited=1"
)


class GuestError(Exception):
    """The guest or its QEMU failed; the message ends with what they said last."""


class GuestTimeout(GuestError):
    """The guest did not answer in time."""


class GuestGone(GuestError):
    """QEMU ended, or the guest rebooted, while a command ran."""


class CommandFailed(GuestError):
    """A command that had to succeed did not; `status` and `output` are what it left."""

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"{command!r} exits with {status}: {output}")
        self.status = status
        self.output = output


class Result(NamedTuple):
    """What a command in the guest came to."""

    status: int
    output: str


@dataclass(frozen=True)
class VhostUserDevice:
    """A PCI device that a back-end serves.

    `socket` is the back-end's path, `slot` the PCI slot that the guest finds it in, `reconnect`
    the seconds between QEMU's attempts to get a lost back-end back (0: none), `options` more
    properties of the QEMU device (`{"packed": "on"}`), `driver` is QEMU's name for its type.
    """

    socket: Path
    slot: int
    _: KW_ONLY
    reconnect: int = 0
    options: dict[str, str] = field(default_factory=dict)
    driver: str

    @property
    def name(self) -> str:
        """The name of the QEMU device."""
        return f"dev{self.slot}"

    def arguments(self, version: tuple[int, ...]) -> list[str]:
        """The arguments for it of a QEMU of this version."""
        chardev = f"socket,id=chardev-{self.name},path={self.socket}"
        if self.reconnect:
            # Since 9.2 in milliseconds; 11.1 has unlearned the seconds.
            if version < (9, 2):
                chardev += f",reconnect={self.reconnect}"
            else:
                chardev += f",reconnect-ms={self.reconnect * 1000}"
        device = f"{self.driver},id={self.name},chardev=chardev-{self.name},addr={self.slot:#x}"
        for name, value in self.properties().items():
            device += f",{name}={value}"
        return ["-chardev", chardev, "-device", device]

    def properties(self) -> dict[str, str]:
        """The QEMU device's properties beside those that every device has."""
        return self.options


@dataclass(frozen=True)
class VhostUserDisk(VhostUserDevice):
    """A vhost-user-blk-pci device."""

    _: KW_ONLY
    driver: str = "vhost-user-blk-pci"
    num_queues: int = 1

    @property
    def name(self) -> str:
        return f"disk{self.slot}"

    def properties(self) -> dict[str, str]:
        return {"num-queues": str(self.num_queues)} | self.options


@dataclass(frozen=True)
class VhostUserNet(VhostUserDevice):
    """A virtio-net-pci device with one queue pair, behind `-netdev vhost-user`.

    It has no MSI-X: QEMU 7.2 crashes under TCG when the guest masks a vector of such a device.
    """

    _: KW_ONLY
    driver: str = "virtio-net-pci"

    @property
    def name(self) -> str:
        return f"net{self.slot}"

    def arguments(self, version: tuple[int, ...]) -> list[str]:
        back_end = f"netdev-{self.name}"
        chardev, of_chardev, _, device = super().arguments(version)
        netdev = f"vhost-user,id={back_end},chardev=chardev-{self.name},queues=1"
        device = device.replace(f"chardev=chardev-{self.name}", f"netdev={back_end}")
        return [chardev, of_chardev, "-netdev", netdev, "-device", device]

    def properties(self) -> dict[str, str]:
        return {"vectors": "0"} | self.options


class Command:
    """A command that runs in the guest; `wait()` for its result."""

    def __init__(self, guest: Guest, text: str, limit: float) -> None:
        self._guest = guest
        self._deadline = time.monotonic() + limit
        self._done = threading.Event()
        self._result: Result | None = None
        self.text = text

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> Result:
        """The exit status (137 when the guest's time limit hit) and the output.

        Raises GuestTimeout when the guest does not answer, GuestGone when it cannot any more.
        """
        # The guest enforces the limit itself; only a guest that is stuck overruns it by this much.
        if not self._done.wait(max(self._deadline - time.monotonic(), 0) + 10):
            raise GuestTimeout(f"no answer to {self.text!r}\n{self._guest.describe()}")
        if self._result is None:
            raise GuestGone(f"the guest went away during {self.text!r}\n{self._guest.describe()}")
        return self._result

    def finish(self, result: Result | None) -> None:
        self._result = result
        self._done.set()


class Guest:
    """A virtual machine, from its start to its end; use it as a context manager.

    `initramfs` comes from build_initramfs(), `folder` takes the logs, `disks` are attached in
    their PCI slots, `machine` is QEMU's machine type with its options, `extra` are more QEMU
    arguments, `parameters` more of the kernel's. `hotplug_slots` and `most_memory_kib` leave room
    for memory that comes later. With `incoming` nothing boots: it is the target of a Migration.
    `boot()` waits until commands can be run.
    """

    def __init__(
        self,
        assets: Assets,
        qemu: Qemu,
        initramfs: Path,
        folder: Path,
        *,
        disks: Sequence[VhostUserDevice] = (),
        extra: Sequence[str] = (),
        parameters: str = "",
        machine: str = "pc",
        cpus: int = 2,
        memory_kib: int = MEMORY_KIB,
        hotplug_slots: int = 0,
        most_memory_kib: int = 0,
        incoming: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number, console = tempfile.mkstemp(dir=folder, prefix="console-", suffix=".log")
        os.close(number)
        self.console = Path(console)
        self._lock = threading.Lock()
        self._booted = threading.Condition(self._lock)
        self._boots = 0
        self._running: dict[int, Command] = {}
        self._last = 0
        self._gone = False
        agent, agent_peer = socket.socketpair()
        control, control_peer = socket.socketpair()
        memory = f"{memory_kib}k"
        if hotplug_slots:
            memory += f",slots={hotplug_slots},maxmem={most_memory_kib}k"
        command = [
            *qemu.command,
            *("-nodefaults", "-no-user-config", "-display", "none", "-machine", machine),
            *("-accel", "tcg,thread=multi", "-smp", str(cpus), "-m", memory),
            "-object",
            f"memory-backend-memfd,id=memory,size={memory_kib}k,share=on",
            *("-numa", "node,memdev=memory"),
            *("-kernel", str(assets.kernel), "-initrd", str(initramfs)),
            *("-append", f"{_KERNEL_COMMAND_LINE} {parameters}".rstrip()),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=control,fd={control_peer.fileno()}"),
            *("-mon", "chardev=control,mode=control"),
            *("-device", "virtio-serial-pci,addr=0x1e"),
            *("-chardev", f"socket,id=agent,fd={agent_peer.fileno()}"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *extra,
            *(word for disk in disks for word in disk.arguments(qemu.version)),
        ]
        if incoming:
            command += ["-incoming", "defer"]
        with agent_peer, control_peer:
            self.process = Child(
                command,
                self.console.with_suffix(".qemu"),
                pass_fds=(agent_peer.fileno(), control_peer.fileno()),
            )
        self.command_line = shlex.join(command)
        self.qmp = Qmp(control)
        self._agent = agent
        self._reader = threading.Thread(target=self._read, name="guest-agent", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.describe())
        self.close()

    def boot(self, limit: float = BOOT_LIMIT, *, boots: int = 1) -> None:
        """Wait until the guest has booted for the `boots`-th time. Raises GuestTimeout."""
        deadline = time.monotonic() + limit
        with self._booted:
            while self._boots < boots and not self._gone:
                left = deadline - time.monotonic()
                if left <= 0 or not self._booted.wait(left):
                    raise GuestTimeout(f"no boot in {limit} s\n{self.describe()}")
            if self._boots < boots:
                raise GuestGone(f"QEMU ended before the guest was up\n{self.describe()}")

    def start(self, command: str, limit: float = 60) -> Command:
        """Start a shell command in the guest and do not wait for it.

        After `limit` seconds the guest kills it. Raises GuestGone.
        """
        running = Command(self, command, limit)
        with self._lock:
            if self._gone:
                raise GuestGone(f"the guest is gone\n{self.describe()}")
            self._last += 1
            number = self._last
            self._running[number] = running
        text = base64.b64encode(command.encode()).decode()
        self._agent.sendall(f"{number} {limit:g} {text}\n".encode())
        return running

    def run(self, command: str, limit: float = 60) -> Result:
        """Run a shell command in the guest; both its output streams come back as one text."""
        return self.start(command, limit).wait()

    def check(self, command: str, limit: float = 60) -> str:
        """Run a command that has to succeed and return its output without outer white space.

        Raises CommandFailed otherwise.
        """
        status, output = self.run(command, limit)
        if status != 0:
            raise CommandFailed(command, status, output)
        return output.strip()

    def reboot(self, limit: float = BOOT_LIMIT) -> None:
        """Reboot from inside and wait until the guest is up again."""
        self.boot(limit, boots=self.start_reboot())

    def start_reboot(self) -> int:
        """Reboot from inside, do not wait; returns what to tell `boot()` as `boots`."""
        with self._lock:
            boots = self._boots
        self.check("sync")
        # No answer comes: the shell is gone before it could give one.
        self.start("reboot -f")
        return boots + 1

    def power_off(self, limit: float = 30) -> int:
        """Power off from inside and return QEMU's exit status."""
        self.check("sync")
        self.start("poweroff -f")
        return self.process.wait(limit)

    def migrate(self, target: Guest, limit: float = 120) -> dict[str, Any]:
        """Move the guest to another QEMU, wait for the end, and return QEMU's figures.

        The target takes commands from then on. Commands that were running go on in the guest, but
        nobody hears their answers.
        See Migration, also for what is raised.
        """
        return Migration(self, target).finish(limit)

    def arrived(self) -> None:
        """This QEMU has taken over a guest that has booted elsewhere."""
        with self._booted:
            self._boots = 1
            self._booted.notify_all()

    def describe(self) -> str:
        """The end of the console and of QEMU's own output, for a failing test's report."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        console = "\n".join(text.splitlines()[-40:])
        return (
            f"--- console ({self.console})\n{console}\n"
            f"--- QEMU, pid {self.process.pid}, exit status {self.process.returncode}\n"
            f"{self.process.tail()}"
        )

    def close(self) -> None:
        """End QEMU, whatever the guest does."""
        if self.process.returncode is None:
            with contextlib.suppress(OSError, TimeoutError):
                self.qmp.execute("quit", limit=5)
            with contextlib.suppress(TimeoutError):
                self.process.wait(5)
        self.process.close()
        self.qmp.close()
        with contextlib.suppress(OSError):
            self._agent.shutdown(socket.SHUT_RDWR)
        self._reader.join(10)
        self._agent.close()

    def _read(self) -> None:
        """The thread that takes what the agent says."""
        try:
            with self._agent.makefile("rb") as stream:
                while line := stream.readline():
                    words = line.split()
                    if line.endswith(b"HELLO\n"):
                        self._forget(booted=True)
                    elif len(words) == 4 and words[0] == b"REPLY":
                        number, status, length = map(int, words[1:])
                        output = stream.read(length).decode(errors="replace")
                        with self._lock:
                            command = self._running.pop(number, None)
                        if command is not None:
                            command.finish(Result(status, output))
        except OSError:
            pass
        finally:
            self._forget(booted=False)

    def _forget(self, *, booted: bool) -> None:
        """Commands that were running get no answer any more."""
        with self._booted:
            if booted:
                self._boots += 1
            else:
                self._gone = True
            lost = list(self._running.values())
            self._running.clear()
            self._booted.notify_all()
        for command in lost:
            command.finish(None)
