"""A deterministic run of many processes in one trio loop: their lives, their freezes, and the trace of what happened.

Same seed, same code: same order of every step, in every process. It stands on four things that trio does not promise,
each held by a test: `_ALLOW_DETERMINISTIC_SCHEDULING` sorts each batch of runnable tasks before it is shuffled with
`_r`; every wake-up of a task is appended to `runner.runq`; the clock is asked how long to wait only when nothing is
runnable, and jumps; and the garbage collector runs only when it is told to, as a generator that it closes would be one
more task at a random moment.
"""

from __future__ import annotations

import gc
import hashlib
import random
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import outcome
import trio
import trio._core._run as trio_run

from peer.errors import BitinglipError
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world import timers

T = TypeVar("T")

LIMIT_S = 7 * 86_400.0  # of virtual time: a world that ends no earlier hangs
INSTANT_STEPS_MAX = 500_000  # of tasks, without virtual time passing: a livelock
GC_YOUNG_STEPS = 5_000
GC_FULL_STEPS = 400_000
TAIL_LINES = 400

_SIMULATIONS = str(Path(__file__).resolve().parents[1]) + "/"
_BUGS = _SIMULATIONS + "bugs/"  # defects for the product: what they raise is the product's

_incarnation: ContextVar[Incarnation | None] = ContextVar("incarnation", default=None)


def current_incarnation() -> Incarnation | None:
    """Whose task this is; None: the world's own."""
    return _incarnation.get()


