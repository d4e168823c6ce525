"""Arrows point one way: what each package imports, and when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What each package may import of the others; extras' libraries only where they are used.
LAYERS: dict[str, set[str]] = {
    "vhost_protocol": set(),
    "guest_memory": set(),
    "virtqueue": {"guest_memory"},
    "vhost_xen": {"guest_memory"},
    "vhost_backend": {"vhost_protocol", "guest_memory", "virtqueue"},
}
LAZY: dict[str, set[str]] = {"vhost_backend": {"rich", "prometheus_client", "vhost_xen"}}


class Import(NamedTuple):
    """One imported module: its full dotted name, and whether importing the file imports it too."""

    where: str
    module: str
    at_import: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports(name: str) -> Iterator[Import]:
    folder = ROOT / "packages" / name.replace("_", "-") / "src" / name
    for path in sorted(folder.rglob("*.py")):
        yield from walk(ast.parse(path.read_text()), str(path.relative_to(folder)), at_import=True)


def walk(node: ast.AST, where: str, *, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(f"{where}:{node.lineno}", alias.name, at_import)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        assert node.module
        yield Import(f"{where}:{node.lineno}", node.module, at_import)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    ):
        # Names for annotations: never imported when the program runs.
        for hidden in node.body:
            yield from walk(hidden, where, at_import=False)
        for other in node.orelse:
            yield from walk(other, where, at_import=at_import)
        return
    inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, where, at_import=inside)


def meant_for_pytest(found: Import) -> bool:
    """Fixtures for users' tests: nothing else imports that module."""
    return found.top == "pytest" and found.where.startswith("testing/pytest_plugin.py:")


def checked_only_for_types(found: Import) -> bool:
    return found.top == "typing_extensions" and not found.at_import


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_only_what_is_below_it(name: str) -> None:
    allowed = set(sys.stdlib_module_names) | {name} | LAYERS[name]
    lazy = LAZY.get(name, set())
    wrong = [
        found
        for found in imports(name)
        if found.top not in allowed
        and not (found.top in lazy and not found.at_import)
        and not checked_only_for_types(found)
        and not meant_for_pytest(found)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_uses_only_the_public_names_of_another(name: str) -> None:
    others = set(LAYERS) - {name}
    assert [
        found for found in imports(name) if found.top in others and found.module != found.top
    ] == []


@pytest.mark.parametrize("name", LAYERS)
def test_public_names_are_declared_once_and_exist(name: str) -> None:
    module = __import__(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


@pytest.mark.parametrize("name", LAYERS)
def test_importing_is_light(name: str) -> None:
    heavy = {"rich", "prometheus_client", "numpy", "vhost_xen", "pytest"} - {name}
    if name == "vhost_protocol":
        heavy |= {"asyncio", "dataclasses"} | (set(LAYERS) - {name})
    program = f"import sys, {name}; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert done.stdout.split() == []
