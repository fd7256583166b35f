"""The simulated network: how connections end, and every fault of links and hosts."""

from __future__ import annotations

import pytest
import trio

from peer.errors import Unavailable
from peer.ports import REFUSED
from simulations.errors import SimulatorError
from tests.simulations.network_setup import Cluster, ends, scenario

# ------------------------------------------------------------------------------------------------ ends


def test_a_killed_process_ends_its_connections_and_a_host_without_power_is_silent() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        for peer_id in ("h2", "h3"):
            await cluster.start(peer_id)
        to_h2, to_h3 = await h1.dial("h2", "h2:1"), await h1.dial("h3", "h3:1")
        at = trio.current_time()
        cluster.lives["h2"].crash()
        ended, _ = await ends(to_h2)
        assert ended - at < 0.1
        cluster.lives["h3"].crash(power=True)
        with trio.move_on_after(60.0) as patience:
            await to_h3.receive()
        assert patience.cancelled_caught  # who sends nothing is never told
        at = trio.current_time()
        await to_h3.send(b"ping")
        ended, why = await ends(to_h3)
        assert 12.0 <= ended - at <= 18.0
        assert "not acknowledged" in why

    scenario(run)


def test_a_host_that_is_back_resets_what_it_does_not_know() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        sending, silent = await h1.dial("h2", "h2:1"), await h1.dial("h2", "h2:1")
        cluster.lives["h2"].crash(power=True)
        for _ in range(10):
            await trio.sleep(0.5)
            await sending.send(b"ping")
        await cluster.start("h2")
        at = trio.current_time()
        ended, why = await ends(sending)
        assert ended - at < 0.1
        assert "ended" in why
        await silent.send(b"ping")
        ended, _ = await ends(silent)
        assert ended - at < 0.1
        assert cluster.got["h2"] == []

    scenario(run)


def test_a_dead_process_cannot_use_its_connections() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        await connection.send(b"before")
        cluster.lives["h1"].crash()
        for call in (connection.send(b"after"), connection.receive()):
            with pytest.raises(Unavailable):
                await call
        await connection.aclose()
        await trio.sleep(1.0)
        assert cluster.texts("h2") == ["before"]

    scenario(run)


# ------------------------------------------------------------------------------------------------ cuts


def test_frames_sent_into_a_short_cut_arrive_late_and_in_order_even_after_a_close() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        await connection.send(b"0")
        await trio.sleep(0.1)
        cluster.network.cut("h1", "h2", for_s=8.0)
        for text in (b"1", b"2", b"3"):
            await connection.send(text)
        await connection.aclose()
        await trio.sleep(7.9)
        assert cluster.texts("h2") == ["0"]
        await trio.sleep(8.2)
        assert cluster.texts("h2") == ["0", "1", "2", "3"]
        assert len(cluster.ended["h2"]) == 1
        assert cluster.network.open_connections == 0

    scenario(run)


def test_a_long_cut_breaks_each_side_that_sends_and_no_old_frame_comes_through() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        trouble = cluster.network.cut("h1", "h2")
        at = trio.current_time()
        await connection.send(b"1")
        ended, _ = await ends(connection)
        assert 12.0 <= ended - at <= 18.0
        trouble.end()
        await trio.sleep(60.0)
        assert cluster.got["h2"] == []
        assert cluster.ended["h2"] == []  # it has never sent: it does not know

    scenario(run)


def test_a_one_way_cut_lets_the_other_way_pass_until_acknowledgements_are_missed() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        cluster.network.cut("h2", "h1", one_way=True)
        assert cluster.network.links.is_open("h1", "h2")
        assert not cluster.network.links.is_open("h2", "h1")
        await connection.send(b"1")
        await trio.sleep(0.5)
        assert cluster.texts("h2") == ["1"]
        assert "not acknowledged" in (await ends(connection))[1]

    scenario(run)


def test_a_blocked_send_ends_with_the_connection() -> None:
    async def run(cluster: Cluster) -> None:
        cluster.reads = False
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")

        async def cut() -> None:
            await trio.sleep(5.0)
            cluster.network.isolate("h2")

        cluster.nursery.start_soon(cut)
        broken = ""
        while not broken:
            try:
                await connection.send(bytes(100_000))
            except Unavailable as error:
                broken = error.message
        assert "not acknowledged" in broken
        assert 17.0 <= trio.current_time() <= 24.0

    scenario(run)