class Trace:
    """A hash over every line that was noted, and the last of the lines."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.lines = 0
        self._now = now
        self._hash = hashlib.blake2b(digest_size=16)

    def note(self, kind: str, peer: str, text: str = "") -> None:
        line = f"{self._now():.6f} {kind} {peer} {text}\n"
        self._hash.update(line.encode())
        self.tail.append(line)
        self.lines += 1

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class World:
    """One run. What it is asked for is virtual time, randomness by name, and where to report what went wrong."""

    def __init__(self, seed: int, nursery: trio.Nursery, *, steps_max: int, blame_livelock: bool) -> None:
        self.seed = seed
        self.trace = Trace(trio.current_time)
        self.counts: Counter[str] = Counter()  # what happened how often, for *sometimes* assertions
        self.failure: Exception | None = None
        self.steps = 0
        self._nursery = nursery
        self._steps_max = steps_max
        self._blame_livelock = blame_livelock
        self._clock = timers.the_clock()
        self._instant, self._instant_steps = -1.0, 0  # virtual time, steps within it
        self._collect_at = GC_YOUNG_STEPS
        self.queue = _RunQueue(self)
        self.frozen: dict[str, Incarnation] = {}

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._clock.current_time()

    def rng(self, name: str) -> random.Random:
        """A component's own randomness: what others draw does not change what it draws."""
        return random.Random(f"{self.seed}/{name}")

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def spawn(self, fn: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run `fn` as the world's own task, which no process holds up, whoever calls this. Ends with the run."""
        token = _incarnation.set(None)
        try:
            self._nursery.start_soon(self._own, fn, args)
        finally:
            _incarnation.reset(token)

    def fail(self, error: Exception) -> None:
        """End the run with this; the first one counts."""
        if self.failure is None:
            self.failure = error
            self.trace.note("failure", "", type(error).__name__)
        self._nursery.cancel_scope.cancel()

    def violated(self, check: str, message: str) -> NoReturn:
        """The product is wrong. The run ends even if the product catches what this raises."""
        error = InvariantViolated(check, message, trio.current_time())
        self.fail(error)
        raise error

    async def _own(self, fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        try:
            await fn(*args)
        except Exception as error:  # whatever it is, the run ends with it
            self.fail(_simulators(error))

    def _stepped(self, batch: int) -> None:
        """Called between two batches of steps, outside every task."""
        self.steps += batch
        if self.steps >= self._collect_at:
            full = self.steps // GC_FULL_STEPS != (self._collect_at - GC_YOUNG_STEPS) // GC_FULL_STEPS
            gc.collect(2 if full else 0)
            self._collect_at = self.steps - self.steps % GC_YOUNG_STEPS + GC_YOUNG_STEPS
        now = self._clock.current_time()
        if now != self._instant:
            self._instant, self._instant_steps = now, batch
        else:
            self._instant_steps += batch

    def _livelocked(self) -> bool:
        return self._instant_steps > self._steps_max

    def _livelock(self, tasks: list[trio.lowlevel.Task]) -> None:
        if self.failure is not None and self._instant_steps > 4 * self._steps_max:
            raise RuntimeError("a livelock that nothing ends")
        if self.failure is not None and self._instant_steps > 2 * self._steps_max:
            for task in tasks:  # they do not end by being cancelled
                if isinstance(task._next_send, outcome.Value):
                    task._next_send = outcome.Error(_Aborted())
            return
        if self.failure is not None:
            return
        runnable = Counter(_where(task) for task in tasks)
        names = ", ".join(f"{name} x{count}" for name, count in runnable.most_common(5))
        message = f"{self._steps_max} steps without time passing; runnable: {names}"
        if self._blame_livelock:
            self.fail(InvariantViolated("livelock", message, trio.current_time()))
        else:
            self.fail(SimulatorError(f"livelock at {trio.current_time():.3f} s: {message}"))


class _Aborted(BaseException):
    """Thrown into tasks that cannot be ended otherwise."""


class _RunQueue(deque[trio.lowlevel.Task]):
    """trio's queue of runnable tasks, from which those of frozen processes are kept out."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __bool__(self) -> bool:
        """trio asks before it waits or jumps: a frozen process whose world ends must be seen to by then."""
        if self._world.frozen:
            for incarnation in list(self._world.frozen.values()):
                incarnation.end_with_the_world()
        return len(self) > 0

    def append(self, task: trio.lowlevel.Task) -> None:
        incarnation = task.context.get(_incarnation)
        if incarnation is not None and incarnation.frozen:
            incarnation.held.append(task)
        else:
            super().append(task)

    def clear(self) -> None:
        """trio has taken the tasks of the next batch."""
        world = self._world
        tasks = list(self) if world._livelocked() else []
        batch = len(self)
        super().clear()
        world._stepped(batch)
        if tasks:
            world._livelock(tasks)

    def take(self, incarnation: Incarnation) -> None:
        """Move the tasks of a process that is frozen now out of the queue."""
        mine = [task for task in self if task.context.get(_incarnation) is incarnation]
        if mine:
            others = [task for task in self if task.context.get(_incarnation) is not incarnation]
            super().clear()
            self.extend(others)
            incarnation.held.extend(mine)


class Incarnation:
    """One life of one peer's process. After it (`alive` is False) nothing that its code does has any effect."""

    def __init__(self, world: World, peer_id: str, life: int) -> None:
        self.world = world
        self.peer_id = peer_id
        self.life = life
        self.name = f"{peer_id}.{life}"
        self.alive = True
        self.frozen = False
        self.how = ""  # it died: killed, power, exited
        self.held: list[trio.lowlevel.Task] = []  # woken while frozen
        self._reasons: dict[str, None] = {}  # why it is frozen
        self._pauses = 0
        self._scope: trio.CancelScope | None = None
        self._outside: Any = None  # trio's cancel status around `run`
        self._deaths: list[Callable[[str], None]] = []

    async def run(
        self, fn: Callable[..., Awaitable[object]], *args: Any, exits: tuple[type[Exception], ...] = ()
    ) -> Exception | None:
        """Run `fn` as this process until it returns or is crashed; its tasks inherit that they belong to it.

        Returns the error if it ended with one of `exits`: a process that stops on purpose. Any other error ends the
        run of the world, as InvariantViolated("peer_crashed") or, from the simulator's own code, as SimulatorError.
        What a crashed process raises is ignored.
        """
        if self._scope is not None:
            raise SimulatorError(f"{self.name} lives once")
        self._outside = trio.lowlevel.current_task()._cancel_status
        token = _incarnation.set(self)
        try:
            with trio.CancelScope() as self._scope:
                if not self.alive:
                    return None
                await fn(*args)
        except BaseException as error:  # a process may end with anything
            return self._ended(error, exits)
        finally:
            _incarnation.reset(token)
            self._die("exited")
        return None

    def crash(self, *, power: bool = False) -> None:
        """kill -9, or with `power` the whole host's loss: from here on its code has no effect on anything."""
        self._die("power" if power else "killed")
        if self._scope is not None:
            self._scope.cancel()

    def freeze(self, why: str = "stopped") -> None:
        """SIGSTOP: no task of it takes a step (those of the present batch are done with it) until thawed.

        Timers that expire meanwhile are handled late, at thaw. Frozen for several reasons, it goes on when all ended.
        """
        if not self.alive:
            return
        self._reasons[why] = None
        if not self.frozen:
            self.frozen = True
            self.world.frozen[self.name] = self
            self.world.queue.take(self)
            self.world.trace.note("frozen", self.name, why)

    def thaw(self, why: str = "stopped") -> None:
        """SIGCONT, for this reason; nothing if it was not frozen for it."""
        self._reasons.pop(why, None)
        if self.frozen and not self._reasons:
            self.world.trace.note("thawed", self.name)
            self._release()

    def freeze_for(self, seconds: float, why: str = "paused") -> None:
        """Frozen for a time: a call that blocks the process, such as a slow disk's."""
        self._pauses += 1
        reason = f"{why} {self._pauses}"
        self.freeze(reason)
        self.world.spawn(self._thaw_later, reason, seconds)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Call it when this process ends, with `how`; at once if it has ended."""
        if self.alive:
            self._deaths.append(callback)
        else:
            callback(self.how)

    def end_with_the_world(self) -> None:
        """When what runs this process is cancelled, a freeze ends, too: its tasks could not end otherwise."""
        if self._outside is not None and self._outside.effectively_cancelled:
            self._die("killed")

    def _die(self, how: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self.how = how
        self.world.trace.note("died", self.name, how)
        self._release()
        for callback in self._deaths:
            callback(how)
        self._deaths.clear()

    def _release(self) -> None:
        self.frozen = False
        self._reasons.clear()
        self.world.frozen.pop(self.name, None)
        tasks, self.held = self.held, []
        self.world.queue.extend(tasks)

    async def _thaw_later(self, reason: str, seconds: float) -> None:
        await trio.sleep(seconds)
        self.thaw(reason)

    def _ended(self, error: BaseException, exits: tuple[type[Exception], ...]) -> Exception | None:
        """What an error that left the process means; raises what is not its own."""
        leaves = list(_leaves(error))
        for leaf in leaves:
            if not isinstance(leaf, (Exception, trio.Cancelled)):
                raise error  # KeyboardInterrupt and the like
        if not self.alive or self._outside.effectively_cancelled:
            for leaf in leaves:
                if isinstance(leaf, (SimulatorError, InvariantViolated)):
                    self.world.fail(leaf)
            if any(isinstance(leaf, trio.Cancelled) for leaf in leaves):
                raise trio_cancelled(error)
            return None
        if all(isinstance(leaf, exits) for leaf in leaves):
            return leaves[0] if isinstance(leaves[0], Exception) else None
        self.world.fail(blame(error, trio.current_time()))
        return None


def trio_cancelled(error: BaseException) -> BaseException:
    """The part of it that a cancel scope further out is waiting for."""
    if isinstance(error, BaseExceptionGroup):
        part = error.subgroup(trio.Cancelled)
        assert part is not None
        return part
    return error


def blame(error: BaseException, at_s: float) -> Exception:
    """Whose fault an error is that ended a living process, as the exception to end the run with.

    The simulator's if it was raised in, or by a library called from, the simulator's own code. Errors that ports are
    allowed to raise are the product's: it let them through.
    """
    leaves = list(_leaves(error))
    for kind in (SimulatorError, InvariantViolated):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    for leaf in leaves:
        if not isinstance(leaf, (BitinglipError, OSError)) and _raised_by_simulator(leaf):
            return _simulators(leaf)
    text = "".join(traceback.format_exception(error))
    violated = InvariantViolated("peer_crashed", text, at_s)
    violated.__cause__ = error
    return violated


def _simulators(error: Exception | BaseException) -> Exception:
    if isinstance(error, (SimulatorError, InvariantViolated)):
        return error
    for leaf in _leaves(error):
        if isinstance(leaf, (SimulatorError, InvariantViolated)):
            return leaf
    mine = SimulatorError("".join(traceback.format_exception(error)))
    mine.__cause__ = error
    return mine


def _raised_by_simulator(error: BaseException) -> bool:
    """Whether the innermost frame of our own code is the simulator's."""
    by_simulator = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith(_SIMULATIONS) and not name.startswith(_BUGS):
            by_simulator = True
        elif "site-packages" not in name and "/lib/python" not in name and not name.startswith("<"):
            by_simulator = False
    return by_simulator


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _where(task: trio.lowlevel.Task) -> str:
    """Whose task it is, and the innermost of our own functions that it waits in."""
    incarnation = task.context.get(_incarnation)
    name = task.name
    coro: Any = task.coro
    while coro is not None and hasattr(coro, "cr_frame"):
        if "site-packages" not in coro.cr_code.co_filename:
            name = f"{Path(coro.cr_code.co_filename).name}:{coro.cr_code.co_qualname}"
        coro = coro.cr_await
    return f"{'world' if incarnation is None else incarnation.name} {name}"


def run_world(
    main: Callable[[World], Awaitable[T]],
    seed: int,
    *,
    limit_s: float = LIMIT_S,
    instant_steps_max: int = INSTANT_STEPS_MAX,
    blame_livelock: bool = False,
) -> T:
    """Run `main` to its end under virtual time and return what it does; leaves nothing behind in trio.

    Raises InvariantViolated, SimulatorError, and whatever `main` itself raises. A world that takes `limit_s` of
    virtual time or longer, or in which nobody can go on, is a SimulatorError. So is one that takes
    `instant_steps_max` steps without time passing or, with `blame_livelock`, an InvariantViolated("livelock").
    """
    worlds: list[World] = []

    async def root() -> T:
        result: list[T] = []
        with trio.move_on_after(limit_s) as limit:
            async with trio.open_nursery() as nursery:
                world = World(seed, nursery, steps_max=instant_steps_max, blame_livelock=blame_livelock)
                worlds.append(world)
                runner: Any = trio_run.GLOBAL_RUN_CONTEXT.runner
                world.queue.extend(runner.runq)
                runner.runq = world.queue
                runner.io_manager = timers.RarelyPolled(runner.io_manager)
                runner.instruments = {}  # there are none: to look so is half as dear in a plain dict
                result.append(await main(world))
                nursery.cancel_scope.cancel()
        if world.failure is not None:
            raise world.failure
        if limit.cancelled_caught or not result:
            raise SimulatorError(f"the world did not end within {limit_s} s of virtual time")
        return result[0]

    with _deterministic(seed):
        try:
            return trio.run(root, clock=timers.VirtualClock())
        except _Aborted:
            raise worlds[0].failure or SimulatorError("aborted") from None
        except BaseExceptionGroup as group:
            _raise_single(group, worlds)
        except trio.TrioInternalError as error:
            if worlds and worlds[0].failure is not None:
                raise worlds[0].failure from None
            raise SimulatorError(f"trio's loop broke: {error.__cause__!r}") from error


def _raise_single(group: BaseExceptionGroup[BaseException], worlds: list[World]) -> NoReturn:
    """`main`'s own error, which nurseries wrap; a recorded failure comes first."""
    if worlds and worlds[0].failure is not None:
        raise worlds[0].failure from group
    leaves = list(_leaves(group))
    for kind in (SimulatorError, InvariantViolated):
        for leaf in leaves:
            if isinstance(leaf, kind):
                raise leaf from None
    if len(leaves) == 1:
        raise leaves[0] from None
    raise group


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """trio's private switches, its sleeps and the garbage collector as a run needs them; put back afterwards."""
    private: Any = trio_run
    switch, state, collecting = private._ALLOW_DETERMINISTIC_SCHEDULING, private._r.getstate(), gc.isenabled()
    sleeps = trio.sleep, trio.sleep_until
    private._ALLOW_DETERMINISTIC_SCHEDULING = True
    private._r.seed(f"{seed}/trio")
    trio.sleep, trio.sleep_until = timers.sleep, timers.sleep_until
    gc.disable()
    try:
        yield
    finally:
        private._ALLOW_DETERMINISTIC_SCHEDULING = switch
        private._r.setstate(state)
        trio.sleep, trio.sleep_until = sleeps
        if collecting:
            gc.enable()
