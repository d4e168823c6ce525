"""The README's examples work as they stand."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "virtqueue" / "README.md"


def test_the_examples_run() -> None:
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
