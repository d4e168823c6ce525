"""Build the C engine: a hatchling hook for the wheel target, and a command for a source tree.

The engine is a plain shared library that ctypes loads, so a wheel is bound to a platform but to no
Python version. An sdist needs no compiler; a wheel takes the first of these that works:

``VIRTQUEUE_BUILD=cc``    the system's C compiler (``CC``, or ``cc``); tagged ``linux_<machine>``.
``VIRTQUEUE_BUILD=zig``   the ``ziglang`` wheel, against glibc 2.17; tagged ``manylinux_2_17``.
``VIRTQUEUE_BUILD=none``  no engine: a ``py3-none-any`` wheel that runs on the Python engine.

Without the variable, ``cc`` is used when it compiles a trial program and ``zig`` otherwise.
``VIRTQUEUE_TARGET=x86_64|aarch64`` builds for another machine than this one; only zig can do that.

Run as a program, it builds the engine in place, for a source tree or an editable install::

    python hatch_build.py [--compiler cc|zig] [--target MACHINE] [--output PATH] [--flag FLAG ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from binascii import crc32
from pathlib import Path
from typing import Any

# Only the hook needs hatchling; in a source tree the command must run without it.
try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:
    BuildHookInterface = object  # type: ignore[assignment,misc,unused-ignore]

LIBRARY = "libvirtqueue.so"
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"
ZIG_VERSION = "0.17.1"
# pip and its like repeat the requirement when it cannot be had, and nothing else that we could say
# would be shown; so the way out travels as the name of an extra.
ZIG_REQUIREMENT = f"ziglang[else_set_VIRTQUEUE_BUILD_to_cc_or_none]=={ZIG_VERSION}"

# Nothing here may depend on the folder of the build: two builds from two paths are byte-identical.
FLAGS = (
    "-std=c11",
    "-O2",
    "-g0",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fstack-protector-strong",
    "-Wall",
    "-Wextra",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
    "-Wl,--build-id=none",
    "-s",
)
ZIG_FLAGS = ("-fno-sanitize=all",)


class BuildError(Exception):
    """The engine cannot be built; the text is one line for the person who installs."""


def source_files(package: Path) -> list[Path]:
    """The engine's C sources and headers, in the order of their names."""
    folder = package / "csrc"
    return sorted([*folder.glob("*.c"), *folder.glob("*.h")])


def source_hash(package: Path) -> str:
    """What the library is built from, as the loader compares it in a source tree."""
    digest = 0
    for path in source_files(package):
        content = path.read_bytes()
        digest = crc32(content, crc32(f"{path.name}\0{len(content)}\0".encode(), digest))
    return f"{digest:08x}"


def cc_command() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def cc_works() -> bool:
    """Compile and link a trial library: a compiler without headers is none."""
    program = (
        "#include <stdatomic.h>\n#include <sys/mman.h>\nint trial(void) { return PROT_READ; }\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.c")
        source.write_text(program)
        command = [*cc_command(), "-std=c11", "-fPIC", "-shared", "-o", f"{folder}/trial.so"]
        try:
            done = subprocess.run([*command, str(source)], capture_output=True, check=False)
        except OSError:
            return False
        return done.returncode == 0


def choose_compiler() -> str:
    """The compiler to use: ``cc``, ``zig`` or ``none``."""
    wanted = os.environ.get("VIRTQUEUE_BUILD", "")
    if wanted not in ("", "cc", "zig", "none"):
        raise BuildError(f"VIRTQUEUE_BUILD={wanted}: must be cc, zig or none")
    if wanted:
        return wanted
    if target_machine() != platform.machine():
        return "zig"
    if platform.machine() not in MACHINES:
        return "cc" if cc_works() else "none"
    return "cc" if cc_works() else "zig"


def target_machine() -> str:
    machine = os.environ.get("VIRTQUEUE_TARGET", "") or platform.machine()
    if machine != platform.machine() and machine not in MACHINES:
        raise BuildError(f"VIRTQUEUE_TARGET={machine}: must be one of {', '.join(MACHINES)}")
    return machine