def test_partitions_isolation_and_overlapping_faults() -> None:
    async def run(cluster: Cluster) -> None:
        network = cluster.network
        links = network.links
        for peer_id in ("h1", "h2", "h3", "h4"):
            await cluster.start(peer_id)
        changes: list[float] = []
        links.watchers.append(lambda: changes.append(trio.current_time()))
        first = network.partition([["h1", "h2"], ["h3"]])
        assert links.both_open("h1", "h2")
        assert not links.is_open("h1", "h3")
        assert not links.is_open("h3", "h4")  # h4 is in the group of the others
        second = network.cut("h1", "h3")
        first.end()
        first.end()
        assert not links.is_open("h1", "h3")
        second.end()
        assert links.all_open
        deaf = network.isolate("h2", only="in")
        assert links.is_open("h2", "h1")
        assert not links.is_open("h1", "h2")
        deaf.end()
        mute = network.isolate("h2", only="out")
        assert not links.is_open("h2", "h1")
        assert links.is_open("h1", "h2")
        assert links.is_open("h2", "h2")
        network.mend()
        mute.end()
        assert links.all_open
        before = len(changes)
        network.cut("h1", "h2", for_s=30.0, flapping=True)
        await trio.sleep(30.1)
        assert links.all_open
        assert 10 < len(changes) - before < 100

    scenario(run)


def test_loss_delays_and_sometimes_breaks() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        network = cluster.network
        trouble = network.lossy(0.3, "h1", "h2")
        began = trio.current_time()
        for number in range(50):
            await connection.send(str(number).encode())
        await trio.sleep(120.0)
        assert cluster.texts("h2") == [str(number) for number in range(50)]
        assert max(at for at, _ in cluster.got["h2"]) - began > 0.2
        trouble.end()
        network.lossy(0.9)
        broken = ""
        with trio.move_on_after(600.0):
            while not broken:
                await trio.sleep(0.5)
                try:
                    await connection.send(b"ping")
                except Unavailable as error:
                    broken = error.message
        assert "not acknowledged" in broken
        network.mend()
        slow = network.slow(1000.0, "h2")
        assert network.latency("h1", "h2") > 0.1
        assert network.latency("h1", "h3") < 0.1
        slow.end()
        with pytest.raises(SimulatorError):
            network.lossy(1.0)

    scenario(run)


def test_a_reset_ends_connections_between_two_on_both_sides() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        await cluster.start("h3")
        to_h2, to_h3 = await h1.dial("h2", "h2:1"), await h1.dial("h3", "h3:1")
        cluster.network.reset("h2", "h1")
        assert (await ends(to_h2))[1] == "connection to h2: reset"
        assert len(cluster.ended["h2"]) == 1
        await to_h3.send(b"1")
        await trio.sleep(0.1)
        assert cluster.texts("h3") == ["1"]

    scenario(run)


# ------------------------------------------------------------------------------------------------ freezes


def test_a_firewall_answers_for_a_peer_that_lives() -> None:
    async def run(cluster: Cluster) -> None:
        h1, h2 = await cluster.start("h1"), await cluster.start("h2")
        open_one = await h1.dial("h2", "h2:1")
        cluster.network.reject("h2", True)
        await ends(open_one)
        with pytest.raises(Unavailable) as refused:
            await h1.dial("h2", "h2:1")
        assert refused.value.code == REFUSED
        await h2.dial("h1", "h1:1")  # it lives, and reaches others
        cluster.network.reject("h2", False)
        await h1.dial("h2", "h2:1")

    scenario(run)


def test_a_frozen_process_gets_at_thaw_what_was_sent_to_it() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        cluster.lives["h2"].freeze()
        for number in range(100):
            await connection.send(str(number).encode())
        await trio.sleep(60.0)
        assert cluster.got["h2"] == []
        cluster.lives["h2"].thaw()
        await trio.sleep(1.0)
        assert cluster.texts("h2") == [str(number) for number in range(100)]

    scenario(run)
