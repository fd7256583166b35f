"""Known defects of whole peers, switched on one at a time: the world level must find each of them.

Each is what somebody could have written: a check left out, a bound forgotten, a copy one step too old. One kind is not
here: an executor that obeys an older epoch. A peer has one session, with the newest leader it knows, so that check is a
second lock behind the first; simulations/world/run.py still looks whether it is ever needed and fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import trio
from msgspec.structs import replace as changed

from peer import cluster_peer, establish, routing
from peer.adapters.stores.fenced_commits import FencedCommits
from peer.answers import not_leading
from peer.decide import admit, elect, place, rebalance, record, retain, schedule, voters, workers
from peer.decide.decision import Decision
from peer.decide.elect import Depose
from peer.election import Election, Leadership
from peer.errors import Fenced, StoreError, Unavailable
from peer.leader import Leader
from peer.ports import BEAT_KEY, LEADER_KEY, Compare, Delete, Put, Write
from peer.state.command import StreamToken
from peer.state.order import AttemptFinished
from peer.state.snapshot import Save, Snapshot
from peer.state.task import Status, Task
from peer.streams import Stream
from simulations.errors import SimulatorError


@dataclass(frozen=True, slots=True)
class Bug:
    """`patches`: where, which name, what instead."""

    says: str
    patches: tuple[tuple[Any, str, Any], ...]


# ---------------------------------------------------------------- election

_candidate = elect.candidate


def _no_guard(
    peer_id: str, seen: elect.Seen, guard: elect.Guard | None, evidence: str, now: float, aside_until: float
) -> Any:
    kept, action = _candidate(peer_id, seen, guard, evidence, now, aside_until)
    if kept is not None and evidence:
        return kept, Depose(seen.epoch, None, evidence)
    return kept, action


def _guard_without_condition(
    peer_id: str, seen: elect.Seen, guard: elect.Guard | None, evidence: str, now: float, aside_until: float
) -> Any:
    """The beat is looked at once: that it stood still for the time is taken for granted."""
    if guard is not None and guard.epoch == seen.epoch:
        seen = changed_seen(seen, guard.beat_revision)
    kept, action = _candidate(peer_id, seen, guard, evidence, now, aside_until)
    if isinstance(action, Depose):
        return kept, Depose(action.epoch, None, action.reason)
    return kept, action


def changed_seen(seen: elect.Seen, beat_revision: int) -> elect.Seen:
    return elect.Seen(seen.epoch, seen.holder, seen.address, beat_revision, seen.ended)


async def _beat_unfenced(self: Election, leadership: Leadership) -> None:
    while True:
        begun = self._clock.now()
        with suppress(StoreError, Unavailable):
            await self._store.txn([], [Put(BEAT_KEY, f"{leadership.epoch}".encode())])
            leadership.beaten(begun)
        await self._clock.sleep(0.5)


async def _beaten_when_answered(self: Election, leadership: Leadership) -> None:
    """A beat vouches from when it was answered, not from when it was begun."""
    holds = [Compare(LEADER_KEY, "create_revision", leadership.epoch)]
    while True:
        try:
            done = await self._store.txn(holds, [Put(BEAT_KEY, f"{leadership.epoch}".encode())])
        except (StoreError, Unavailable):
            leadership.beaten(self._clock.now())
        else:
            if not done.succeeded:
                self._lose(leadership, "another peer leads")
                return
            leadership.beaten(self._clock.now())
        await self._clock.sleep(0.5)


async def _let_go_of_any(self: Election, lease_id: int) -> None:
    """Whoever holds the key by then loses it."""
    with trio.move_on_after(2.0, shield=True), suppress(StoreError, Unavailable):
        await self._store.txn([], [Delete(LEADER_KEY)])


async def _campaign_believed(self: Election) -> None:
    """A campaign that timed out is taken for won."""
    begun = self._clock.now()
    lease = await self._store.grant(5.0)
    name = elect.key_value(self._peer_id, self._address, self._entropy.token(8))
    won = True
    try:
        done = await self._store.txn(
            [Compare(LEADER_KEY, "create_revision", 0)], [Put(LEADER_KEY, name, lease.lease_id)]
        )
        won = done.succeeded
    except StoreError:
        pass
    try:
        key = (await self._store.get([LEADER_KEY])).get(LEADER_KEY)
        if won and key is not None:
            await self._hold(Leadership(key.create_revision, self._clock, begun), lease.lease_id)
    finally:
        await self._let_go(lease.lease_id)


# ---------------------------------------------------------------- commits

_try = FencedCommits._try


async def _unfenced(self: FencedCommits, writes: tuple[Write, ...], retried: bool) -> int:
    done = await self._store.txn([], [*writes, Put("batch", self._name)])
    return done.revision


async def _unnumbered(self: FencedCommits, writes: tuple[Write, ...], retried: bool) -> int:
    """A batch that timed out is sent again as it is: its first try may arrive after later ones."""
    done = await self._store.txn([Compare(LEADER_KEY, "create_revision", self._epoch)], list(writes))
    if not done.succeeded:
        raise Fenced("another leads")
    return done.revision


_commit = Leader._commit


async def _commits_hoped_for(self: Leader, writes: Any) -> None:
    with suppress(StoreError, Unavailable):
        await _commit(self, writes)
    self._over = False


async def _time_outs_taken_for_done(self: Leader, transactions: Any) -> None:
    if not transactions:
        return
    self._over = True
    for writes in transactions:
        changes: list[Write] = [Put(k, v) if v is not None else Delete(k) for k, v in writes.items()]
        with suppress(Exception):  # a defect on purpose: whatever the store said, it is taken for done
            await self._store.commit(self._snapshot.epoch, changes)
    self._over = False


@asynccontextmanager
async def _reads_what_is_in_flight(self: Leader) -> AsyncIterator[None]:
    await trio.lowlevel.checkpoint()
    if self._voucher.lost:  # who asks again and again is told, or no time would pass
        raise not_leading()
    yield


# ---------------------------------------------------------------- new leaders

_load_snapshot = establish.load_snapshot


def _loading(wrong: Callable[[Snapshot], None]) -> Any:
    async def load(*args: Any, **kwargs: Any) -> Snapshot:
        snapshot = await _load_snapshot(*args, **kwargs)
        wrong(snapshot)
        return snapshot

    return load


def _event_number_repeated(snapshot: Snapshot) -> None:
    snapshot.events_next = max(1, snapshot.events_next - 1)


def _event_number_skipped(snapshot: Snapshot) -> None:
    snapshot.events_next += 1


def _running_tasks_forgotten(snapshot: Snapshot) -> None:
    for tasks in list(snapshot.held.values()):
        for task in list(tasks.values()):
            snapshot._take_out(task)


def _running_tasks_given_anew(snapshot: Snapshot) -> None:
    """What runs is queued again, one attempt back: it is given to another worker under the same number."""
    for tasks in list(snapshot.held.values()):
        for task in list(tasks.values()):
            snapshot._save(changed(task, status=Status.QUEUED, attempt=task.attempt - 1))


# ---------------------------------------------------------------- decisions

_schedule = schedule.schedule
_report = record.report
_due = retain.due


def _attempt_kept(snapshot: Snapshot, now: float) -> Decision:
    decision = _schedule(snapshot, now)
    for at, change in enumerate(decision.changes):
        if isinstance(change, Save) and isinstance(change.record, Task) and change.record.attempt > 1:
            decision.changes[at] = Save(changed(change.record, attempt=change.record.attempt - 1))
    return decision


def _dead_results_taken(snapshot: Snapshot, now: float, message: Any) -> Decision:
    if isinstance(message, AttemptFinished):
        task = snapshot.tasks.get(message.task_id)
        if task is not None and task.status in (Status.ASSIGNED, Status.RUNNING):
            held = changed(message, attempt=task.attempt, worker_id=task.worker_id)
            decision = _report(snapshot, now, held)
            for at, change in enumerate(decision.changes):
                if isinstance(change, Save) and hasattr(change.record, "generated_text"):
                    decision.changes[at] = Save(
                        changed(change.record, attempt=message.attempt, worker_id=message.worker_id)
                    )
            return decision
    return _report(snapshot, now, message)


def _live_tasks_retired(
    snapshot: Snapshot, now: float, oldest: Sequence[tuple[float, str]], nbytes: Sequence[int] = ()
) -> list[str]:
    live, due = sorted(snapshot.tasks), _due(snapshot, now, oldest, nbytes)
    return [*due, *live[:1]] if len(live) > 20 else due


# ---------------------------------------------------------------- answers and events

_RoutedEvents = routing.RoutedCluster._all_events


async def _events_resumed_late(self: Any, last: int, events: Any, client: Any) -> AsyncIterator[Any]:
    """After a failover the reader goes on one event too far."""
    while True:
        try:
            async for event in events:
                last = event.id
                yield event
        except Unavailable:
            pass
        at = last + 1
        _, events = await self._held(lambda at=at: self._source(at, client), repeatable=True)


async def _events_resumed_early(self: Any, last: int, events: Any, client: Any) -> AsyncIterator[Any]:
    while True:
        try:
            async for event in events:
                last = event.id
                yield event
        except Unavailable:
            pass
        at = max(0, last - 1)
        _, events = await self._held(lambda at=at: self._source(at, client), repeatable=True)


async def _wakes_nobody(self: Leadership) -> None:
    await trio.sleep_forever()


_first_of = admit.first_of


def _finished_keys_forgotten(snapshot: Snapshot, command: Any, stored: Any) -> str | None:
    return _first_of(snapshot, command, None)


# ---------------------------------------------------------------- texts as they come

_publish = Stream.publish


def _first_tokens_skipped(self: Stream, attempt: int, text: str, count: int, *more: Any) -> None:
    """What a new attempt gives first is taken for what the reader has already."""
    anew = self._begun > 0 and self.tokens == 0
    _publish(self, attempt, "" if anew else text, count, *more)


def _tokens_taken_twice(self: Stream, token: StreamToken) -> bool:
    """A copy that begins anew is appended whole."""
    _publish(self, token.attempt, token.text, token.count, token.logprobs)
    return True


# ---------------------------------------------------------------- hosts and voters

_lasted = voters._State.lasted


async def _knock_takes_all_for_death(self: Any, peer_id: str, leader: Leader) -> None:
    """Any dial that fails says that the peer's process has ended."""
    address = self.membership.address(peer_id)
    if address is None:
        return
    try:
        connection = await self._network.dial(peer_id, address)
    except Unavailable:
        leader.linked(peer_id, False, dead=True)
    else:
        await connection.aclose()


