"""The simulated store's faults, one at a time."""

from __future__ import annotations

import random
from collections.abc import Awaitable

import pytest
import trio

from peer import limits
from peer.errors import Ambiguous, BitinglipError, Compacted, Fenced, NotFound, TooLarge, Unavailable
from peer.ports import BATCH_KEY, LEADER_KEY, Delete, Put, Write
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world.store import EtcdModel
from tests.simulations.store_setup import TTL_S, VOTERS, Setup, simulated


async def fails(error: type[Exception], call: Awaitable[object]) -> float:
    """How long it took to fail so."""
    began = trio.current_time()
    with pytest.raises(error):
        await call
    return trio.current_time() - began


# ------------------------------------------------------------------------------------------------ members, links


def test_without_quorum_nothing_but_time_outs() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        lease = await store.grant(TTL_S)
        s.model.quorum_lost(True)
        for call in (store.get(["a"]), store.range("", "z"), store.count("", "z"), store.txn([], [])):
            assert await fails(Unavailable, call) == pytest.approx(limits.STORE_CALL_S_MAX)
        writes = (
            store.txn([], [Put("a", b"")]),
            store.grant(TTL_S),
            store.keepalive(lease.lease_id),
            store.revoke(lease.lease_id),
        )
        for write in writes:
            assert await fails(Ambiguous, write) == pytest.approx(limits.STORE_CALL_S_MAX)
        await trio.sleep(20)
        assert lease.lease_id in s.model.leases  # nobody is there to end it
        s.model.mend()
        await trio.sleep(4)
        await store.keepalive(lease.lease_id)  # a new leader gives it its whole time
        await store.get(["a"])

    simulated(test)


def test_the_minority_side_can_do_nothing_and_the_others_go_on() -> None:
    async def test(s: Setup) -> None:
        stores = {name: s.store(name) for name in VOTERS}
        first = s.model.leader
        s.isolate(first)
        await fails(Ambiguous, stores[first].txn([], [Put("a", b"minority")]))
        await trio.sleep(5)
        assert s.model.leader not in ("", first)
        other = s.model.leader
        await stores[other].txn([], [Put("b", b"majority")])
        await fails(Unavailable, stores[first].get(["b"]))
        s.cut.clear()
        await trio.sleep(1)
        assert (await stores[first].get(["b"]))["b"].value == b"majority"

    simulated(test)


def test_a_link_that_is_cut_one_way_is_cut() -> None:
    async def test(s: Setup) -> None:
        other = next(name for name in VOTERS if name != s.model.leader)
        s.cut.add((s.model.leader, other))
        await fails(Unavailable, s.store(other).get(["a"]))
        await s.store(s.model.leader).get(["a"])

    simulated(test)


def test_a_short_cut_moves_no_leader() -> None:
    async def test(s: Setup) -> None:
        store, leader = s.store(), s.model.leader
        s.isolate(leader)
        with trio.move_on_after(0.5):
            await store.get(["a"])
        s.cut.clear()
        await store.get(["a"])
        assert s.model.leader == leader

    simulated(test)


def test_a_member_that_is_down_refuses_at_once_and_comes_back_with_all() -> None:
    async def test(s: Setup) -> None:
        store = s.store("h2")
        revision = (await store.txn([], [Put("a", b"1")])).revision
        s.model.fsync_error("h2")
        assert await fails(Unavailable, store.txn([], [Put("a", b"2")])) < 0.1
        assert await fails(Unavailable, store.get(["a"])) < 0.1
        s.model.member_up("h2")
        await trio.sleep(4)
        assert (await store.get(["a"]))["a"].mod_revision == revision

    simulated(test)


