"""The Xen mappings on Xen: what the checks inside the emulated machine reported.

The machine is booted once for all tests of a run (`machine`), runs every check of `inside`, and
reports one line for each. Here each line becomes a test.
"""

import ast
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
INSIDE = HERE / "inside"
UNAVAILABLE = 3  # the machine's exit code on a host that cannot run it
SECONDS_ALLOWED = 90.0


def _expected() -> list[str]:
    """The names of all checks, read from their sources: one that never ran is missed."""
    return [
        f"{file.stem}.{node.name}"
        for file in sorted(INSIDE.glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "check" for mark in node.decorator_list)
    ]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the machine reported; workers that run at the same time share one boot."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "xen-machine"
    folder.mkdir(exist_ok=True)
    output, outcome = folder / "results.json", folder / "outcome.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            command = [sys.executable, "-m", "machine", "--output", str(output)]
            command += ["--console", str(folder / "console")]
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
            outcome.write_text(json.dumps([done.returncode, done.stderr.strip()]))
    code, complaint = json.loads(outcome.read_text())
    if code == UNAVAILABLE and os.environ.get("CI") != "true":
        pytest.skip(complaint)
    if code:
        pytest.fail(f"the machine did not do its work: {complaint}", pytrace=False)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


@pytest.mark.timeout(900)  # the first run downloads the hypervisor and a kernel
@pytest.mark.parametrize("name", _expected())
def test_inside(report: dict[str, Any], name: str) -> None:
    result = report["results"].get(name)
    if result is None:
        imports = {key: value for key, value in report["results"].items() if "import" in key}
        pytest.fail(f"no result; {imports}", pytrace=False)
    if not result["ok"]:
        pytest.fail(result["error"], pytrace=False)


@pytest.mark.timeout(900)
def test_the_run_is_short(report: dict[str, Any]) -> None:
    # By the emulator's own time: the clock says more about a busy host than about the run.
    assert report["cpu_seconds"] < SECONDS_ALLOWED
