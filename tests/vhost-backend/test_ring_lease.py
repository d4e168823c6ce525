"""A ring's lease in every interleaving of its worker, its visitors, driver and control plane.

The lease and the worker's part are the real code. What stands for C here follows
`packages/virtqueue/csrc/serve.c` step by step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from interleavings import Steps, World, Wrong, explore, stepwise

from vhost_backend.adapter.ring_worker import QueueWorker
from vhost_backend.vring import ring_lease
from vhost_backend.vring.ring_lease import RingLease

#: What several actors read and write without a lock.
SHARED = {"wanted", "server", "_visitor", "_lender", "_server", "_listeners"}
LEASE = ("claim", "begin", "give_way", "end", "__enter__", "_call_back", "__exit__")
WORKER = ("_serve", "_turns", "_finish")
KICK = 5

#: A method, and what to replace in its text.
Mutation = tuple[str, tuple[tuple[str, str], ...]]


class Lock:
    """`threading.Lock`; a wait with a timeout ends early only where C can take long."""

    world: RingWorld

    def __init__(self) -> None:
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> Steps:
        if not blocking:
            yield None
        elif timeout < 0:
            yield lambda: not self.held
        else:
            self.world.waits = True
            yield lambda: not self.held or self.world.slow()
            self.world.waits = False
        if self.held:
            self.world.expired = blocking
            return False
        self.held = True
        return True

    def release(self) -> Steps:
        yield None
        if not self.held:
            self.world.fail("a lock is released that is free")
        self.held = False


class Ring:
    """The `VringState` and its queue."""

    name = "ring"
    call_fd = KICK + 1
    number = "ring"

    def __init__(self, world: RingWorld) -> None:
        self.world = world
        self.available = 1
        self.taken = 0
        self._generation = 0
        #: The call eventfd is full and blocking, so that a write to it waits.
        self.full = False
        #: It was read by somebody else than the driver, who may wait for it.
        self.stolen = False

    @property
    def generation(self) -> int:
        self.world.touch("looks at the ring")
        return self._generation

    def finish(self, count: int) -> Steps:
        yield None
        self.complete(count)

    def complete(self, count: int) -> None:
        self.world.touch("completes")
        if count != self.taken:
            self.world.fail("a batch of a ring that was stopped is completed")
        self.taken = 0

    def restart(self) -> None:
        self._generation += 1
        self.available += self.taken
        self.taken = 0

    def drain_call(self) -> Steps:
        yield None
        self.full, self.stolen = False, True

    def signal_call(self) -> Steps:
        yield None
        self.stolen = False


class Server:
    """What `virtqueue.Server` and serve.c do for one queue."""

    def __init__(self, world: RingWorld) -> None:
        self.world = world
        self.queue = SimpleNamespace(window=None, memory=None)
        self.handled = world.handled
        self.left = 0
        self.owner = "engine"
        self.interrupted = False
        self.working = self.stuck = False
        self.of = world.ring._generation
        self.number = f"server {self.of}"

    def resume(self, kick_fd: int, call_fd: int) -> object:
        self.world.touch("adopts the ring")
        self.owner = "engine"
        return SimpleNamespace(built=False)

    def begin(self, count: int) -> None:
        self.world.touch("looks at the batch")

    def turn(self) -> Steps:
        ring = self.world.ring
        yield None
        if self.of != ring._generation:
            self.world.fail("a ring that was stopped is served")
        if ring.taken:
            ring.complete(ring.taken)
            self.stuck = ring.full
            yield lambda: not ring.full
            self.stuck = False
        yield None
        if self.interrupted:
            return 0
        yield None
        self.world.touch("takes")
        ring.taken, ring.available = ring.available, int(self.world.busy)
        return ring.taken

    def serve(self) -> Steps:
        ring, world = self.world.ring, self.world
        self.left = 0
        while True:
            count = yield from self.turn()
            if not count:
                yield None
                if self.interrupted:
                    return 0
                yield None
                world.touch("asks for kicks")
                if ring.available:
                    continue
                world.asleep = "in C"
                yield lambda: world.woken or world.kicked
                world.asleep = None
                world.kicked = False
                if world.woken:
                    return 0
                continue
            if not self.handled:
                return count
            yield None
            self.owner, self.working = "nobody", True
            yield None
            self.working = False
            yield None
            if self.owner != "nobody":
                self.left = world.leaves
                return count
            self.owner = "engine"
            if world.leaves:
                self.left = world.leaves
                return count

    def own(self) -> Steps:
        yield None
        self.world.touch("has the ring back")
        self.owner = "engine"

    def interrupt(self) -> Steps:
        yield None
        self.interrupted = True

    def clear_interrupt(self) -> Steps:
        yield None
        self.interrupted = False

    def borrow(self) -> Steps:
        yield None
        if self.owner in ("nobody", "visited"):
            self.owner = "borrower"
            return True
        if self.working:
            self.world.fail("a visitor waits for the handler in C")
        return False

    def give_back(self) -> Steps:
        yield None
        self.owner = "visited"


class RingWorld(World):
    """One ring, its worker, and those who come."""

    def __init__(
        self,
        *visitors: str,
        handled: bool = False,
        leaves: int = 0,
        full: bool = False,
        listener: bool = False,
        busy: bool = False,
        kicks: int = 1,
        mutation: Mutation | None = None,
    ) -> None:
        super().__init__()
        Lock.world = self
        self.handled, self.leaves = handled, leaves
        #: The driver always has another chain.
        self.busy = busy
        #: A visitor has called back and waits.
        self.waits = False
        self.inside: str | None = None
        self.woken = self.kicked = False
        self.asleep: str | None = None
        self.ring = Ring(self)
        self.ring.full = full
        self.lease: Any = _stepwise(RingLease, LEASE, mutation)(self.ring)
        self.lease.wake = self.wake
        self.worker: Any = object.__new__(_stepwise(QueueWorker, WORKER, mutation))
        self._make_worker()
        self.actors["worker"] = self.work()
        for number, what in enumerate(visitors):
            self.actors[f"visitor{number}"] = self.visit(what)
        if kicks:
            self.actors["driver"] = self.drive(kicks)
        if listener:
            self.actors["control"] = self.control()

    def _make_worker(self) -> None:
        worker = self.worker
        worker._kick_of, worker._edges = {0: KICK}, {KICK}
        worker._listeners, worker._stopping = {}, False
        worker._server, worker._refused = None, -1
        worker._adopt = self.adopt
        worker._device = SimpleNamespace(
            view=lambda state: SimpleNamespace(forget=lambda: None),
            device=SimpleNamespace(handle_batch=self.handle),
            serve_batch=self.handle,
            fail_batch=lambda view, batch, error: self.fail(f"the device failed: {error!r}"),
        )

    # -- the actors -----------------------------------------------------------------------------

    def work(self) -> Steps:
        """`QueueWorker._round` again and again."""
        worker = self.worker
        while True:
            served = yield from worker._serve(self.lease)
            if served and worker._server is not None:
                yield from worker._server.clear_interrupt()
            if not served:
                self.asleep = "on the long way"
                yield lambda: self.woken or self.kicked
                self.asleep = None
            yield None
            self.woken = self.kicked = False
            yield from self.lease.__enter__()
            self.enter()
            yield None
            ring = self.ring
            if ring.taken:
                ring.complete(ring.taken)
            ring.available = int(self.busy)
            self.inside = None
            yield from self.lease.__exit__()

    def visit(self, what: str) -> Steps:
        for _ in range(what.count("enter") or 1):
            state = yield from self.lease.__enter__()
            if state is not self.ring:
                self.fail("a visitor has got something else than the ring")
            self.enter()
            yield None
            if "again" in what:
                yield from self.lease.__enter__()
                yield from self.lease.__exit__()
            if "restart" in what:
                self.ring.restart()
                yield None
            self.inside = None
            yield from self.lease.__exit__()

    def drive(self, kicks: int) -> Steps:
        for _ in range(kicks):
            yield None
            self.ring.available += 1
            yield None
            self.kicked = True

    def control(self) -> Steps:
        """`register_listener`, and the `wake` that it ends with."""
        yield None
        self.worker._listeners = {7: "listener"}
        yield None
        server = self.worker._server
        if server is not None:
            yield from server.interrupt()
        yield from self.wake()

    # -- what they share ------------------------------------------------------------------------

    def adopt(self, state: Ring) -> Server:
        server = self.worker._server
        if server is None or server.of != self.ring._generation:
            server = Server(self)
        assert isinstance(server, Server)
        return server

    def handle(self, view: object, batch: object) -> Steps:
        yield None

    def wake(self) -> Steps:
        yield None
        self.woken = True

    def slow(self) -> bool:
        """Whether the worker is where it can stay long without being asleep."""
        server = self.lease.server
        return server is not None and (server.working or server.stuck)

    def enter(self) -> None:
        if self.inside is not None:
            self.fail(f"{self.current} is in the ring together with {self.inside}")
        self.inside = self.current

    def touch(self, what: str) -> None:
        if self.inside not in (None, self.current):
            self.fail(f"{self.current} {what} while {self.inside} has the ring")

    def shared(self) -> Hashable:
        lease, ring = self.lease, self.ring
        servers = {
            server for server in (lease.server, self.worker._server, lease._lender) if server
        }
        return (
            (lease._ring.held, lease._turn.held, lease._visitor, lease._depth, lease.wanted),
            tuple(server and server.number for server in (lease.server, lease._lender)),
            (self.worker._server and self.worker._server.number, bool(self.worker._listeners)),
            tuple(
                (s.number, s.owner, s.interrupted, s.working, s.stuck, s.left)
                for s in sorted(servers, key=lambda server: server.of)
            ),
            (ring.available, ring.taken, ring._generation, ring.full, ring.stolen),
            (self.inside, self.waits, self.woken, self.kicked, self.asleep),
        )

    def must_end(self) -> bool:
        """With a driver that never rests: whether the worker is wanted elsewhere."""
        called = bool(self.worker._listeners) and "control" not in self.actors
        return not self.busy or self.waits or called

    def check_rest(self) -> None:
        if set(self.actors) != {"worker"}:
            self.fail(f"deadlock of {sorted(self.actors)}")
        elif self.ring.stolen:
            self.fail("a signal is lost")
        elif self.ring.full and self.slow():
            pass  # it waits to signal, as long as there is no visitor
        elif self.asleep is None:
            self.fail("the worker stands still")
        elif (self.ring.available or self.ring.taken) and not self.busy:
            self.fail("the worker sleeps beside a chain")
        elif self.worker._listeners and self.asleep == "in C":
            self.fail("the worker sleeps where it does not see its listener")


class _Log:
    """What the worker logs is a fault here."""

    @staticmethod
    def exception(*what: object) -> None:
        Lock.world.fail(f"the worker has raised: {what}")


_made: dict[tuple[type, Mutation | None], type] = {}


def _stepwise(kind: type, methods: tuple[str, ...], mutation: Mutation | None) -> type:
    made = _made.get((kind, mutation))
    if made is None:
        changed = {}
        for name in methods:
            own = mutation[1] if mutation and mutation[0] == name else ()
            changed[name] = stepwise(
                getattr(kind, name), SHARED, own, log=_Log, _settle=lambda: None
            )
        made = _made[kind, mutation] = type(f"Stepwise{kind.__name__}", (kind,), changed)
    return made


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Locks and threads that the explorer steps through, and a clock that stands."""
    threads = SimpleNamespace(Lock=Lock, get_ident=lambda: Lock.world.current)
    monkeypatch.setattr(ring_lease, "threading", threads)
    monkeypatch.setattr(ring_lease, "time", SimpleNamespace(monotonic=lambda: 0.0))
    # A full call descriptor is read at the first look; how long that takes is no question here.
    monkeypatch.setattr(ring_lease, "CALL_BACK_PATIENCE", -1.0)
    _made.clear()
    yield
    _made.clear()


