"""What a type checker sees from outside; mypy judges it, running it is only a smoke test."""

from __future__ import annotations

import socket
from typing import assert_type

from vhost_protocol import (
    Ack,
    Answered,
    AsyncFrontend,
    BackendConnection,
    FeaturesReply,
    Frontend,
    GetFeatures,
    GetVringBase,
    IotlbMsg,
    OwnedFd,
    ProtocolFeatures,
    Received,
    SetVringNum,
    VringBaseReply,
)


def front_end(front: Frontend) -> None:
    assert_type(front.ask(GetFeatures()), FeaturesReply)
    assert_type(front.ask(GetVringBase(0)), VringBaseReply)
    assert_type(front.ask_fds(GetVringBase(0)), Answered[VringBaseReply])
    assert_type(front.get_features(), int)
    assert_type(front.get_protocol_features(), ProtocolFeatures)
    assert_type(front.postcopy_advise(), OwnedFd | None)


async def asynchronous(front: AsyncFrontend) -> None:
    assert_type(await front.ask(GetFeatures()), FeaturesReply)
    assert_type(await front.get_features(), int)


def back_end(back: BackendConnection) -> None:
    received = back.receive()
    assert_type(received, Received | None)
    assert received is not None
    match received.message:
        case SetVringNum(index, num):
            assert_type(index, int)
            assert_type(num, int)
        case IotlbMsg():
            back.reply(received, Ack(0))
    assert_type(back.acknowledge(received, True), bool)


def test_the_back_end_part_runs() -> None:
    ours, theirs = socket.socketpair()
    with Frontend(ours) as front, BackendConnection(theirs) as back:
        front.set_vring_num(0, 1) if front.session.owned else front.set_owner()
        back_end(back)
