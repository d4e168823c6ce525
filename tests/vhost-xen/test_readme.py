"""The README's example runs."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
# In the repository, or beside the tests in an sdist.
READMES = [HERE.parents[2] / "packages" / "vhost-xen" / "README.md", HERE.parents[1] / "README.md"]


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    readme = next(path for path in READMES if path.exists())
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.M | re.S)
    exec(compile(example, str(readme), "exec"), {})
    assert capsys.readouterr().out
