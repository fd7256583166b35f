"""What every `peer.ports.Store` must do.

A test module subclasses `StoreContract` and gives it a fixture `store_factory`, a `StoreFactory`. Nothing
here relies on what number a store's first revision or lease has, nor on how it keeps time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.errors import Compacted, Fenced, NotFound
from peer.ports import BEAT_KEY, LEADER_KEY, Batch, Change, Compare, Delete, KeyValue, Put, Store, Write
from tests.contracts.model import check_against_model, gone, lead, one, put, take, values

TTL_S = 2.0  # etcd's least


class StoreFactory(ABC):
    """Makes stores over one set of data, and does to them what a caller cannot."""

    @abstractmethod
    async def open(self, nursery: trio.Nursery) -> Store:
        """The same data every time."""

    @abstractmethod
    async def pass_time(self, seconds: float) -> None:
        """Let the store's clock go on."""

    @abstractmethod
    async def forget_history(self, store: Store) -> None:
        """Make batches up to now unavailable to watchers."""


class StoreContract:
    @pytest.fixture
    async def store(self, store_factory: StoreFactory, nursery: trio.Nursery) -> AsyncIterator[Store]:
        store = await store_factory.open(nursery)
        yield store
        await store.aclose()

    # -------------------------------------------------------------------------------- reading

    async def test_an_empty_store_has_nothing(self, store: Store) -> None:
        page = await store.range("", "\U0010ffff")
        assert (page.items, page.more) == ((), False)
        assert page.revision >= 0
        assert await store.count("", "\U0010ffff") == 0
        assert await store.get(["a"]) == {}

    async def test_keys_are_ordered_by_their_utf8_bytes(self, store: Store) -> None:
        keys = ["a", "a/", "a/b", "A", "ä", "z", "é", "～", "\U0001f600", "a\x7f", "a\u0080", "10", "9"]
        await store.txn((), [Put(key, key.encode()) for key in keys])
        assert list(await values(store)) == sorted(keys, key=lambda key: key.encode())

    async def test_a_range_holds_its_start_and_not_its_end(self, store: Store) -> None:
        await store.txn((), [Put(key, b"") for key in ("a", "b", "b0", "c", "d")])
        assert list(await values(store, "b", "d")) == ["b", "b0", "c"]
        assert list(await values(store, "bb", "cc")) == ["c"]
        assert await values(store, "d", "b") == {}
        assert await store.count("b", "d") == 3
        assert await store.count("e", "f") == 0

    async def test_limit_offset_and_more(self, store: Store) -> None:
        keys = [f"t/{n:03}" for n in range(10)]
        await store.txn((), [Put(key, key.encode()) for key in keys])
        for offset, limit in (
            (0, 4), (4, 4), (6, 4), (8, 4), (9, 1), (10, 3), (50, 1), (3, 0), (0, 10), (0, 11),
        ):  # fmt: skip
            page = await store.range("t/", "t0", limit=limit, offset=offset)
            wanted = keys[offset : offset + limit] if limit else keys[offset:]
            assert [(item.key, item.value) for item in page.items] == [(key, key.encode()) for key in wanted]
            assert page.more == (offset + len(wanted) < len(keys) and bool(wanted))

    async def test_keys_only_leaves_out_the_values(self, store: Store) -> None:
        revision = await put(store, "a", b"long")
        page = await store.range("a", "b", keys_only=True)
        assert page.items == (KeyValue("a", b"", revision, revision),)

    async def test_get_finds_those_that_exist(self, store: Store) -> None:
        await store.txn((), [Put("a", b"1"), Put("b", b""), Put("c", b"\x00\xff")])
        found = await store.get(["c", "missing", "b", "c"])
        assert {key: item.value for key, item in found.items()} == {"b": b"", "c": b"\x00\xff"}
        assert await store.get([]) == {}
        assert await store.peek(["c", "missing", "b", "c"]) == found
        await store.txn((), [Put("a", b"2"), Delete("b")])
        assert {key: item.value for key, item in (await store.peek(["a", "b"])).items()} == {"a": b"2"}

    # -------------------------------------------------------------------------------- revisions

    async def test_each_transaction_that_writes_makes_one_revision(self, store: Store) -> None:
        first = await put(store, "a")
        second = (await store.txn((), [Put("b", b"1"), Put("c", b"2"), Put("a", b"3")])).revision
        assert second == first + 1
        items = (await store.range("a", "d")).items
        assert [(i.key, i.create_revision, i.mod_revision) for i in items] == [
            ("a", first, second),
            ("b", second, second),
            ("c", second, second),
        ]
        assert (await store.range("x", "y")).revision == second

    async def test_what_changes_nothing_makes_no_revision(self, store: Store) -> None:
        revision = await put(store, "a")
        assert (await store.txn((), [Delete("missing")])).revision == revision
        assert (await store.txn((), [])).revision == revision
        assert await put(store, "a") == revision + 1  # the same value again is a write all the same

    async def test_deleting_and_putting_makes_a_new_create_revision(self, store: Store) -> None:
        first = await put(store, "a")
        await store.txn((), [Delete("a")])
        assert await one(store, "a") is None
        third = await put(store, "a")
        assert await one(store, "a") == KeyValue("a", b"v", third, third)
        assert third == first + 2

    async def test_a_transaction_writes_a_key_once(self, store: Store) -> None:
        epoch = await lead(store)
        revision = await put(store, "a", b"0")
        thrice: list[Write] = [Put("a", b"1"), Put("b", b"1"), Put("a", b"2")]
        for twice in (thrice, [Delete("a"), *thrice[:2]]):
            with pytest.raises(ValueError, match="once"):
                await store.txn((), twice)
            with pytest.raises(ValueError, match="once"):
                await store.txn((), [], twice)
            with pytest.raises(ValueError, match="once"):
                await store.commit(epoch, twice)
        assert await one(store, "a") == KeyValue("a", b"0", revision, revision)
        done = await store.txn([Compare("a", "value", b"0")], [Put("a", b"1")], [Put("a", b"2")])
        assert (done.succeeded, done.revision) == (True, revision + 1)
        await store.commit(epoch, [Put("a", b"3")])

    # -------------------------------------------------------------------------------- transactions

    async def test_comparisons_of_a_key_that_exists(self, store: Store) -> None:
        created = await put(store, "a", b"1")
        modified = await put(store, "a", b"2")
        for compare, holds in (
            (Compare("a", "create_revision", created), True),
            (Compare("a", "create_revision", modified), False),
            (Compare("a", "create_revision", 0), False),
            (Compare("a", "mod_revision", modified), True),
            (Compare("a", "mod_revision", created), False),
            (Compare("a", "value", b"2"), True),
            (Compare("a", "value", b"1"), False),
            (Compare("a", "value", b""), False),
        ):
            assert (await store.txn([compare], [], [])).succeeded is holds, compare

    async def test_comparisons_of_a_key_that_is_missing(self, store: Store) -> None:
        for compare, holds in (
            (Compare("a", "create_revision", 0), True),
            (Compare("a", "create_revision", 1), False),
            (Compare("a", "mod_revision", 0), True),
            (Compare("a", "mod_revision", 1), False),
            (Compare("a", "value", b""), False),
            (Compare("a", "value", b"x"), False),
        ):
            assert (await store.txn([compare], [], [])).succeeded is holds, compare

    async def test_all_comparisons_must_hold_or_else_the_other_writes_are_done(self, store: Store) -> None:
        revision = await put(store, "a", b"1")
        both = [Compare("a", "value", b"1"), Compare("b", "create_revision", 0)]
        done = await store.txn(both, [Put("b", b"1")], [Put("c", b"1")])
        assert (done.succeeded, done.revision) == (True, revision + 1)
        done = await store.txn(both, [Put("b", b"2")], [Put("c", b"2"), Delete("a")])
        assert (done.succeeded, done.revision) == (False, revision + 2)
        assert await values(store) == {"b": b"1", "c": b"2"}
        assert (await store.txn(both, [Put("b", b"3")])).revision == revision + 2

    # -------------------------------------------------------------------------------- the fence

    async def test_a_commit_of_the_epoch_that_leads_is_written(self, store: Store) -> None:
        epoch = await lead(store)
        revision = await store.commit(epoch, [Put("a", b"1")])
        assert revision > epoch
        assert await store.commit(epoch, [Delete("a"), Put("b", b"1")]) == revision + 1
        assert await store.commit(epoch, []) == revision + 1
        assert await store.commit(epoch, [Delete("missing")]) in (revision + 1, revision + 2)
        assert await values(store, "a", "c") == {"b": b"1"}

    async def test_a_commit_of_another_epoch_writes_nothing(self, store: Store) -> None:
        old = await lead(store, b"one")
        new = await lead(store, b"two")
        assert new > old
        before = await store.range("", "\U0010ffff")
        for epoch in (old, new + 1, 0):
            with pytest.raises(Fenced):
                await store.commit(epoch, [Put("a", b"1")])
        assert await store.range("", "\U0010ffff") == before
        await store.commit(new, [Put("a", b"2")])

    async def test_the_epoch_stays_while_the_leader_key_is_only_rewritten(self, store: Store) -> None:
        epoch = await lead(store)
        await put(store, LEADER_KEY, b"me, still")
        await store.commit(epoch, [Put("a", b"1")])

    async def test_without_a_leader_no_epoch_leads(self, store: Store) -> None:
        epoch = await lead(store)
        await store.txn((), [Delete(LEADER_KEY)])
        for stale in (epoch, 0):
            with pytest.raises(Fenced):
                await store.commit(stale, [Put("a", b"1")])
        assert await values(store) == {}

    async def test_commits_and_other_transactions_do_not_disturb_each_other(self, store: Store) -> None:
        epoch = await lead(store)

        async def commits() -> None:
            for number in range(20):
                await store.commit(epoch, [Put("committed", str(number).encode())])

        async def beats() -> None:
            for number in range(20):
                fence = [Compare(LEADER_KEY, "create_revision", epoch)]
                assert (await store.txn(fence, [Put(BEAT_KEY, str(number).encode())])).succeeded

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commits)
            nursery.start_soon(beats)
        assert await values(store) == {"committed": b"19", BEAT_KEY: b"19", LEADER_KEY: b"me"}

    # -------------------------------------------------------------------------------- at the same time

    async def test_concurrent_transactions_are_atomic_and_each_has_its_revision(self, store: Store) -> None:
        fence = [Compare(LEADER_KEY, "create_revision", await lead(store))]
        revisions: list[int] = []

        async def write(number: int) -> None:
            text = str(number).encode()
            done = await store.txn(fence, [Put("x", text), Put(f"n/{number:03}", text), Put("y", text)])
            revisions.append(done.revision)

        async def read() -> None:
            for _ in range(20):
                items = (await store.range("x", "z")).items
                assert len({item.value for item in items}) <= 1
                assert len({item.mod_revision for item in items}) <= 1

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(write, number)
            nursery.start_soon(read)
        assert sorted(revisions) == list(range(min(revisions), min(revisions) + 60))
        assert await store.count("n/", "n0") == 60
        by_revision = {item.mod_revision: item.value for item in (await store.range("n/", "n0")).items}
        last = await one(store, "x")
        assert last is not None
        assert last.value == by_revision[max(revisions)]

    async def test_of_those_who_race_one_wins(self, store: Store) -> None:
        winners: list[int] = []

        async def campaign(number: int) -> None:
            vacant = [Compare(LEADER_KEY, "create_revision", 0)]
            if (await store.txn(vacant, [Put(LEADER_KEY, str(number).encode())])).succeeded:
                winners.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(campaign, number)
        assert len(winners) == 1
        leader = await one(store, LEADER_KEY)
        assert leader is not None
        assert leader.value == str(winners[0]).encode()

    async def test_a_cancelled_caller_leaves_whole_transactions(self, store: Store) -> None:
        done: list[int] = []

        async def write(number: int) -> None:
            await store.txn((), [Put(f"a/{number:03}", b"1"), Put(f"b/{number:03}", b"1")])
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(write, number)
            while len(done) < 3:  # noqa: ASYNC110 - what it waits for is anywhere in the middle
                await trio.sleep(0.0001)
            nursery.cancel_scope.cancel()
        found = await values(store)  # of one revision: what was cancelled may be carried out yet
        first, second = ({key[2:] for key in found if key.startswith(part)} for part in ("a/", "b/"))
        assert first == second
        assert first >= {f"{number:03}" for number in done}

    # -------------------------------------------------------------------------------- leases

    async def test_keys_go_when_their_lease_expires(self, store: Store, store_factory: StoreFactory) -> None:
        lease = await store.grant(TTL_S)
        assert lease.ttl_s == TTL_S
        await store.txn((), [Put("a", b"1", lease.lease_id), Put("b", b"1", lease.lease_id), Put("c", b"1")])
        held = await one(store, "a")
        assert held is not None
        assert held.lease == lease.lease_id
        async with store.watch("", held.mod_revision + 1) as batches:
            await store_factory.pass_time(TTL_S * 1.5)
            (batch,) = await take(batches, 1)
        assert {change.key for change in batch.changes} == {"a", "b"}
        assert {change.value for change in batch.changes} == {None}
        assert await values(store) == {"c": b"1"}
        with pytest.raises(NotFound):
            await store.keepalive(lease.lease_id)
        with pytest.raises(NotFound):
            await put(store, "d", lease=lease.lease_id)

    async def test_keepalive_begins_the_time_anew(self, store: Store, store_factory: StoreFactory) -> None:
        kept, let_go = await store.grant(TTL_S), await store.grant(TTL_S)
        await store.txn((), [Put("kept", b"", kept.lease_id), Put("let go", b"", let_go.lease_id)])
        for _ in range(3):
            await store_factory.pass_time(TTL_S * 0.6)
            assert await store.keepalive(kept.lease_id) == kept
        await gone(store, "let go")
        assert list(await values(store)) == ["kept"]

    async def test_a_revoked_lease_takes_its_keys_at_once(self, store: Store) -> None:
        lease, other = await store.grant(TTL_S), await store.grant(TTL_S)
        await store.txn((), [Put("a", b"1", lease.lease_id), Put("b", b"1", other.lease_id)])
        await store.revoke(lease.lease_id)
        assert await values(store) == {"b": b"1"}
        await store.revoke(lease.lease_id)
        await store.revoke(1 << 40)
        with pytest.raises(NotFound):
            await store.keepalive(lease.lease_id)

    async def test_a_lease_of_the_past_is_never_mistaken_for_a_new_one(self, store: Store) -> None:
        old = await store.grant(TTL_S)
        await store.revoke(old.lease_id)
        assert (await store.grant(TTL_S)).lease_id != old.lease_id
        with pytest.raises(NotFound):
            await store.keepalive(old.lease_id)

    async def test_a_put_moves_the_key_to_its_own_lease_or_none(self, store: Store) -> None:
        first, second = await store.grant(TTL_S), await store.grant(TTL_S)
        for key in ("a", "b", "c"):
            await put(store, key, lease=first.lease_id)
        await put(store, "a")
        await put(store, "b", lease=second.lease_id)
        await store.revoke(first.lease_id)
        assert list(await values(store)) == ["a", "b"]

    async def test_unknown_leases_are_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.keepalive(1 << 40)
        with pytest.raises(NotFound):
            await store.txn((), [Put("a", b"1"), Put("b", b"1", 1 << 40)])
        assert await values(store) == {}

    async def test_the_epoch_ends_with_the_leaders_lease(
        self, store: Store, store_factory: StoreFactory
    ) -> None:
        lease = await store.grant(TTL_S)
        epoch = await put(store, LEADER_KEY, b"me", lease.lease_id)
        await store.commit(epoch, [Put("a", b"1")])
        await store_factory.pass_time(TTL_S * 1.5)
        await gone(store, LEADER_KEY)
        with pytest.raises(Fenced):
            await store.commit(epoch, [Put("a", b"2")])
        assert await put(store, LEADER_KEY, b"you") > epoch

    # -------------------------------------------------------------------------------- watching

    async def test_a_watch_tells_what_was_and_what_comes_in_order(self, store: Store) -> None:
        first = await put(store, "a", b"1")
        await put(store, "a", b"2")
        async with store.watch("", first) as batches:
            assert await take(batches, 2) == [
                Batch(first, (Change("a", b"1"),)),
                Batch(first + 1, (Change("a", b"2"),)),
            ]
            with trio.move_on_after(0.05) as nothing_more:
                await anext(batches)
            assert nothing_more.cancelled_caught
            await store.txn((), [Delete("a")])
            assert await take(batches, 1) == [Batch(first + 2, (Change("a", None),))]

    async def test_changes_of_one_revision_come_as_one_batch(self, store: Store) -> None:
        first = await put(store, "b", b"0")
        await store.txn((), [Put("c", b"1"), Delete("b"), Put("a", b"1"), Delete("missing")])
        async with store.watch("", first + 1) as batches:
            assert await take(batches, 1) == [
                Batch(first + 1, (Change("c", b"1"), Change("b", None), Change("a", b"1")))
            ]

    async def test_a_watch_sees_its_prefix_only(self, store: Store) -> None:
        first = await put(store, "t/1")
        await store.txn((), [Put("t", b""), Put("t/2", b"2"), Put("u/1", b"")])
        await put(store, "u/2")
        await put(store, "t0")
        await put(store, "t/3", b"3")
        async with store.watch("t/", first + 1) as batches:
            assert await take(batches, 2) == [
                Batch(first + 1, (Change("t/2", b"2"),)),
                Batch(first + 4, (Change("t/3", b"3"),)),
            ]

    async def test_a_watch_of_a_revision_to_come_waits_for_it(self, store: Store) -> None:
        first = await put(store, "a")
        async with store.watch("", first + 2) as batches:
            await put(store, "a", b"skipped")
            await put(store, "a", b"told")
            assert await take(batches, 1) == [Batch(first + 2, (Change("a", b"told"),))]

    async def test_read_and_watch_on_leaves_no_gap(self, store: Store) -> None:
        """How every reader follows the store: what was read plus the batches is what is there."""
        count = 150

        async def write() -> None:
            for number in range(count):
                await put(store, f"k/{number % 7}", str(number).encode())

        async def follow() -> None:
            page = await store.range("k/", "k0")
            state = {item.key: item.value for item in page.items}
            async with store.watch("k/", page.revision + 1) as batches:
                revision = page.revision
                while str(count - 1).encode() not in state.values():
                    batch = (await take(batches, 1))[0]
                    assert batch.revision == revision + 1
                    revision = batch.revision
                    state |= {change.key: change.value or b"" for change in batch.changes}
            assert state == await values(store, "k/", "k0")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for _ in range(4):
                nursery.start_soon(follow)

    async def test_a_cancelled_wait_loses_no_batch(self, store: Store) -> None:
        first = await put(store, "a")
        async with store.watch("", first + 1) as batches:
            for _ in range(3):
                with trio.move_on_after(0.01):
                    await anext(batches)
            await put(store, "b")
            with trio.CancelScope() as cancelled:
                cancelled.cancel()
                await anext(batches)
            assert await take(batches, 1) == [Batch(first + 1, (Change("b", b"v"),))]

    async def test_history_that_is_gone_is_compacted(self, store: Store, store_factory: StoreFactory) -> None:
        first = await put(store, "a")
        await store_factory.forget_history(store)
        with pytest.raises(Compacted):
            async with store.watch("", first) as batches:
                await take(batches, 1)
        now = (await store.range("a", "b")).revision
        async with store.watch("", now + 1) as batches:
            await put(store, "b")
            assert await take(batches, 1) == [Batch(now + 1, (Change("b", b"v"),))]

    # -------------------------------------------------------------------------------- opened again

    async def test_everything_is_there_when_opened_again(
        self, store_factory: StoreFactory, nursery: trio.Nursery
    ) -> None:
        store = await store_factory.open(nursery)
        epoch = await lead(store)
        for number in range(5):
            await store.commit(epoch, [Put(f"t/{number}", str(number).encode())])
        before = await store.range("", "\U0010ffff")
        await store.aclose()
        await store.aclose()
        store = await store_factory.open(nursery)
        assert await store.range("", "\U0010ffff") == before
        assert await store.commit(epoch, [Put("t/9", b"")]) == before.revision + 1
        await store.commit(epoch, [Put("t/9", b"1")])
        await store.aclose()

    async def test_leases_outlive_the_opener_and_end_in_time(
        self, store_factory: StoreFactory, nursery: trio.Nursery
    ) -> None:
        store = await store_factory.open(nursery)
        lease = await store.grant(TTL_S)
        await put(store, "a", lease=lease.lease_id)
        await store.aclose()
        store = await store_factory.open(nursery)
        assert await store.keepalive(lease.lease_id) == lease
        assert (await store.grant(TTL_S)).lease_id != lease.lease_id
        await store_factory.pass_time(TTL_S * 1.5)
        await gone(store, "a")
        await store.aclose()

    # -------------------------------------------------------------------------------- against a model

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    async def test_it_does_what_a_plain_dict_does(
        self, store_factory: StoreFactory, data: st.DataObject
    ) -> None:
        async with trio.open_nursery() as nursery:  # every example has an event loop of its own
            store = await store_factory.open(nursery)
            try:
                await check_against_model(store, data)
            finally:
                await store.aclose()
