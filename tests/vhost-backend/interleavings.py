"""Every interleaving of actors that run real code: a small model checker.

`stepwise` makes a generator of a function: it stops before each access to what actors share.
`explore` runs the actors of a world in every order of such steps. Generators cannot be copied, so
each path is replayed from the start. A path ends in a state that another path has met.
"""

from __future__ import annotations

import ast
import graphlib
import inspect
import textwrap
from collections.abc import Callable, Collection, Generator, Hashable, Iterable
from types import FunctionType, GeneratorType
from typing import Any

#: None: the actor can go on at any time. Otherwise what it waits for.
Condition = Callable[[], object] | None
Steps = Generator[Condition, None, Any]


#: A world whose actors end: nothing that they do on their way out counts.
_closing: list[object] = []


class Wrong(Exception):
    """The protocol has failed; `path` says which actor made each step until then."""

    def __init__(self, what: str, path: list[str]) -> None:
        super().__init__(f"{what}, after {' '.join(path)}")


class World:
    """Actors and what they share. Subclasses say what has to hold."""

    def __init__(self) -> None:
        self.actors: dict[str, Steps] = {}
        self._waits: dict[str, Condition] = {}
        self._places: dict[str, Hashable] = {}
        self.current = ""
        #: The present step gave up a wait, which another actor has to end.
        self.expired = False
        self.fault: str | None = None

    def shared(self) -> Hashable:
        """What the actors share, as a value."""
        raise NotImplementedError

    def check_rest(self) -> None:
        """No actor can go on: `fail` unless that is how it should end."""
        raise NotImplementedError

    def must_end(self) -> bool:
        """Whether this state must not be kept up for ever."""
        return True

    def fail(self, what: str) -> None:
        """Something that must not happen. The code under test cannot catch it."""
        self.fault = self.fault or what

    def enabled(self) -> list[str]:
        """The actors that can make a step."""
        names = []
        for name in self.actors:
            wait = self._waits.get(name)
            if wait is None or wait():
                names.append(name)
        return names

    def step(self, name: str) -> None:
        """One step of one actor."""
        self.current, self.expired = name, False
        self._places.pop(name, None)
        try:
            self._waits[name] = next(self.actors[name])
        except StopIteration:
            del self.actors[name]

    def close(self) -> None:
        """End the actors where they are, without a step more."""
        _closing.append(self)
        for actor in self.actors.values():
            actor.close()
        _closing.pop()

    def key(self) -> Hashable:
        """The state: what is shared, and where each actor is, with its variables."""
        places = self._places
        for name, actor in self.actors.items():
            if name not in places:
                places[name] = _place(actor)
        return self.shared(), tuple((name, places[name]) for name in self.actors)


def explore(make: Callable[[], World]) -> int:
    """Check every state that can be reached; returns how many there are.

    Besides what the world checks itself: states that must end do, in two senses. Each can lead to
    a state where the actors rest or that need not end, and no sequence of steps stays among them
    for ever unless an actor gives up a wait again and again. Raises `Wrong`.
    """
    graph = _Graph()
    graph.paths.append(([], None))
    while graph.paths:
        world = make()
        try:
            graph.follow(world, *graph.paths.pop())
        finally:
            world.close()
    graph.check()
    return len(graph.before)


