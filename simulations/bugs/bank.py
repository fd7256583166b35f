"""The bug bank: each defect replaces one decision (or what it leans on) with a plausible wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace as changed

from peer.decide import lose, place, rebalance, record, recover, replan, retain, schedule, workers
from peer.decide.decision import Decision
from peer.state.model import HOLDS_MEMORY, Replica, ReplicaState
from peer.state.order import AttemptFinished, RunAttempt, StopAttempt
from peer.state.plan import Plan
from peer.state.snapshot import Drop, Lose, Save, Snapshot
from peer.state.task import Idempotency, Status, Task, TaskResult
from peer.state.worker import EngineState
from simulations.policy.shell import Decisions

Switch = Callable[[Decisions], Any]


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _requeue_keeps_attempt(decisions: Decisions) -> None:
    def wrong(snapshot: Snapshot, now: float) -> Decision:
        decision = schedule.schedule(snapshot, now)
        for i, change in enumerate(decision.changes):
            if isinstance(change, Save) and isinstance(change.record, Task) and change.record.attempt > 1:
                task = change.record
                decision.changes[i] = Save(changed(task, attempt=task.attempt - 1))
                decision.orders = [
                    (peer, changed(order, attempt=order.attempt - 1))
                    if isinstance(order, RunAttempt) and order.task_id == task.task_id
                    else (peer, order)
                    for peer, order in decision.orders
                ]
        return decision

    decisions.schedule = wrong


def _accepts_dead_results(decisions: Decisions) -> None:
    def wrong(snapshot: Snapshot, now: float, message: Any) -> Decision:
        if isinstance(message, AttemptFinished):
            task = snapshot.tasks.get(message.task_id)
            if task is not None and task.status is not Status.QUEUED:
                task_worker = task.worker_id or ""
                message = changed(message, attempt=task.attempt, worker_id=task_worker)
        return record.report(snapshot, now, message)

    decisions.report = wrong


def _schedule_with(slots: Callable[[Snapshot, Replica], int]) -> Callable[[Snapshot, float], Decision]:
    """Scheduling that sees other free slots than there are."""

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        room: dict[str, dict[str, int]] = {}
        for model_name, of in snapshot.index.placed.items():
            for worker_id, replica in of.items():
                report = snapshot.reports.get(worker_id)
                is_up = report is not None and report.state is EngineState.READY
                if is_up and worker_id not in snapshot.paused and (free := slots(snapshot, replica)) > 0:
                    room.setdefault(model_name, {})[worker_id] = free
        right, snapshot.index.room = snapshot.index.room, room
        try:
            return schedule.schedule(snapshot, now)
        finally:
            snapshot.index.room = right

    return wrong


def _schedules_on_draining(decisions: Decisions) -> None:
    def slots(snapshot: Snapshot, replica: Replica) -> int:
        is_ready = replica.state is ReplicaState.READY
        return workers.free_slots(snapshot, replica, _held(snapshot, replica)) if is_ready else 0

    decisions.schedule = _schedule_with(slots)


def _held(snapshot: Snapshot, replica: Replica) -> int:
    return len(snapshot.held.get(replica.worker_id, ()))


def _memory_ignores_loading(decisions: Decisions) -> None:
    def wrong(snapshot: Snapshot, worker_id: str, *, without: frozenset[str] = frozenset()) -> Any:
        loading = [
            r.model_name
            for r in snapshot.replicas[worker_id].values()
            if r.state in HOLDS_MEMORY and r.state is not ReplicaState.READY
        ]
        return workers.memory(snapshot, worker_id, without=without | frozenset(loading))

    def reconcile(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(place, "memory", wrong):
            return place.reconcile(snapshot, now)

    def advance(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(rebalance, "memory", wrong):
            return rebalance.advance(snapshot, now)

    decisions.reconcile, decisions.advance = reconcile, advance


def _acknowledges_before_commit(decisions: Decisions) -> None:
    decisions.acknowledge_early = True


def _forgets_finished_keys(decisions: Decisions) -> None:
    first_of = decisions.first_of
    decisions.first_of = lambda snapshot, command, stored: first_of(snapshot, command, None)


def _loses_drains(decisions: Decisions) -> None:
    """A drain ends only in the tick in which its last task ended: one that begins idle is never woken."""
    busy: dict[tuple[str, str], bool] = {}

    def wrong(snapshot: Snapshot, now: float, decision: Decision) -> None:
        waiting = dict(snapshot.draining)
        for worker_id, name in waiting:
            is_busy = workers.held_of(snapshot, worker_id, name) > 0
            was_busy = busy.get((worker_id, name), False)
            busy[worker_id, name] = is_busy
            if not was_busy and name in snapshot.replicas.get(worker_id, {}):
                snapshot.draining.pop((worker_id, name))
        finish(snapshot, now, decision)
        snapshot.draining = waiting

    finish = place._finish_drains

    def reconcile(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(place, "_finish_drains", wrong):
            return place.reconcile(snapshot, now)

    decisions.reconcile = reconcile


def _strikes_do_not_count(decisions: Decisions) -> None:
    requeue = recover.requeue

    def wrong(*args: Any, strike: bool) -> Decision:
        return requeue(*args, strike=False)

    def lost_attempts(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(recover, "requeue", wrong):
            return recover.lost_attempts(snapshot, now)

    decisions.lost_attempts = lost_attempts


def _completes_cancelled(decisions: Decisions) -> None:
    """A late result of a cancelled task is taken."""
    ended: dict[str, Task] = {}
    cancel = decisions.cancel

    def remember(snapshot: Snapshot, now: float, command: Any, finished: Task | None) -> Decision:
        decision = cancel(snapshot, now, command, finished)
        ended[command.task_id] = decision.reply.task
        decision.orders = [pair for pair in decision.orders if not isinstance(pair[1], StopAttempt)]
        return decision

    def wrong(snapshot: Snapshot, now: float, message: Any) -> Decision:
        decision = record.report(snapshot, now, message)
        if isinstance(message, AttemptFinished) and message.task_id in ended:
            task = changed(ended[message.task_id], status=Status.COMPLETED)
            result = TaskResult(
                task_id=task.task_id,
                attempt=message.attempt,
                worker_id=message.worker_id,
                generated_text=message.generated_text,
                tokens_generated=message.tokens_generated,
                prompt_tokens=message.prompt_tokens,
                finish_reason=message.finish_reason,
                processing_s=message.processing_s,
                first_token_s=message.first_token_s,
            )
            decision.changes += [Save(task), Save(result)]
        return decision

    decisions.cancel, decisions.report = remember, wrong


def _event_numbers_repeat(decisions: Decisions) -> None:
    def wrong(snapshot: Snapshot) -> None:
        snapshot.events_next = max(1, snapshot.events_next - 1)

    decisions.loaded = wrong


def _forgets_running_tasks(decisions: Decisions) -> None:
    def wrong(snapshot: Snapshot) -> None:
        for tasks in snapshot.held.values():
            for task in list(tasks.values()):
                snapshot._take_out(task)

    decisions.loaded = wrong


def _unloads_before_loading(decisions: Decisions) -> None:
    """A migration drains its source as soon as it begins."""

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        decision = rebalance.advance(snapshot, now)
        plan = rebalance.active(snapshot)
        for move in plan.moves if plan is not None else ():
            source = (move.from_worker or "", move.model)
            if move.state == "loading" and source not in snapshot.draining:
                decision.changes.append(place.drain(snapshot, now, *source, place.MOVE))
        return decision

    decisions.advance = wrong


def _trusts_silent_workers(decisions: Decisions) -> None:
    """Nobody is ever lost."""
    decisions.lose = lambda snapshot, now: Decision()


def _forgets_held_slots(decisions: Decisions) -> None:
    def slots(snapshot: Snapshot, replica: Replica) -> int:
        return replica.slots if workers.takes_tasks(snapshot, replica) else 0

    decisions.schedule = _schedule_with(slots)


def _foresees_for_ever(decisions: Decisions) -> None:
    """A load whose order was lost is believed in until a report shows it."""

    def wrong(snapshot: Snapshot, now: float, message: Any) -> Decision:
        with _replaced(record, "_LOAD_FORESEEN_S", float("inf")):
            return record.report(snapshot, now, message)

    def still_so(snapshot: Snapshot, now: float, peer_id: str) -> Decision:
        with _replaced(record, "_LOAD_FORESEEN_S", float("inf")):
            return record.still_so(snapshot, now, peer_id)

    decisions.report, decisions.still_so = wrong, still_so


def _never_times_out(decisions: Decisions) -> None:
    time_out = decisions.time_out

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        decision = time_out(snapshot, now)
        held = {task_id for tasks in snapshot.held.values() for task_id in tasks}
        decision.changes = [c for c in decision.changes if c.record.task_id not in held]  # type: ignore[union-attr]
        return decision

    decisions.time_out = wrong


def _second_load_at_once(decisions: Decisions) -> None:
    """A replica that is being loaded counts as one that takes tasks."""

    def slots(snapshot: Snapshot, replica: Replica) -> int:
        counts = replica.state is ReplicaState.LOADING or workers.takes_tasks(snapshot, replica)
        return (
            (replica.slots or 1) - workers.held_of(snapshot, replica.worker_id, replica.model_name)
            if counts
            else 0
        )

    decisions.schedule = _schedule_with(slots)


def _ignores_the_share(decisions: Decisions) -> None:
    """Whoever the evidence is against is lost, however many."""

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(lose, "_allowed", lambda snapshot: 1_000):
            return lose.lose(snapshot, now)

    decisions.lose = wrong


def _sleeps_and_blames(decisions: Decisions) -> None:
    """The leader's own sleep counts as everybody's silence."""

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(lose, "STARVED_S", float("inf")):
            return lose.wake(snapshot, now)

    decisions.wake = wrong


def _believes_gossip(decisions: Decisions) -> None:
    """A rumour alone is evidence."""

    def wrong(snapshot: Snapshot, now: float) -> Decision:
        decision = lose.lose(snapshot, now)
        for peer_id, rumour in snapshot.rumours.items():
            if rumour.status == "failed" and peer_id not in snapshot.lost and snapshot.peers.get(peer_id):
                decision.changes.append(Lose(peer_id, now, "gossip says so", True))
        return decision

    decisions.lose = wrong


def _forgets_drains(decisions: Decisions) -> None:
    """They are in the leader's memory only."""
    decisions.loaded = lambda snapshot: snapshot.draining.clear()


