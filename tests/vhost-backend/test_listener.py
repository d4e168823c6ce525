"""Who may listen on a path, and what happens to the socket file."""

import os
import socket
from pathlib import Path

import pytest

from vhost_backend import Listener, ListenError


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
