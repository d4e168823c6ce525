"""The C engine and a driver thread under ThreadSanitizer; c/tsan_ring.c says what it sees."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "packages" / "virtqueue" / "csrc"
DRIVER = Path(__file__).parent / "c" / "tsan_ring.c"

pytestmark = [
    pytest.mark.skipif(not CSRC.exists(), reason="the C sources are not there"),
    pytest.mark.skipif(shutil.which("clang") is None, reason="no clang (ThreadSanitizer)"),
]


def build(folder: Path, *edits: tuple[str, str, str]) -> Path:
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    for name, old, new in edits:
        path = sources / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    program = folder / "ring"
    flags = ["-std=c11", "-D_DEFAULT_SOURCE", "-g", "-O1", "-fsanitize=thread", f"-I{sources}"]
    files = [str(path) for path in (DRIVER, *sorted(sources.glob("*.c")))]
    subprocess.run(["clang", *flags, "-o", str(program), *files], check=True, capture_output=True)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=100)


def test_no_race_is_seen(tmp_path: Path) -> None:
    program = build(tmp_path)
    for format_ in ("split", "packed"):
        for notification in ("flags", "event"):
            done = run(program, format_, notification, "20000")
            assert (done.returncode, done.stdout) == (0, "20000 chains\n"), done.stderr


def test_a_missing_release_is_seen(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        (
            "memory.h",
            "__atomic_store_n((uint16_t *)address, value, __ATOMIC_RELEASE)",
            "__atomic_store_n((uint16_t *)address, value, __ATOMIC_RELAXED)",
        ),
    )
    for format_ in ("split", "packed"):
        assert "data race" in run(program, format_, "flags", "20000").stderr
