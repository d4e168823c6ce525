"""vhost-trace: recordings, the proxy between our own ends, and between QEMU and a C back-end."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vhost_protocol import (
    BackendChannel,
    BackendConnection,
    FeaturesReply,
    Frontend,
    FrontendRequest,
    MemoryRegion,
    ProtocolFeatures,
    ProtocolFeaturesReply,
    Session,
    SetBackendReqFd,
    VringBaseReply,
)
from vhost_protocol.trace.cli import main
from vhost_protocol.trace.proxy import Proxy
from vhost_protocol.trace.recording import TraceError, read_records
from vhost_protocol.trace.show import Printer, format_text, to_json
from vhost_protocol.trace.tracer import Tracer

DATA = Path(__file__).parent / "data"
RECORDING = DATA / "qemu-7.2-storage-daemon.jsonl"
QEMU = shutil.which("qemu-system-x86_64")
DAEMON = shutil.which("qemu-storage-daemon")

# The recording's commands, in the order in which QEMU 7.2 sends them.
START = [
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_MAX_MEM_SLOTS",
    "SET_BACKEND_REQ_FD",
    "SET_OWNER",
]


def frame(code: int, payload: bytes = b"", flags: int = 1, order: str = "=") -> bytes:
    return struct.pack(f"{order}III", code, flags, len(payload)) + payload


def test_a_recording_of_qemu_and_its_storage_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--read", str(RECORDING)]) == 0
    text = capsys.readouterr().out
    assert "!!" not in text
    assert "~~" not in text
    assert "GET_VRING_BASE reply index=0 base=1 (answers #35 after" in text
    assert main(["--read", str(RECORDING), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(events) == 36
    requests = [event["request"] for event in events if not event["reply"]]
    assert requests[:7] == START
    assert all(event["violations"] == [] for event in events)
    assert all(event["answers"] for event in events if event["reply"])
    add = next(event for event in events if event["request"] == "ADD_MEM_REG")
    assert add["fds"] == ["memfd:memory-backend-memfd"]
    assert add["need_reply"] is True
    assert add["fields"]["region"]["size"] == 64 << 20


def test_a_recording_of_the_other_byte_order(tmp_path: Path) -> None:
    other = "little" if sys.byteorder == "big" else "big"
    sign = {"little": "<", "big": ">"}[other]
    path = tmp_path / "other.jsonl"
    lines: list[dict[str, Any]] = [
        {"format": "vhost-trace", "version": 1, "byteorder": other},
        {"t": 0, "c": 1, "ch": "main", "fe": True, "data": frame(1, order=sign).hex(), "fds": []},
        {
            "t": 1,
            "c": 1,
            "ch": "main",
            "fe": False,
            "data": frame(1, struct.pack(f"{sign}Q", 0x1234567), 5, sign).hex(),
            "fds": [],
        },
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    out = io.StringIO()
    with path.open() as file:
        order, records = read_records(file)
        printer = Printer(out, as_json=False, order=order)
        for record in records:
            printer.record(record)
    assert "features=0x1234567 (answers #1 after 1000.000 ms)" in out.getvalue()
    assert printer.violations == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json\n",
        '{"format": "else", "version": 1, "byteorder": "little"}\n',
        '{"format": "vhost-trace", "version": 2, "byteorder": "little"}\n',
        '{"format": "vhost-trace", "version": 1, "byteorder": "middle"}\n',
        "[1]\n",
        '{"format": "vhost-trace", "version": 1, "byteorder": "little"}\n{"t": 0}\n',
        '{"format": "vhost-trace", "version": 1, "byteorder": "little"}\n'
        '{"t": 0, "c": 1, "ch": "main", "fe": true, "data": "00", "fds": []}\n',
        '{"format": "vhost-trace", "version": 1, "byteorder": "little"}\n'
        '{"t": 0, "c": 1, "ch": "side", "fe": true, "data": "000000000000000000000000",'
        ' "fds": []}\n',
    ],
)
def test_damaged_recordings(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert main(["--read", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vhost-trace: ")
    assert error.count("\n") == 1


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["--listen", "a"],
        ["--read", "a", "--listen", "b"],
        ["--read", "a", "--write", "b"],
        ["--read", "a", "--listen", "b", "--connect", "c"],
        ["--listen", "a", "--connect", "a"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    capsys.readouterr()
    missing = tmp_path / "missing"
    assert main(["--read", str(missing)]) == 2
    assert capsys.readouterr().err == f"vhost-trace: {missing}: No such file or directory\n"
    taken = tmp_path / "file"
    taken.touch()
    assert main(["--listen", str(taken), "--connect", "x"]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_violations_are_marked_and_the_rest_goes_on() -> None:
    tracer = Tracer()

    def feed(front: bool, data: bytes, fds: tuple[str, ...] = (), ch: str = "main") -> list[str]:
        event = tracer.feed(0.5, ch, front, data, fds)
        text = format_text(event)
        json.dumps(to_json(event))
        assert text.count("\n") == len(event.violations)
        return [violation.rule for violation in event.violations]

    assert "version" not in str(feed(True, frame(1)))
    assert feed(True, frame(1, flags=2)) == ["must be 1"]
    assert feed(True, frame(99)) == [f"front-end requests are 1 to {len(FrontendRequest)}"]
    assert feed(True, frame(2, b"123")) == ["must be 8 bytes"]
    assert feed(True, frame(17)) == ["needs MQ negotiated"]
    assert feed(True, frame(1), ("memfd:x",)) == ["must be 0 with this message"]
    assert feed(True, frame(18, struct.pack("=II", 0, 7))) == ["must be 0 or 1"]
    assert feed(False, frame(15, bytes(8), 5)) == ["answers nothing that was asked"]
    # GET_QUEUE_NUM is due after several GET_FEATURES.
    assert feed(False, frame(17, bytes(8), 5)) == ["the answer to GET_FEATURES is due first"]
    assert feed(False, frame(1, b"123", 5)) == ["must be 8 bytes"]
    assert feed(False, frame(1, bytes(8), 5)) == []
    assert feed(True, frame(10, bytes(8))) == ["comes after SET_OWNER"]
    assert tracer.unanswered >= 1
    assert feed(False, frame(2), ch="backend")[0] == "needs BACKEND_REQ|CONFIG negotiated"
    assert feed(False, frame(4, struct.pack("=III", 0, 1, 2), 0), ch="gpu") == []
    assert feed(True, frame(7, b"", 4), ch="gpu")[-1] == "answers nothing that was asked"
    assert feed(True, frame(26, bytes(1072)))[0].startswith("must be one of")
    assert feed(True, frame(5, bytes(9))) == ["must be 8 to 1288 or 0 or 8 bytes"]


def test_keys_do_not_get_into_traces() -> None:
    from protocol_samples import VECTORS

    tracer = Tracer(order="<")
    vectors = [v for v in VECTORS if v.table == "front-end" and v.code == 26 and not v.reply]
    for vector in vectors:
        event = tracer.feed(0, "main", True, vector.frame("little"))
        assert event.message == vector.message
        for text in (format_text(event), json.dumps(to_json(event))):
            assert "secret bytes" in text
            assert "6b6b6b6b" not in text
            assert "30303030" not in text


@contextmanager
def tracing(proxy: Proxy, *, once: bool = True) -> Iterator[None]:
    thread = threading.Thread(target=proxy.run, kwargs={"once": once})
    thread.start()
    try:
        yield
    finally:
        proxy.stop()
        thread.join(60)
        assert not thread.is_alive()
        proxy.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_the_proxy_passes_everything_through(tmp_path: Path, fds: list[int]) -> None:
    front_path, back_path = str(tmp_path / "front"), str(tmp_path / "back")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(back_path)
    listener.listen()
    offer = ProtocolFeatures.BACKEND_REQ | ProtocolFeatures.REPLY_ACK | ProtocolFeatures.CONFIG
    passed: list[int] = []

    def back_end() -> None:
        sock, _ = listener.accept()
        with BackendConnection(sock, timeout=60) as back:
            channel = None
            while (received := back.receive()) is not None:
                with received:
                    match received.request.name:
                        case "GET_FEATURES":
                            back.reply(received, FeaturesReply(1 << 30))
                        case "GET_PROTOCOL_FEATURES":
                            back.reply(received, ProtocolFeaturesReply(offer))
                        case "SET_MEM_TABLE":
                            passed.extend(os.fstat(fd.fileno()).st_ino for fd in received.fds)
                            back.acknowledge(received, True)
                        case "GET_VRING_BASE":
                            assert channel is not None
                            channel.config_change()
                            channel.close()
                            back.reply(received, VringBaseReply(0, 5))
                        case _:
                            if isinstance(received.message, SetBackendReqFd):
                                fd = received.take_fd()
                                assert fd is not None
                                channel = BackendChannel.from_fd(fd, back.session, timeout=60)
                            back.acknowledge(received, True)

    thread = threading.Thread(target=back_end)
    thread.start()
    out = io.StringIO()
    recording = io.StringIO()
    with listener, tracing(Proxy(front_path, back_path, Printer(out, as_json=False), recording)):
        with Frontend.connect(front_path, timeout=60) as front:
            assert front.get_features() == 1 << 30
            assert front.get_protocol_features() == offer
            front.set_protocol_features(offer)
            channel = front.open_backend_channel(timeout=60)
            front.set_owner()
            regions = [MemoryRegion(n << 20, 4096, n << 20) for n in range(2)]
            front.set_mem_table(regions, fds[:2])
            answered = threading.Thread(
                target=lambda: channel.acknowledge(channel.receive(), True)  # type: ignore[arg-type]
            )
            answered.start()
            assert front.get_vring_base(0) == 5
            answered.join(60)
            channel.close()
        thread.join(60)
        deadline = time.monotonic() + 60
        while "closed" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert passed == [os.fstat(fd).st_ino for fd in fds[:2]]
    text = out.getvalue()
    assert "!!" not in text
    assert "fe <- be [backend] CONFIG_CHANGE_MSG need-reply" in text
    assert "fe -> be [backend] CONFIG_CHANGE_MSG reply value=0 (answers #" in text
    assert "fds=[memfd:passed-0, memfd:passed-1]" in text
    assert not os.path.exists(front_path)
    recording.seek(0)
    again = io.StringIO()
    printer = Printer(again, as_json=False)
    for record in read_records(recording)[1]:
        printer.record(record)
    notes = [line for line in text.splitlines() if " -- " not in line]
    assert again.getvalue().splitlines() == notes


@pytest.mark.usefixtures("no_fd_leak")
def test_the_proxy_survives_nonsense(tmp_path: Path, fds: list[int]) -> None:
    front_path, back_path = str(tmp_path / "front"), str(tmp_path / "back")
    out = io.StringIO()
    proxy = Proxy(front_path, back_path, Printer(out, as_json=True), None)
    with tracing(proxy, once=False):
        # There is no back-end yet.
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(front_path)
            front.settimeout(60)
            assert front.recv(1) == b""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(back_path)
            listener.listen()
            for data in (
                frame(1, b"x" * 200_000),
                struct.pack("=III", 1, 1, 0xFFFF_FFFF) + b"y" * 100_000,
                b"short",
                frame(21) + frame(200, b"z" * 5000),
            ):
                with socket.socket(socket.AF_UNIX) as front:
                    front.connect(front_path)
                    back, _ = listener.accept()
                    with back:
                        back.settimeout(60)
                        sender = threading.Thread(target=send_all, args=(front, data, fds))
                        sender.start()
                        got = b""
                        while len(got) < len(data) and (piece := back.recv(65536)):
                            got += piece
                        sender.join(60)
                        assert got == data
    notes = [json.loads(line).get("note") for line in out.getvalue().splitlines()]
    assert any(note and "cannot connect" in note for note in notes)


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.timeout(90)
def test_a_full_queue_of_connections_holds_up_nothing(
    tmp_path: Path, full_listener: socket.socket
) -> None:
    """Neither the tracer, when its back-end's is full, nor its start, when its own path's is."""
    path = full_listener.getsockname()
    with pytest.raises(TraceError, match="in use"):
        Proxy(path, str(tmp_path / "back"), Printer(io.StringIO(), as_json=True), None)
    out = io.StringIO()
    with (
        tracing(Proxy(str(tmp_path / "front"), path, Printer(out, as_json=True), None), once=False),
        socket.socket(socket.AF_UNIX) as front,
    ):
        front.settimeout(60)
        front.connect(str(tmp_path / "front"))
        assert front.recv(1) == b""
    assert "cannot connect to the back-end" in out.getvalue()


class _Reluctant(socket.socket):
    """A listener of a process that may not open more, twice."""

    refusals = 2

    def accept(self) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


@pytest.mark.usefixtures("no_fd_leak")
def test_running_short_ends_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor to accept with, no room to record in, no pair for the back-end's channel."""
    front_path, back_path = str(tmp_path / "front"), str(tmp_path / "back")
    out = io.StringIO()
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(back_path)
        listener.listen()
        full = open("/dev/full", "w")  # noqa: SIM115 (closing it has to fail)
        proxy = Proxy(front_path, back_path, Printer(out, as_json=False), full)
        proxy._selector.unregister(proxy._listener)
        proxy._listener = _Reluctant(fileno=proxy._listener.detach())
        proxy._selector.register(proxy._listener, selectors.EVENT_READ)
        stack.enter_context(tracing(proxy, once=False))
        front = stack.enter_context(Frontend.connect(front_path, timeout=60))
        accepted, _ = listener.accept()
        back = stack.enter_context(BackendConnection(accepted, timeout=60))
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        monkeypatch.setattr(socket, "socketpair", no_pair)
        front.session.protocol_features = ProtocolFeatures.BACKEND_REQ
        back.session.protocol_features = ProtocolFeatures.BACKEND_REQ
        with theirs:
            front.set_backend_req_fd(theirs)
        received = back.receive()
        assert received is not None
        with received:
            fd = received.take_fd()
            assert fd is not None
            with fd:
                os.write(fd.fileno(), b"untraced")
        assert ours.recv(8) == b"untraced"
        with pytest.raises(OSError, match="No space"):
            full.close()
    text = out.getvalue()
    assert text.count("a front-end has to wait: Too many open files") == 1
    assert "the recording ends before this message: No space left" in text
    assert "the backend channel is not traced: Too many open files" in text
    assert not proxy.recorded


