"""The build hook: compilers, tags, the same bytes from any folder, and a clean build."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from virtqueue import c_library

PACKAGE = Path(__file__).parents[2] / "packages" / "virtqueue"
BUILD = PACKAGE / "hatch_build.py"

pytestmark = [
    pytest.mark.skipif(not BUILD.exists(), reason="the C sources are not there"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="the ziglang wheel is not installed"
)
needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"
)
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]


def build(package: Path, output: Path, *arguments: str) -> bytes:
    command = [sys.executable, str(package / "hatch_build.py"), "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output.read_bytes()


@pytest.mark.parametrize("compiler", ["cc", pytest.param("zig", marks=needs_zig)])
def test_two_folders_give_the_same_bytes_without_a_warning(tmp_path: Path, compiler: str) -> None:
    built: list[bytes] = []
    for name in ("one", "elsewhere/deep"):
        package = tmp_path / name / "virtqueue"
        shutil.copytree(PACKAGE / "csrc", package / "csrc")
        shutil.copy(BUILD, package)
        flags = [f"--flag={flag}" for flag in STRICT]
        built.append(build(package, tmp_path / f"{len(built)}.so", "--compiler", compiler, *flags))
    assert built[0] == built[1]
    assert str(tmp_path).encode() not in built[0]


@needs_hatchling
@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        ({"VIRTQUEUE_BUILD": "cc"}, f"py3-none-linux_{os.uname().machine}"),
        ({"VIRTQUEUE_BUILD": "none"}, "py3-none-any"),
        pytest.param(
            {"VIRTQUEUE_TARGET": "aarch64"},
            "py3-none-manylinux_2_17_aarch64.manylinux2014_aarch64",
            marks=needs_zig,
        ),
    ],
)
def test_the_tag_says_what_is_inside(tmp_path: Path, settings: dict[str, str], tag: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VIRTQUEUE_")}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=PACKAGE,
        env=environment | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith(f"-{tag}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert ("virtqueue/_engine/libvirtqueue.so" in names) == (tag != "py3-none-any")


@needs_hatchling
def test_a_wrong_choice_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BUILD],
        env=os.environ | {"VIRTQUEUE_BUILD": "tcc"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "virtqueue: VIRTQUEUE_BUILD=tcc: must be cc, zig or none\n"


@needs_hatchling
def test_a_wrong_choice_is_one_line_under_pip_too() -> None:
    """pip asks for the build's requirements first, and shows what that writes."""
    program = f"import runpy; runpy.run_path({str(BUILD)!r})['EngineBuildHook'].dependencies(None)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"VIRTQUEUE_BUILD": "foo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "virtqueue: VIRTQUEUE_BUILD=foo: must be cc, zig or none\n"


def test_a_library_from_other_sources_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "virtqueue"
    shutil.copytree(PACKAGE / "csrc", package / "csrc")
    shutil.copy(BUILD, package)
    library = package / "src" / "virtqueue" / "_engine" / "libvirtqueue.so"
    library.parent.mkdir(parents=True)
    build(package, library)
    monkeypatch.setattr(c_library, "__file__", str(library.parents[1] / "c_library.py"))
    monkeypatch.setattr(c_library, "LIBRARY_PATH", str(library))
    c_library.Library(library)
    with (package / "csrc" / "split.c").open("a") as file:
        file.write("/* changed */\n")
    with pytest.warns(c_library.StaleEngine, match="hatch run build-engine"):
        c_library.Library(library)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path = tmp_path / "libvirtqueue.so"
    with pytest.raises(ImportError, match="does not exist"):
        c_library.Library(path)
    path.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be loaded"):
        c_library.Library(path)