def _drops_unheard_drains(decisions: Decisions) -> None:
    """A new leader takes a worker that it has not heard for one where the replica is gone."""

    def reconcile(snapshot: Snapshot, now: float) -> Decision:
        decision = place.reconcile(snapshot, now)
        for (worker_id, name), draining in snapshot.draining.items():
            if name not in snapshot.replicas.get(worker_id, {}) and worker_id not in snapshot.reports:
                decision.changes.append(Drop(draining))
        return decision

    decisions.reconcile = reconcile


def _gives_back_what_an_owner_unloads(decisions: Decisions) -> None:
    """A move that is given up ends every drain of its source."""

    def advance(snapshot: Snapshot, now: float) -> Decision:
        decision = rebalance.advance(snapshot, now)
        for change in list(decision.changes):
            if isinstance(change, Save) and isinstance(change.record, Plan):
                for move in change.record.moves:
                    draining = snapshot.draining.get((move.from_worker or "", move.model))
                    if move.state == "failed" and draining is not None:
                        decision.changes.append(Drop(draining))
        return decision

    decisions.advance = advance


def _requeues_the_lost_twice(decisions: Decisions) -> None:
    """Each of a lost worker's tasks is given a strike for its worker, and one for its peer."""

    def lost_attempts(snapshot: Snapshot, now: float) -> Decision:
        decision = recover.lost_attempts(snapshot, now)
        for i, change in enumerate(decision.changes):
            if isinstance(change, Save) and isinstance(change.record, Task):
                task = change.record
                if task.status is Status.QUEUED and "is lost" in task.requeued_because:
                    decision.changes[i] = Save(changed(task, strikes=task.strikes + 1))
        return decision

    decisions.lost_attempts = lost_attempts


