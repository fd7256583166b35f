"""FencedCommits over a store whose transactions time out, are lost, or are applied later, in any interleaving."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.adapters.stores.fenced_commits import STORE_FULL, FencedCommits
from peer.errors import Ambiguous, BitinglipError, Fenced, NotFound, StoreBroken, StoreError, Unavailable
from peer.ports import BATCH_KEY, LEADER_KEY, Compare, Delete, KeyValue, Put, TxnResult, Write

Transaction = tuple[Sequence[Compare], Sequence[Write], Sequence[Write]]


class Chaos:
    """A store without time. What becomes of a call is taken from `fates`, in order; then all goes well.

    ok; unsent (Unavailable); lost, done, late (Ambiguous: never applied, applied, applied when `arrive` is called)
    """

    def __init__(self) -> None:
        self.data: dict[str, KeyValue] = {}
        self.revision = 1
        self.fates: list[str] = []
        self.under_way: list[Transaction] = []
        self.log: list[tuple[int, Sequence[Write]]] = []

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate == "unsent":
            raise Unavailable("unsent")
        if fate != "ok":
            raise Ambiguous("time-out of a read")
        return {key: self.data[key] for key in keys if key in self.data}

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate == "unsent":
            raise Unavailable("unsent")
        if fate == "broken":
            raise StoreBroken("fsync")
        if fate == "late":
            self.under_way.append((compare, then, orelse))
        elif fate != "lost":
            done = self.apply((compare, then, orelse))
            if fate == "ok":
                return done
        raise Ambiguous(fate)

    def arrive(self, which: int = 0) -> None:
        self.apply(self.under_way.pop(which))

    def apply(self, transaction: Transaction) -> TxnResult:
        compare, then, orelse = transaction
        holds = all(self._holds(each) for each in compare)
        writes = then if holds else orelse
        if writes:
            self.revision += 1
            self.log.append((self.revision, writes))
        for write in writes:
            old = self.data.pop(write.key, None)
            if isinstance(write, Put):
                created = old.create_revision if old else self.revision
                self.data[write.key] = KeyValue(write.key, write.value, created, self.revision)
        return TxnResult(holds, self.revision)

    def _holds(self, compare: Compare) -> bool:
        found = self.data.get(compare.key)
        return (getattr(found, compare.field) if found else 0) == compare.value

    def lead(self) -> int:
        for writes in ([Delete(LEADER_KEY)], [Put(LEADER_KEY, b"")]):
            self.apply(((), writes, ()))
        return self.revision


def run(coroutine: Coroutine[Any, Any, int]) -> int:
    """FencedCommits waits for nothing but the store, and this one never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        revision: int = end.value
        return revision
    raise AssertionError("it waited")


def batch(name: str) -> list[Write]:
    return [Put("name", name.encode()), Delete("nothing")]


class Two:
    """A store, its commits and the epoch that leads."""

    def __init__(self) -> None:
        self.store = Chaos()
        self.commits = FencedCommits(self.store)
        self.epoch = self.store.lead()

    def commit(self, name: str, *fates: str, epoch: int = 0) -> int:
        self.store.fates = list(fates)
        try:
            return run(self.commits.commit(epoch or self.epoch, batch(name)))
        finally:
            self.store.fates = []

    @property
    def names(self) -> list[str]:
        puts = [w for _, writes in self.store.log for w in writes if isinstance(w, Put) and w.key == "name"]
        return [put.value.decode() for put in puts]


# ------------------------------------------------------------------------------------------------ one by one


def test_every_commit_names_its_batch() -> None:
    two = Two()
    assert two.commit("a") == two.epoch + 1
    assert two.commit("b") == two.epoch + 2
    assert two.store.data[BATCH_KEY].value == f"{two.epoch}/2".encode()
    assert two.names == ["a", "b"]


@pytest.mark.parametrize("fate", ["lost", "done", "late"])
def test_a_time_out_is_tried_again_until_it_is_known(fate: str) -> None:
    two = Two()
    two.commit("a")
    with pytest.raises(Ambiguous):
        two.commit("b", fate)
    with pytest.raises(ValueError, match="still ambiguous"):
        two.commit("c")
    revision = two.commit("b")
    assert two.store.data[BATCH_KEY].mod_revision == revision == two.store.revision
    two.commit("c")
    for _ in tuple(two.store.under_way):
        two.store.arrive()  # after its retry and a later commit
    two.commit("d")
    assert two.names == ["a", "b", "c", "d"]