def test_a_peek_needs_no_quorum_and_shows_what_the_member_had() -> None:
    async def test(s: Setup) -> None:
        stores = {name: s.store(name) for name in VOTERS}
        await stores["h1"].txn([], [Put("a", b"old"), Put("gone", b"")])
        cut = next(name for name in VOTERS if name != s.model.leader)
        assert await stores[cut].peek(["a"]) == await stores["h1"].get(["a"])
        s.isolate(cut)
        other = next(name for name in VOTERS if name != cut)
        was = await stores[cut].peek(["a", "gone", "b"])
        await stores[other].txn([], [Put("a", b"new"), Delete("gone"), Put("b", b"")])
        await stores[other].txn([], [Put("a", b"newest")])
        assert await stores[cut].peek(["a", "gone", "b"]) == was
        assert set(was) == {"a", "gone"}
        assert (await stores[other].peek(["a"]))["a"].value == b"newest"
        s.model.quorum_lost(True)
        assert (await stores[other].peek(["a"]))["a"].value == b"newest"
        s.model.member_frozen(other, True)
        assert await fails(Unavailable, stores[other].peek(["a"])) == pytest.approx(limits.STORE_CALL_S_MAX)
        s.model.fsync_error(cut)
        assert await fails(Unavailable, stores[cut].peek(["a"])) < 0.1

    simulated(test)


def test_a_member_that_ends_in_mid_call_leaves_it_ambiguous() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        s.model.quorum_lost(True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, Ambiguous, store.txn([], [Put("a", b"")]))
            nursery.start_soon(fails, Unavailable, store.get(["a"]))
            await trio.sleep(0.5)
            s.model.member_down("h1")

    simulated(test)


def test_a_frozen_member_neither_answers_nor_refuses() -> None:
    async def test(s: Setup) -> None:
        name = next(name for name in VOTERS if name != s.model.leader)
        store = s.store(name)
        s.model.member_frozen(name, True)
        assert await fails(Unavailable, store.get(["a"])) == pytest.approx(limits.STORE_CALL_S_MAX)
        s.model.member_frozen(name, False)
        await store.get(["a"])

    simulated(test)


def test_what_waits_for_a_leader_that_dies_is_lost_with_it() -> None:
    async def test(s: Setup) -> None:
        for _ in range(10):
            await s.model.serving("h1", s.model.members["h1"].life)
            leader = s.model.leader
            name = next(name for name in VOTERS if name != leader)
            store = s.store(name)
            s.model.quorum_lost(True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails, Ambiguous, store.txn([], [Put("a", b"")]))
                await trio.sleep(0.1)
                s.model.member_down(leader)
            s.model.mend()
            await trio.sleep(20.0)
            assert "a" not in s.model.data

    simulated(test)


def test_a_store_without_space_may_have_done_what_it_refuses() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        s.model.no_space(True, 0.5)
        for number in range(40):
            with pytest.raises(Ambiguous) as refused:
                await store.txn([], [Put(f"a{number}", b"")])
            assert refused.value.code == "store_full"
        assert 5 < len(s.model.data) < 35
        s.model.mend()
        await store.txn([], [Put("b", b"")])

    simulated(test)


def test_a_leader_that_moves_makes_leases_last_longer_never_shorter() -> None:
    async def test(s: Setup) -> None:
        for _ in range(10):
            store = s.store()
            lease = await store.grant(TTL_S)
            await trio.sleep(TTL_S - 0.1)
            leader, began = s.model.leader, trio.current_time()
            s.model.move_leader()
            with trio.move_on_after(0.45) as silent:
                await s.model.serving("h1", s.model.members["h1"].life)
            assert silent.cancelled_caught
            await s.model.serving("h1", s.model.members["h1"].life)
            assert 0.5 <= trio.current_time() - began <= 3.3
            assert s.model.leader != leader
            await trio.sleep(TTL_S - 0.6)
            await store.keepalive(lease.lease_id)
            await trio.sleep(TTL_S + 0.8)
            await fails(NotFound, store.keepalive(lease.lease_id))

    simulated(test)


# ------------------------------------------------------------------------------------------------ writes


@pytest.mark.parametrize(("fate", "at_once", "in_the_end"), [("done", 1, 1), ("lost", 0, 0), ("late", 0, 1)])
def test_a_time_out_tells_nothing(fate: str, at_once: int, in_the_end: int) -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        s.model.next_writes("h1", "", fate)
        await store.txn([], [Put("z", b"")])
        await fails(Ambiguous, store.txn([], [Put("a", b"")]))
        assert await store.count("a", "b") == at_once
        await trio.sleep(15)
        assert await store.count("a", "b") == in_the_end

    simulated(test)


