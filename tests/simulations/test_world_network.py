"""The simulated network: TCP's promises, dialling, and the whole of it under load."""

from __future__ import annotations

import time

import pytest
import trio

from peer import limits
from peer.errors import Unavailable
from peer.ports import Connection, Network
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world.connections import WINDOW_FRAMES
from simulations.world.kernel import Incarnation
from tests.simulations.network_setup import Cluster, ends, scenario

# ------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("seed", range(5))
def test_frames_arrive_whole_and_in_order_with_latency(seed: int) -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        assert connection.peer_id == "h2"
        sent = [f"{number}" for number in range(200)]
        began = trio.current_time()
        for text in sent:
            await connection.send(text.encode())
        await trio.sleep(1.0)
        assert cluster.texts("h2") == sent
        assert all(0.0 < at - began < 0.1 for at, _ in cluster.got["h2"])
        await connection.aclose()
        await trio.sleep(1.0)
        assert [text for _, text in cluster.ended["h2"]] == ["connection to h1: h1 has ended the connection"]
        assert cluster.network.open_connections == 0
        with pytest.raises(Unavailable):
            await connection.send(b"")
        with pytest.raises(Unavailable):
            await connection.receive()

    scenario(run, seed)


def test_both_sides_speak_and_know_each_other() -> None:
    async def run(cluster: Cluster) -> None:
        h1, h2 = await cluster.start("h1"), await cluster.start("h2", listens=False)

        async def echo(connection: Connection) -> None:
            assert connection.peer_id == "h1"
            await connection.send(b"echo " + await connection.receive())

        await cluster.nursery.start(h2.listen, echo)
        connection = await h1.dial("h2", "h2:1")
        await connection.send(b"hello")
        assert await connection.receive() == b"echo hello"
        assert "ended" in (await ends(connection))[1]

    scenario(run)


def test_a_send_waits_for_who_does_not_read_and_the_window_is_bounded() -> None:
    async def run(cluster: Cluster) -> None:
        cluster.reads = False
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        for size in (1, 64 * 1024, limits.FRAME_BYTES_MAX):
            frames = 0
            with trio.move_on_after(5.0) as patience:
                for _ in range(2 * WINDOW_FRAMES):
                    await connection.send(bytes(size))
                    frames += 1
            assert patience.cancelled_caught
            assert frames <= WINDOW_FRAMES

    scenario(run)


