"""The clients: a right cluster in memory satisfies them, whatever it refuses; each way of being wrong is noticed."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from peer.errors import BitinglipError, Compacted, Conflict, NotFound, Overloaded, Unavailable
from peer.state import command as asks
from peer.state.event import Event
from peer.state.task import TERMINAL, Status, Task, TaskResult
from simulations.errors import InvariantViolated, SimulatorError
from simulations.scenario import Op, Scenario
from simulations.world.cards import expected_text
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.workload import Clients, draw_ops
from tests.simulations.noticing import require_noticed
from tests.simulations.stream_setup import stream_of

PEERS = ("h1", "h2", "h3")
QUEUED_S, TOKENS_PER_S = 0.4, 40.0


class Core:
    """A cluster's whole truth, with one scheduler that never fails but re-queues each third task once."""

    def __init__(self) -> None:
        self.views: dict[str, asks.TaskView] = {}
        self.commands: dict[str, asks.SubmitTask] = {}
        self.keys: dict[str, str] = {}
        self.events: list[Event] = []

    def submit(self, command: asks.SubmitTask) -> asks.Submitted:
        known = self.keys.get(command.idempotency_key) if command.idempotency_key else None
        if known is not None:
            return asks.Submitted(view=self.get(known), replayed=True)
        now = trio.current_time()
        task_id = f"t{len(self.views)}"
        task = Task(
            task_id=task_id,
            task_type=command.task_type,
            model_name=command.model_name,
            priority=command.priority,
            timeout_s=command.timeout_s,
            created_at=now,
            deadline=now + command.timeout_s,
            idempotency_key=command.idempotency_key,
        )
        self.keys[command.idempotency_key] = task_id
        self.commands[task_id] = command
        self.views[task_id] = asks.TaskView(task=task)
        return asks.Submitted(view=self.views[task_id])

    def step(self) -> None:
        for task_id in self.views:
            self.get(task_id)

    def get(self, task_id: str) -> asks.TaskView:
        view = self.views.get(task_id)
        if view is None:
            raise NotFound(f"there is no task {task_id}")
        if view.task.status in TERMINAL:
            return view
        age_s = trio.current_time() - view.task.created_at - QUEUED_S
        attempt = 1
        if int(task_id[1:]) % 3 == 0 and age_s > 0.5:  # requeued
            age_s, attempt = age_s - 1.0, 2
        if age_s >= self.commands[task_id].parameters["max_tokens"] / TOKENS_PER_S:
            self.complete(task_id, attempt)
        elif age_s >= 0.0:
            self._become(task_id, Status.RUNNING, attempt)
        elif attempt == 2:
            self._become(task_id, Status.QUEUED, 1)
        return self.views[task_id]

    def complete(self, task_id: str, attempt: int) -> None:
        text = expected_text(self.commands[task_id].parameters)
        result = TaskResult(
            task_id=task_id,
            attempt=attempt,
            worker_id="h1-gpu0",
            generated_text=text,
            tokens_generated=1,
            prompt_tokens=1,
            finish_reason="length",
            processing_s=1.0,
            first_token_s=0.1,
        )
        self._become(task_id, Status.COMPLETED, attempt, result)
        self.tell("task_completed", task_id=task_id)

    def cancel(self, task_id: str) -> asks.TaskView:
        view = self.get(task_id)
        if view.task.status in TERMINAL:
            raise Conflict("it is finished", details={"status": view.task.status.value})
        self._become(task_id, Status.CANCELLED, view.task.attempt)
        self.tell("task_cancelled", task_id=task_id)
        return self.views[task_id]

    def tell(self, name: str, **data: Any) -> None:
        self.events.append(
            Event(id=len(self.events) + 1, event=name, timestamp=trio.current_time(), data=data)
        )

    def _become(self, task_id: str, status: Status, attempt: int, result: TaskResult | None = None) -> None:
        task = msgspec.structs.replace(self.views[task_id].task, status=status, attempt=attempt)
        self.views[task_id] = asks.TaskView(task=task, result=result)


