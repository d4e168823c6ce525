"""Boot the hypervisor and its dom0 under QEMU's software emulation; return what they reported."""

import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .errors import MachineFailed
from .fetch import Assets
from .initramfs import build

MARK = "XEN-RESULT "  # a line of the console that carries one result as JSON
END = "XEN-END"  # printed when the script inside came to its end


class Run(NamedTuple):
    """What one run of the machine brought."""

    results: dict[str, dict[str, Any]]
    seconds: float  # by the clock
    cpu_seconds: float  # of the emulator: what the run costs whatever else the host is busy with
    console: str


def _option_path(path: Path) -> str:
    return str(path).replace(",", ",,")


def _command(assets: Assets, initramfs: Path, log: Path) -> list[str]:
    # smap=off: the dom0 dies at once with it under emulation. Memory is left for a domU.
    xen = "com1=115200,8n1 console=com1 dom0_mem=512M,max:512M loglvl=all guest_loglvl=all"
    dom0 = "console=hvc0 earlyprintk=xen rdinit=/init panic=1 quiet"
    return [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max,smap=off",
        "-smp", "1", "-m", "1024", "-nographic", "-nodefaults", "-no-reboot",
        "-serial", f"file:{_option_path(log)}", "-monitor", "none", "-display", "none",
        "-kernel", str(assets.hypervisor), "-append", f"{xen} noreboot=0",
        "-initrd", f"{_option_path(assets.kernel)} {dom0},{_option_path(initramfs)}",
    ]  # fmt: skip


def parse(console: str) -> dict[str, dict[str, Any]]:
    """The results among the console's lines, by their name.

    The hypervisor's own messages may stand before or after a result on its line.
    """
    decoder = json.JSONDecoder()
    results: dict[str, dict[str, Any]] = {}
    for line in console.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                result, _ = decoder.raw_decode(text)
            except json.JSONDecodeError:
                continue
            results[result["name"]] = result
    return results


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(assets: Assets, repository: Path, inside: Path, limit: float = 300.0) -> Run:
    """Boot once and wait for the machine's end, `limit` seconds at most."""
    with tempfile.TemporaryDirectory(prefix="xen-machine-") as scratch:
        initramfs = Path(scratch, "initramfs")
        log = Path(scratch, "console")
        build(assets, repository, inside, initramfs)
        started = time.monotonic()
        before = _children_cpu()
        process = subprocess.Popen(
            _command(assets, initramfs, log),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, complaint = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            complaint = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        seconds = time.monotonic() - started
        cpu_seconds = _children_cpu() - before
        console = log.read_text(errors="replace") if log.exists() else ""
    # QEMU ends with 0 whatever happened inside, so the lines are all there is to go by.
    if END not in console:
        raise MachineFailed(f"no end was reported; {complaint}\n{console[-4000:]}")
    return Run(parse(console), seconds, cpu_seconds, console)