def test_tries_that_are_all_under_way_take_effect_once() -> None:
    two = Two()
    for _ in range(3):
        with pytest.raises(Ambiguous):
            two.commit("a", *(["ok"] if not two.store.under_way else []), "late")
    two.store.arrive(1)
    two.store.arrive(1)
    assert two.commit("a") == two.store.data[BATCH_KEY].mod_revision
    two.store.arrive()
    two.commit("b")
    assert two.names == ["a", "b"]


def test_a_retry_that_is_not_sent_leaves_the_first_try_ambiguous() -> None:
    two = Two()
    two.commit("a")
    for fates in (["late"], ["unsent"], ["unsent"], ["broken"]):
        with pytest.raises(StoreError if fates == ["broken"] else Ambiguous):
            two.commit("b", *fates)
    two.store.arrive()
    for fates in (["ok", "unsent"], ["ok", "lost"]):  # the comparison failed, and why cannot be read
        with pytest.raises(Ambiguous):
            two.commit("b", *fates)
    with pytest.raises(ValueError, match="still ambiguous"):
        two.commit("c")
    two.commit("b")
    assert two.names == ["a", "b"]


def test_what_was_not_sent_binds_nobody() -> None:
    two = Two()
    for fate in ("unsent", "lost"):  # of the read that begins an epoch
        with pytest.raises(Unavailable):
            two.commit("never", fate)
    with pytest.raises(Unavailable):
        two.commit("never", "ok", "unsent")
    two.commit("a")
    two.store.lead()
    with pytest.raises(Unavailable):  # another epoch leads, but that cannot be read
        two.commit("never", "ok", "unsent")
    with pytest.raises(Fenced):
        two.commit("b")
    assert two.names == ["a"]


def test_another_epoch_fences_what_is_under_way() -> None:
    two = Two()
    two.commit("a")
    with pytest.raises(Ambiguous):
        two.commit("b", "late")
    new = two.store.lead()
    with pytest.raises(Fenced):
        two.commit("b")
    with pytest.raises(Fenced):
        two.commit("c")
    two.commit("d", epoch=new)
    two.store.arrive()
    with pytest.raises(Fenced):
        two.commit("e")  # the older epoch once more
    two.commit("f", epoch=new)
    assert two.names == ["a", "d", "f"]


def test_what_took_effect_before_another_epoch_is_told_while_it_can_be() -> None:
    two = Two()
    with pytest.raises(Ambiguous):
        two.commit("a", "ok", "done")
    new = two.store.lead()
    assert two.commit("a") == two.epoch + 1
    with pytest.raises(Fenced):
        two.commit("b")
    two.commit("c", epoch=new)
    assert two.names == ["a", "c"]


def test_what_took_effect_and_was_covered_stays_unknown() -> None:
    two = Two()
    with pytest.raises(Ambiguous):
        two.commit("a", "ok", "done")
    run(FencedCommits(two.store).commit(two.store.lead(), batch("b")))
    with pytest.raises(Fenced):
        two.commit("a")
    assert two.names == ["a", "b"]


def test_a_new_epoch_of_the_same_peer_forgets_what_was_ambiguous() -> None:
    two = Two()
    with pytest.raises(Ambiguous):
        two.commit("a", "ok", "late")
    with pytest.raises(Fenced):
        two.commit("x", epoch=two.epoch + 7)  # an epoch that nobody was given changes nothing
    with pytest.raises(ValueError, match="ambiguous"):
        two.commit("b")
    two.epoch = two.store.lead()
    two.commit("b")
    two.store.arrive()
    assert two.names == ["b"]