def test_a_slow_store_answers_late_or_not_in_time() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        s.model.slow(20)
        await store.txn([], [Put("a", b"")])
        assert 0.02 <= trio.current_time() <= 0.21
        s.model.slow(10_000)
        await fails(Ambiguous, store.txn([], [Put("b", b"")]))
        await fails(Unavailable, store.get(["a"]))
        s.model.mend()
        await store.get(["a"])

    simulated(test)


def test_without_space_puts_are_refused_and_the_rest_goes_on() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        lease = await store.grant(TTL_S)
        epoch = await s.lead(store)
        await store.txn([], [Put("a", b"")])
        s.model.no_space(True)
        for call in (store.txn([], [Put("b", b"")]), store.grant(1), store.commit(epoch, [Put("c", b"")])):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.code == "store_full"
        await store.keepalive(lease.lease_id)
        await store.txn([], [Delete("a")])
        s.model.mend()
        await store.commit(epoch, [Put("d", b"")])  # what was refused binds nobody
        assert set(s.model.data) == {LEADER_KEY, BATCH_KEY, "d"}

    simulated(test)


def test_a_request_that_is_too_large_is_refused() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        await fails(TooLarge, store.txn([], [Put("a", bytes(13_000_000))]))

    simulated(test)


def test_a_caller_that_goes_away_may_have_written() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        for number in range(60):
            with trio.move_on_after(0.004):
                await store.txn([], [Put(f"{number}", b"")])
        await trio.sleep(10)
        assert 20 < len(s.model.data) < 60

    simulated(test)


# ------------------------------------------------------------------------------------------------ processes


def test_what_a_dead_process_had_not_sent_has_no_effect() -> None:
    async def test(s: Setup) -> None:
        process = s.process("h1")
        store = s.store(process=process)
        process.crash()
        await fails(Unavailable, store.txn([], [Put("a", b"")]))
        await fails(Unavailable, store.get(["a"]))
        await trio.sleep(10)
        assert s.model.data == {}

    simulated(test)


def test_what_a_killed_process_had_sent_may_take_effect() -> None:
    async def test(s: Setup) -> None:
        for number in range(40):
            process = s.process("h1")
            store = s.store(process=process)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.run, store.txn, [], [Put(f"{number}", b"")])
                await trio.sleep(0.002)
                process.crash()
        await trio.sleep(10)
        assert 5 < len(s.model.data) < 40

    simulated(test)


