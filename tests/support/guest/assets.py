"""What a test guest is made of: a kernel, busybox, QEMU and two tools, fetched once and cached.

`provide()` hands out what is there and fetches the rest when that is possible: as root on Debian,
by apt. The kernel and busybox are only unpacked into the cache, never installed; QEMU, kmod and
cpio are ordinary programs and are installed when they are missing. Newer QEMUs come from newer
Debian suites, each bootstrapped into a folder of the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "VHOST_BACKEND_TEST_CACHE"
MIRROR_VARIABLE = "VHOST_BACKEND_TEST_MIRROR"
SYSTEM = "system"

# The Debian suite that carries a QEMU version.
SUITES = {"7.2": "bookworm", "10.0": "trixie", "11.1": "sid"}

_TOOL_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "modprobe": "kmod",
    "cpio": "cpio",
}
_KERNEL_META = "linux-image-cloud-amd64"


class Missing(Exception):
    """Something the guest tests need is not here and cannot be fetched; says what and why."""


@dataclass(frozen=True)
class Qemu:
    """One QEMU to run guests with.

    `command` is what an argument vector starts with; `version` is what the program itself says.
    """

    name: str
    version: tuple[int, ...]
    command: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Assets:
    """Paths of all that a guest is built from."""

    kernel: Path
    kernel_version: str
    kernel_root: Path
    busybox: Path
    depmod: str
    modprobe: str
    cpio: str


def cache_directory() -> Path:
    """The folder that keeps everything fetched (created when needed)."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        path = Path(named)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "vhost-backend-tests"
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def tool(name: str) -> str | None:
    """Where a program is; the system folders count, also for users who lack them in PATH."""
    return shutil.which(name, path=_TOOL_PATH)


def provide() -> Assets:
    """Find all parts of a guest, fetching what is missing.

    Raises Missing with the reason when something is absent and cannot be fetched here.
    """
    _check_machine()
    with contextlib.suppress(Missing):
        return _locate()
    _check_fetching()
    with _locked():
        _fetch()
    return _locate()


def provide_qemu(name: str = SYSTEM) -> Qemu:
    """Find the QEMU called `name`: "system", or a version such as "7.2" or "10.0".

    The machine's own QEMU is taken when its version begins with `name`; otherwise the Debian suite
    that carries this version is bootstrapped into the cache (about 360 MB, under a minute).
    Raises Missing with the reason.
    """
    _check_machine()
    program = tool("qemu-system-x86_64")
    if program is not None:
        own = _qemu(name, (program,))
        if name == SYSTEM or str(own).startswith(f"{name}."):
            return own
    elif name == SYSTEM:
        raise Missing("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)")
    suite = SUITES.get(name)
    if suite is None:
        raise Missing(f"no Debian suite is known to carry QEMU {name}")
    root = provide_suite(suite, ["qemu-system-x86"])
    # The loader of the suite runs its program with its libraries; no chroot, so that sockets,
    # images and passed descriptors mean the same inside and outside.
    libraries = root / "usr/lib/x86_64-linux-gnu"
    found = _qemu(
        name,
        (
            str(libraries / "ld-linux-x86-64.so.2"),
            "--library-path",
            str(libraries),
            str(root / "usr/bin/qemu-system-x86_64"),
            "-L",
            str(root / "usr/share/qemu"),
            "-L",
            str(root / "usr/share/seabios"),
            "-L",
            str(root / "usr/lib/ipxe/qemu"),
        ),
    )
    if not str(found).startswith(f"{name}.") and suite != "sid":
        raise Missing(f"Debian {suite} carries QEMU {found}, not {name}")
    return found


def provide_program(name: str, *packages: str, fetch: bool = True) -> str:
    """The path of a program of this machine; its Debian packages are installed when it is missing.

    Raises Missing with the reason, also when it is missing and `fetch` is false.
    """
    path = tool(name)
    if path is None:
        if not fetch:
            raise Missing(f"{name} is not installed (Debian: {' '.join(packages)})")
        _check_fetching()
        with _locked():
            _apt("update")
            _install(list(packages))
        path = tool(name)
    if path is None:
        raise Missing(f"{' '.join(packages)}: no {name} in there")
    return path