def _retention_forgets_keys_of_live_tasks(decisions: Decisions) -> None:
    """The idempotency record goes with the task's first attempt."""
    submit = decisions.submit

    def wrong(*args: Any) -> Decision:
        decision = submit(*args)
        decision.changes = [
            c for c in decision.changes if not (isinstance(c, Save) and isinstance(c.record, Idempotency))
        ]
        return decision

    decisions.submit = wrong


def _retention_drops_live_tasks(decisions: Decisions) -> None:
    """What is forgotten is as many as are surplus, whether they have ended or not."""

    def wrong(tasks: Any) -> Decision:
        decision = retain.forget_tasks(tasks)
        for snapshot in seen[-1:]:
            held = [task for of in snapshot.held.values() for task in of.values()]
            decision.changes += [Drop(task) for task in held[:1]]
        return decision

    seen: list[Snapshot] = []
    decisions.loaded = seen.append
    decisions.forget_tasks = wrong


def _without_leaving(wrong: Callable[..., Decision]) -> Callable[..., Decision]:
    """A decision that knows of no host that leaves."""

    def decide(snapshot: Snapshot, *args: Any) -> Decision:
        leaving, snapshot.leaving = snapshot.leaving, {}
        try:
            return wrong(snapshot, *args)
        finally:
            snapshot.leaving = leaving

    return decide


