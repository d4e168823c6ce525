"""Build or find what a comparison needs: load generators, peers and our own packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
LOAD = BENCHMARKS / "load" / "build" / "load"
NETLOAD = LOAD.with_name("netload")
PEERS = BENCHMARKS / "peers" / "target" / "release"


class Unavailable(Exception):
    """This machine cannot build, start or measure something; the text says why."""


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise Unavailable(f"`{' '.join(command)}`: {lines[-1]}")
    return done.stdout


def build_load() -> None:
    """Compile the load generators."""
    _run(["make", "--silent", f"BUILD={LOAD.parent}"], BENCHMARKS / "load")


def build_rust() -> str:
    """Compile the Rust peers; return their versions, which the lock file fixes."""
    _run(["cargo", "build", "--release", "--locked", "--quiet"], BENCHMARKS / "peers")
    lock = (BENCHMARKS / "peers" / "Cargo.lock").read_text()
    found = dict(re.findall(r'name = "([\w-]+)"\nversion = "([\d.]+)"', lock))
    crates = ("vhost", "vhost-user-backend", "virtio-queue", "vm-memory")
    compiler = _run(["rustc", "--version"]).split()[1]
    return ", ".join(f"{name} {found[name]}" for name in crates) + f" (rustc {compiler}, LTO)"


def find_qemu() -> str:
    """Return the version of qemu-storage-daemon."""
    if shutil.which("qemu-storage-daemon") is None:
        raise Unavailable("qemu-storage-daemon is not installed")
    text = _run(["qemu-storage-daemon", "--help"])
    if "vhost-user-blk" not in text:
        raise Unavailable("this qemu-storage-daemon has no vhost-user-blk export")
    return _run(["qemu-storage-daemon", "--version"]).splitlines()[0].split("version ")[1]


def find_dpdk() -> str:
    """Return the version of testpmd."""
    if shutil.which("dpdk-testpmd") is None:
        raise Unavailable("dpdk-testpmd is not installed (Debian: dpdk-dev, librte-net-vhost23)")
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("testpmd polls and needs a processor of its own")
    program = ["dpdk-testpmd", "--no-huge", "--no-pci", "--no-shconf", "-m", "64", "-v", "-h"]
    done = subprocess.run(program, capture_output=True, text=True)
    found = re.search(r"RTE Version: '(.*)'", done.stdout + done.stderr)
    return found[1] if found else "of an unknown version"


def find_ours() -> str:
    """Return our versions and the engine that a queue uses by default."""
    program = (
        "import vhost_backend, virtqueue;"
        "print(f'vhost-backend {vhost_backend.__version__}, virtqueue {virtqueue.__version__},'"
        "f' {virtqueue.default_engine()} engine')"
    )
    return _run([sys.executable, "-c", program]).strip()


_FINDERS: dict[str, Callable[[], str]] = {
    "rust": build_rust,
    "qemu": find_qemu,
    "dpdk": find_dpdk,
}


def prepare(wanted: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Build or find each wanted peer; return the versions, and why a peer is missing."""
    versions, missing = {}, {}
    for need in sorted(wanted - {""}):
        try:
            versions[need] = _FINDERS[need]()
        except Unavailable as reason:
            missing[need] = str(reason)
    return versions, missing
