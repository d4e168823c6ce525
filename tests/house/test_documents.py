"""What the documents promise exists: commands, scripts, links, options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vhost_backend.features import RING_FEATURES, VirtioFeature
from vhost_protocol import ProtocolFeatures

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "docs/**/", "packages/*/", "examples/", "tests/*/", "benchmarks/**/")
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
PACKAGES = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
SCRIPTS = sorted(
    path for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"] if path.is_file()
)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def readme_command(name: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "readme-command"), name]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def hatch_scripts() -> set[str]:
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    return {
        script if name == "default" else f"{name}:{script}"
        for name, table in environments.items()
        for script in table.get("scripts", {})
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=identify)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=identify)
def test_hatch_scripts_and_own_scripts_exist(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"hatch run ([a-z0-9:-]*[a-z0-9])", text))
    named |= set(re.findall(r"`((?:check|build):[a-z0-9]+)`", text))
    assert named <= hatch_scripts() | {"python"}
    assert [
        name
        for name in re.findall(r"\bscripts/([a-z0-9-]+)", text)
        if not (ROOT / "scripts" / name).exists()
    ] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=identify)
def test_no_install_command_can_reach_the_index_for_our_names(path: Path) -> None:
    """Nothing is published: a package of our name on an index would be a stranger's."""
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"pip3? install[^\n`]*", text):
        words = shlex.split(line.rstrip("&| "), comments=True)[2:]
        bare = {re.split(r"[\[<>=~!]", word)[0] for word in words if not word.startswith("-")}
        if "--no-index" not in words:
            assert not bare & PACKAGES, line
            # Each local package needs its lower layers in the same command.
            paths = {Path(word.split("[")[0]).name for word in words if "packages/" in word}
            for name in paths & PACKAGES:
                table = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())[
                    "project"
                ]
                needed = {re.split(r"[<>=]", item)[0] for item in table["dependencies"]}
                assert needed <= paths, line


def test_the_front_page_leads_to_every_page_and_package() -> None:
    """And to the folders a newcomer looks for."""
    targets = set(re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()))
    pages = {identify(path) for path in ROOT.glob("docs/**/*.md")}
    packages = {f"packages/{name}/README.md" for name in PACKAGES}
    assert pages | packages | {"CONTRIBUTING.md", "SECURITY.md", "examples"} <= targets


@pytest.mark.parametrize(
    "feature",
    [*ProtocolFeatures, *(RING_FEATURES | VirtioFeature.IN_ORDER)],
    ids=lambda feature: feature.name,
)
def test_every_feature_has_its_row(feature: ProtocolFeatures | VirtioFeature) -> None:
    row = rf"^\| {int(feature).bit_length() - 1} \| {feature.name}\b"
    assert re.search(row, (ROOT / "docs" / "features.md").read_text(), re.M)


def test_the_commands_of_the_readme_can_be_found() -> None:
    assert "vhost-backend demo" in readme_command("demo")
    assert "hatch run test" in readme_command("test")


@pytest.mark.parametrize("path", SCRIPTS, ids=identify)
def test_each_script_explains_itself(path: Path) -> None:
    done = subprocess.run(
        [str(path), "--help"],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.lower().startswith("usage")


@pytest.mark.parametrize(
    "name", ["build-wheels", "check-ranges", "check-reproducible", "typecheck", "verify-types"]
)
def test_a_script_refuses_a_package_that_there_is_not(name: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / name), "virtqueues"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2
    assert "error: no such" in done.stderr


def test_the_verification_refuses_a_step_that_there_is_not() -> None:
    done = subprocess.run([str(ROOT / ".ci" / "run"), "tset"], text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("no such step: tset\n")


@pytest.mark.parametrize("command", ["blk", "demo"])
def test_each_command_of_the_readme_explains_itself(command: str) -> None:
    program = [sys.executable, "-m", "vhost_backend", command, "--help"]
    text = subprocess.run(program, check=True, text=True, stdout=subprocess.PIPE).stdout
    used = re.findall(rf"vhost-backend {command}([^\n`]*)", (ROOT / "README.md").read_text())
    assert used
    for option in re.findall(r"--[a-z-]+", " ".join(used)):
        assert option in text