class _Graph:
    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        #: The states that lead to each state.
        self.before: dict[int, set[int]] = {}
        #: The same, of states that must end, without steps that give up a wait.
        self._urgent: dict[int, set[int]] = {}
        self._ends: list[int] = []
        #: Paths that are not followed yet, each with the state before its last step.
        self.paths: list[tuple[list[str], int | None]] = []

    def follow(self, world: World, path: list[str], before: int | None) -> None:
        """Replay `path` and go on to a state that is known; what is not tried goes into `paths`."""
        for name in path:
            world.step(name)
        while True:
            enabled = world.enabled()
            if not enabled:
                world.check_rest()
            if world.fault is not None:
                raise Wrong(world.fault, path)
            state = self._numbers.setdefault(world.key(), len(self._numbers))
            known = state in self.before
            self.before.setdefault(state, set())
            if before is not None:
                self.before[state].add(before)
            if not enabled or not world.must_end():
                self._ends.append(state)
            else:
                steps = self._urgent.setdefault(state, set())
                if before is not None and not world.expired:
                    steps.add(before)
            if known or not enabled:
                return
            self.paths.extend(([*path, other], state) for other in enabled[1:])
            path, before = [*path, enabled[0]], state
            world.step(enabled[0])

    def check(self) -> None:
        """What `explore` says of states that must end."""
        ending, left = set(self._ends), list(self._ends)
        while left:
            new = self.before[left.pop()] - ending
            ending |= new
            left.extend(new)
        if len(ending) < len(self.before):
            raise Wrong("actors go on for ever", [])
        try:
            urgent = {state: steps & self._urgent.keys() for state, steps in self._urgent.items()}
            graphlib.TopologicalSorter(urgent).prepare()
        except graphlib.CycleError:
            raise Wrong("actors may go on for ever", []) from None


def _place(actor: Steps) -> Hashable:
    frames: list[Hashable] = []
    inner: Any = actor
    while inner is not None:
        frame = inner.gi_frame
        if frame.f_code in _THROUGH:
            frames.append(frame.f_lasti)
        else:
            values = frame.f_locals
            frames.append(
                (frame.f_lasti, *((name, _brief(values[name])) for name in sorted(values)))
            )
        inner = inner.gi_yieldfrom
    return tuple(frames)


def _brief(value: object) -> Hashable:
    if value is None or type(value) in (int, str, bool):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_brief, value))
    return getattr(value, "number", type(value).__name__)


def stepwise(
    function: Callable[..., Any],
    shared: Collection[str],
    mutations: Iterable[tuple[str, str]] = (),
    **names: object,
) -> Callable[..., Steps]:
    """`function` as a generator that stops before each access to an attribute named in `shared`.

    Its calls may be generators too, whose steps are its own then. `mutations` replace pieces
    of its text, `names` some of its module's names.
    """
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    for piece, other in mutations:
        assert source.count(piece) == 1, piece
        source = source.replace(piece, other)
    tree = ast.fix_missing_locations(_Rewrite(shared).visit(ast.parse(source)))
    namespace = {**function.__globals__, **names, "_do": _do, "_load": _load}
    exec(compile(tree, f"<stepwise {function.__name__}>", "exec"), namespace)
    result: Callable[..., Steps] = namespace[function.__name__]
    return result


def _do(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Steps:
    if _closing:
        raise GeneratorExit
    result = function(*args, **kwargs)
    if isinstance(result, GeneratorType):
        result = yield from result
    return result


def _load(owner: object, name: str) -> Steps:
    if _closing:
        raise GeneratorExit
    yield None
    return getattr(owner, name)


#: Their variables are known from where their caller is.
_THROUGH = {_do.__code__, _load.__code__}


class _Rewrite(ast.NodeTransformer):
    def __init__(self, shared: Collection[str]) -> None:
        self._shared = shared

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
        if node.args.vararg:
            node.args.vararg.annotation = None
        self.generic_visit(node)
        node.body += ast.parse("if False: yield").body  # a generator also without any step
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return ast.YieldFrom(_call("_do", [node.func, *node.args], node.keywords))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr not in self._shared or not isinstance(node.ctx, ast.Load):
            return node
        return ast.YieldFrom(_call("_load", [node.value, ast.Constant(node.attr)], []))

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        stored = {
            part.attr
            for target in node.targets
            for part in ast.walk(target)
            if isinstance(part, ast.Attribute)
        }
        self.generic_visit(node)
        pause: list[ast.stmt] = [ast.Expr(ast.Yield(None))]
        return [*(pause if stored & set(self._shared) else []), node]


def _call(name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), arguments, keywords)
