"""The command line as a user meets it, in a process of its own."""

import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import vhost_protocol as vp
from vhost_backend.cli import demo as demo_module
from vhost_backend.cli import main
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES

COMMAND = [sys.executable, "-m", "vhost_backend"]


def run(
    *arguments: str, fds: tuple[int, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        pass_fds=fds,
        env=os.environ | (environment or {}),
    )


@contextmanager
def daemon(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "blk", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        # Tests may run under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("vhost-backend: serving"), line
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_serve_use_and_end(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with daemon(f"--socket-path={path}", f"--blk-file={image}", "--serial=abc") as process:
        with DriverSession.connect(path, features=DRIVER_FEATURES) as session:
            driver = BlockDriver(session)
            driver.write(0, b"x" * 512)
            assert driver.get_id() == b"abc"
            process.send_signal(signal.SIGTERM)  # while a front-end is connected
            assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not path.exists()
    assert image.read_bytes()[:512] == b"x" * 512


def test_interrupt_ends_it_without_a_traceback(tmp_path: Path, image: Path) -> None:
    with daemon(f"--socket-path={tmp_path / 's'}", f"--blk-file={image}") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_an_interrupt_before_it_serves_is_no_traceback() -> None:
    program = (
        "import argparse, signal, sys\n"
        "from vhost_backend.cli import main\n"
        "def interrupted(*_): signal.raise_signal(signal.SIGINT)\n"
        "argparse.ArgumentParser.parse_known_args = interrupted\n"
        "sys.exit(main(['blk']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_full_log_ends_no_disk(tmp_path: Path, image: Path) -> None:
    """stderr on a full disk: the disk is served, the counters asked for, and it ends as ever."""
    path = tmp_path / "s"
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [*COMMAND, "blk", "-vv", f"--socket-path={path}", f"--blk-file={image}"], stderr=full
        )
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with DriverSession.connect(path, features=DRIVER_FEATURES) as session:
            driver = BlockDriver(session)
            driver.write(0, b"x" * 512)
            process.send_signal(signal.SIGUSR1)
            assert driver.read(0, 512) == b"x" * 512
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_killed_daemon_leaves_a_socket_that_the_next_one_replaces(
    tmp_path: Path, image: Path
) -> None:
    arguments = (f"--socket-path={tmp_path / 's'}", f"--blk-file={image}")
    with daemon(*arguments) as process:
        process.kill()
        process.wait()
        assert (tmp_path / "s").exists()
    with daemon(*arguments), DriverSession.connect(tmp_path / "s") as session:
        assert BlockDriver(session).capacity == image.stat().st_size


def test_a_second_instance_refuses(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    with daemon(f"--socket-path={tmp_path / 's'}", f"--blk-file={image}"):
        second = run("blk", f"--socket-path={tmp_path / 's'}", f"--blk-file={other}")
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert "listens on this socket" in second.stderr


@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "no permission"])
def test_an_unusable_image_is_one_line_before_the_socket_exists(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    if kind == "empty":
        image.touch()
    elif kind == "folder":
        image.mkdir()
    elif kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        image.write_bytes(bytes(512))
        image.chmod(0)
    done = run("blk", f"--socket-path={tmp_path / 's'}", f"--blk-file={image}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"vhost-backend: {image}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "1 to 107 bytes, not 0"),
        ("x" * 200, "1 to 107 bytes, not 200"),
        ("missing/s", "No such file or directory"),
        ("disk.img/s", "Not a directory"),
        ("disk.img", "exists and is not a socket"),
        ("loose", "a symbolic link that leads nowhere"),
    ],
)
def test_an_unusable_socket_path_is_one_line(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loose").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    done = run("blk", f"--socket-path={path}", f"--blk-file={image}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"vhost-backend: cannot listen on {path}")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_processors_that_there_are_not_are_one_line(tmp_path: Path, image: Path) -> None:
    done = run("blk", f"--socket-path={tmp_path / 's'}", f"--blk-file={image}", "--cpus=0,7000")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is not allowed on processors [7000]" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_disk_with_every_option_serves(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    options = ["--direct", "--busy-poll=50", "--cpus=0", "--num-queues=2"]
    command = [sys.executable, "-m", "vhost_backend", "blk", f"--socket-path={path}"]
    process = subprocess.Popen([*command, f"--blk-file={image}", *options])
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.01)
        with DriverSession.connect(path, features=DRIVER_FEATURES, num_queues=2) as session:
            driver = BlockDriver(session)
            driver.write(8192, b"x" * 4096)
            assert driver.read(8192, 4096) == b"x" * 4096
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["blk", "demo"])
def test_an_engine_that_there_is_not_is_one_line(tmp_path: Path, image: Path, command: str) -> None:
    arguments = [f"--socket-path={tmp_path / 's'}", f"--blk-file={image}"]
    if command == "demo":
        arguments = [f"--image={tmp_path / 'demo.img'}"]
    done = run(command, *arguments, environment={"VIRTQUEUE_ENGINE": "fortran"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "VIRTQUEUE_ENGINE is c or python" in done.stderr
    assert list(tmp_path.iterdir()) == [image]  # nothing was made before that was known


@pytest.mark.parametrize("kind", ["listening", "connected"])
def test_an_inherited_descriptor(tmp_path: Path, image: Path, kind: str) -> None:
    if kind == "listening":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            fd = listener.fileno()
            with (
                daemon(f"--fd={fd}", f"--blk-file={image}", fds=(fd,)) as process,
                DriverSession.connect(tmp_path / "s") as session,
            ):
                assert BlockDriver(session).read(0, 512) == bytes(512)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with daemon(
        f"--fd={theirs.fileno()}", f"--blk-file={image}", fds=(theirs.fileno(),)
    ) as process:
        theirs.close()
        with DriverSession(vp.Frontend(ours, timeout=60)) as session:
            assert BlockDriver(session).read(0, 512) == bytes(512)
        assert process.wait(60) == 0  # the one connection is over


def test_capabilities_ignore_everything_else() -> None:
    done = run("blk", "--print-capabilities", "--nonsense")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_help_shows_how_to_attach_qemu() -> None:
    done = run("blk", "--help")
    assert done.returncode == 0
    assert "vhost-user-blk-pci" in done.stdout
    assert "share=on" in done.stdout
    assert "reconnect=1" in done.stdout
    assert run("--help").returncode == 0
    assert re.fullmatch(r"vhost-backend \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("blk",),
        ("blk", "--blk-file=x"),
        ("blk", "--socket-path=s", "--fd=3", "--blk-file=x"),
        ("blk", "--fd=nonsense", "--blk-file=x"),
        ("blk", "--fd=987", "--blk-file=x"),
        ("blk", "--socket-path=s", "--blk-file=x", "--num-queues=0"),
        ("blk", "--socket-path=s", "--blk-file=x", "--num-queues=many"),
        ("blk", "--socket-path=s", "--blk-file=x", "--busy-poll=long"),
        ("blk", "--socket-path=s", "--blk-file=x", "--busy-poll=1000000"),
        ("blk", "--socket-path=s", "--blk-file=x", "--cpus=0,one"),
        ("blk", "--socket-path=s", "--blk-file=x", "--cpus=3-1"),
        ("blk", "--socket-path=s", "--blk-file=x", "--cpus=0-99999999"),
        ("blk", "--socket-path=s", "--blk-file=x", "--locking=maybe"),
        ("blk", "--socket-path=s", "--blk-file="),
        ("blk", "--socket-path=s", "--blk-file=x", "--metrics=nonsense"),
        ("blk", "--socket-path=s", "--blk-file=x", "--metrics=unix:"),
        ("blk", "--socket-path=s", "--blk-file=x", "--metrics=localhost:65536"),
        ("demo", "--size=0"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "usage:" in done.stderr


def test_an_option_that_there_is_not_names_the_one_that_was_meant() -> None:
    done = run("blk", "--socket-path=s", "--blk-file=x", "--readonly")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: unrecognized arguments: --readonly (is --read-only meant?)\n"
    )


def test_a_range_of_processors(tmp_path: Path, image: Path) -> None:
    first = min(os.sched_getaffinity(0))
    arguments = (f"--socket-path={tmp_path / 's'}", f"--blk-file={image}")
    with daemon(*arguments, f"--cpus={first}-{first}"):
        pass


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("blk", "--help"), ("blk", "--print-capabilities"), ("demo", "--size=1")],
)
def test_a_full_output_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = [f"--image={tmp_path / 'demo.img'}"] if arguments[0] == "demo" else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments, *where],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=environment,
        )
    lines = [line for line in done.stderr.splitlines() if "serving" not in line]
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("vhost-backend: ")
    assert lines[0].endswith("No space left on device")


