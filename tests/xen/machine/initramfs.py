"""Build the dom0's initramfs: busybox, this Python, the Xen libraries, and the packages under test.

Two archives: the base (Python and the Xen parts) is cached; the packages and the script that runs
inside are written anew for each run and appended.
"""

import gzip
import hashlib
import io
import lzma
import marshal
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path
from typing import NamedTuple

from .cpio import CpioWriter
from .errors import Unavailable
from .fetch import Assets, cache_folder, locked

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox mkdir -p /dev/shm
/bin/busybox mount -t tmpfs shm /dev/shm
for module in {modules}; do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t xenfs xenfs /proc/xen
export LD_LIBRARY_PATH=/xenlib PYTHONHOME={home} PYTHONPATH=/packages PYTHONDONTWRITEBYTECODE=1
export HOME=/tmp PATH=/bin
{python} -X utf8 -m inside
/bin/busybox sync
/bin/busybox poweroff -f
"""

# Not needed by any package here, and large.
_LEFT_OUT = {
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "sqlite3",
    "curses",
    "dbm",
    "distutils",
    "unittest",
    "wsgiref",
    "xmlrpc",
    "venv",
    "config-3",
}
_LEFT_OUT_EXTENSIONS = (
    "_test",
    "_codecs_",
    "_tkinter",
    "_sqlite3",
    "_curses",
    "xx",
    "_dbm",
    "_gdbm",
)
_LAYOUT = 2


class _Python(NamedTuple):
    executable: str
    home: str
    stdlib: str
    dynamic: str


def _this_python() -> _Python:
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    stdlib = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})
    dynamic = sysconfig.get_config_var("DESTSHARED") or f"{stdlib}/lib-dynload"
    if not Path(stdlib, "os.py").exists():
        raise Unavailable(f"no standard library in {stdlib}")
    return _Python(executable, sys.base_prefix, stdlib, dynamic)


def compiled(path: Path, name: str) -> bytes:
    """Byte code that is used without a look at the source's time (emulation compiles slowly)."""
    source = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = compile(source, name, "exec", dont_inherit=True)
    return MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code)


def _add_python_file(archive: CpioWriter, path: Path, name: str) -> None:
    archive.file(name, path.read_bytes())
    archive.file(cache_from_source(name), compiled(path, "/" + name))


def _add_tree(archive: CpioWriter, root: Path, prefix: str) -> None:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _LEFT_OUT and not name.startswith("config-") and name != "lib-dynload"
        )
        for file in sorted(files):
            path = Path(folder, file)
            name = f"{prefix}/{path.relative_to(root)}"
            if file.endswith(".py"):
                _add_python_file(archive, path, name)


def _needed_libraries(binary: Path) -> set[str]:
    done = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    return set(re.findall(r"(/\S+\.so[\w.]*)", done.stdout))


def _xz(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _base(assets: Assets) -> bytes:
    python = _this_python()
    out = io.BytesIO()
    archive = CpioWriter(out)
    for folder in ("proc", "sys", "dev", "tmp"):
        archive.directory(folder)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", assets.busybox.read_bytes(), 0o755)
    for name in ("sh", "cat", "ls", "mount"):
        archive.symlink(f"bin/{name}", "busybox")
    names = []
    for module in assets.modules:
        name = module.name.removesuffix(".xz")
        names.append(name)
        archive.file(f"modules/{name}", _xz(module))
    for library in assets.libraries:
        if library.is_symlink():
            archive.symlink(f"xenlib/{library.name}", os.readlink(library))
        else:
            archive.file(f"xenlib/{library.name}", library.read_bytes(), 0o755)
    binaries = [Path(python.executable)]
    for extension in sorted(Path(python.dynamic).glob("*.so")):
        if not extension.name.startswith(_LEFT_OUT_EXTENSIONS):
            binaries.append(extension)
            archive.file(str(extension).lstrip("/"), extension.read_bytes(), 0o755)
    libraries = {"/lib64/ld-linux-x86-64.so.2"}
    for binary in [*binaries, *assets.libraries]:
        libraries |= _needed_libraries(binary)
    for needed in sorted(libraries):
        if Path(needed).exists():
            archive.file(needed.lstrip("/"), Path(needed).read_bytes(), 0o755)
    archive.file(python.executable.lstrip("/"), Path(python.executable).read_bytes(), 0o755)
    _add_tree(archive, Path(python.stdlib), python.stdlib.lstrip("/"))
    init = _INIT.format(modules=" ".join(names), home=python.home, python=python.executable)
    archive.file("init", init.encode(), 0o755)
    archive.close()
    return gzip.compress(out.getvalue(), compresslevel=1, mtime=0)


def _overlay(repository: Path, inside: Path) -> bytes:
    out = io.BytesIO()
    archive = CpioWriter(out)
    for root in [*sorted((repository / "packages").glob("*/src/*")), inside]:
        if not root.is_dir() or root.name.endswith(".egg-info"):
            continue
        for path in sorted(root.rglob("*")):
            name = f"packages/{root.name}/{path.relative_to(root)}"
            if path.suffix == ".py":
                _add_python_file(archive, path, name)
            elif path.suffix in {".so", ".c", ".h"}:
                archive.file(name, path.read_bytes(), 0o755)
    archive.close()
    return gzip.compress(out.getvalue(), compresslevel=1, mtime=0)


def build(assets: Assets, repository: Path, inside: Path, target: Path) -> None:
    """Write the initramfs of one run to `target`."""
    recipe = hashlib.sha256()
    for name in ("initramfs.py", "cpio.py", "fetch.py"):
        recipe.update(Path(__file__).with_name(name).read_bytes())
    recipe.update(f"{_LAYOUT} {assets.versions} {sys.version} {sys.base_prefix}".encode())
    cache = cache_folder()
    base = cache / f"xen-base-{recipe.hexdigest()[:16]}.gz"
    with locked(cache / "locks-xen"):
        if not base.exists():
            for old in cache.glob("xen-base-*.gz"):
                old.unlink()
            partial = base.with_suffix(".partial")
            partial.write_bytes(_base(assets))
            partial.rename(base)
    target.write_bytes(base.read_bytes() + _overlay(repository, inside))
