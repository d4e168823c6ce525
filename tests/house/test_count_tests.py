"""The closing line of the verification counts what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = (
    '<testsuites><testsuite name="pytest" tests="{tests}" failures="{failures}" '
    'errors="{errors}" skipped="{skipped}"/></testsuites>'
)


def count(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "count-tests"), *map(str, arguments)]
    return subprocess.run(command, check=False, text=True, capture_output=True)


def report(path: Path, tests: int, failures: int, errors: int, skipped: int) -> Path:
    path.write_text(REPORT.format(tests=tests, failures=failures, errors=errors, skipped=skipped))
    return path


def test_sums_over_reports(tmp_path: Path) -> None:
    first = report(tmp_path / "a.xml", 10, 1, 1, 3)
    second = report(tmp_path / "b.xml", 7, 0, 0, 0)
    assert count(first, second).stdout == "12 passed, 2 failed, 3 skipped\n"


def test_a_missing_report_counts_nothing(tmp_path: Path) -> None:
    assert count(tmp_path / "none.xml").stdout == "0 passed, 0 failed, 0 skipped\n"


def test_a_run_that_skips_everything_can_be_refused(tmp_path: Path) -> None:
    skipped = report(tmp_path / "a.xml", 4, 0, 0, 4)
    assert count("--require-passed", skipped).returncode == 1
    assert count("--require-passed", report(tmp_path / "b.xml", 4, 0, 0, 3)).returncode == 0


def test_a_skip_for_an_unknown_reason_can_be_refused(tmp_path: Path) -> None:
    skipped = tmp_path / "a.xml"
    skipped.write_text(
        '<testsuites><testsuite name="pytest" tests="2" failures="0" errors="0" skipped="1">'
        '<testcase classname="tests.some" name="test_it"><skipped message="no clang (fuzz)"/>'
        '</testcase><testcase classname="tests.some" name="test_too"/></testsuite></testsuites>'
    )
    reasons = tmp_path / "reasons"
    reasons.write_text("# a comment: no clang\n\n^root may\n")
    refused = count("--may-skip", reasons, "--require-passed", skipped)
    assert refused.returncode == 1
    assert "tests.some::test_it: no clang (fuzz)" in refused.stderr
    reasons.write_text("^root may\n^no clang\n")
    assert count("--may-skip", reasons, "--require-passed", skipped).returncode == 0
