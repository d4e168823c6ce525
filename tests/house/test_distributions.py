"""What is in the files that users get: built here by hatchling alone, without the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vhost-protocol", "guest-memory", "virtqueue", "vhost-xen", "vhost-backend")
LICENCES = {"LICENSE-APACHE", "LICENSE-BSD-3-Clause"}


def build(source: Path, target: str, folder: Path) -> Path:
    """Build one file; virtqueue without its engine, since this must work without a compiler."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        target,
        "--directory",
        str(folder),
    ]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, "VIRTQUEUE_BUILD": "none"},
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    (built,) = folder.iterdir()
    return built


def sources(name: str) -> set[str]:
    """The package's files as git would hold them, relative to src."""
    folder = ROOT / "packages" / name / "src"
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        str(path)
        for path in found
        if path.suffix != ".so"
        and not any(part.startswith((".", "__")) for part in path.parts[:-1])
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel(name: str, tmp_path: Path) -> None:
    wheel = build(ROOT / "packages" / name, "wheel", tmp_path / "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {path.split("/")[0] for path in names if ".dist-info/" in path}
        metadata = HeaderParser().parsestr(archive.read(f"{about}/METADATA").decode())
    assert {path for path in names if not path.startswith(about)} == sources(name)
    assert {f"{about}/licenses/{licence}" for licence in LICENCES} <= names
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {re.split(r"[<>=]", text)[0].strip() for text in required} <= set(PACKAGES)
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize("name", PACKAGES)
def test_sdist_holds_the_tests_and_builds_the_same_again(name: str, tmp_path: Path) -> None:
    source = ROOT / "packages" / name
    sdist = build(source, "sdist", tmp_path / "sdist")
    subprocess.run(["tar", "-xf", str(sdist), "-C", str(tmp_path)], check=True)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]
    tests = {
        str(path.relative_to(ROOT / "tests" / name))
        for path in (ROOT / "tests" / name).rglob("test_*.py")
    }
    assert tests
    assert tests == {
        str(path.relative_to(unpacked / "tests")) for path in unpacked.glob("tests/**/test_*.py")
    }
    assert LICENCES | {"README.md", "CHANGELOG.md"} <= {path.name for path in unpacked.iterdir()}

    again = build(unpacked, "sdist", tmp_path / "sdist-from-sdist")
    assert again.read_bytes() == sdist.read_bytes()
    wheels = [
        build(place, "wheel", tmp_path / f"wheel-{place.name}") for place in (source, unpacked)
    ]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_the_engine_is_built_from_the_sdist(tmp_path: Path) -> None:
    sdist = build(ROOT / "packages" / "virtqueue", "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    engine = {
        f"csrc/{path.name}" for path in (ROOT / "packages" / "virtqueue" / "csrc").glob("*.[ch]")
    }
    assert engine
    assert engine | {"hatch_build.py"} <= names
    assert not [name for name in names if name.endswith(".so")]
