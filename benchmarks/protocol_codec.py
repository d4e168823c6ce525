"""Measure how fast the codec encodes and decodes messages, and the cost of importing it.

    python benchmarks/protocol_codec.py [--json]

Encoding is the whole of ``Requester.request``, with its checks against the session. Decoding is the
whole of ``Responder.receive`` and ``next``. ``struct`` alone runs beside them, because figures of
different runs cannot be compared on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from vhost_protocol import (
    FRONTEND_TABLE,
    MemoryRegion,
    ProtocolFeatures,
    Requester,
    Responder,
    Session,
    SetFeatures,
    SetMemTable,
)


def session() -> Session:
    """Make a session that allows the benchmark's messages, without acknowledgements."""
    made = Session()
    made.features = 1 << 30
    made.protocol_features = ProtocolFeatures.MQ
    made.owned = True
    return made


def rate(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Return the calls per second of the best of five rounds."""
    count, best = 1, 0.0
    while True:
        began = time.perf_counter()
        for _ in range(count):
            work()
        took = time.perf_counter() - began
        if took > seconds / 10:
            break
        count *= 2
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            work()
        best = max(best, count / (time.perf_counter() - began))
    return best


def codec() -> dict[str, float]:
    """Return the messages per second of each step."""
    regions = tuple(MemoryRegion(n << 30, 1 << 30, (n + 9) << 30, 0) for n in range(8))
    front, back = Requester(FRONTEND_TABLE, session()), Responder(FRONTEND_TABLE, session())
    nowhere = os.open(os.devnull, os.O_RDONLY)
    table, word = SetMemTable(regions), SetFeatures(1 << 30)
    table_bytes = front.request(table, [nowhere] * 8)[0].data
    word_bytes = front.request(word)[0].data
    plain = struct.Struct("=IIIQ")

    def decode_table() -> None:
        back.receive(table_bytes, [os.dup(nowhere) for _ in range(8)])
        received = back.next()
        assert received is not None
        received.close()

    def decode_word() -> None:
        back.receive(word_bytes)
        back.next()

    return {
        "u64: construct and encode": rate(lambda: front.request(SetFeatures(1 << 30))),
        "u64: encode": rate(lambda: front.request(word)),
        "u64: decode": rate(decode_word),
        "SET_MEM_TABLE(8): encode": rate(lambda: front.request(table, [nowhere] * 8)),
        "SET_MEM_TABLE(8): decode, with 8 descriptors opened and closed": rate(decode_table),
        "struct alone: pack and unpack a u64 message": rate(
            lambda: plain.unpack(plain.pack(2, 1, 8, 1 << 30))
        ),
    }


def import_cost() -> dict[str, float]:
    """Return the CPU milliseconds that each import adds to the interpreter, best of fifteen."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        best: dict[str, float] = {}
        for _ in range(15):
            for code in ("pass", "import vhost_protocol", "import dataclasses", "import asyncio"):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, "-c", code], check=True, env=environment)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                best[code] = min(best.get(code, spent), spent)
    bare = best.pop("pass")
    return {code: (spent - bare) * 1000 for code, spent in best.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    rates, costs = codec(), import_cost()
    if options.json:
        print(json.dumps({"messages_per_second": rates, "import_ms": costs}))
        return
    for name, value in rates.items():
        print(f"{name:64} {value:12,.0f} /s")
    for name, value in costs.items():
        print(f"{name:64} {value:12.1f} ms")


if __name__ == "__main__":
    main()
