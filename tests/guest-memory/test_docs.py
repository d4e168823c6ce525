"""The README's example runs as it stands, and its list of errors is complete."""

import re
from pathlib import Path

import pytest

import guest_memory

HERE = Path(__file__).resolve().parent
README = next(
    path / "README.md"
    for path in (HERE.parent.parent / "packages" / "guest-memory", HERE.parent)
    if (path / "README.md").exists()
)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    assert "4096 bytes at 0x" in capsys.readouterr().out


def test_every_error_class_is_explained() -> None:
    text = README.read_text(encoding="utf-8")
    for name in guest_memory.__all__:
        value = getattr(guest_memory, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert f"`{name}`" in text, name


def test_public_names_exist_and_say_what_they_are() -> None:
    assert len(guest_memory.__all__) == len(set(guest_memory.__all__))
    for name in guest_memory.__all__:
        value = getattr(guest_memory, name)
        if isinstance(value, type):
            assert value.__doc__, name
