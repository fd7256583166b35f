"""The simulated disk: what is durable survives everything but the disk's loss, and every write may fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from simulations.errors import SimulatorError
from simulations.world.disk import SimDisk
from simulations.world.kernel import Incarnation, World, run_world


async def as_process(process: Incarnation, fn: Callable[[], Any], *, then_s: float = 0.0) -> list[Any]:
    """What it returned or raised, as that process, which then lives on a while."""
    results: list[Any] = []

    async def body() -> None:
        try:
            results.append(fn())
        except OSError as error:
            results.append(error)
        await trio.sleep(then_s)

    await process.run(body)
    return results


def test_what_was_written_durably_survives_every_death() -> None:
    async def main(world: World) -> None:
        disk = SimDisk(world, "h1")
        assert disk.read("epoch") is None
        for life, power in enumerate((False, True)):
            process = Incarnation(world, "h1", life + 1)
            await as_process(process, lambda: disk.write_durably("epoch", b"7"))
            process.crash(power=power)
            assert disk.read("epoch") == b"7"
        disk.delete("epoch")
        assert disk.read("epoch") is None

    run_world(main, 1)


def test_the_dead_do_not_write_and_nobody_writes_elsewhere() -> None:
    async def main(world: World) -> None:
        disk = SimDisk(world, "h1")
        process = Incarnation(world, "h1", 1)

        def die_and_write() -> None:
            process.crash()
            disk.write_durably("epoch", b"8")

        (error,) = await as_process(process, die_and_write)
        assert isinstance(error, OSError)
        assert disk.read("epoch") is None

    run_world(main, 1)


def test_a_disk_is_used_and_lost_by_the_rules() -> None:
    async def elsewhere(world: World) -> None:
        disk = SimDisk(world, "h1")
        await as_process(Incarnation(world, "h2", 1), lambda: disk.write_durably("epoch", b"9"))

    async def running(world: World) -> None:
        disk = SimDisk(world, "h1")

        def write_and_lose() -> None:
            disk.append("log", b"1")
            disk.lose()

        await as_process(Incarnation(world, "h1", 1), write_and_lose)

    for main, text in ((elsewhere, "disk of h1"), (running, "that is lost")):
        with pytest.raises(SimulatorError, match=text):
            run_world(main, 1)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_not_synced_is_lost_with_the_power_but_for_a_part(seed: int) -> None:
    async def main(world: World) -> bytes:
        disk = SimDisk(world, "h1")

        def write() -> None:
            disk.append("log", b"synced")
            disk.sync("log")
            disk.append("log", b" not synced")

        async def one(life: int, *, power: bool) -> bytes:
            process = Incarnation(world, "h1", life)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: as_process(process, write, then_s=10.0))
                await trio.sleep(1.0)
                process.crash(power=power)
            return disk.read("log") or b""

        assert await one(1, power=False) == b"synced not synced"
        disk.delete("log")
        after = await one(2, power=True)
        assert b"synced not synced".startswith(after)
        assert len(after) >= len(b"synced")
        return after

    assert run_world(main, seed) == run_world(main, seed)


def test_a_full_disk_and_a_failed_fsync_leave_the_file_as_it_was() -> None:
    async def main(world: World) -> None:
        disk = SimDisk(world, "h1")
        disk.write_durably("epoch", b"1")
        disk.fill(True)
        with pytest.raises(OSError, match="no space"):
            disk.write_durably("epoch", b"2")
        with pytest.raises(OSError, match="no space"):
            disk.append("epoch", b"2")
        disk.fill(False)
        disk.fsync_fails(1)
        with pytest.raises(OSError, match="fsync"):
            disk.write_durably("epoch", b"3")
        assert disk.read("epoch") == b"1"
        disk.write_durably("epoch", b"4")
        assert disk.read("epoch") == b"4"
        disk.fill(True)
        disk.fsync_fails(5)
        disk.tear(5)
        disk.mend()
        disk.write_durably("epoch", b"5")
        disk.lose()
        assert disk.read("epoch") is None

    run_world(main, 1)


def test_a_torn_write_kills_the_process_in_the_middle() -> None:
    async def main(world: World) -> None:
        disk = SimDisk(world, "h1")
        disk.write_durably("epoch", b"1")
        for life, write in enumerate((disk.write_durably, disk.append)):
            disk.tear(1)
            process = Incarnation(world, "h1", life)
            (error,) = await as_process(process, lambda write=write: write("epoch", b"234"))  # type: ignore[misc]
            assert isinstance(error, OSError)
            assert not process.alive
            assert process.how == "killed"
            after = disk.read("epoch")
            assert after is not None
            assert after == b"1" if life == 0 else b"1234".startswith(after)

    run_world(main, 1)


def test_a_slow_disk_blocks_the_process() -> None:
    async def main(world: World) -> None:
        disk = SimDisk(world, "h1")
        disk.slow(3.0, 10.0)
        process = Incarnation(world, "h1", 1)
        at: list[float] = []

        async def beside() -> None:
            while True:
                await trio.sleep(1.0)
                at.append(trio.current_time())

        async def body() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beside)
                await trio.sleep(0.5)
                disk.write_durably("epoch", b"1")
                disk.write_durably("epoch", b"2")
                await trio.sleep(0.1)
                at.append(trio.current_time())
                await trio.sleep(10.0)
                disk.write_durably("epoch", b"3")
                await trio.lowlevel.checkpoint()
                assert not process.frozen
                nursery.cancel_scope.cancel()

        await process.run(body)
        assert at[:2] == [6.5, 6.5]  # two writes of three seconds each from 0.5 s on
        assert disk.read("epoch") == b"3"

    run_world(main, 1)


def test_who_dies_while_a_slow_disk_writes_has_written_the_first_few_or_nothing() -> None:
    async def main(world: World) -> bytes | None:
        disk = SimDisk(world, "h1")
        disk.write_durably("epoch", b"0")
        disk.slow(3.0, 10.0)
        process = Incarnation(world, "h1", 1)

        def write() -> None:
            disk.write_durably("epoch", b"1")
            disk.write_durably("epoch", b"2")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: as_process(process, write, then_s=60.0))
            await trio.sleep(1.0)
            process.crash()
        return disk.read("epoch")

    assert {run_world(main, seed) for seed in range(30)} == {b"0", b"1", b"2"}
