"""Which back-ends and which QEMUs the guest tests run with, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.guest import (
    OURS,
    STORAGE_DAEMON,
    Assets,
    Missing,
    Qemu,
    able,
    build_initramfs,
    provide,
    provide_qemu,
    skip_or_fail,
)

from virtqueue import available_engines


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "tests in real guests")
    group.addoption(
        "--back-end",
        default=None,
        help="back-ends, separated by commas: c and python (ours, by ring engine), storage-daemon, "
        "or the path of a back-end program",
    )
    group.addoption(
        "--qemu",
        default=None,
        help="QEMUs, separated by commas: system, or versions such as 7.2 and 10.0",
    )
    group.addoption("--kills", default=None, help="how often a back-end is killed mid-I/O (4)")
    group.addoption(
        "--dimms", default=None, help="how many memory slots come and go (20; at most 250)"
    )
    group.addoption("--migrations", default=None, help="how often a guest moves in a row (3)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(ability): run only with back-ends that have this ability"
    )


def _option(config: pytest.Config, name: str, default: str) -> list[str]:
    # The options exist only when the tests were named on the command line by their folder.
    return str(config.getoption(name, None) or default).split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "qemu_name" in metafunc.fixturenames:
        names = _option(metafunc.config, "--qemu", "system")
        ids = [f"qemu-{name}" for name in names]
        metafunc.parametrize("qemu_name", names, ids=ids, scope="session")
    if "kind" in metafunc.fixturenames:
        kinds = _option(metafunc.config, "--back-end", ",".join(OURS))
        for kind in kinds:
            if kind not in (*OURS, STORAGE_DAEMON) and "/" not in kind:
                raise pytest.UsageError(f"--back-end: {kind} is none")
        ids = [Path(kind).name for kind in kinds]
        metafunc.parametrize("kind", kinds, ids=ids, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a back-end does not claim to be able to do; give many kills their time."""
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        needs = [marker.args[0] for marker in item.iter_markers("needs")]
        spec = getattr(item, "callspec", None)
        kind = spec.params.get("kind") if spec is not None else None
        fits = kind is None or all(able(kind, ability) for ability in needs)
        (chosen if fits else others).append(item)
        if "kills" in getattr(item, "fixturenames", ()):
            times = int(_option(config, "--kills", "4")[0])
            item.add_marker(pytest.mark.timeout(120 + 45 * times))
    items[:] = chosen
    if others:
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    """The back-end to test with, see BackEnd."""
    name = str(request.param)
    if name == "c" and "c" not in available_engines():
        skip_or_fail(Missing("the C engine is not built here"))
    return name


@pytest.fixture(scope="session")
def assets() -> Assets:
    try:
        return provide()
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(scope="session")
def qemu(assets: Assets, qemu_name: str) -> Qemu:
    try:
        return provide_qemu(qemu_name)
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(scope="session")
def initramfs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_initramfs(assets, tmp_path_factory.mktemp("initramfs") / "initramfs.cpio")


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How often a back-end dies in the tests that kill it under load."""
    return int(_option(request.config, "--kills", "4")[0])


@pytest.fixture(scope="session")
def migrations(request: pytest.FixtureRequest) -> int:
    """How often a guest is moved in each of the tests that move one."""
    return int(_option(request.config, "--migrations", "3")[0])


@pytest.fixture(scope="session")
def dimms(request: pytest.FixtureRequest) -> int:
    """How many pieces of memory are plugged into a guest."""
    return int(_option(request.config, "--dimms", "20")[0])