def _loads_on_leaving_hosts(decisions: Decisions) -> None:
    decisions.reconcile = _without_leaving(decisions.reconcile)


def _moves_to_leaving_hosts(decisions: Decisions) -> None:
    """A plan that is under way goes on as it was made."""
    decisions.advance = _without_leaving(decisions.advance)


def _empties_nothing(decisions: Decisions) -> None:
    """Nothing new comes to a host that leaves, and nothing goes."""
    decisions.replan = _without_leaving(decisions.replan)


def _forgets_leaving_hosts(decisions: Decisions) -> None:
    """They are in the leader's memory only."""
    decisions.loaded = lambda snapshot: snapshot.leaving.clear()


def _plans_all_the_time(decisions: Decisions) -> None:
    """Who is there counts as changed for ever."""

    def wrong(snapshot: Snapshot, now: float) -> bool:
        return snapshot.peopled is not None and bool(snapshot.policy.auto_rebalance)

    def decide(snapshot: Snapshot, now: float, plan_id: str) -> Decision:
        with _replaced(replan, "_has_changed", wrong):
            return replan.replan(snapshot, now, plan_id)

    decisions.replan = decide


def _busy_models_stay(decisions: Decisions) -> None:
    def reconcile(snapshot: Snapshot, now: float) -> Decision:
        with _replaced(place, "KEPT_OUT_S", float("inf")):
            return place.reconcile(snapshot, now)

    decisions.reconcile = reconcile


BUGS: dict[str, Switch] = {
    "requeue_keeps_attempt": _requeue_keeps_attempt,
    "accepts_dead_results": _accepts_dead_results,
    "schedules_on_draining": _schedules_on_draining,
    "memory_ignores_loading": _memory_ignores_loading,
    "acknowledges_before_commit": _acknowledges_before_commit,
    "forgets_finished_keys": _forgets_finished_keys,
    "loses_drains": _loses_drains,
    "strikes_do_not_count": _strikes_do_not_count,
    "completes_cancelled": _completes_cancelled,
    "event_numbers_repeat": _event_numbers_repeat,
    "forgets_running_tasks": _forgets_running_tasks,
    "unloads_before_loading": _unloads_before_loading,
    "trusts_silent_workers": _trusts_silent_workers,
    "forgets_held_slots": _forgets_held_slots,
    "foresees_for_ever": _foresees_for_ever,
    "held_tasks_never_time_out": _never_times_out,
    "runs_on_loading_replicas": _second_load_at_once,
    "ignores_the_share": _ignores_the_share,
    "sleeps_and_blames": _sleeps_and_blames,
    "believes_gossip": _believes_gossip,
    "forgets_drains": _forgets_drains,
    "drops_unheard_drains": _drops_unheard_drains,
    "gives_back_what_an_owner_unloads": _gives_back_what_an_owner_unloads,
    "requeues_the_lost_twice": _requeues_the_lost_twice,
    "drops_keys_of_live_tasks": _retention_forgets_keys_of_live_tasks,
    "retention_drops_live_tasks": _retention_drops_live_tasks,
    "loads_on_leaving_hosts": _loads_on_leaving_hosts,
    "moves_to_leaving_hosts": _moves_to_leaving_hosts,
    "empties_nothing": _empties_nothing,
    "forgets_leaving_hosts": _forgets_leaving_hosts,
    "plans_all_the_time": _plans_all_the_time,
    "busy_models_stay": _busy_models_stay,
}
