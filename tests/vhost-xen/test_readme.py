"""The README's example runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "packages" / "vhost-xen" / "README.md"


@pytest.mark.skipif(not README.exists(), reason="an sdist keeps its README elsewhere")
def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out