def _scenario(*visitors: str, kicks: int = 0, **options: Any) -> dict[str, Any]:
    return {"visitors": visitors, "kicks": kicks, **options}


SCENARIOS: dict[str, dict[str, Any]] = {
    "one comes twice": _scenario("enter enter"),
    "one comes twice, handler in C": _scenario("enter enter", handled=True),
    "one enters again": _scenario("again"),
    "one restarts": _scenario("restart", kicks=1),
    "one restarts, handler in C": _scenario("restart", kicks=1, handled=True),
    "one restarts, handler in C leaves some": _scenario("restart", handled=True, leaves=1),
    "one, full call descriptor": _scenario("enter", full=True),
    "one, busy": _scenario("enter", busy=True),
    "one, busy, handler in C": _scenario("enter", busy=True, handled=True),
    "two": _scenario("enter", "restart"),
    "two, handler in C": _scenario("enter", "restart", handled=True),
    "listener": _scenario(listener=True, kicks=1),
    "listener, handler in C": _scenario(listener=True, kicks=1, handled=True),
    "listener, busy": _scenario(listener=True, busy=True),
}


def check(scenario: dict[str, Any], mutation: Mutation | None = None) -> int:
    options = dict(scenario)
    visitors = options.pop("visitors")
    return explore(lambda: RingWorld(*visitors, mutation=mutation, **options))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_excludes_and_ends(scenario: str) -> None:
    """No two are in the ring, none waits for ever, and the worker sleeps beside no chain."""
    assert check(SCENARIOS[scenario]) > 100