def no_pair() -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def send_all(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sent = socket.send_fds(sock, [data[:3]], fds)
    sock.sendall(data[sent:])
    sock.shutdown(socket.SHUT_WR)


def test_a_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "front")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    printer = Printer(io.StringIO(), as_json=False)
    proxy = Proxy(path, "nowhere", printer, None)
    with pytest.raises(TraceError, match="in use"):
        Proxy(path, "nowhere", printer, None)
    proxy.close()


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@contextmanager
def storage_daemon(folder: Path) -> Iterator[Path]:
    """qemu-storage-daemon serving an 8 MiB image as vhost-user-blk."""
    assert DAEMON is not None
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    path = folder / "daemon.sock"
    with running(
        DAEMON,
        "--blockdev",
        f"driver=file,node-name=disk,filename={image}",
        "--export",
        f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={path},num-queues=2,"
        "writable=on",
    ):
        wait_for(path)
        yield path


def qemu_command(path: Path) -> list[str]:
    """A QEMU without a guest's operating system that attaches a vhost-user-blk device."""
    assert QEMU is not None
    return [
        QEMU,
        *("-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-m", "64M", "-S"),
        *("-object", "memory-backend-memfd,id=m,size=64M,share=on", "-numa", "node,memdev=m"),
        *("-chardev", f"socket,id=c,path={path}"),
        *("-device", "vhost-user-blk-pci,chardev=c,num-queues=1"),
        *("-qmp", "stdio"),
    ]


