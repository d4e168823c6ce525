"""A scripted front-end, with vhost-protocol alone: what does a back-end offer?

    python examples/what_is_offered.py SOCKET
    python examples/what_is_offered.py PROGRAM [ARGUMENT ...]

The second starts the back-end program and hands it the connection as `--fd=N`, which every program
that follows the specification's conventions understands:

    python examples/what_is_offered.py vhost-backend blk --blk-file=disk.img
"""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

from vhost_protocol import Frontend, ProtocolError, ProtocolFeatures

F_PROTOCOL_FEATURES = 1 << 30


def interview(frontend: Frontend) -> None:
    """Ask what may be asked before there is memory or a ring, and print the answers."""
    features = frontend.get_features()
    print("virtio features:", *(bit for bit in range(64) if features >> bit & 1))
    if not features & F_PROTOCOL_FEATURES:
        return
    offered = frontend.get_protocol_features()
    print("protocol features:", *(feature.name for feature in offered))
    wanted = ProtocolFeatures.MQ | ProtocolFeatures.CONFIG | ProtocolFeatures.CONFIGURE_MEM_SLOTS
    frontend.set_protocol_features(offered & wanted)
    frontend.set_owner()
    if offered & ProtocolFeatures.MQ:
        print("queues:", frontend.get_queue_num())
    if offered & ProtocolFeatures.CONFIGURE_MEM_SLOTS:
        print("memory slots:", frontend.get_max_mem_slots())
    if offered & ProtocolFeatures.CONFIG:
        print("configuration space begins:", frontend.get_config(0, 8).hex(" "))


def main(arguments: list[str]) -> int:
    """Run the script; 1 when the back-end breaks the protocol or leaves."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with Frontend.connect(str(path), timeout=10) as frontend:
                interview(frontend)
            return 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs:
                command = [*arguments, f"--fd={theirs.fileno()}"]
                program = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            with program, Frontend(ours, timeout=10) as frontend:
                interview(frontend)
    except (ProtocolError, OSError) as error:
        print(f"what_is_offered: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