#: The scenario that shows it, what is changed, and what is found.
MUTANTS: dict[str, tuple[str, Mutation, str]] = {
    "a visitor that wakes nobody": (
        "one comes twice",
        ("_call_back", (("self.wake()", "pass"),)),
        "deadlock",
    ),
    "a visitor that interrupts nothing": (
        "one, busy, handler in C",
        ("_call_back", (("server.interrupt()", "pass"),)),
        "actors may go on for ever",
    ),
    "a visitor that looks before it says": (
        "one comes twice",
        (
            "__enter__",
            (
                (
                    "self.wanted = True\n    if not self._ring.acquire(False):",
                    "if self._ring.acquire(False):\n        self.wanted = True\n    else:",
                ),
            ),
        ),
        "deadlock",
    ),
    "a visitor that does not give back": (
        "two, handler in C",
        ("__exit__", (("lender.give_back()", "pass"),)),
        "a visitor waits for the handler in C",
    ),
    "a visitor that forgets its lender": (
        "one comes twice, handler in C",
        ("_call_back", (("self._lender = server", "pass"),)),
        "a lock is released that is free",
    ),
    "a visitor that keeps its turn": (
        "one comes twice",
        ("__exit__", (("self._turn.release()", "pass"),)),
        "deadlock",
    ),
    "a visitor that takes no turn": (
        "two",
        ("__enter__", (("self._turn.acquire()\n    self.wanted", "self.wanted"),)),
        "a lock is released that is free",
    ),
    "a visitor that leaves before the last exit": (
        "one enters again",
        ("__exit__", (("self._depth -= 1\n        return", "self._depth -= 1"),)),
        "a lock is released that is free",
    ),
    "a stolen signal": (
        "one, full call descriptor",
        ("_call_back", (("drained = True", "pass"),)),
        "a signal is lost",
    ),
    "a full call descriptor that is left": (
        "one, full call descriptor",
        ("_call_back", (("self.state.drain_call()", "pass"),)),
        "actors go on for ever",
    ),
    "no second look before C": (
        "one comes twice",
        ("begin", (("return not self.wanted", "return True"),)),
        "deadlock",
    ),
    "a look before the server is shown": (
        "one comes twice",
        (
            "begin",
            (
                (
                    "self.server = server\n    return not self.wanted",
                    "free = not self.wanted\n    self.server = server\n    return free",
                ),
            ),
        ),
        "deadlock",
    ),
    "a claim that stays wanted": (
        "one comes twice",
        ("claim", (("self.wanted = False", "pass"),)),
        "actors go on for ever",
    ),
    "a claim that does not own": (
        "two, handler in C",
        ("claim", (("self.server.own()", "pass"),)),
        "a ring that was stopped is served",
    ),
    "an end that keeps the ring": (
        "one comes twice",
        ("end", (("self._ring.release()", "pass"),)),
        "deadlock",
    ),
    "no look after C": (
        "one restarts, handler in C",
        ("_turns", (("while not lease.wanted:", "while True:"),)),
        "while visitor0 has the ring",
    ),
    "no look after the device": (
        "one restarts",
        ("_turns", (("if lease.wanted:", "if False:"),)),
        "a ring that was stopped is served",
    ),
    "no way given after C": (
        "one restarts, handler in C",
        ("_turns", (("lease.give_way()", "pass"),)),
        "while visitor0 has the ring",
    ),
    "a batch that is finished whatever came": (
        "one restarts",
        ("_finish", (("state.generation == generation", "True"),)),
        "a batch of a ring that was stopped is completed",
    ),
    "no second look for a listener": (
        "listener, busy",
        ("_serve", (("not self._listeners and not self._stopping", "not self._stopping"),)),
        "actors go on for ever",
    ),
    "a claim that takes the ring before its turn": (
        "two",
        (
            "claim",
            (
                (
                    "self._turn.acquire()\n    self._ring.acquire()",
                    "self._ring.acquire()\n    self._turn.acquire()",
                ),
            ),
        ),
        "deadlock",
    ),
    "a claim that takes no turn": (
        "two, handler in C",
        (
            "claim",
            (
                ("self._turn.acquire()\n    ", ""),
                ("\n    self._turn.release()", ""),
            ),
        ),
        "deadlock",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_the_protocol_is_found(mutant: str) -> None:
    scenario, mutation, found = MUTANTS[mutant]
    with pytest.raises(Wrong, match=found):
        check(SCENARIOS[scenario], mutation)
