"""Long polls for a task's next stage."""

from __future__ import annotations

from typing import Any

import trio

from peer.errors import Unavailable
from peer.state import command as asks
from peer.state.task import Status, Task, stage
from tests.decide.build import failed, replica
from tests.leader.rig import Rig, leading


async def past(rig: Rig, task: Task, stage: int, wait_s: float = 10.0) -> asks.TaskView:
    ask = asks.GetTask(task_id=task.task_id, wait_s=wait_s, past=stage)
    view: asks.TaskView = await rig.leader.call(ask)
    return view


async def test_a_poll_past_a_stage_is_answered_when_an_attempt_is_assigned_or_ends(
    autojump_clock: Any,
) -> None:
    async with leading(worker=False) as rig:
        task = (await rig.submit()).task
        seen: list[tuple[int, Status, str]] = []

        async def follow() -> None:
            view = asks.TaskView(task=task)
            while view.task.status is not Status.COMPLETED:
                before = stage(view.task)
                view = await past(rig, task, before)
                assert view.task.status is Status.COMPLETED or stage(view.task) > before
                seen.append((stage(view.task), view.task.status, view.peer_id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.sleep(1.0)
            assert not seen
            await rig.hear(replica("echo"))
            await trio.sleep(0.01)
            assert seen == [(1, Status.ASSIGNED, "p1")]
            await rig.leader.report(failed(rig.snapshot.tasks[task.task_id], 0.0))
            await trio.sleep(0.01)
            assert seen[1:] == [(2, Status.QUEUED, "")]
            await rig.hear(replica("echo"))
            await trio.sleep(0.01)
            assert seen[2:] == [(3, Status.ASSIGNED, "p1")]
            await rig.finish(rig.snapshot.tasks[task.task_id])
        assert [status for _, status, _ in seen[3:]] == [Status.COMPLETED]


async def test_a_poll_past_an_old_stage_is_answered_at_once_and_others_at_their_time(
    autojump_clock: Any,
) -> None:
    async with leading() as rig:
        task = await rig.running()
        began = trio.current_time()
        assert (await past(rig, task, 0)).task.attempt == 1
        assert trio.current_time() == began
        assert (await past(rig, task, 1, wait_s=3.0)).task.status is Status.ASSIGNED
        assert trio.current_time() == began + 3.0


async def test_who_polls_is_told_when_this_peer_leads_no_more(autojump_clock: Any) -> None:
    told: list[str] = []

    async def follow(rig: Rig, task: Task) -> None:
        try:
            await past(rig, task, 1)
        except Unavailable as error:
            told.append(error.code)

    async with trio.open_nursery() as nursery:
        async with leading() as rig:
            task = await rig.running()
            nursery.start_soon(follow, rig, task)
            await trio.sleep(0.1)
            rig.scope.cancel()
        await trio.sleep(0.1)
        assert told == ["not_leading"]
