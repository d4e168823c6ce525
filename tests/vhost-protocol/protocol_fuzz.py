"""A structure-aware fuzzer of both cores; the tests run a short form of it.

An input is a byte string that is read as a little program: which side of which socket, what is
negotiated, then messages made from the known vectors by changing bytes, sizes, flags, the number of
descriptors and where the stream is cut.  Whatever happens, only RemoteProtocolError may come out
(LocalProtocolError from our own requests), and no descriptor may stay open.

Long runs, guided by coverage with atheris when it is installed, random otherwise:

    python tests/vhost-protocol/protocol_fuzz.py --runs 10000000
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from protocol_samples import ALL, VECTORS, Vector

from vhost_protocol import (
    BACKEND_TABLE,
    FRONTEND_TABLE,
    GPU_TABLE,
    LocalProtocolError,
    ProtocolFeatures,
    RemoteProtocolError,
    Request,
    Requester,
    Responder,
    Session,
)

TABLES = (FRONTEND_TABLE, BACKEND_TABLE, GPU_TABLE)
# The cursor image is left out: its 16 KiB would be most of what is copied.
_SMALL = [v for v in VECTORS if v.table != "gpu" or v.code != 6]
_REQUESTS = {t.name: [v for v in _SMALL if v.table == t.name and not v.reply] for t in TABLES}
_REPLIES = {t.name: [v for v in _SMALL if v.table == t.name and v.reply] for t in TABLES}
_FRAMES = {
    sign: {id(v): v.frame(order) for v in _SMALL} for sign, order in (("<", "little"), (">", "big"))
}
_ASKED: dict[tuple[str, int], Vector] = {}
for _vector in _SMALL:
    if not _vector.reply:
        _ASKED.setdefault((_vector.table, _vector.code), _vector)
_INTERESTING = (0, 1, 2, 3, 7, 8, 12, 16, 0x7F, 0x80, 0xFE, 0xFF)
_NULL = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class Source:
    """Reads an input; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """The next byte."""
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at


def mutated(source: Source, frame: bytes) -> bytes:
    """A frame with some of it changed; the input says what."""
    mode = source.byte()
    changed = bytearray(frame)
    for _ in range(mode & 3):
        at = (source.byte() << 8 | source.byte()) % len(changed)
        value = source.byte()
        changed[at] = _INTERESTING[value % 12] if mode & 4 else value
    if mode & 8 and len(changed) > 12:
        at = 12 + source.byte() % (len(changed) - 12)
        changed[at] ^= 1 << (source.byte() & 7)
    if mode & 0x80 and len(changed) > 12:
        # A whole field, near the front, where fields are: all ones, all zeros, or one.
        width = 4 << (source.byte() & 1)
        fields = min(len(changed) - 12, 64) // width or 1
        at = 12 + source.byte() % fields * width
        value = (0, 1, (1 << 8 * width) - 1, 0x500)[source.byte() & 3]
        size = len(changed)
        changed[at : at + width] = value.to_bytes(width, "little")
        del changed[size:]
    if mode & 0x70 == 0x10:
        # Another size, with a payload that fits it.
        size = source.byte() | (source.byte() & 15) << 8
        changed = changed[: 12 + size].ljust(12 + size, b"\0")
        changed[8:12] = size.to_bytes(4, "little" if source.byte() & 1 else "big")
    elif mode & 0x70 == 0x20:
        changed = changed[: source.byte() % (len(changed) + 1)]
    return bytes(changed)


def feed(source: Source, core: Requester | Responder, data: bytes, fds: int) -> None:
    """Give bytes to a core, cut where the input says."""
    cut = source.byte()
    where = cut % (len(data) + 1) if cut & 0x80 else 0
    passed = [os.dup(_NULL) for _ in range(fds)]
    if where:
        core.receive(data[:where], passed)
        passed = [os.dup(_NULL)] if cut == 0xFF else []
    core.receive(data[where:], passed)


def one_input(data: bytes) -> None:
    """Run one input; raises what must not happen."""
    source = Source(data)
    head = source.byte()
    table = TABLES[head % 3]
    sign = ">" if head & 0x80 else "<"
    session = Session(sign)
    state = source.byte()
    if not state & 1:
        session.features = (1 << 64) - 1
        session.offered_features = session.features
        without = 0 if state & 2 else ProtocolFeatures.XEN_MMAP
        session.protocol_features = ALL & ~without
        session.gpu_features = type(session.gpu_features)(3)
    session.postcopy = bool(state & 4)
    session.owned = bool(state & 8)
    core: Requester | Responder
    replies = bool(head & 0x40)
    vectors = (_REPLIES if replies else _REQUESTS)[table.name]
    if replies:
        core = Requester(table, session, strict=False)
    else:
        core = Responder(table, session, strict=bool(state & 16))
    try:
        for _ in range(4):
            if source.left <= 0:
                break
            vector = vectors[source.byte() % len(vectors)]
            if isinstance(core, Requester):
                asked = _ASKED[table.name, vector.code]
                # Now and then nothing was asked.
                if source.byte() & 15:
                    assert isinstance(asked.message, Request)
                    with contextlib.suppress(LocalProtocolError):
                        core.request(asked.message, [_NULL] * asked.fds)
            fds = vector.fds
            extra = source.byte()
            if extra >= 0xF0:
                fds = extra & 3
            feed(source, core, mutated(source, _FRAMES[sign][id(vector)]), fds)
            while (got := core.next()) is not None:
                with got:
                    repr(got.message)
                    hash(got.message)
    except RemoteProtocolError as error:
        if str(core.broken) != str(error) or not (error.field and error.rule and str(error)):
            raise AssertionError("an error that does not name its facts") from error
    finally:
        core.close()


def open_fds() -> int:
    """How many descriptors are open."""
    return len(os.listdir("/proc/self/fd"))


def random_input(rng: random.Random) -> bytes:
    """An input of a length that leaves room for a few messages."""
    return rng.randbytes(rng.randrange(6, 32))


def run_random(runs: int, seed: int, *, progress: bool = False) -> None:
    """Run random inputs."""
    rng = random.Random(seed)
    for done in range(1, runs + 1):
        one_input(random_input(rng))
        if progress and done % 100_000 == 0:
            print(f"{done} inputs, {open_fds()} descriptors", flush=True)


def main() -> None:
    """Run for long and say what was done."""
    parser = argparse.ArgumentParser(description="Fuzz the vhost-user cores.")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    one_input(b"")
    before = open_fds()
    started = time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def report() -> None:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        print(
            f"{options.runs} inputs in {time.monotonic() - started:.0f} s;"
            f" descriptors {before} before, {open_fds()} after; memory grew by {grown} KiB",
            flush=True,
        )

    if not options.random:
        with contextlib.suppress(ImportError):
            import atexit

            import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

            atheris.instrument_all()
            atexit.register(report)
            flags = [f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=64"]
            atheris.Setup([sys.argv[0], *flags, "-print_final_stats=1"], one_input)
            atheris.Fuzz()
            return
    run_random(options.runs, options.seed, progress=True)
    report()


if __name__ == "__main__":
    main()
