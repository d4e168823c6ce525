"""What QEMU sends a vhost-user-blk back-end, over a real socket pair, both ends ours."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from vhost_protocol import (
    Ack,
    AddMemReg,
    BackendConnection,
    ConfigReply,
    FeaturesReply,
    Frontend,
    FrontendRequest,
    GetConfig,
    GetFeatures,
    GetInflightFd,
    GetMaxMemSlots,
    GetProtocolFeatures,
    GetQueueNum,
    GetStatus,
    GetVringBase,
    InflightReply,
    MaxMemSlotsReply,
    MemoryRegion,
    ProtocolFeatures,
    ProtocolFeaturesReply,
    QueueNumReply,
    Received,
    Reply,
    RequestFailed,
    SetLogBase,
    SetVringNum,
    StatusReply,
    VringBaseReply,
)

FEATURES = 1 << 30 | 1 << 32
OFFER = (
    ProtocolFeatures.MQ
    | ProtocolFeatures.LOG_SHMFD
    | ProtocolFeatures.REPLY_ACK
    | ProtocolFeatures.BACKEND_REQ
    | ProtocolFeatures.CONFIG
    | ProtocolFeatures.INFLIGHT_SHMFD
    | ProtocolFeatures.RESET_DEVICE
    | ProtocolFeatures.CONFIGURE_MEM_SLOTS
    | ProtocolFeatures.STATUS
)


class Device(threading.Thread):
    """A back-end that says yes, and remembers what it was asked."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.connection = BackendConnection(sock, timeout=60)
        self.seen: list[FrontendRequest] = []
        self.fds: list[int] = []

    def answer(self, received: Received) -> tuple[Reply | None, list[int]]:
        message = received.message
        match message:
            case GetFeatures():
                return FeaturesReply(FEATURES), []
            case GetProtocolFeatures():
                return ProtocolFeaturesReply(OFFER), []
            case GetQueueNum():
                return QueueNumReply(4), []
            case GetMaxMemSlots():
                return MaxMemSlotsReply(509), []
            case GetConfig(offset, size, _):
                return ConfigReply(offset, 0, bytes(range(offset, offset + size))), []
            case GetVringBase(index):
                return VringBaseReply(index, 77), []
            case GetStatus():
                return StatusReply(15), []
            case GetInflightFd(_, _, queues, size):
                fd = os.memfd_create("inflight")
                return InflightReply(4096, 0, queues, size), [fd]
            case SetLogBase():
                return Ack(0), []
            case _:
                return None, []

    def run(self) -> None:
        with self.connection:
            while (received := self.connection.receive()) is not None:
                with received:
                    assert isinstance(received.request, FrontendRequest)
                    self.seen.append(received.request)
                    self.fds.append(len(received.fds))
                    reply, fds = self.answer(received)
                    if reply is None:
                        message = received.message
                        bad = isinstance(message, SetVringNum) and message.num == 13
                        self.connection.acknowledge(received, not bad)
                    else:
                        self.connection.reply(received, reply, fds)
                        for fd in fds:
                            os.close(fd)


def test_a_blk_front_end_starts_and_stops_a_ring() -> None:
    ours, theirs = socket.socketpair()
    device = Device(theirs)
    device.start()
    memory = os.memfd_create("memory")
    event = os.eventfd(0)
    before = len(os.listdir("/proc/self/fd"))
    with Frontend(ours, timeout=60) as frontend:
        assert frontend.get_features() == FEATURES
        assert frontend.get_protocol_features() == OFFER
        frontend.set_protocol_features(OFFER)
        assert frontend.get_queue_num() == 4
        assert frontend.get_max_mem_slots() == 509
        channel = frontend.open_backend_channel()
        frontend.set_owner()
        frontend.set_features(FEATURES)
        assert frontend.get_config(2, 5) == b"\2\3\4\5\6"
        frontend.set_config(3, b"x")
        region = MemoryRegion(0, 1 << 20, 1 << 40)
        frontend.set_mem_table([region], [memory])
        frontend.add_mem_reg(MemoryRegion(1 << 30, 4096, 1 << 41), memory)
        frontend.rem_mem_reg(MemoryRegion(1 << 30, 4096, 1 << 41))
        inflight, fd = frontend.get_inflight_fd(4, 128)
        assert (inflight.mmap_size, inflight.num_queues, inflight.queue_size) == (4096, 4, 128)
        assert fd is not None
        with fd:
            frontend.set_inflight_fd(4096, 0, 4, 128, fd)
        frontend.set_log_base(4096, 0, memory)
        frontend.set_log_fd(event)
        frontend.set_vring_num(0, 128)
        frontend.set_vring_base(0, 0)
        frontend.set_vring_addr(0, 1 << 40, (1 << 40) + 8192, (1 << 40) + 4096)
        frontend.set_vring_call(0, event)
        frontend.set_vring_err(0)
        frontend.set_vring_kick(0, event)
        frontend.set_vring_enable(0)
        frontend.set_status(15)
        assert frontend.get_status() == 15
        with pytest.raises(RequestFailed) as failed:
            frontend.set_vring_num(0, 13)
        assert failed.value.request == "SET_VRING_NUM"
        assert failed.value.value == 1
        assert frontend.get_vring_base(0) == 77
        frontend.reset_device()
        channel.close()
    device.join(60)
    assert not device.is_alive()
    assert device.seen[:4] == [
        FrontendRequest.GET_FEATURES,
        FrontendRequest.GET_PROTOCOL_FEATURES,
        FrontendRequest.SET_PROTOCOL_FEATURES,
        FrontendRequest.GET_QUEUE_NUM,
    ]
    kick = device.seen.index(FrontendRequest.SET_VRING_KICK)
    assert device.fds[kick] == 1
    os.close(memory)
    os.close(event)
    assert len(os.listdir("/proc/self/fd")) == before - 4


def test_received_values_compare_and_show() -> None:
    region = MemoryRegion(0, 4096, 1 << 40)
    assert AddMemReg(region) == AddMemReg(region)
    assert AddMemReg(region) != AddMemReg(MemoryRegion(4096, 4096, 1 << 40))
    assert repr(region) == (
        "MemoryRegion(guest_address=0, size=0x1000, user_address=0x10000000000,"
        " mmap_offset=0, flags=0, domid=0)"
    )