@pytest.mark.skipif(QEMU is None or DAEMON is None, reason="QEMU or its storage daemon is missing")
def test_between_qemu_and_its_storage_daemon(tmp_path: Path) -> None:
    front, recording = tmp_path / "front.sock", tmp_path / "trace.jsonl"
    command = "import sys; from vhost_protocol.trace.cli import main; sys.exit(main())"
    with (
        storage_daemon(tmp_path) as back,
        running(
            *(sys.executable, "-c", command, "--listen", str(front), "--connect", str(back)),
            *("--json", "--once", "--write", str(recording)),
            stdout=subprocess.PIPE,
        ) as trace,
    ):
        wait_for(front)
        with running(
            *qemu_command(front), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as qemu:
            assert trace.stdout is not None
            events = []
            for line in trace.stdout:
                events.append(json.loads(line))
                if events[-1].get("request") == "GET_CONFIG" and events[-1]["reply"]:
                    break
            assert qemu.stdin is not None
            qemu.stdin.write('{"execute":"qmp_capabilities"}{"execute":"quit"}')
            qemu.stdin.flush()
            events += [json.loads(line) for line in trace.stdout]
        assert trace.wait(60) == 0
    messages = [event for event in events if "note" not in event]
    assert [m["request"] for m in messages if not m["reply"]][:4] == START[:4]
    assert [m["violations"] for m in messages if m["violations"]] == []
    assert events[-1]["note"] == "closed"
    with recording.open() as file:
        records = list(read_records(file)[1])
    assert len(records) == len(messages)


@pytest.mark.skipif(DAEMON is None, reason="qemu-storage-daemon is missing")
@pytest.mark.usefixtures("no_fd_leak")
def test_our_front_end_against_the_storage_daemon(tmp_path: Path, fds: list[int]) -> None:
    with (
        storage_daemon(tmp_path) as path,
        Frontend.connect(str(path), timeout=60) as front,
    ):
        features = front.get_features()
        assert features >> 30 & 1
        offered = front.get_protocol_features()
        wanted = offered & (
            ProtocolFeatures.MQ
            | ProtocolFeatures.REPLY_ACK
            | ProtocolFeatures.CONFIG
            | ProtocolFeatures.BACKEND_REQ
            | ProtocolFeatures.CONFIGURE_MEM_SLOTS
        )
        front.set_protocol_features(wanted)
        assert front.get_queue_num() == 2
        assert front.get_max_mem_slots() >= 8
        with front.open_backend_channel():
            front.set_owner()
            front.set_features(features & (1 << 32 | 1 << 30))
            # Capacity in sectors of 512 bytes.
            assert int.from_bytes(front.get_config(0, 8), "little") == (8 << 20) // 512
            memory = os.memfd_create("memory")
            os.ftruncate(memory, 1 << 20)
            try:
                region = MemoryRegion(0, 1 << 20, 1 << 40)
                front.add_mem_reg(region, memory)
                front.set_vring_num(0, 128)
                front.set_vring_base(0, 0)
                front.set_vring_addr(0, 1 << 40, (1 << 40) + 8192, (1 << 40) + 4096)
                event = os.eventfd(0)
                try:
                    front.set_vring_call(0, event)
                    front.set_vring_kick(0, event)
                finally:
                    os.close(event)
                front.set_vring_enable(0)
                assert front.get_vring_base(0) == 0
                front.rem_mem_reg(region)
            finally:
                os.close(memory)


@pytest.mark.skipif(QEMU is None, reason="QEMU is missing")
def test_our_back_end_against_qemu(tmp_path: Path) -> None:
    from vhost_protocol import ConfigReply, GetConfig, MaxMemSlotsReply, QueueNumReply, StatusReply

    path = tmp_path / "back.sock"
    offer = ProtocolFeatures((1 << 20) - 1) & ~(
        ProtocolFeatures.XEN_MMAP
        | ProtocolFeatures.INBAND_NOTIFICATIONS
        | ProtocolFeatures.INFLIGHT_SHMFD
    )
    seen: list[str] = []
    errors: list[BaseException] = []

    def back_end() -> None:
        try:
            sock, _ = listener.accept()
            with BackendConnection(sock, timeout=60) as back:
                while (received := back.receive()) is not None:
                    with received:
                        seen.append(received.request.name)
                        assert received.violations == ()
                        match received.message:
                            case GetConfig(offset, size, _):
                                back.reply(received, ConfigReply(offset, 0, bytes(size)))
                            case _ if received.request.name == "GET_FEATURES":
                                back.reply(received, FeaturesReply(1 << 30 | 1 << 32))
                            case _ if received.request.name == "GET_PROTOCOL_FEATURES":
                                back.reply(received, ProtocolFeaturesReply(offer))
                            case _ if received.request.name == "GET_QUEUE_NUM":
                                back.reply(received, QueueNumReply(1))
                            case _ if received.request.name == "GET_MAX_MEM_SLOTS":
                                back.reply(received, MaxMemSlotsReply(32))
                            case _ if received.request.name == "GET_STATUS":
                                back.reply(received, StatusReply(0))
                            case _:
                                back.acknowledge(received, True)
        except BaseException as error:
            errors.append(error)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=back_end)
        thread.start()
        with running(*qemu_command(path), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as qemu:
            deadline = time.monotonic() + 60
            while "GET_CONFIG" not in seen and not errors and time.monotonic() < deadline:
                time.sleep(0.02)
            assert qemu.stdin is not None
            qemu.stdin.write('{"execute":"qmp_capabilities"}{"execute":"quit"}')
            qemu.stdin.flush()
            qemu.wait(60)
        thread.join(60)
    assert not errors, errors
    assert seen[:7] == START
    assert "GET_CONFIG" in seen


def test_the_program_ends_on_a_signal(tmp_path: Path) -> None:
    front = tmp_path / "front"
    command = "import sys; from vhost_protocol.trace.cli import main; sys.exit(main())"
    with running(
        *(sys.executable, "-c", command, "--listen", str(front), "--connect", "nowhere"),
        stdout=subprocess.PIPE,
    ) as trace:
        wait_for(front)
        trace.send_signal(signal.SIGTERM)
        assert trace.wait(60) == 0
    assert not front.exists()


def test_a_signal_at_once_leaves_no_socket_behind(tmp_path: Path) -> None:
    front = tmp_path / "front"
    command = """
import os, signal, sys
from vhost_protocol.trace import cli

class Told(cli.Proxy):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

cli.Proxy = Told
sys.exit(cli.main())
"""
    with running(
        *(sys.executable, "-c", command, "--listen", str(front), "--connect", "nowhere")
    ) as trace:
        assert trace.wait(60) == 0
    assert not front.exists()


def test_sessions_of_a_trace_follow_the_negotiation() -> None:
    tracer = Tracer()
    assert isinstance(tracer.session, Session)
    tracer.feed(0, "main", True, frame(1))
    tracer.feed(0, "main", False, frame(1, struct.pack("=Q", 1 << 30), 5))
    assert tracer.session.offered_features == 1 << 30