class Peer:
    """A peer's API on the one truth: slow at times, and refusing with `refusing` as its chance."""

    def __init__(self, core: Core, rng: random.Random, peer_id: str, refusing: float = 0.0) -> None:
        self.core, self.rng, self.peer_id, self.refusing = core, rng, peer_id, refusing

    async def call(self, request: Any) -> Any:
        await trio.sleep(self.rng.expovariate(20.0))
        if self.rng.random() < self.refusing:
            raise Unavailable("not led", code="no_leader", retry_after_s=1.0)
        answer = await self.carry_out(request)
        await trio.sleep(self.rng.expovariate(20.0))
        if self.rng.random() < self.refusing:
            if not isinstance(request, asks.Command):
                raise Overloaded("too much")
            raise Unavailable("who knows", code="ambiguous", retry_after_s=0.5)
        return answer

    async def carry_out(self, request: Any) -> Any:
        self.core.step()
        match request:
            case asks.SubmitTask():
                return self.core.submit(request)
            case asks.CancelTask():
                return self.core.cancel(request.task_id)
            case asks.GetTask():
                end_at = trio.current_time() + request.wait_s
                while (  # noqa: ASYNC110 - nothing announces it
                    self.core.get(request.task_id).task.status not in TERMINAL
                    and trio.current_time() < end_at
                ):
                    await trio.sleep(0.1)
                return self.core.get(request.task_id)
            case asks.ListTasks():
                tasks = tuple(view.task for view in self.core.views.values())
                return asks.TaskPage(tasks=tasks, total=len(tasks))
        raise Conflict("not now")

    stream = stream_of

    @asynccontextmanager
    async def events(self, since: int | None) -> AsyncIterator[AsyncIterator[Event]]:
        async with aclosing(self._events(len(self.core.events) if since is None else since)) as events:
            yield events

    def bend(self, event: Event) -> list[Event]:
        return [event]

    async def _events(self, since: int) -> AsyncGenerator[Event, None]:
        while True:
            self.core.step()
            for event in self.core.events[since:]:
                since = event.id
                for bent in self.bend(event):
                    yield bent
            await trio.sleep(0.05)
            if self.rng.random() < self.refusing / 5:
                raise Overloaded("too far behind", code="slow_reader")


Make = Callable[[Core, random.Random, str], Peer]


def scenario(seed: int = 1, **more: Any) -> Scenario:
    drawn = Scenario(seed=seed, hosts=3, fault_s=40.0, **more)
    return msgspec.structs.replace(drawn, ops=draw_ops(random.Random(seed), drawn, PEERS))


def run(drawn: Scenario, make: Make = Peer, **more: Any) -> Clients:
    async def main(world: World) -> Clients:
        core = Core()
        peers = {name: make(core, world.rng(name), name) for name in PEERS}
        clients = Clients(world, peers.get, drawn, **more)
        await clients.run()
        await clients.finish()
        clients.check()
        return clients

    return run_world(main, drawn.seed)


# ---------------------------------------------------------------- what is drawn


def test_what_is_drawn_is_in_order_and_refers_to_submits() -> None:
    kinds: set[str] = set()
    for drawn in map(scenario, range(40)):
        assert [op.at_s for op in drawn.ops] == sorted(op.at_s for op in drawn.ops)
        assert all(0.0 <= op.at_s <= drawn.fault_s for op in drawn.ops)
        kinds |= {op.kind for op in drawn.ops}
        for op in drawn.ops:
            if op.kind in ("get", "wait", "cancel"):
                assert drawn.ops[op.task].kind == "submit"
            if op.kind == "submit" and op.task >= 0:  # again
                first = drawn.ops[op.task]
                assert (first.key, first.model, first.tokens) == (op.key, op.model, op.tokens)
                assert op.key
        assert drawn == scenario(drawn.seed)
    assert kinds == {
        "submit", "get", "wait", "cancel", "list", "events", "stream", "assign", "unload", "rebalance",
        "restart", "drain", "undrain", "transfer",
    }  # fmt: skip


# ---------------------------------------------------------------- a right cluster


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("refusing", [0.0, 0.3])
def test_a_right_cluster_satisfies_them(seed: int, refusing: float) -> None:
    clients = run(scenario(seed), lambda core, rng, name: Peer(core, rng, name, refusing))
    assert clients.parameters
    assert clients.checks["linearizable"] == len(clients.parameters)
    assert clients.checks["read_to_its_end"] == len(clients.parameters)
    assert clients.marks
    if refusing:
        assert clients.sometimes["submit_tried_again"]