def test_misuse_is_refused_and_binds_nobody() -> None:
    two = Two()
    for writes in ([Put(BATCH_KEY, b"")], [Delete(BATCH_KEY)]):
        with pytest.raises(ValueError, match="itself"):
            run(two.commits.commit(two.epoch, writes))
    waits = two.commits.commit(two.epoch, batch("a"))

    async def never(keys: Sequence[str]) -> dict[str, KeyValue]:
        with pytest.raises(ValueError, match="one commit"):
            run(two.commits.commit(two.epoch, batch("b")))
        return {key: two.store.data[key] for key in keys if key in two.store.data}

    two.store.get = never  # type: ignore
    run(waits)
    for epoch in (0, -1):
        with pytest.raises(Fenced):
            run(two.commits.commit(epoch, []))
    assert run(two.commits.commit(two.epoch, [])) == two.store.revision
    with pytest.raises(Fenced):
        run(two.commits.commit(two.epoch + 1, []))
    assert two.names == ["a"]


def test_a_refusal_of_the_store_passes_through() -> None:
    two = Two()
    real = two.store.txn

    async def refuses(*arguments: Any) -> TxnResult:
        raise NotFound("lease")

    two.store.txn = refuses  # type: ignore
    with pytest.raises(NotFound):
        two.commit("a")
    two.store.txn = real  # type: ignore
    two.commit("b")
    assert two.names == ["b"]


def test_a_caller_that_is_cancelled_leaves_an_ambiguous_commit() -> None:
    two = Two()
    two.commit("a")
    real = two.store.txn

    async def cancelled(*arguments: Any) -> TxnResult:
        two.store.under_way.append((arguments[0], arguments[1], ()))
        raise KeyboardInterrupt  # as trio.Cancelled: no Exception

    two.store.txn = cancelled  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        two.commit("b")
    two.store.txn = real  # type: ignore
    with pytest.raises(ValueError, match="ambiguous"):
        two.commit("c")
    two.commit("b")
    two.store.arrive()
    assert two.names == ["a", "b"]


# ------------------------------------------------------------------------------------------------ any interleaving

FATES = ("ok", "ok", "unsent", "lost", "done", "late", "late")


class Oracle:
    """What each of several leaders was told, against what the store did."""

    def __init__(self, choose: random.Random, commits: type[FencedCommits] = FencedCommits) -> None:
        self.store = Chaos()
        self.choose = choose
        self.make = commits
        self.made = 0
        self.told: dict[str, int] = {}  # batch: the revision that its commit returned
        self.of_epoch: dict[int, list[str]] = {}  # batches in the order in which they were first committed
        self.never: set[str] = set()  # told that they were not sent, and given up
        self.leaders: list[tuple[int, FencedCommits]] = []
        self.wanted: dict[int, str] = {}  # epoch: the batch that is not over

    def step(self) -> None:
        what = self.choose.random()
        if not self.leaders or what < 0.02:
            old = [commits for _, commits in self.leaders] + [self.make(self.store)]
            self.leaders.append((self.store.lead(), self.choose.choice(old)))
        elif what < 0.35 and self.store.under_way:
            self.store.arrive(self.choose.randrange(len(self.store.under_way)))
        else:
            # Of those who share a FencedCommits, a peer's last epoch is the one it uses.
            epoch, commits = self.choose.choice([*self.leaders[-3:], self.leaders[-1], self.leaders[-1]])
            if not any(e > epoch and c is commits for e, c in self.leaders):
                self.commit(epoch, commits)

    def commit(self, epoch: int, commits: FencedCommits) -> None:
        name = self.wanted.get(epoch)
        first = name is None
        if name is None:
            self.made += 1
            name = f"{epoch}:{self.made}"
            self.of_epoch.setdefault(epoch, []).append(name)
        self.store.fates = [self.choose.choice(FATES) for _ in range(3)]
        try:
            self.told[name] = run(commits.commit(epoch, batch(name)))
        except Unavailable:
            assert first, "a commit that was sent before is not merely unsent"
            self.never.add(name)
        except Ambiguous:
            self.wanted[epoch] = name
            return
        except Fenced:
            assert epoch != self.store.data[LEADER_KEY].create_revision, "fenced by nobody"
        finally:
            self.store.fates = []
        self.wanted.pop(epoch, None)

    def check(self) -> None:
        applied = [
            (revision, write.value.decode())
            for revision, writes in self.store.log
            for write in writes
            if isinstance(write, Put) and write.key == "name"
        ]
        names = [name for _, name in applied]
        assert len(names) == len(set(names)), "twice"
        assert not self.never & set(names), "what was said not to be sent took effect"
        assert self.told.items() <= {name: revision for revision, name in applied}.items()
        epochs = [int(name.partition(":")[0]) for name in names]
        assert epochs == sorted(epochs), "an older epoch's after a newer one's"
        for epoch, order in self.of_epoch.items():
            mine = [name for name in names if name.startswith(f"{epoch}:")]
            assert mine == [name for name in order if name in mine], "out of order"


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_any_interleaving_takes_effect_once_and_in_order(choose: random.Random, steps: int) -> None:
    oracle = Oracle(choose)
    for _ in range(steps):
        oracle.step()
        oracle.check()