def test_who_has_read_enough_of_the_output_hears_no_complaint(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        done = subprocess.run(
            [*COMMAND, "blk", "--print-capabilities"],
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("closed", [(0, 1, 2), (2,), (0,), (0, 2)])
def test_closed_standard_streams_are_never_the_image(
    tmp_path: Path, image: Path, closed: tuple[int, ...]
) -> None:
    path = tmp_path / "s"

    def close() -> None:
        for fd in closed:
            os.close(fd)

    command = [*COMMAND, "blk", f"--socket-path={path}", f"--blk-file={image}"]
    process = subprocess.Popen(command, preexec_fn=close, stderr=subprocess.DEVNULL)
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.01)
        for fd in closed:
            assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == "/dev/null"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains_and_removes_the_socket(
    tmp_path: Path, image: Path, number: signal.Signals
) -> None:
    path = tmp_path / "s"
    with (
        daemon(f"--socket-path={path}", f"--blk-file={image}") as process,
        DriverSession.connect(path) as session,
    ):
        BlockDriver(session).write(0, b"x" * 512)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not path.exists()


def test_a_second_front_end_that_has_to_wait_is_one_line(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with daemon(f"--socket-path={path}", f"--blk-file={image}") as process:
        assert process.stderr is not None
        with DriverSession.connect(path) as session:
            BlockDriver(session).read(0, 512)
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(path))
                line = process.stderr.readline()
        assert line.startswith(f"vhost-backend: {image}: another front-end has connected")
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_more_words_say_more(tmp_path: Path, image: Path) -> None:
    """Who came and went; with two, what was negotiated, the memory, and each ring's facts."""
    said = []
    for flag in ("-v", "-vv"):
        path = tmp_path / "s"
        with daemon(f"--socket-path={path}", f"--blk-file={image}", flag) as process:
            with DriverSession.connect(path, features=DRIVER_FEATURES, packed=True) as session:
                BlockDriver(session).read(0, 512)
                session.stop_ring(0)
            assert process.stderr is not None
            lines: list[str] = []
            while not lines or "has gone" not in lines[-1]:
                lines.append(process.stderr.readline())
            assert all(line.startswith(f"vhost-backend: {image}: ") for line in lines)
            process.terminate()
            assert process.wait(60) == 0
        said.append("".join(lines))
    assert "has connected" in said[0]
    assert "queue 0 starts" not in said[0]
    assert re.search(r"features .*VERSION_1 RING_PACKED", said[1])
    assert re.search(r"protocol features: .*CONFIG\b", said[1])
    assert re.search(
        r"memory 0x[0-9a-f]+ to 0x[0-9a-f]+ \(\d+ MiB\), for the front-end at 0x", said[1]
    )
    assert re.search(r"queue 0 starts: \d+ descriptors, packed, from 0x", said[1])
    assert "queue 0 stops at 0x" in said[1]


def test_a_descriptor_that_is_no_socket_is_one_line(tmp_path: Path, image: Path) -> None:
    with open(image, "rb") as file:
        done = run("blk", f"--fd={file.fileno()}", f"--blk-file={image}", fds=(file.fileno(),))
    assert done.returncode == 1
    assert "not a Unix stream socket" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.path.exists("/dev/xen"), reason="this is a Xen domain")
