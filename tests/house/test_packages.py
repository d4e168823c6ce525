"""What holds for each of the five packages: versions, ranges, licences, markers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vhost-protocol", "guest-memory", "virtqueue", "vhost-xen", "vhost-backend")
# Arrows point one way: what each package may need of the others, and what its extras may.
DEPENDENCIES = {
    "vhost-protocol": set(),
    "guest-memory": set(),
    "virtqueue": {"guest-memory"},
    "vhost-xen": {"guest-memory"},
    "vhost-backend": {"vhost-protocol", "guest-memory", "virtqueue"},
}
EXTRAS = {"cli": {"rich"}, "metrics": {"prometheus-client"}, "xen": {"vhost-xen"}}
REQUIREMENT = re.compile(r"(?P<name>[a-z0-9-]+)(?P<specifier>.*)")
RANGE = re.compile(r">=0\.(?P<low>\d+)(\.\d+)?,<0\.(?P<high>\d+)")


def project(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(
        (ROOT / "packages" / name / "pyproject.toml").read_text()
    )["project"]
    return table


def package_folder(name: str) -> Path:
    return ROOT / "packages" / name / "src" / name.replace("-", "_")


def version(name: str) -> str:
    found = re.search(
        r'^__version__ = "(\d+\.\d+\.\d+)"$',
        (package_folder(name) / "_version.py").read_text(),
        re.M,
    )
    assert found, "_version.py holds one line that the build reads"
    return found[1]


def split(requirement: str) -> tuple[str, str]:
    match = REQUIREMENT.fullmatch(requirement)
    assert match, requirement
    return match["name"], match["specifier"]


def own_requirements(name: str) -> list[tuple[str, str]]:
    table = project(name)
    extras = [item for items in table.get("optional-dependencies", {}).values() for item in items]
    return [pair for pair in map(split, [*table["dependencies"], *extras]) if pair[0] in PACKAGES]


def test_no_package_is_unknown() -> None:
    assert {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize(
    "place",
    [
        *("hatch.toml", "pyproject.toml", "README.md", "docs/releasing.md"),
        *("scripts/build-wheels", "scripts/check-ranges"),
    ],
)
def test_every_package_is_named_where_all_are_listed(place: str, name: str) -> None:
    assert re.search(rf"(?<![\w-]){name}(?![\w-])", (ROOT / place).read_text())


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("licence", ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"])
def test_licences_are_equal_and_files(name: str, licence: str) -> None:
    copy = ROOT / "packages" / name / licence
    assert not copy.is_symlink()
    assert copy.read_bytes() == (ROOT / licence).read_bytes()


@pytest.mark.parametrize("name", PACKAGES)
def test_metadata(name: str) -> None:
    table = project(name)
    assert table["name"] == name
    assert table["requires-python"] == ">=3.11"
    assert table["license"] == "Apache-2.0 OR BSD-3-Clause"
    assert table["readme"] == "README.md"
    assert table["dynamic"] == ["version"]
    assert (package_folder(name) / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("name", PACKAGES)
def test_dependencies_point_one_way_and_stay_in_the_house(name: str) -> None:
    assert {split(item)[0] for item in project(name)["dependencies"]} == DEPENDENCIES[name]


def test_extras() -> None:
    extras = project("vhost-backend")["optional-dependencies"]
    assert {extra: {split(item)[0] for item in items} for extra, items in extras.items()} == EXTRAS
    for name in set(PACKAGES) - {"vhost-backend"}:
        assert "optional-dependencies" not in project(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_ranges_are_one_minor_version_and_hold_the_version_here(name: str) -> None:
    for lower, specifier in own_requirements(name):
        match = RANGE.fullmatch(specifier)
        assert match, f"{lower}{specifier} is not of the form >=0.N,<0.N+1"
        assert int(match["high"]) == int(match["low"]) + 1
        assert version(lower).split(".")[:2] == ["0", match["low"]], (
            f"{name} does not allow the {lower} beside it"
        )


def test_everyone_names_the_same_range() -> None:
    named: dict[str, set[str]] = {}
    for name in PACKAGES:
        for lower, specifier in own_requirements(name):
            named.setdefault(lower, set()).add(specifier)
    assert {lower: specifiers for lower, specifiers in named.items() if len(specifiers) > 1} == {}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_changelog_begins_with_the_version(name: str) -> None:
    headings = re.findall(
        r"^## (.*)$", (ROOT / "packages" / name / "CHANGELOG.md").read_text(), re.M
    )
    number = re.escape(version(name))
    assert re.fullmatch(rf"Unreleased \({number}\)|{number} \(\d{{4}}-\d\d-\d\d\)", headings[0])


@pytest.mark.parametrize("name", PACKAGES)
def test_the_tests_of_a_package_are_linked_into_it(name: str) -> None:
    link = ROOT / "packages" / name / "tests"
    assert link.is_symlink()
    assert link.readlink() == Path("../../tests") / name