def test_long_histories() -> None:
    told = 0
    for seed in range(60):
        oracle = Oracle(random.Random(f"{seed}/fenced"))
        for _ in range(400):
            oracle.step()
        while oracle.store.under_way:
            oracle.store.arrive()
        oracle.check()
        told += len(oracle.told)
    assert told > 1_000, told


class NoFence(FencedCommits):
    """Compares the epoch alone: a late try takes effect again."""

    async def _try(self, writes: tuple[Write, ...], retried: bool) -> int:
        compare = [Compare(LEADER_KEY, "create_revision", self._epoch)]
        done = await self._store.txn(compare, [*writes, Put(BATCH_KEY, self._name)])
        return done.revision if done.succeeded else await self._find_out(retried)


class Gullible(FencedCommits):
    """Takes a failed comparison of a retry for success."""

    async def _find_out(self, retried: bool) -> int:
        try:
            return await super()._find_out(retried)
        except Fenced:
            if retried:
                return 1
            raise


@pytest.mark.parametrize("defect", [NoFence, Gullible])
def test_the_oracle_finds_what_is_wrong(defect: type[FencedCommits]) -> None:
    for seed in range(50):
        oracle = Oracle(random.Random(f"{seed}/defect"), defect)
        try:
            for _ in range(200):
                oracle.step()
                oracle.check()
        except (AssertionError, BitinglipError):
            return
    raise AssertionError("not found")


# ------------------------------------------------------------------------------------------------ a full store


class Full(Chaos):
    """Answers that it is full, of what it has applied (`crossing`) and of what it has not (`full`)."""

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        if self.fates and self.fates[0] in ("full", "crossing"):
            if self.fates.pop(0) == "crossing":
                self.apply((compare, then, orelse))
            raise Ambiguous("database space exceeded", code=STORE_FULL)
        return await super().txn(compare, then, orelse)


@pytest.mark.parametrize(
    ("fates", "outcome", "written"),
    [
        (["crossing"], None, True),
        (["full"], Unavailable, False),
        (["crossing", "unsent"], Ambiguous, True),  # applied, but the keys cannot be read
        (["full", "unsent"], Ambiguous, False),
    ],
)
async def test_a_full_store_is_asked_what_it_has_done(
    fates: list[str], outcome: type[BitinglipError] | None, written: bool
) -> None:
    store = Full()
    store.lead()
    commits = FencedCommits(store)
    epoch = store.data[LEADER_KEY].create_revision
    await commits.commit(epoch, [Put("a", b"0")])
    store.fates = list(fates)
    if outcome is None:
        assert await commits.commit(epoch, [Put("a", b"1")]) == store.revision
    else:
        with pytest.raises(outcome):
            await commits.commit(epoch, [Put("a", b"1")])
    assert store.data["a"].value == (b"1" if written else b"0")
    await commits.commit(epoch, [Put("a", b"1")])
    again = [writes for _, writes in store.log if Put("a", b"1") in writes]
    assert len(again) == (2 if outcome is None else 1)  # what was told of is not tried again


async def test_an_earlier_try_may_be_under_way_in_a_full_store() -> None:
    store = Full()
    store.lead()
    commits = FencedCommits(store)
    epoch = store.data[LEADER_KEY].create_revision
    await commits.commit(epoch, [Put("a", b"0")])
    store.fates = ["late", "full"]
    for _ in range(2):
        with pytest.raises(Ambiguous):
            await commits.commit(epoch, [Put("a", b"1")])
    store.arrive()
    assert await commits.commit(epoch, [Put("a", b"1")]) == store.revision
    assert store.data["a"].value == b"1"
