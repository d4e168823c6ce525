"""Who may listen on a path, and what happens to the socket file."""

import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from vhost_backend import Listener, ListenError
from vhost_backend.fds import listener


def test_the_socket_file_exists_while_listening_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(path):
        assert path.is_socket()
    assert os.listdir(tmp_path) == []


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(path))
    left_over.close()
    with Listener(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept().close()


def test_a_live_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(path) as first:
        with pytest.raises(ListenError, match="another program listens"):
            Listener(path)
        assert path.is_socket()
        first.accept().close()  # the probe of the second one
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept().close()


def test_something_else_at_the_path_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        Listener(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["missing/s", "x" * 200])
def test_a_path_that_cannot_be_bound_is_one_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(ListenError):
        Listener(tmp_path / path)


def test_a_replaced_socket_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(path):
        path.unlink()
        path.write_text("someone else's")
    assert path.read_text() == "someone else's"


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_lock_that_somebody_keeps_on_the_directory_does_not_hinder(
    tmp_path: Path, kind: int
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, kind)
        with Listener(tmp_path / "s"):
            assert (tmp_path / "s").is_socket()
    finally:
        os.close(fd)


def test_another_that_starts_here_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_PATIENCE", 60.0)
    waits = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.set())
    made: list[Listener] = []
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    starter = threading.Thread(target=lambda: made.append(Listener(tmp_path / "s")))
    starter.start()
    try:
        assert waits.wait(60)
        assert not (tmp_path / "s").exists()
    finally:
        os.close(fd)
        starter.join(60)
    made[0].close()


def test_a_file_system_without_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Listener(tmp_path / "s"):
        assert (tmp_path / "s").is_socket()


def test_a_path_with_a_zero_byte_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="no zero byte"):
        Listener(f"{tmp_path}/a\0b")