def test_xen_where_there_is_none_is_one_line(tmp_path: Path, image: Path) -> None:
    where = (f"--socket-path={tmp_path / 's'}", f"--blk-file={image}")
    done = run("blk", *where, "--xen")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    installed = importlib.util.find_spec("vhost_xen") is not None
    said = "is this a Xen domain" if installed else "pip install ./packages/guest-memory"
    assert said in done.stderr
    done = run("blk", *where, "--xen", "--no-mem-slots")
    assert "no postcopy migration on Xen" in done.stderr


def test_the_demo(tmp_path: Path) -> None:
    done = run("demo", "--size=2", f"--image={tmp_path / 'demo.img'}")
    assert done.returncode == 0, done.stderr
    assert "every block was read back" in done.stdout
    assert "ring engine" in done.stdout
    assert "vhost-user-blk-pci" in done.stdout
    assert (tmp_path / "demo.img").stat().st_size == 2 << 20
    again = run("demo", "--size=1", f"--image={tmp_path / 'demo.img'}")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("running", [False, True])
def test_a_demo_leaves_an_image_alone_that_somebody_uses(
    tmp_path: Path, image: Path, running: bool
) -> None:
    """A guest that has the disk by the command that the demo prints, and one that will have it."""
    content = b"a guest's own".ljust(512)
    image.write_bytes(content * 8192)
    with (
        daemon(f"--socket-path={tmp_path / 's'}", f"--blk-file={image}") as process,
        ExitStack() as stack,
    ):
        if running:
            session = stack.enter_context(DriverSession.connect(tmp_path / "s"))
            BlockDriver(session).read(0, 512)
        done = run("demo", "--size=1", f"--image={image}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"{image}: process {process.pid} " in done.stderr
    assert image.read_bytes() == content * 8192


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r"])
def test_a_demo_in_any_character_set(tmp_path: Path, encoding: str) -> None:
    image = tmp_path / "dёmö.img"
    done = subprocess.run(
        [*COMMAND, "demo", "--size=1", f"--image={image}"],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert "every block was read back" in done.stdout.decode(encoding)


def test_a_demo_in_a_folder_with_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    done = run("demo", "--size=1", environment={"TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr


def test_a_demo_does_not_follow_a_link_in_the_folder_for_everybody(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"vhost-demo-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    done = run("demo", "--size=1", environment={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert "use --image" in done.stderr
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_demo_waits_for_its_daemons_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(subprocess.Popen[bytes]):
        """It takes longer to end than anybody waits who does not wait for as long as it takes."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Slow)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    with demo_module._daemon(image) as connection:
        assert connection.fileno() >= 0


def test_a_demo_that_is_killed_takes_its_daemon_along(tmp_path: Path) -> None:
    with demo(tmp_path) as (process, daemon):
        process.kill()
        process.wait()
        assert select.select([daemon], [], [], 60)[0] == [daemon]


def test_an_image_that_the_demo_cannot_make_is_one_line(tmp_path: Path) -> None:
    done = run("demo", f"--image={tmp_path / 'missing' / 'demo.img'}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "demo.img: No such file or directory" in done.stderr


@contextmanager
def demo(
    folder: Path, hang_up: signal.Handlers = signal.SIG_DFL
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A demo that has begun to write, and a pidfd of its daemon."""
    process = subprocess.Popen(
        [*COMMAND, "demo", "--size=64", f"--image={folder / 'demo.img'}"],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    )
    with ExitStack() as stack:
        assert process.stderr is not None
        stack.enter_context(process.stderr)
        stack.callback(process.wait)
        stack.callback(process.kill)
        line = process.stderr.readline()
        assert line.startswith("vhost-backend: serving"), line
        while not os.stat(folder / "demo.img").st_blocks:
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        daemon = os.pidfd_open(int(children[0]))
        stack.callback(os.close, daemon)
        try:
            yield process, daemon
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(daemon, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_ended_takes_its_daemon_along(
    tmp_path: Path, number: signal.Signals
) -> None:
    with demo(tmp_path) as (process, daemon):
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert select.select([daemon], [], [], 0)[0] == [daemon]  # it has ended
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["demo.img"]


def test_a_demo_under_nohup_does_not_hear_the_terminal_go(tmp_path: Path) -> None:
    with demo(tmp_path, hang_up=signal.SIG_IGN) as (process, _):
        process.send_signal(signal.SIGHUP)
        assert process.wait(240) == 0  # a whole demo, on whatever the machine has left for it


def test_a_demo_whose_daemon_dies_says_so_in_one_line(tmp_path: Path) -> None:
    with demo(tmp_path) as (process, daemon):
        signal.pidfd_send_signal(daemon, signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stderr is not None
        *before, last = process.stderr.read().splitlines()
        assert last.startswith("vhost-backend: the daemon ended with status -9: ")
        # On a busy machine the daemon may have wondered where the requests are.
        assert all("no request has come" in line for line in before)


def test_the_demo_under_qemu_runs_the_guest_tests_of_the_clone_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # a report of its own would replace ours
    assert main(["demo", "--qemu"]) == 1
    assert capfd.readouterr().err.startswith(
        "vhost-backend: --qemu runs the guest tests of a clone"
    )
    (tmp_path / "tests" / "guest").mkdir(parents=True)
    tests = tmp_path / "tests" / "guest" / "test_blk.py"
    tests.write_text("def test_a_guest(): print('booted')")
    assert main(["demo", "--qemu"]) == 0
    assert "1 passed" in capfd.readouterr().out
    tests.write_text("import pytest\ndef test_a_guest(): pytest.skip('no QEMU here')")
    assert main(["demo", "--qemu"]) == 1
    captured = capfd.readouterr()
    assert captured.err.endswith("every guest test was skipped\n")
    assert "no QEMU here" in captured.out
    tests.write_text("def test_a_guest(): assert False")
    assert main(["demo", "--qemu"]) == 1
    capfd.readouterr()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--qemu"]) == 1
    assert capfd.readouterr().err.endswith("pip install pytest pytest-timeout\n")