def test_a_lease_expires_while_its_owner_is_frozen_and_its_commits_are_fenced() -> None:
    outcomes: list[object] = []

    async def test(s: Setup) -> None:
        process = s.process("h1")
        store = s.store(process=process)

        async def leads() -> None:
            lease = await store.grant(TTL_S)
            put = await store.txn([], [Put(LEADER_KEY, b"h1", lease.lease_id)])
            await store.commit(put.revision, [Put("a", b"1")])
            while True:
                try:
                    await store.keepalive(lease.lease_id)
                    await trio.sleep(1)
                except NotFound:
                    break
            try:
                outcomes.append(await store.commit(put.revision, [Put("a", b"2")]))
            except BitinglipError as error:
                outcomes.append(type(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.run, leads)
            await trio.sleep(2.5)
            process.freeze()
            await trio.sleep(TTL_S - 1.5)
            assert LEADER_KEY in s.model.data
            await trio.sleep(2.1)
            assert LEADER_KEY not in s.model.data
            process.thaw()
        assert s.model.data["a"].value == b"1"

    simulated(test)
    assert outcomes == [Fenced]


def test_keepalives_that_are_lost() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        lease = await store.grant(TTL_S)
        s.model.lose_keepalives(1.0)
        for _ in range(2):
            await fails(Ambiguous, store.keepalive(lease.lease_id))
        s.model.mend()
        await trio.sleep(TTL_S - 2 * limits.STORE_CALL_S_MAX)
        await fails(NotFound, store.keepalive(lease.lease_id))

    simulated(test)


# ------------------------------------------------------------------------------------------------ watching


def test_a_watch_ends_with_its_member() -> None:
    async def test(s: Setup) -> None:
        store = s.store()

        async def follow() -> None:
            async with store.watch("", 1) as batches:
                await fails(Unavailable, anext(batches))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.sleep(1)
            s.model.member_down("h1")

    simulated(test)


def test_a_watch_on_the_minority_side_is_silent_and_then_goes_on() -> None:
    async def test(s: Setup) -> None:
        name = next(name for name in VOTERS if name != s.model.leader)
        cut_off, other = s.store(name), s.store(s.model.leader)
        seen: list[tuple[int, float]] = []

        async def follow() -> None:
            async with cut_off.watch("a", 1) as batches:
                async for batch in batches:
                    seen.append((batch.revision, trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await other.txn([], [Put("a", b"1")])
            await trio.sleep(0.1)
            s.isolate(name)
            for number in range(5):
                await other.txn([], [Put(f"a{number}", b"2")])
            await trio.sleep(1)
            assert [revision for revision, _ in seen] == [2]
            s.cut.clear()
            await trio.sleep(1)
            assert [revision for revision, _ in seen] == [2, 3, 4, 5, 6, 7]
            nursery.cancel_scope.cancel()

    simulated(test)


def test_a_watch_that_is_behind_is_compacted() -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        await store.txn([], [Put("a", b"1")])
        async with store.watch("", 1) as batches:
            s.model.compact_all()
            await fails(Compacted, anext(batches))
        async with store.watch("", s.model.revision + 1) as batches:
            await store.txn([], [Put("a", b"2")])
            assert (await anext(batches)).revision == s.model.revision

    simulated(test)


# ------------------------------------------------------------------------------------------------ the product's duty


@pytest.mark.parametrize("what", ["twice", "two at once", "never granted", "others while ambiguous"])
def test_breaking_the_ports_contract_is_the_products_fault(what: str) -> None:
    async def test(s: Setup) -> None:
        store = s.store()
        epoch = await s.lead(store)
        await store.commit(epoch, [Put("a", b"")])
        match what:
            case "twice":
                await store.txn([], [Put("a", b""), Delete("a")])
            case "two at once":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(store.commit, epoch, [Put("a", b"")])
                    nursery.start_soon(store.commit, epoch, [Put("b", b"")])
            case "never granted":
                await store.commit(epoch + 1, [Put("a", b"")])
            case _:
                s.model.next_writes("h1", "done")
                await fails(Ambiguous, store.commit(epoch, [Put("a", b"")]))
                await store.commit(epoch, [Put("b", b"")])

    with pytest.raises(InvariantViolated) as caught:
        simulated(test)
    assert caught.value.check == "port_contract"


def test_a_host_without_a_member_has_no_store() -> None:
    async def test(s: Setup) -> None:
        s.store("h9")

    with pytest.raises(SimulatorError):
        simulated(test)
    with pytest.raises(SimulatorError):
        EtcdModel([], random.Random())


def test_every_revision_is_told_with_its_epoch_and_peer() -> None:
    told: list[tuple[int, tuple[Write, ...], int | None, str]] = []

    async def test(s: Setup) -> None:
        s.model.on_applied.append(lambda *applied: told.append(applied))
        store = s.store()
        lease = await store.grant(TTL_S)
        await store.txn([], [Put("x", b"", lease.lease_id), Delete("missing")])
        epoch = await s.lead(store)
        await store.commit(epoch, [Put("a", b"")])
        await trio.sleep(2 * TTL_S)
        assert s.model.epochs == {epoch: "h1"}

    simulated(test)
    assert told == [
        (2, (Put("x", b"", 1),), None, "h1"),
        (3, (Put(LEADER_KEY, b"h1"),), None, "h1"),
        (4, (Put("a", b""), Put(BATCH_KEY, b"3/1")), 3, "h1"),
        (5, (Delete("x"),), None, ""),
    ]
