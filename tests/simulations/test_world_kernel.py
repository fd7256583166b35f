"""The world's kernel: same seed, same trace; a freeze is a freeze; a death is final; whose fault an error is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio._core._run as trio_run

from peer.errors import Unavailable
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world.clocks import OVERSHOOT_S, WALL_START_S, HostClock, SimEntropy
from simulations.world.kernel import TAIL_LINES, Incarnation, World, run_world

ROOT = Path(__file__).resolve().parents[2]


async def crowd(world: World, *, leak: str = "") -> str:
    """Processes that race for everything trio has: timers, channels, locks, cancellation; one is frozen a while."""
    lock = trio.Lock()
    send, receive = trio.open_memory_channel[str](3)

    async def worker(name: str) -> None:
        rng = world.rng(name)
        for turn in range(20):
            with trio.move_on_after(rng.choice((0.1, 0.2, 0.3))):
                async with lock:
                    await trio.sleep(rng.choice((0.0, 0.1, 0.2)))
                    await send.send(f"{name} {turn}")
            world.trace.note("turn", name, str(turn))

    async def reader() -> None:
        async for text in receive:
            world.trace.note("read", "", text)

    async def process(incarnation: Incarnation) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(worker, f"{incarnation.name}/{number}")

    world.spawn(reader)
    incarnations = [Incarnation(world, f"h{number}", 1) for number in range(6)]
    async with trio.open_nursery() as nursery:
        for incarnation in incarnations:
            nursery.start_soon(incarnation.run, process, incarnation)
        await trio.sleep(0.7)
        incarnations[2].freeze()
        incarnations[3].crash()
        await trio.sleep(1.0)
        incarnations[2].thaw()
        if leak == "set":
            for name in {f"name {number}" for number in range(30)}:
                nursery.start_soon(worker, name)
        elif leak == "wall":
            import time

            world.trace.note("at", "", str(time.time_ns()))
    return world.trace.hexdigest()


def in_other_process(leak: str, hash_seed: str) -> str:
    code = (
        "import functools\n"
        "from simulations.world.kernel import run_world\n"
        "from tests.simulations.test_world_kernel import crowd\n"
        f"print([run_world(functools.partial(crowd, leak={leak!r}), seed) for seed in (3, 7)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_trace_is_the_same_in_other_processes() -> None:
    hashes = {str([run_world(crowd, seed) for seed in (3, 7)])}
    hashes |= {in_other_process("", "1"), in_other_process("", "4242")}
    assert len(hashes) == 1
    assert run_world(crowd, 3) != run_world(crowd, 7)


@pytest.mark.parametrize("leak", ["set", "wall"])
def test_what_is_not_deterministic_shows_in_the_trace(leak: str) -> None:
    """The proof above proves something: it fails as soon as the order of a set or the real time gets in."""
    assert in_other_process(leak, "1") != in_other_process(leak, "4242")


def test_a_run_leaves_trio_as_it_was() -> None:
    before = (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate(), gc.isenabled())
    hashes = {run_world(crowd, 5) for _ in range(20)}
    assert (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate(), gc.isenabled()) == before
    assert len(hashes) == 1

    async def broken(world: World) -> None:
        raise KeyError("main")

    with pytest.raises(KeyError):
        run_world(broken, 1)
    assert (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate(), gc.isenabled()) == before
    gc.collect()
    assert sum(isinstance(thing, (World, Incarnation)) for thing in gc.get_objects()) == 0


# ------------------------------------------------------------------------------------------------ freeze


def test_a_frozen_process_takes_no_step_and_is_late_for_everything_at_thaw() -> None:
    async def main(world: World) -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []
        send, receive = trio.open_memory_channel[str](10)

        async def ticks() -> None:
            while True:
                await trio.sleep(1.0)
                seen.append((trio.current_time(), "tick"))

        async def guard() -> None:
            with trio.move_on_after(2.5):
                await trio.sleep_forever()
            seen.append((trio.current_time(), "guard"))

        async def messages() -> None:
            async for text in receive:
                seen.append((trio.current_time(), text))

        async def process() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ticks)
                nursery.start_soon(guard)
                nursery.start_soon(messages)

        incarnation = Incarnation(world, "h1", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incarnation.run, process)
            await trio.sleep(1.5)
            incarnation.freeze()
            assert incarnation.frozen
            await send.send("early")
            await trio.sleep(5.0)
            await send.send("late")
            incarnation.thaw()
            await trio.sleep(1.2)
            nursery.cancel_scope.cancel()
        return seen

    seen = run_world(main, 1)
    assert [at for at, _ in seen] == [1.0, 6.5, 6.5, 6.5, 6.5, 7.5]
    assert sorted(what for at, what in seen if at == 6.5) == ["early", "guard", "late", "tick"]


def test_tasks_about_to_run_are_frozen_too() -> None:
    async def main(world: World) -> None:
        steps = 0

        async def busy() -> None:
            nonlocal steps
            while True:
                steps += 1
                await trio.lowlevel.checkpoint()

        incarnation = Incarnation(world, "h1", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incarnation.run, busy)
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            incarnation.freeze()
            await trio.lowlevel.checkpoint()
            before = steps
            assert before > 1
            await trio.sleep(3.0)
            assert steps == before
            incarnation.thaw()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            assert steps > before
            incarnation.crash()

    run_world(main, 1)


def test_freezes_for_several_reasons_overlap() -> None:
    async def main(world: World) -> list[float]:
        seen: list[float] = []

        async def process() -> None:
            await trio.sleep(0.5)
            incarnation.freeze_for(2.0)
            await trio.sleep(0.0)
            seen.append(trio.current_time())

        incarnation = Incarnation(world, "h1", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incarnation.run, process)
            await trio.sleep(1.0)
            incarnation.freeze()
            await trio.sleep(5.0)
            incarnation.thaw("another reason")
            assert seen == []
            incarnation.thaw()
        return seen

    assert run_world(main, 1) == [6.0]


@pytest.mark.parametrize("busy", [False, True])
def test_the_world_ends_although_processes_are_frozen(busy: bool) -> None:
    async def main(world: World) -> None:
        async def process() -> None:
            while busy:
                await trio.lowlevel.checkpoint()
            await trio.sleep_forever()

        incarnation = Incarnation(world, "h1", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incarnation.run, process)
            await trio.sleep(1.0) if not busy else await trio.lowlevel.checkpoint()
            incarnation.freeze()
            await trio.sleep(1.0)
            nursery.cancel_scope.cancel()

    run_world(main, 1)


# ------------------------------------------------------------------------------------------------ life and death


def test_a_crash_ends_a_process_at_once_and_what_it_raises_then_counts_for_nothing() -> None:
    async def main(world: World) -> None:
        how: list[str] = []

        async def process() -> None:
            try:
                await trio.sleep_forever()
            finally:
                assert not incarnation.alive
                raise ValueError("dying")

        for frozen in (False, True):
            for power in (False, True):
                incarnation = Incarnation(world, "h1", 1)
                incarnation.on_death(how.append)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(incarnation.run, process)
                    await trio.sleep(1.0)
                    if frozen:
                        incarnation.freeze()
                        await trio.sleep(1.0)
                    incarnation.crash(power=power)
                    assert not incarnation.frozen
        assert how == ["killed", "power", "killed", "power"]
        incarnation.on_death(how.append)  # too late: told at once
        assert how[4:] == ["power"]

    run_world(main, 1)


def test_a_process_may_end_by_itself() -> None:
    async def main(world: World) -> None:
        async def stops() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise Unavailable("stopping")

        returned, stopped = Incarnation(world, "h1", 1), Incarnation(world, "h1", 2)
        assert await returned.run(trio.sleep, 1.0) is None
        assert (returned.alive, returned.how) == (False, "exited")
        assert isinstance(await stopped.run(stops, exits=(Unavailable,)), Unavailable)
        assert not stopped.alive

    run_world(main, 1)


def process_that(fn: Callable[[World], Awaitable[None]]) -> Callable[[World], Awaitable[None]]:
    async def main(world: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Incarnation(world, "h1", 1).run, fn, world)
            await trio.sleep(100.0)

    return main


async def _raises(world: World) -> None:
    raise ValueError("a bug")


async def _unavailable(world: World) -> None:
    raise Unavailable("nobody there")


async def _misuses_the_simulator(world: World) -> None:
    incarnation = Incarnation(world, "h2", 1)
    await incarnation.run(trio.sleep, 1.0)
    await incarnation.run(trio.sleep, 1.0)


async def _breaks_the_simulator(world: World) -> None:
    world.spawn(trio.sleep, "long")
    await trio.sleep(1.0)


async def _breaks_a_contract(world: World) -> None:
    try:
        world.violated("port_contract", "twice")
    except Exception:
        await trio.sleep_forever()


@pytest.mark.parametrize(
    ("fn", "kind", "text"),
    [
        (_raises, InvariantViolated, "peer_crashed: .*a bug"),
        (_unavailable, InvariantViolated, "peer_crashed: .*nobody there"),
        (_misuses_the_simulator, SimulatorError, "lives once"),
        (_breaks_the_simulator, SimulatorError, "TypeError"),
        (_breaks_a_contract, InvariantViolated, "port_contract: twice"),
    ],
)
def test_whose_fault_it_is(fn: Callable[[World], Awaitable[None]], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"(?s){text}"):
        run_world(process_that(fn), 1)


# ------------------------------------------------------------------------------------------------ bounds


async def _spins(world: World) -> None:
    while True:
        await trio.lowlevel.checkpoint()


async def _spins_for_ever(world: World) -> None:
    while True:
        await trio.lowlevel.cancel_shielded_checkpoint()


async def _hangs(world: World) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("spins", [_spins, _spins_for_ever])
def test_a_livelock_is_noticed(spins: Callable[[World], Awaitable[None]]) -> None:
    with pytest.raises(SimulatorError, match=r"livelock.*h1.1 .*spins"):
        run_world(process_that(spins), 1, instant_steps_max=1_000)
    with pytest.raises(InvariantViolated, match=r"livelock.*h1.1 .*spins"):
        run_world(process_that(spins), 1, instant_steps_max=1_000, blame_livelock=True)
    assert run_world(crowd, 3) == run_world(crowd, 3)


def test_a_world_that_does_not_end_is_the_simulators_fault() -> None:
    with pytest.raises(SimulatorError, match="did not end within 60"):
        run_world(_hangs, 1, limit_s=60.0)


def test_the_trace_is_bounded() -> None:
    async def main(world: World) -> None:
        for number in range(2 * TAIL_LINES):
            world.trace.note("line", "", str(number))
        assert len(world.trace.tail) == TAIL_LINES
        assert world.trace.lines == 2 * TAIL_LINES

    run_world(main, 1)


# ------------------------------------------------------------------------------------------------ clocks


def test_clocks_drift_and_never_jump_within_a_life() -> None:
    async def main(world: World) -> None:
        host = HostClock(world.rng("clock"), drift=0.01, wall_error_s=-30.0)
        clock = host.port(Incarnation(world, "h1", 1))
        now, wall = clock.now(), clock.wall()
        assert wall == WALL_START_S - 30.0
        host.jump_wall(3_600.0)
        await trio.sleep(100.0)
        assert clock.now() - now == pytest.approx(101.0)
        assert clock.wall() - wall == pytest.approx(101.0)
        before = clock.now()
        host.mend()
        assert clock.now() == pytest.approx(before)
        host.wall_error_s = 5.0
        assert host.port(Incarnation(world, "h1", 2)).wall() == pytest.approx(WALL_START_S + 105.0)

    run_world(main, 1)


def test_sleep_is_on_the_drifting_clock_and_never_early() -> None:
    async def main(world: World) -> None:
        host = HostClock(world.rng("clock"), drift=-0.01)
        clock = host.port(Incarnation(world, "h1", 1))
        before, deadline = trio.current_time(), clock.now() + 0.3
        turns = 0
        while clock.now() < deadline:
            await clock.sleep(deadline - clock.now())
            turns += 1
        assert turns == 1
        assert trio.current_time() - before == pytest.approx(0.3 / 0.99 + OVERSHOOT_S)
        await clock.sleep(0.0)
        with pytest.raises(SimulatorError):
            host.set_drift(0.5)

    run_world(main, 1)


def test_entropy_is_the_seeds() -> None:
    async def main(world: World) -> tuple[str, float]:
        entropy = SimEntropy(world.rng("h1/entropy"))
        return entropy.token(16), entropy.uniform(1.0, 2.0)

    first, again, other = run_world(main, 1), run_world(main, 1), run_world(main, 2)
    assert first == again != other
    assert len(first[0]) == 32
    assert 1.0 <= first[1] <= 2.0
