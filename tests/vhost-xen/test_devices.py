"""What a program is told on a machine without Xen."""

from pathlib import Path

import pytest

from vhost_xen import XenError, XenUnavailable, check_devices


def test_missing_devices_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "privcmd").touch()
    with pytest.raises(XenUnavailable) as caught:
        check_devices(tmp_path)
    text = str(caught.value)
    assert "gntdev" in text
    assert "no " + str(tmp_path / "privcmd") not in text
    assert "\n" not in text
    assert isinstance(caught.value, XenError)


def test_devices_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "privcmd").touch()
    (tmp_path / "gntdev").touch()
    check_devices(tmp_path)