def provide_suite(suite: str, packages: list[str]) -> Path:
    """The root folder of a bootstrapped Debian suite that holds these packages.

    Needs root and debootstrap the first time. Raises Missing with the reason.
    """
    root = cache_directory() / f"{suite}-{'-'.join(sorted(packages))}"
    if root.is_dir():
        return root
    _check_fetching()
    with _locked():
        if root.is_dir():
            return root
        if tool("debootstrap") is None:
            _install(["debootstrap"])
        partial = root.with_name(f"{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        mirror = os.environ.get(MIRROR_VARIABLE)  # or debootstrap's own choice
        _run(
            [
                tool("debootstrap") or "debootstrap",
                "--variant=minbase",
                f"--include={','.join(packages)}",
                suite,
                str(partial),
                *([mirror] if mirror else []),
            ],
            limit=1200,
        )
        shutil.rmtree(partial / "var/cache/apt", ignore_errors=True)
        partial.rename(root)
    return root


def _check_machine() -> None:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Missing(f"test guests are x86-64 Linux; this is {platform.platform()}")


def _check_fetching() -> None:
    if not Path("/etc/debian_version").exists() or tool("apt-get") is None:
        raise Missing("a part of the test guest is missing and is fetched on Debian only")
    if os.geteuid() != 0:
        raise Missing("a part of the test guest is missing and only root can fetch it (apt)")


def _locate() -> Assets:
    cache = cache_directory()
    programs = {}
    for name, package in _PROGRAMS.items():
        path = tool(name)
        if path is None:
            raise Missing(f"{name} is not installed (Debian: {package})")
        programs[name] = path
    kernels = sorted(cache.glob("kernel-*/boot/vmlinuz-*"), key=lambda p: p.stat().st_mtime)
    if not kernels:
        raise Missing(f"no kernel in {cache}")
    busybox = cache / "busybox/bin/busybox"
    if not busybox.exists():
        raise Missing(f"no static busybox in {cache}")
    kernel = kernels[-1]
    return Assets(
        kernel=kernel,
        kernel_version=kernel.name.removeprefix("vmlinuz-"),
        kernel_root=kernel.parents[1],
        busybox=busybox,
        depmod=programs["depmod"],
        modprobe=programs["modprobe"],
        cpio=programs["cpio"],
    )


def _fetch() -> None:
    cache = cache_directory()
    # A brand-new machine has no package lists, an old one has stale ones: both make downloads fail.
    _apt("update")
    missing = sorted({package for name, package in _PROGRAMS.items() if tool(name) is None})
    if missing:
        _install(missing)
    if not any(cache.glob("kernel-*/boot/vmlinuz-*")):
        package = _kernel_package()
        _unpack(package, cache / f"kernel-{package.removeprefix('linux-image-')}")
    if not (cache / "busybox/bin/busybox").exists():
        _unpack("busybox-static", cache / "busybox")


def _kernel_package() -> str:
    """The package with the kernel that the meta package stands for at the moment."""
    listed = _run(["apt-cache", "show", "--no-all-versions", _KERNEL_META])
    found = re.search(r"^Depends:.*?(linux-image-[^\s,]+-cloud-amd64)", listed, re.MULTILINE)
    if found is None:
        raise Missing(f"{_KERNEL_META} names no kernel package")
    return found[1]


def _unpack(package: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        # Root downloads into a private folder, where apt's own user may not write.
        _apt("download", package, option="APT::Sandbox::User=root", folder=folder)
        (archive,) = Path(folder).glob("*.deb")
        tree = Path(folder) / "tree"
        _run(["dpkg", "-x", str(archive), str(tree)])
        # Newer suites merge /bin and /lib into /usr; the guest is built from the plain names.
        for name in ("bin", "lib", "sbin"):
            merged = tree / "usr" / name
            if merged.is_dir() and not (tree / name).exists():
                (tree / name).symlink_to(f"usr/{name}")
        tree.rename(target)


def _install(packages: list[str]) -> None:
    _apt("install", "-y", "--no-install-recommends", *packages)


def _apt(*arguments: str, option: str | None = None, folder: str | None = None) -> None:
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    if option is not None:
        command += ["-o", option]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "PATH": _TOOL_PATH}
    _run([*command, *arguments], limit=900, folder=folder, environment=environment)


def _run(
    command: list[str],
    *,
    limit: float = 120,
    folder: str | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a program; its failure is a Missing that ends with its last words."""
    environment = environment or os.environ | {"PATH": _TOOL_PATH}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        words = " / ".join(done.stdout.strip().splitlines()[-3:])
        raise Missing(f"{' '.join(command)} failed with {done.returncode}: {words}")
    return done.stdout


@functools.lru_cache
def _qemu(name: str, command: tuple[str, ...]) -> Qemu:
    said = _run([*command, "--version"])
    found = re.search(r"version (\d+(?:\.\d+)+)", said)
    if found is None:
        raise Missing(f"{command[0]} does not tell its version")
    return Qemu(name, tuple(map(int, found[1].split("."))), command)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One fetcher at a time, whichever test process it is."""
    with (cache_directory() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
