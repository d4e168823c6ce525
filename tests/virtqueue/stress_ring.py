"""A driver and a device process at full speed over two mappings of one memory.

    python tests/virtqueue/stress_ring.py --chains 10000000 [--packed] [--event-idx]
        [--in-order] [--engine c|python] [--seconds 900] [--patience 5]

Each chain carries a number that the device copies into its answer: none may be lost, come back
twice or with another's number.  Both sides sleep on eventfds whenever they find nothing; when there
is something and no signal comes for as long as the patience (seconds), a wake-up was lost.
With ``--seconds`` no chain is offered after that time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from virtqueue_rig import Rig

from guest_memory import GuestMemory
from virtqueue import RECORD


def wait(fd: int, who: str, patience: float, missed: Callable[[], bool]) -> None:
    """Sleep until the other side signals.  Both may be starved: slow is not lost."""
    while not select.select([fd], [], [], patience)[0]:
        # It had all that time to signal for what it was seen to have done before.
        if missed() and not select.select([fd], [], [], patience)[0]:
            raise SystemExit(f"the {who} slept for {patience} s: a wake-up was lost")
    os.eventfd_read(fd)


def serve(rig: Rig, kick: int, call: int, options: argparse.Namespace) -> None:
    random_ = random.Random(options.seed)
    rig.memory = GuestMemory.map([(rig.memory.regions[0], rig.fd)])
    device = rig.new_device(base=None)
    window = device.window
    assert window is not None
    words = window.cast("Q")
    held: list[int] = []
    while True:
        batch = device.take(random_.randint(1, 128))
        for record in RECORD.iter_unpack(batch.records):
            words[record[2] >> 3] = int.from_bytes(record[0][:8], "little")
            held.append(record[6])
        if not batch and not held:
            with contextlib.suppress(InterruptedError):
                wait(kick, "device", options.patience, device.ready)
            continue
        if not options.in_order:
            random_.shuffle(held)
        keep = random_.randint(0, 4) if batch else 0
        for head in held[keep:]:
            device.complete(head, written=8)
        del held[keep:]
        if device.publish():
            os.eventfd_write(call, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=10_000_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--event-idx", action="store_true")
    parser.add_argument("--in-order", action="store_true")
    parser.add_argument("--engine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--patience", type=float, default=5.0)
    options = parser.parse_args()
    rig = Rig(
        size=options.size,
        packed=options.packed,
        event_idx=options.event_idx,
        in_order=options.in_order,
        engine=options.engine,
        device=False,
    )
    kick, call = os.eventfd(0), os.eventfd(0)
    random_ = random.Random(options.seed)
    driver = rig.driver
    slots = [(rig.room(16), rig.room(16)) for _ in range(options.size)]
    base, window = rig.memory.window_base, rig.memory.window
    words = window.cast("Q")

    def word(address: int) -> int:
        offset: int = rig.memory.translate(address, 8) - base
        return offset >> 3

    where = [(word(text[0]), word(room[0])) for text, room in slots]
    idle = list(range(options.size))
    open_: dict[int, tuple[int, int]] = {}
    number = returned = sleeps = 0
    draining = False
    child = os.fork()
    if not child:
        code = 1
        try:
            # The parent's death ends this process too.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            serve(rig, kick, call, options)
        except SystemExit as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(code)

    def missed() -> bool:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("the device has ended")
        return driver.enable_notification()

    started = time.monotonic()
    try:
        chains = options.chains
        while returned < chains:
            late = options.seconds and time.monotonic() > started + options.seconds
            if late and chains != number:
                chains = number
                continue  # all may be home already
            # Now and then everything comes home, so that both sides get to sleep.
            draining = bool(open_) and (draining or random_.random() < 0.05)
            limit = 0 if draining else random_.randint(1, options.size)
            while idle and driver.free and limit and number < chains:
                limit -= 1
                slot = idle.pop()
                text, room = slots[slot]
                number += 1
                words[where[slot][0]] = number
                words[where[slot][1]] = 0
                if number % 7 == 0 and driver.free > 1:
                    half = (text[0] + 5, 3)
                    head = driver.add([(text[0], 5), half], [room], indirect=True)
                else:
                    head = driver.add([text], [room], driver.free < 2)
                if head in open_:
                    raise SystemExit(f"id {head} is out twice")
                open_[head] = (number, slot)
            if driver.publish():
                os.eventfd_write(kick, 1)
            found = driver.collect()
            if not found and (draining or not idle):
                if not driver.enable_notification():
                    sleeps += 1
                    wait(call, "driver", options.patience, missed)
                driver.disable_notification()
                continue
            if not found and number == chains and not driver.enable_notification():
                wait(call, "driver", options.patience, missed)
            for head, written in found:
                expected, slot = open_.pop(head)
                answer = words[where[slot][1]]
                if answer != expected or written != 8:
                    raise SystemExit(f"chain {expected} came back with {answer}")
                idle.append(slot)
                returned += 1
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if open_:
        raise SystemExit(f"{len(open_)} chains are still out")
    seconds = time.monotonic() - started
    print(
        f"{returned} chains in {seconds:.1f} s ({returned / seconds / 1000:.0f} k/s), "
        f"{sleeps} sleeps of the driver, none lost or repeated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