def test_much_of_it_is_reached() -> None:
    seen: set[str] = set()
    for seed in range(8):
        seen |= set(run(scenario(seed), lambda core, rng, name: Peer(core, rng, name, 0.2)).sometimes)
    assert seen >= {
        "submit_acknowledged", "submit_replayed", "submit_unknown", "cancel_done", "cancel_too_late",
        "cancel_unknown", "client_vanished", "wait_ended", "events_resumed", "rebalance_refused",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_history() -> None:
    first, again = (run(scenario(3), lambda c, r, n: Peer(c, r, n, 0.2)) for _ in range(2))
    assert first.history.operations == again.history.operations
    assert first.sometimes == again.sometimes


def test_peers_that_are_away_and_processes_that_freeze_and_die() -> None:
    drawn = scenario(2)

    async def main(world: World) -> Clients:
        core = Core()
        lives = {name: Incarnation(world, name, 1) for name in PEERS}
        for life in lives.values():
            world.spawn(life.run, trio.sleep_forever)
        peers = {name: Peer(core, world.rng(name), name) for name in PEERS}

        def listening(name: str) -> Peer | None:
            return peers[name] if lives[name].alive and not lives[name].frozen else None

        async def faults() -> None:
            await trio.sleep(5.0)
            lives["h1"].freeze_for(8.0)
            await trio.sleep(15.0)
            lives["h2"].crash()
            await trio.sleep(5.0)
            lives["h2"] = Incarnation(world, "h2", 2)
            world.spawn(lives["h2"].run, trio.sleep_forever)

        world.spawn(faults)
        clients = Clients(world, listening, drawn, process_of=lives.get)
        await clients.run()
        await clients.finish()
        clients.check()
        return clients

    assert run_world(main, 2).checks["linearizable"]


def test_an_unknown_operation_is_the_simulators_fault() -> None:
    bad = Scenario(seed=1, hosts=3, ops=(Op(at_s=1.0, kind="dance", peer="h1"),))
    with pytest.raises(SimulatorError):
        run(bad)


# ---------------------------------------------------------------- wrong ones


class Wrong(Peer):
    """Right but for one thing."""


class Loses(Wrong):
    async def carry_out(self, request: Any) -> Any:
        if isinstance(request, asks.GetTask) and request.task_id == "t2":
            raise NotFound("lost")
        return await super().carry_out(request)


class ChangesResult(Wrong):
    async def carry_out(self, request: Any) -> Any:
        answer = await super().carry_out(request)
        if isinstance(request, asks.GetTask) and answer.result is not None and self.peer_id == "h2":
            result = msgspec.structs.replace(answer.result, processing_s=2.0)
            return msgspec.structs.replace(answer, result=result)
        return answer


class MixesResults(Wrong):
    async def carry_out(self, request: Any) -> Any:
        answer = await super().carry_out(request)
        if isinstance(request, asks.GetTask) and answer.result is not None and answer.task.task_id == "t2":
            result = msgspec.structs.replace(answer.result, generated_text="another's")
            return msgspec.structs.replace(answer, result=result)
        return answer


class StaleReads(Wrong):
    """This peer answers what was true when it last had contact."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.copies: dict[str, asks.TaskView] = {}

    async def carry_out(self, request: Any) -> Any:
        if self.peer_id == "h3" and isinstance(request, asks.GetTask):
            return self.copies.setdefault(request.task_id, self.core.get(request.task_id))
        return await super().carry_out(request)


class MakesTwo(Wrong):
    async def carry_out(self, request: Any) -> Any:
        if isinstance(request, asks.SubmitTask):
            self.core.keys.clear()
        return await super().carry_out(request)


class CompletesCancelled(Wrong):
    async def carry_out(self, request: Any) -> Any:
        for task_id, view in self.core.views.items():
            if view.task.status is Status.CANCELLED:
                self.core.complete(task_id, max(1, view.task.attempt))
        return await super().carry_out(request)


class CancelsLate(Wrong):
    """Says that it cancelled what was finished, or what it does not cancel."""

    async def carry_out(self, request: Any) -> Any:
        if isinstance(request, asks.CancelTask):
            task = self.core.get(request.task_id).task
            return asks.TaskView(task=msgspec.structs.replace(task, status=Status.CANCELLED))
        return await super().carry_out(request)


class DoesWhatItRefuses(Wrong):
    async def call(self, request: Any) -> Any:
        answer = await super().call(request)
        if isinstance(request, asks.CancelTask):
            raise Unavailable("not led, it says", code="no_leader")
        return answer


class Cancels(Wrong):
    """Without having been asked to."""

    async def carry_out(self, request: Any) -> Any:
        if "t3" in self.core.views and self.core.get("t3").task.status not in TERMINAL:
            self.core.cancel("t3")
        return await super().carry_out(request)


class SkipsEvent(Wrong):
    def bend(self, event: Event) -> list[Event]:
        return [] if event.id == 5 else [event]


class RepeatsEvent(Wrong):
    def bend(self, event: Event) -> list[Event]:
        return [event, event] if event.id == 5 else [event]


class SwapsEvents(Wrong):
    def bend(self, event: Event) -> list[Event]:
        if event.id in (4, 5):
            return [] if event.id == 4 else [event, self.core.events[3]]
        return [event]


class ChangesEvent(Wrong):
    def bend(self, event: Event) -> list[Event]:
        other = self.peer_id == "h2" and event.id == 2
        return [msgspec.structs.replace(event, data={"other": 1}) if other else event]


class EndsEventsEarly(Wrong):
    def bend(self, event: Event) -> list[Event]:
        return [event] if self.peer_id == "h1" or event.id <= 5 else []


class ForgetsEvents(Wrong):
    @asynccontextmanager
    async def events(self, since: int | None) -> AsyncIterator[AsyncIterator[Event]]:
        if since is not None and trio.current_time() > 10.0:
            raise Compacted("gone")
        async with super().events(since) as events:
            yield events


class BreaksDown(Wrong):
    async def carry_out(self, request: Any) -> Any:
        if isinstance(request, asks.ListTasks | asks.GetTask):
            raise BitinglipError("an internal error; it has been logged")
        return await super().carry_out(request)


class ListsTwice(Wrong):
    async def carry_out(self, request: Any) -> Any:
        page = await super().carry_out(request)
        if isinstance(request, asks.ListTasks):
            return asks.TaskPage(tasks=(*page.tasks, *page.tasks), total=page.total)
        return page


class ListsStale(Wrong):
    async def carry_out(self, request: Any) -> Any:
        page = await super().carry_out(request)
        if isinstance(request, asks.ListTasks):
            tasks = tuple(
                msgspec.structs.replace(task, status=Status.QUEUED, attempt=0) for task in page.tasks
            )
            return asks.TaskPage(tasks=tasks, total=page.total)
        return page


class RefusesSubmits(Wrong):
    async def carry_out(self, request: Any) -> Any:
        if isinstance(request, asks.SubmitTask):
            raise NotFound("no such model")
        return await super().carry_out(request)


WRONG = {
    Loses: "linearizable",
    ChangesResult: "linearizable",
    MixesResults: "result_is_of_its_task",
    StaleReads: "linearizable",
    MakesTwo: "linearizable",
    CompletesCancelled: "linearizable",
    CancelsLate: "linearizable",
    DoesWhatItRefuses: "linearizable",
    Cancels: "linearizable",
    SkipsEvent: "events_without_gap",
    RepeatsEvent: "events_without_gap",
    SwapsEvents: "events_without_gap",
    ChangesEvent: "events_never_change",
    EndsEventsEarly: "events_arrive",
    ForgetsEvents: "compacted_only_if_so",
    BreaksDown: "no_internal_error",
    ListsTwice: "lists_name_each_once",
    ListsStale: "linearizable",
    RefusesSubmits: "submits_are_accepted",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_clusters_are_noticed(wrong: type[Wrong]) -> None:
    require_noticed(lambda seed: run(scenario(seed), wrong), WRONG[wrong])


def test_a_task_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.world.clients.POLLS_MAX", 20)
    monkeypatch.setattr(Core, "complete", lambda self, task_id, attempt: None)
    with pytest.raises(InvariantViolated, match="tasks_end"):
        run(scenario(1))


def test_journals_that_are_really_compacted_are_fine() -> None:
    oldest = 1

    class Compacts(Peer):
        @asynccontextmanager
        async def events(self, since: int | None) -> AsyncIterator[AsyncIterator[Event]]:
            nonlocal oldest
            oldest = max(1, len(self.core.events) - 3)
            if since is not None and since + 1 < oldest:
                raise Compacted("gone")
            async with super().events(since) as events:
                yield events

    assert run(scenario(1), lambda c, r, n: Compacts(c, r, n, 0.5), oldest_event=lambda: oldest).checks
