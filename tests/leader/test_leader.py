"""The leader's shell: answered only when durable, one commit for many, and nothing false when the store fails."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from peer import answers as answers_module
from peer import deciding, limits
from peer.errors import (
    Ambiguous,
    BitinglipError,
    Conflict,
    Fenced,
    NotFound,
    StoreBroken,
    StoreError,
    Unavailable,
)
from peer.ports import LEADER_KEY, Delete
from peer.state import command as asks
from peer.state.key import ApiKey
from peer.state.order import StopAttempt
from peer.state.task import Status
from tests.decide.build import CATALOGUE, POLICY, failed, finished, replica, started
from tests.leader.memory_store import MemoryStore
from tests.leader.rig import Counting, Rig, VirtualClock, ask, leading


async def gather(*calls: Any) -> list[Any]:
    """Answers and errors of calls made at once."""
    results: list[Any] = [None] * len(calls)

    async def one(index: int, call: Any) -> None:
        try:
            results[index] = await call
        except BitinglipError as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(one, index, call)
    return results


async def test_what_comes_during_a_commit_shares_the_next_one(autojump_clock: Any) -> None:
    async with leading(worker=False) as rig:
        rig.store.delay_s = 0.1
        before = len(rig.store.commits)
        views = await gather(*(rig.submit() for _ in range(50)))
        assert len({view.task.task_id for view in views}) == 50
        assert len(rig.store.commits) - before <= 4


async def test_large_prompts_do_not_share_a_giant_transaction(autojump_clock: Any) -> None:
    async with leading(worker=False, queue_bytes_max=10**9) as rig:
        text = {"prompt": "x" * 2_000_000}
        biggest = 0
        commit = rig.store.commit

        async def watched(epoch: int, writes: Any) -> int:
            nonlocal biggest
            biggest = max(biggest, sum(len(getattr(write, "value", b"")) for write in writes))
            revision: int = await commit(epoch, writes)
            return revision

        rig.store.commit = watched
        rig.store.delay_s = 0.01
        await gather(*(rig.submit(parameters=text) for _ in range(20)))
        assert biggest < 2 * limits.BODY_BYTES_MAX + 100_000


async def test_nobody_is_answered_and_nothing_ordered_before_it_is_durable(autojump_clock: Any) -> None:
    async with leading() as rig:
        rig.store.delay_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.submit)
            await trio.sleep(0.5)
            assert rig.snapshot.queued + rig.leader.held_tasks() == 1  # decided, not durable
            assert rig.runs == []
            with trio.move_on_after(0.3) as too_early:
                await rig.leader.call(asks.GetStatus())
            assert too_early.cancelled_caught  # a query waits too
        assert any(key.startswith("task/") for key in rig.store.data)
        assert len(rig.runs) == 1


async def test_a_cancelled_callers_command_is_done(autojump_clock: Any) -> None:
    async with leading() as rig:
        rig.store.delay_s = 1.0
        with trio.move_on_after(0.1):
            await rig.submit()
        await trio.sleep(3)
        page = await rig.leader.call(asks.ListTasks())
        assert (page.total, page.tasks[0].status) == (1, Status.ASSIGNED)


async def test_waiters_hear_of_the_end_or_their_time_is_up(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running()
        assert (await rig.view(task, wait_s=5)).task.status is Status.ASSIGNED
        with trio.move_on_after(1):
            await rig.view(task, wait_s=5)
        async with trio.open_nursery() as nursery:
            seen: list[asks.TaskView] = []

            async def wait() -> None:
                seen.append(await rig.view(task, wait_s=100))

            for _ in range(3):
                nursery.start_soon(wait)
            await trio.sleep(1)
            await rig.finish(task)
        assert [view.result.generated_text for view in seen if view.result] == ["text"] * 3
        assert rig.leader._answers._waiting == {}
        assert (await rig.view(task, wait_s=100)).task.status is Status.COMPLETED


async def test_a_long_result_is_read_from_the_store(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running()
        await rig.finish(task, generated_text="x" * 20_000)
        view = await rig.view(task)
        assert view.result is not None
        assert len(view.result.generated_text) == 20_000


async def test_only_so_many_finished_tasks_stay_in_memory(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_RECENT_MAX", 2)
    async with leading() as rig:
        tasks = []
        for _ in range(4):
            tasks.append(await rig.running())
            await rig.finish(tasks[-1])
        assert len(rig.leader._answers._recent) == 2
        assert [(await rig.view(task)).task.status for task in tasks] == [Status.COMPLETED] * 4


async def test_a_repeated_submission_gets_the_first_task(autojump_clock: Any) -> None:
    async with leading() as rig:
        again = ask(idempotency_key="i", body_digest="d")
        first, second = await gather(rig.leader.call(again), rig.leader.call(again))
        assert sorted((first.replayed, second.replayed)) == [False, True]
        assert first.view.task.task_id == second.view.task.task_id
        await trio.sleep(0.01)
        await rig.finish(rig.snapshot.tasks[first.view.task.task_id])
        rig.leader._answers._recent.clear()
        third = await rig.leader.call(again)  # known to the store alone
        assert (third.replayed, third.view.task.status) == (True, Status.COMPLETED)
        with pytest.raises(Conflict):
            await rig.leader.call(ask(idempotency_key="i", body_digest="e"))
        assert len(rig.runs) == 1


async def test_a_cancellation_in_the_batch_that_ended_the_task_is_a_conflict(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running()
        rig.store.delay_s = 0.1
        cancel = asks.CancelTask(task_id=task.task_id)
        await rig.leader.report(finished(task, rig.clock.wall()))
        (error,) = await gather(rig.leader.call(cancel))
        assert isinstance(error, Conflict)
        other = (await rig.submit()).task
        both = await gather(*(rig.leader.call(asks.CancelTask(task_id=other.task_id)) for _ in range(2)))
        assert sorted(type(each).__name__ for each in both) == ["Conflict", "TaskView"]
        with pytest.raises(Conflict):
            await rig.leader.call(cancel)
        with pytest.raises(NotFound):
            await rig.leader.call(asks.CancelTask(task_id="task-0"))


@pytest.mark.parametrize("error", [StoreBroken("disk"), Ambiguous("time-out"), Fenced("other")])
async def test_a_store_that_fails_ends_it_and_nobody_gets_a_false_answer(
    error: StoreError, autojump_clock: Any
) -> None:
    """Not the caller, not the next one, not a reader who waited for the lock; and nothing is ordered."""
    answers: list[Any] = []
    rigs: list[Rig] = []
    with pytest.RaisesGroup(pytest.RaisesGroup(type(error)), flatten_subgroups=False):
        async with leading() as rig:
            rigs.append(rig)
            busy = await rig.running(timeout_s=1_000)
            rig.store.delay_s = 0.5
            rig.store.fail = error

            async def all_at_once() -> None:
                answers.extend(
                    await gather(
                        rig.submit(),
                        late(rig.submit()),
                        late(rig.leader.call(asks.GetStatus())),
                        late(rig.leader.call(asks.ListTasks())),
                        late(rig.view(busy)),
                        rig.view(busy, wait_s=100),
                    )
                )

            async def late(call: Any) -> Any:
                await trio.sleep(0.2)
                return await call

            with trio.CancelScope(shield=True):
                await all_at_once()
    assert [type(answer) for answer in answers] == [Unavailable] * 6
    assert [answer.code for answer in answers[:2]] == ["ambiguous", "not_leading"]
    rig = rigs[0]
    assert len(rig.runs) == 1
    with pytest.raises(Unavailable):
        await rig.submit()
    with pytest.raises(Unavailable, match="does not lead"):
        await rig.leader.report(started(busy_of(rig), 0.0))


def busy_of(rig: Rig) -> Any:
    return next(iter(rig.snapshot.held["w1"].values()))


async def test_a_commit_is_tried_again_until_its_outcome_is_known(autojump_clock: Any) -> None:
    async with leading() as rig:
        for fates in (["unsent"], ["lost"], ["done"], ["lost", "unsent", "done", "unsent"]):
            before = len(rig.store.commits)
            rig.store.fates = list(fates)
            task = (await rig.submit()).task
            assert rig.store.fates == []
            assert f"task/{task.task_id}" in rig.store.data
            assert len(rig.store.commits) == before + 1, fates
        assert (await rig.leader.call(asks.GetStatus())) is not None


@pytest.mark.parametrize("error", [Ambiguous("time-out"), Unavailable("not sent")])
async def test_a_commit_that_stays_unknown_ends_it_in_time(error: Any, autojump_clock: Any) -> None:
    with pytest.RaisesGroup(pytest.RaisesGroup(type(error))):
        async with leading() as rig:
            began = trio.current_time()
            rig.store.fail = error
            with pytest.raises(Unavailable) as caught, trio.CancelScope(shield=True):
                await rig.submit()
            assert caught.value.code == "ambiguous"
            took_s = trio.current_time() - began
            assert limits.COMMIT_S_MAX - 1 < took_s <= limits.COMMIT_S_MAX
    assert limits.COMMIT_S_MAX < limits.COMMAND_S_MAX  # the caller learns of it from here


async def test_a_fence_ends_it_at_once(autojump_clock: Any) -> None:
    with pytest.RaisesGroup(pytest.RaisesGroup(Fenced)):
        async with leading() as rig:
            rig.store.fates = ["lost"]
            began = trio.current_time()
            del rig.store.data[LEADER_KEY]
            with pytest.raises(Unavailable), trio.CancelScope(shield=True):
                await rig.submit()
            assert trio.current_time() - began < 1.0


async def test_another_epoch_ends_it(autojump_clock: Any) -> None:
    with pytest.RaisesGroup(pytest.RaisesGroup(Fenced)):
        async with leading() as rig:
            await rig.store.txn([], [Delete(LEADER_KEY)])
            with pytest.raises(Unavailable), trio.CancelScope(shield=True):
                await rig.submit()


async def test_a_store_that_takes_too_long_is_ambiguous(autojump_clock: Any) -> None:
    async with leading() as rig:
        rig.store.delay_s = 100
        with pytest.raises(Unavailable) as caught:
            await rig.submit()
        assert caught.value.code == "ambiguous"


async def test_a_full_inbox_refuses(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMMANDS_WAITING_MAX", 2)
    async with leading() as rig:
        rig.store.delay_s = 1
        answers = await gather(*(rig.submit() for _ in range(6)))
        assert {a.code for a in answers if isinstance(a, BitinglipError)} == {"overloaded"}


async def test_evidence_that_found_no_room_does_not_come_after_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is back would be called dead by what was said of it before."""
    monkeypatch.setattr(limits, "COMMANDS_WAITING_MAX", 1)
    rig = Rig(MemoryStore(), VirtualClock(), POLICY, Counting())
    await rig.begin()
    rig.leader.rumour("p2", "alive")
    rig.leader.linked("p2", up=False, dead=True)
    assert len(rig.leader._late_evidence) == 1
    rig.leader._inbox.receive_nowait()
    rig.leader.linked("p2", up=True)
    assert rig.leader._late_evidence == {}