def compile_engine(
    package: Path, output: Path, compiler: str, machine: str, extra: tuple[str, ...] = ()
) -> None:
    """Compile all sources of ``package`` into the library ``output``."""
    environment = dict(os.environ)
    if compiler == "zig":
        if importlib.util.find_spec("ziglang") is None:
            raise BuildError(
                f"the C engine needs a C compiler or ziglang=={ZIG_VERSION}, and neither is here; "
                "VIRTQUEUE_BUILD=none installs without it"
            )
        # The native target would use instructions that other machines lack.
        command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}"]
        command += [*FLAGS, *ZIG_FLAGS]
    else:
        if machine != platform.machine():
            raise BuildError(f"VIRTQUEUE_TARGET={machine} needs VIRTQUEUE_BUILD=zig")
        command = [*cc_command(), *FLAGS]
    sources = [path.name for path in source_files(package) if path.suffix == ".c"]
    with tempfile.TemporaryDirectory() as folder:
        environment.setdefault("ZIG_GLOBAL_CACHE_DIR", f"{folder}/zig")
        environment.setdefault("ZIG_LOCAL_CACHE_DIR", f"{folder}/zig")
        built = Path(folder, LIBRARY)
        command += [f"-ffile-prefix-map={package / 'csrc'}=csrc"]
        command += [f'-DVQ_SOURCE_HASH="{source_hash(package)}"', *extra]
        command += ["-o", str(built), *sources, "-Wl,-soname," + LIBRARY]
        try:
            done = subprocess.run(
                command,
                cwd=package / "csrc",
                env=environment,
                check=False,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise BuildError(f"{command[0]}: {error.strerror}") from None
        if done.returncode:
            raise BuildError(
                f"{compiler} failed; VIRTQUEUE_BUILD=none does without:\n{done.stdout}"
            )
        if done.stdout:
            sys.stderr.write(done.stdout)
        # A process that has the old library mapped keeps it: replace the name, not the content.
        output.parent.mkdir(parents=True, exist_ok=True)
        staged = output.with_name(f".{output.name}.{os.getpid()}")
        staged.write_bytes(built.read_bytes())
        staged.chmod(0o755)
        staged.replace(output)


def wheel_tag(compiler: str, machine: str) -> str:
    if compiler == "zig":
        version = GLIBC.replace(".", "_")
        return f"py3-none-manylinux_{version}_{machine}.manylinux2014_{machine}"
    return f"py3-none-linux_{machine}"


class EngineBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc,unused-ignore]
    """Put the engine into a wheel, or into the source tree for an editable install."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        try:
            return [ZIG_REQUIREMENT] if choose_compiler() == "zig" else []
        except BuildError as error:
            raise SystemExit(f"virtqueue: {error}") from None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root)
        try:
            compiler, machine = choose_compiler(), target_machine()
            if compiler == "none":
                return
            if version == "editable":
                output = package / "src" / "virtqueue" / "_engine" / LIBRARY
            else:
                self.folder = tempfile.TemporaryDirectory()
                output = Path(self.folder.name, LIBRARY)
            compile_engine(package, output, compiler, machine)
        except BuildError as error:
            raise SystemExit(f"virtqueue: {error}") from None
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag(compiler, machine)
            build_data["force_include"][str(output)] = f"virtqueue/_engine/{LIBRARY}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def main() -> None:
    package = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build the C engine of virtqueue in place.")
    parser.add_argument("--compiler", choices=("cc", "zig"))
    parser.add_argument("--target", choices=MACHINES, default=None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flag", action="append", default=[], help="one more compiler flag")
    arguments = parser.parse_args()
    if arguments.target:
        os.environ["VIRTQUEUE_TARGET"] = arguments.target
    try:
        compiler = arguments.compiler or choose_compiler()
        if compiler == "none":
            raise BuildError("VIRTQUEUE_BUILD=none builds nothing")
        output = arguments.output or package / "src" / "virtqueue" / "_engine" / LIBRARY
        compile_engine(package, output.resolve(), compiler, target_machine(), (*arguments.flag,))
    except BuildError as error:
        raise SystemExit(f"virtqueue: {error}") from None
    print(f"{output}: built with {compiler} for {target_machine()}, {source_hash(package)}")


if __name__ == "__main__":
    main()
