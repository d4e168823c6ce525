"""Fetch the hypervisor, a dom0 kernel and the Xen libraries from Debian into a cache folder.

The packages are downloaded with apt, unpacked and thrown away: nothing is installed. The cache
keeps only what the machine boots from.
"""

import fcntl
import gzip
import io
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .errors import Unavailable

CACHE_VARIABLE = "VHOST_BACKEND_TEST_CACHE"
XEN = "4.17"
MODULES = ("xen-privcmd", "xen-gntdev", "xen-gntalloc", "xen-evtchn", "xenfs")
_LAYOUT = 1  # raised when what the cache holds changes


class Assets(NamedTuple):
    """Files the machine boots from."""

    hypervisor: Path
    kernel: Path
    modules: tuple[Path, ...]
    busybox: Path
    libraries: tuple[Path, ...]
    versions: str


def cache_folder() -> Path:
    """The folder that downloads and built files are kept in between runs."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vhost-backend-tests"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other test runs that would fill it at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:3])}...: {done.stderr.strip()[-300:]}")
    return done.stdout


def check_host() -> None:
    """Raise Unavailable when this host cannot run the machine."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the Xen machine is x86-64, this host is {platform.machine()}")
    _need("ldd", "qemu-system-x86_64")


def _need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is needed (a Debian 12 host with qemu-system-x86)")


def _newest(pattern: str) -> str:
    names = [
        line.split()[0]
        for line in _run("apt-cache", "search", "--names-only", pattern).split("\n")
        if line.strip()
    ]
    if not names:
        raise Unavailable(f"apt knows no package {pattern} (is apt-get update needed?)")
    return max(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def _dependencies(package: str, pattern: str) -> list[str]:
    text = _run("apt-cache", "depends", "--important", package)
    return re.findall(rf"Depends: ({pattern})$", text, re.MULTILINE)


def _packages() -> dict[str, list[str]]:
    # The guest is made through libxenctrl, whose structures change with each version.
    hypervisor = _newest(rf"^xen-hypervisor-{re.escape(XEN)}-amd64$")
    kernels = _dependencies("linux-image-amd64", r"linux-image-\S+")
    if not kernels:
        raise Unavailable("apt knows no Debian kernel (linux-image-amd64)")
    misc = f"libxenmisc{XEN}"
    libraries = [misc, *_dependencies(misc, r"lib(?:xen|yajl)\S+")]
    for library in list(libraries[1:]):
        libraries += _dependencies(library, r"libxen\S+")
    return {
        "hypervisor": [hypervisor],
        "kernel": kernels[:1],
        "busybox": ["busybox-static"],
        "libraries": sorted(set(libraries)),
    }


def _unpack(package: Path, want: Callable[[str], str | None], into: Path) -> None:
    """Unpack the members that `want` gives a file name for, links as copies' names."""
    done = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"cannot unpack {package.name}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            name = want(member.name.removeprefix("./"))
            if name is None:
                continue
            target = into / name
            if member.issym():
                target.symlink_to(member.linkname)
            elif member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())


def _want_hypervisor(name: str) -> str | None:
    return "xen.gz" if re.fullmatch(r"boot/xen-[\d.]+-amd64\.gz", name) else None


def _want_kernel(name: str) -> str | None:
    if re.fullmatch(r"boot/vmlinuz-\S+", name):
        return "vmlinuz"
    match = re.fullmatch(r".*/drivers/xen/(?:\S+/)?([a-z-]+\.ko(?:\.xz)?)", name)
    if match and match.group(1).split(".")[0] in MODULES:
        return match.group(1)
    return None


def _want_busybox(name: str) -> str | None:
    return "busybox" if name.endswith("bin/busybox") else None


def _want_library(name: str) -> str | None:
    match = re.fullmatch(r"usr/lib/x86_64-linux-gnu/(lib(?:xen|yajl)[\w.-]+\.so[\w.]*)", name)
    if match and not re.match(r"libxen(guest|light|stat|vchan)", match.group(1)):
        return match.group(1)
    return None


def _download(folder: Path) -> None:
    wants = {
        "hypervisor": _want_hypervisor,
        "kernel": _want_kernel,
        "busybox": _want_busybox,
        "libraries": _want_library,
    }
    versions = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # apt drops its rights for the download, when it has any, and must still reach the folder.
        os.chmod(scratch, 0o777)
        for part, packages in _packages().items():
            target = folder / part
            target.mkdir()
            for package in packages:
                _run("apt-get", "download", "-q", package, cwd=Path(scratch))
            for file in sorted(Path(scratch).glob("*.deb")):
                versions.append(file.name)
                _unpack(file, wants[part], target)
                file.unlink()
    compressed = folder / "hypervisor" / "xen.gz"
    (folder / "hypervisor" / "xen").write_bytes(gzip.decompress(compressed.read_bytes()))
    compressed.unlink()
    (folder / "versions").write_text("\n".join(versions) + "\n")


def fetch() -> Assets:
    """Return the boot files, downloading them when the cache has none."""
    cache = cache_folder()
    folder = cache / f"xen-{_LAYOUT}"
    with locked(cache / "locks-xen"):
        if not (folder / "versions").exists():
            _need("apt-get", "apt-cache", "dpkg-deb")
            shutil.rmtree(folder, ignore_errors=True)
            partial = cache / f"xen-{_LAYOUT}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                _download(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    modules = []
    for name in MODULES:
        found = sorted((folder / "kernel").glob(f"{name}.ko*"))
        if not found:
            raise Unavailable(f"the kernel package has no module {name}")
        modules.append(found[0])
    return Assets(
        hypervisor=folder / "hypervisor" / "xen",
        kernel=folder / "kernel" / "vmlinuz",
        modules=tuple(modules),
        busybox=folder / "busybox" / "busybox",
        libraries=tuple(sorted((folder / "libraries").iterdir())),
        versions=(folder / "versions").read_text(),
    )