async def test_stopping_takes_nothing_new_and_begins_nothing(autojump_clock: Any) -> None:
    async with leading(worker=False) as rig:
        await rig.submit()
        rig.leader.refuse_new("stopping")
        with pytest.raises(Unavailable, match="stopping"):
            await rig.submit()
        await rig.hear(replica("echo"))
        assert rig.runs == []


async def test_a_bug_costs_one_command_or_report(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    async with leading() as rig:
        task = await rig.running()
        with monkeypatch.context() as patched:
            patched.setattr(deciding.record, "report", broken)
            patched.setattr(deciding.keys, "revoke", broken)
            await rig.finish(task)
            with pytest.raises(BitinglipError, match="internal error"):
                await rig.leader.call(asks.RevokeKey(key_id="k"))
        await rig.finish(task)
        assert (await rig.view(task)).task.status is Status.COMPLETED


async def test_an_order_that_cannot_be_delivered_is_decided_anew(autojump_clock: Any) -> None:
    async with leading(beats=False) as rig:
        rig.link.down = True
        task = await rig.running()
        rig.link.down = False
        for _ in range(5):
            await rig.hear(replica("echo"))
            await trio.sleep(1)
        assert [run.attempt for run in rig.runs] == [2]
        assert (await rig.view(task)).task.strikes == 1


async def test_a_failed_attempt_restarts_its_stream(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running()
        items: list[Any] = []

        async def read() -> None:
            async with rig.cluster.stream(task.task_id) as stream:
                async for item in stream:
                    items.append(item)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.1)
            rig.streams.publish(task.task_id, 1, "ab", 2)
            await trio.sleep(0.1)
            await rig.leader.report(failed(task, 0.0))
            await rig.hear(replica("echo"))
            await trio.sleep(0.1)
            rig.streams.publish(task.task_id, 2, "cd", 2)
            await rig.finish(rig.snapshot.tasks[task.task_id], generated_text="cd")
        assert [type(item).__name__ for item in items] == [
            "StreamToken",
            "StreamRestart",
            "StreamToken",
            "StreamEnd",
        ]
        assert items[-1].view.result.generated_text == "cd"
        async with rig.cluster.stream(task.task_id) as stream:  # a late reader
            again = [item async for item in stream]
        assert [getattr(item, "text", None) for item in again] == ["cd", None]
        other = await rig.running()
        await rig.leader.call(asks.CancelTask(task_id=other.task_id))
        async with rig.cluster.stream(other.task_id) as stream:
            assert [type(item).__name__ async for item in stream] == ["StreamEnd"]
        async with rig.cluster.stream((await rig.running()).task_id):
            pass  # a reader who leaves at once
        with pytest.raises(NotFound):
            async with rig.cluster.stream("task-0"):
                pass
        assert "task-0" not in rig.streams._streams


async def test_a_deadline_frees_the_slot(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running(timeout_s=2)
        view = await rig.view(task, wait_s=10)
        assert (view.task.status, view.task.error and view.task.error.code) == (Status.FAILED, "timeout")
        assert rig.clock.now() < 2.5
        await trio.sleep(0.01)
        assert any(isinstance(order, StopAttempt) for order in rig.link.sent)


async def test_every_command_and_query_is_answered(autojump_clock: Any) -> None:
    async with leading() as rig:
        call = rig.leader.call
        key = ApiKey(key_id="a", owner="o", scopes=("read",), secret_sha256="", created_at=0.0)
        assert await call(asks.CreateKey(key=key)) == key == rig.cluster.key("a")
        assert (await call(asks.RevokeKey(key_id="a"))).revoked_at
        assert len(await call(asks.ListKeys())) == 1
        wish = asks.AssignModel(model_name="echo", worker_ids=("w1",), preload=False, priority=5)
        assert (await call(wish)).placed[0].status == "loaded"
        assert len((await call(asks.ListAssignments()))[0].wishes) == 1
        unload = asks.UnloadModel(model_name="echo", worker_ids=(), force=False)
        assert (await call(unload)).affected_workers == ("w1",)
        assert (await call(asks.RestartWorker(worker_id="w1"))).worker_id == "w1"
        plan = await call(asks.Rebalance(strategy="load_balanced", force=False, dry_run=False))
        assert await call(asks.GetPlan(rebalance_id=plan.rebalance_id)) == plan
        with pytest.raises(NotFound):
            await call(asks.GetPlan(rebalance_id="none"))
        assert [w.worker.worker_id for w in await call(asks.ListWorkers())] == ["w1"]
        assert (await call(asks.GetWorker(worker_id="w1"))).worker.worker_id == "w1"
        assert len(await call(asks.ListModels())) == len(rig.cluster.models()) == len(CATALOGUE)
        assert (await call(asks.GetStatus())).leader == "p1"
        assert (await call(asks.GetMetrics(timeframe="1h"))).total_tasks == 0
        with pytest.raises(TypeError):
            await call("what")
        rig.leader.configure(POLICY, {})
        with pytest.raises(NotFound):
            await rig.submit()
        assert await rig.cluster.count_tokens("echo", {}) is None
        assert rig.cluster.ready() == "this peer is starting"


async def test_a_list_shows_the_start_that_only_memory_knows(autojump_clock: Any) -> None:
    async with leading() as rig:
        task = await rig.running()
        await rig.leader.report(started(task, rig.clock.wall()))
        await trio.sleep(0.01)
        (listed,) = (await rig.leader.call(asks.ListTasks(status="running", worker_id="w1"))).tasks
        assert listed.started_at is not None
        assert (await rig.leader.call(asks.ListTasks(status="queued"))).total == 0


async def test_a_stopped_leader_answers_those_who_wait(autojump_clock: Any) -> None:
    store = MemoryStore()
    async with leading(store) as rig:
        store.delay_s = 10
        async with trio.open_nursery() as nursery:
            got: list[Any] = []

            async def submit() -> None:
                with trio.CancelScope(shield=True):
                    got.extend(await gather(rig.submit()))

            nursery.start_soon(submit)
            await trio.sleep(1)
            rig.scope.cancel()
    assert [error.code for error in got] == ["ambiguous"]