def _away_is_dead(self: Any, what: str, whose: str | int, seconds: float) -> bool:
    return _lasted(self, what, whose, 0.0 if what == "away" else seconds)


def _dead_voters_stay(self: Any) -> None:
    return None


def _nobody_leaves(snapshot: Snapshot, worker_id: str) -> bool:
    return False


BUGS: Final[Mapping[str, Bug]] = MappingProxyType(
    {
        "no_silence_guard": Bug("evidence alone deposes a leader", ((elect, "candidate", _no_guard),)),
        "guard_without_condition": Bug(
            "the beat is not compared when the leader is deposed",
            ((elect, "candidate", _guard_without_condition),),
        ),
        "beats_unfenced": Bug(
            "a deposed leader's beats still vouch for it", ((Election, "_beat", _beat_unfenced),)
        ),
        "beats_believed": Bug("an unanswered beat vouches", ((Election, "_beat", _beaten_when_answered),)),
        "lets_go_of_any": Bug(
            "letting go deletes whoever's key it is", ((Election, "_let_go", _let_go_of_any),)
        ),
        "campaign_believed": Bug(
            "a campaign that timed out is won", ((Election, "_campaign", _campaign_believed),)
        ),
        "always_vouches": Bug(
            "a paused leader answers from memory", ((Leadership, "fresh", lambda self: True),)
        ),
        "unfenced_commits": Bug("commits do not compare the epoch", ((FencedCommits, "_try", _unfenced),)),
        "unnumbered_commits": Bug("retried batches have no number", ((FencedCommits, "_try", _unnumbered),)),
        "commits_hoped_for": Bug(
            "failed commits are answered as done", ((Leader, "_commit", _commits_hoped_for),)
        ),
        "time_outs_taken_for_done": Bug(
            "a time-out counts as done", ((Leader, "_commit", _time_outs_taken_for_done),)
        ),
        "reads_in_flight": Bug(
            "queries do not wait for the commit", ((Leader, "settled", _reads_what_is_in_flight),)
        ),
        "finished_keys_forgotten": Bug(
            "the idempotency keys of finished tasks are not looked up",
            ((admit, "first_of", _finished_keys_forgotten),),
        ),
        "event_number_repeated": Bug(
            "a new leader numbers from the last event",
            ((cluster_peer, "load_snapshot", _loading(_event_number_repeated)),),
        ),
        "event_number_skipped": Bug(
            "a new leader leaves a number out",
            ((cluster_peer, "load_snapshot", _loading(_event_number_skipped)),),
        ),
        "running_tasks_forgotten": Bug(
            "a new leader loads queued tasks only",
            ((cluster_peer, "load_snapshot", _loading(_running_tasks_forgotten)),),
        ),
        "running_tasks_given_anew": Bug(
            "a new leader dispatches what runs a second time",
            ((cluster_peer, "load_snapshot", _loading(_running_tasks_given_anew)),),
        ),
        "attempt_kept": Bug(
            "a re-queued task keeps its attempt's number", ((schedule, "schedule", _attempt_kept),)
        ),
        "dead_results_taken": Bug(
            "any attempt's result is recorded", ((record, "report", _dead_results_taken),)
        ),
        "live_tasks_retired": Bug("retention takes live tasks, too", ((retain, "due", _live_tasks_retired),)),
        "events_resumed_late": Bug(
            "a reader misses an event at a failover",
            ((routing.RoutedCluster, "_all_events", _events_resumed_late),),
        ),
        "events_resumed_early": Bug(
            "a reader gets an event twice at a failover",
            ((routing.RoutedCluster, "_all_events", _events_resumed_early),),
        ),
        "dials_in_vain_are_deaths": Bug(
            "a leader takes every dial that fails for a process that has ended",
            ((cluster_peer.ClusterPeer, "_knock", _knock_takes_all_for_death),),
        ),
        "drained_hosts_get_loads": Bug(
            "models are loaded on a host that is to be emptied",
            (
                (workers, "leaves", _nobody_leaves),
                (place, "leaves", _nobody_leaves),
                (rebalance, "leaves", _nobody_leaves),
            ),
        ),
        "voters_removed_below_quorum": Bug(
            "a voter that is away is removed at once, however few are left",
            ((voters._State, "lasted", _away_is_dead), (voters, "quorum", lambda voters: 0)),
        ),
        "dead_voters_stay": Bug(
            "a voter that is gone is never replaced", ((voters._State, "_replace_dead", _dead_voters_stay),)
        ),
        "tokens_skipped_after_a_restart": Bug(
            "a reader misses what the next attempt gives first", ((Stream, "publish", _first_tokens_skipped),)
        ),
        "tokens_taken_twice": Bug(
            "a reader gets tokens again whose connection broke", ((Stream, "take", _tokens_taken_twice),)
        ),
        "wakes_nobody": Bug("who waits for a beat is not woken", ((Leadership, "renewed", _wakes_nobody),)),
    }
)


@contextmanager
def switched_on(bug: str) -> Iterator[None]:
    """With this defect, "" for none. The product is itself again afterwards."""
    if not bug:
        yield
        return
    if bug not in BUGS:
        raise SimulatorError(f"there is no bug `{bug}`")
    patches = BUGS[bug].patches
    before = [(where, name, vars(where)[name]) for where, name, _ in patches]
    for where, name, instead in patches:
        setattr(where, name, instead)
    try:
        yield
    finally:
        for where, name, was in before:
            setattr(where, name, was)
