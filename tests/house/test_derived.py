"""The blocking endpoints are what `scripts/derive-blocking` makes of those for asyncio."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "derive-blocking"


@pytest.fixture(scope="module")
def derive() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("derive_blocking", str(SCRIPT))
    spec = importlib.util.spec_from_loader("derive_blocking", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_blocking_endpoints_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), f"run scripts/derive-blocking: {done.stdout}"


def test_a_stale_file_is_named_and_written(
    derive: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derive, "ROOT", tmp_path)
    monkeypatch.setattr(derive, "SOCKETS", tmp_path)
    (tmp_path / "aio").mkdir()
    (tmp_path / "blocking").mkdir()
    for name in derive.NAMES:
        (tmp_path / f"aio/{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(sys, "argv", ["derive-blocking", "--check"])
    assert derive.main() == 1
    assert not list((tmp_path / "blocking").iterdir())
    monkeypatch.setattr(sys, "argv", ["derive-blocking"])
    assert derive.main() == 0
    monkeypatch.setattr(sys, "argv", ["derive-blocking", "--check"])
    assert derive.main() == 0
    (tmp_path / "blocking/backend.py").write_text("x = 2\n")
    assert derive.main() == 1


ASYNCIO = '''\
class AsyncThing(_AsyncBase):
    """See ``AsyncOther``."""

    async def __aenter__(self) -> AsyncThing:
        return self

    async def ask(
        self, message: int, another_argument: str, one_more: bytes, the_last: int = 0
    ) -> int:
        async with self._lock:
            await self.send(message)
            value = (await self.answer()).value
            return take(await self.more(value), (await self.last()))
'''
BLOCKING = '''\
# Derived from ../aio/thing.py by scripts/derive-blocking: change that file.
class Thing(_Base):
    """See ``Other``."""

    def __enter__(self) -> Thing:
        return self

    def ask(self, message: int, another_argument: str, one_more: bytes, the_last: int = 0) -> int:
        with self._lock:
            self.send(message)
            value = self.answer().value
            return take(self.more(value), self.last())
'''


def test_what_becomes_of_asyncio(derive: ModuleType) -> None:
    assert derive.blocking(ASYNCIO, "thing") == BLOCKING
