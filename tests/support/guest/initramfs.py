"""The guest's whole file system: busybox, a few drivers, and the agent as its first process."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .assets import Assets, Missing, tool

MODULES = ("virtio_pci", "virtio_blk", "virtio_console")

# Busybox has no way to write zeroes; util-linux is on every Debian.
EXTRA_PROGRAMS = {"blkdiscard": "/usr/sbin/blkdiscard"}


def build_initramfs(
    assets: Assets,
    target: Path,
    *,
    modules: Iterable[str] = MODULES,
    programs: dict[str, str] | None = None,
) -> Path:
    """Write an initramfs to `target` and return it.

    `modules` are loaded at boot, with what they depend on. `programs` maps names to programs of
    this machine, which are copied to /usr/sbin in the guest together with their libraries
    (default: util-linux's blkdiscard); the shell there prefers busybox, so call them by path.
    Raises Missing when a module, a program or a tool is not there.
    """
    programs = EXTRA_PROGRAMS if programs is None else programs
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="initramfs-") as folder:
        root = Path(folder) / "root"
        for name in ("bin", "sbin", "dev", "proc", "sys", "tmp", "etc", "mnt", "usr/sbin"):
            (root / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(assets.busybox, root / "bin/busybox")
        init = root / "init"
        init.write_text((Path(__file__).parent / "init.sh").read_text())
        init.chmod(0o755)
        modules = list(modules)
        (root / "etc/modules").write_text("".join(f"{name}\n" for name in modules))
        _copy_modules(assets, root, modules)
        for name, path in programs.items():
            _copy_program(root, name, path)
        _pack(assets, root, target)
    return target


def _copy_modules(assets: Assets, root: Path, modules: Iterable[str]) -> None:
    version = assets.kernel_version
    source = assets.kernel_root / "lib/modules" / version
    if not (source / "modules.dep").exists():
        _run([assets.depmod, "-b", str(assets.kernel_root), version])
    files: dict[str, None] = {}
    for name in modules:
        shown = _run(
            [
                assets.modprobe,
                f"--dirname={assets.kernel_root}",
                f"--set-version={version}",
                "--show-depends",
                name,
            ]
        )
        for line in shown.splitlines():
            word, _, rest = line.partition(" ")
            if word == "insmod":
                files[rest.split()[0]] = None
    target = root / "lib/modules" / version
    for file in files:
        path = Path(file)
        copy = target / path.resolve().relative_to(source.resolve())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    _run([assets.depmod, "-b", str(root), version])


def _copy_program(root: Path, name: str, path: str) -> None:
    program = Path(path) if Path(path).exists() else Path(tool(name) or path)
    if not program.exists():
        raise Missing(f"{path} is not on this machine")
    shutil.copy(program, root / "usr/sbin" / name)
    for library in re.findall(r"(/\S+) \(0x", _run(["ldd", str(program)])):
        copy = root / library.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, copy)


def _pack(assets: Assets, root: Path, target: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as archive:
        subprocess.run(
            [assets.cpio, "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            input="".join(f"{name}\n" for name in names).encode(),
            stdout=archive,
            cwd=root,
            check=True,
            timeout=60,
        )
    partial.rename(target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise Missing(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
