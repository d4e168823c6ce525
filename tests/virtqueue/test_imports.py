"""What `import virtqueue` does not load: a device's process lives for months."""

from __future__ import annotations

import subprocess
import sys

import pytest

import virtqueue


def test_importing_brings_no_openssl_and_nothing_of_the_driver() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import virtqueue\n"
        "virtqueue.available_engines()\n"
        "print(sorted({'_hashlib', 'hashlib', 'inspect', 'pathlib', 'platform', 'ssl',"
        " 'virtqueue.queue.driver', 'virtqueue.engine.python.ring', 'virtqueue.waiting'}"
        " & (sys.modules.keys() - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    assert dir(virtqueue) == sorted(virtqueue.__all__)
    for name in virtqueue.__all__:
        getattr(virtqueue, name)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = virtqueue.Nonsense