def test_what_a_port_forbids_is_the_products_fault() -> None:
    async def too_large(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        connection = await h1.dial("h2", "h2:1")
        await connection.send(bytes(limits.FRAME_BYTES_MAX + 1))

    async def twice(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await h1.listen(lambda connection: connection.aclose())

    async def address_taken(cluster: Cluster) -> None:
        await cluster.start("h1")
        cluster.network.port(Incarnation(cluster.world, "h2", 1), "h1:1")

    for fn in (too_large, twice):
        with pytest.raises(InvariantViolated, match="port_contract"):
            scenario(fn)
    with pytest.raises(SimulatorError, match="lives at"):
        scenario(address_taken)


# ------------------------------------------------------------------------------------------------ dialling


async def _dial_fails(network: Network, peer_id: str, address: str) -> tuple[float, str]:
    began = trio.current_time()
    with pytest.raises(Unavailable) as caught:
        await network.dial(peer_id, address)
    took = trio.current_time() - began
    assert took <= limits.DIAL_S_MAX
    return took, caught.value.message


def test_dialling_fails_in_time_and_says_why() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        for peer_id in ("h2", "h3", "h4", "h5"):
            await cluster.start(peer_id, listens=peer_id != "h5")
        silent = pytest.approx(0.98)
        assert await _dial_fails(h1, "h9", "h9:1") == (silent, "h9 does not answer at h9:1")
        took, why = await _dial_fails(h1, "h3", "h2:1")
        assert (took < 0.1, why) == (True, "h2 answers at h2:1 in place of h3")
        took, why = await _dial_fails(h1, "h5", "h5:1")
        assert (took < 0.1, why) == (True, "h5 refuses connections at h5:1")
        cluster.lives["h2"].crash()
        took, why = await _dial_fails(h1, "h2", "h2:1")
        assert (took < 0.1, why) == (True, "h2 refuses connections at h2:1")
        cluster.lives["h3"].crash(power=True)
        assert (await _dial_fails(h1, "h3", "h3:1"))[0] == silent
        await cluster.start("h3")
        await h1.dial("h3", "h3:1")
        cluster.lives["h4"].freeze()
        assert (await _dial_fails(h1, "h4", "h4:1"))[0] == silent
        cluster.lives["h4"].thaw()
        await trio.sleep(0.1)  # it sees the connection, and its end
        assert len(cluster.ended["h4"]) == 1
        for one_way in (("h1", "h4"), ("h4", "h1")):
            trouble = cluster.network.cut(*one_way, one_way=True)
            assert (await _dial_fails(h1, "h4", "h4:1"))[0] == silent
            trouble.end()
        await h1.dial("h4", "h4:1")

    scenario(run)


def test_a_dial_whose_listener_dies_or_that_is_cancelled_leaves_nothing() -> None:
    async def run(cluster: Cluster) -> None:
        h1 = await cluster.start("h1")
        await cluster.start("h2")
        cluster.lives["h2"].freeze()
        with trio.move_on_after(0.5):
            await h1.dial("h2", "h2:1")

        async def kill() -> None:
            await trio.sleep(0.5)
            cluster.lives["h2"].crash()

        cluster.nursery.start_soon(kill)
        took, why = await _dial_fails(h1, "h2", "h2:1")
        assert (took, why) == (pytest.approx(0.5), "h2 has refused the connection")
        assert cluster.network.open_connections == 0
        cluster.lives["h1"].crash()
        with pytest.raises(Unavailable):
            await h1.dial("h2", "h2:1")

    scenario(run)


# ------------------------------------------------------------------------------------------------ the whole


async def _busy(cluster: Cluster, peers: int, seconds: float) -> str:
    """Everybody reports to h1 and pings it, through partitions, losses and deaths."""
    world, network = cluster.world, cluster.network
    for number in range(peers):
        await cluster.start(f"h{number + 1}")

    async def reports(peer_id: str) -> None:
        while True:
            try:
                connection = await cluster.ports[peer_id].dial("h1", "h1:1")
                while True:
                    for what in ("report", "ping", "ping"):
                        await connection.send(f"{peer_id} {what}".encode())
                        await trio.sleep(0.3333)
            except Unavailable as error:
                world.trace.note("unavailable", peer_id, error.message)
                await trio.sleep(1.0)
                if not cluster.lives[peer_id].alive:
                    return

    for number in range(1, peers):
        cluster.nursery.start_soon(reports, f"h{number + 1}")
    rng = world.rng("faults")
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        await trio.sleep(rng.uniform(1.0, 5.0))
        peer_id = f"h{rng.randrange(2, peers)}"
        match rng.randrange(5):
            case 0:
                network.isolate(peer_id, for_s=rng.uniform(1.0, 30.0), flapping=rng.random() < 0.5)
            case 1:
                network.lossy(0.2, peer_id, for_s=5.0)
            case 2:
                network.cut("h1", peer_id, one_way=True, for_s=20.0)
            case 3:
                network.reset("", peer_id)
            case 4 if cluster.lives[peer_id].alive and rng.random() < 0.3:
                cluster.lives[peer_id].crash(power=rng.random() < 0.5)
    network.mend()
    for got in cluster.got["h1"]:
        world.trace.note("got", *map(str, got))
    return world.trace.hexdigest()


def test_the_same_seed_gives_the_same_trace() -> None:
    hashes = [scenario(lambda cluster: _busy(cluster, 8, 120.0), seed) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_many_peers_are_cheap() -> None:
    began = time.process_time()
    scenario(lambda cluster: _busy(cluster, 200, 20.0))
    assert time.process_time() - began < 10.0
