"""Clients and owners that carry a scenario's operations out as sane programs do, and note what they saw.

A request that got 503 or no answer is made again, at another peer, a few times: reads and cancels always, submits if
they have an idempotency key or were surely not carried out. Each try is an operation of its own in the history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import trio

from peer.errors import BitinglipError, NotFound
from peer.state import command as asks
from peer.state.task import TERMINAL
from simulations.errors import SimulatorError
from simulations.outcome import CLUSTER, Mark
from simulations.scenario import Op, Scenario
from simulations.world.calls import Door, NoAnswer
from simulations.world.cards import expected_text
from simulations.world.event_readers import EventReaders
from simulations.world.history import History, is_done_unknown, outcome_of, retry_after
from simulations.world.kernel import Incarnation, World
from simulations.world.stream_readers import StreamReaders

PATIENCE_S: Final = 15.0  # of one try, beyond what it asks to wait for
TRIES_MAX: Final = 6
PAUSE_S_MAX: Final = 5.0
AGAIN_S_MAX: Final = 5.0  # after a client has seen a task's end
POLL_WAIT_S: Final = 10.0  # when all is over: a long poll
POLLS_AT_ONCE: Final = 16
POLLS_MAX: Final = 1_000  # of one task
LIST_MAX: Final = 500

Problem = BitinglipError | NoAnswer


class Clients:
    """`cluster_of` gives the API of a peer, None while nobody listens there; `process_of` whose tasks serve it.

    `acknowledged` is told of every task whose submit was answered, `oldest_event` says which one is still kept.
    """

    def __init__(
        self,
        world: World,
        cluster_of: Callable[[str], Any],
        scenario: Scenario,
        acknowledged: Callable[[str], None] = lambda task_id: None,
        *,
        process_of: Callable[[str], Incarnation | None] | None = None,
        oldest_event: Callable[[], int] | None = None,
    ) -> None:
        self.history = History()
        self.marks: list[Mark] = []
        self.parameters: dict[str, dict[str, Any]] = {}  # of acknowledged tasks
        self._counted: Counter[str] = Counter()
        self._checked: Counter[str] = Counter()
        self._world = world
        self._ops = scenario.ops
        self._peers = [f"h{number}" for number in range(1, scenario.hosts + 1)]
        self._rng = world.rng("clients")
        self._acknowledged = acknowledged
        self._door = Door(world, cluster_of, process_of)
        self._readers = EventReaders(world, self._door, self._peers, world.rng("readers"), oldest_event)
        self._streams = StreamReaders(world, self._door)
        self._ids: dict[int, str] = {}  # by the place of the submit
        self._kinds: dict[str, Callable[[int, Op], Awaitable[None]]] = {
            "submit": self._submit,
            "get": self._get,
            "wait": self._get,
            "cancel": self._cancel,
            "list": self._list,
            "events": self._events,
            "stream": self._stream,
            "assign": self._owner,
            "unload": self._owner,
            "rebalance": self._owner,
            "restart": self._owner,
            "drain": self._owner,
            "undrain": self._owner,
            "transfer": self._transfer,
        }

    @property
    def checks(self) -> Counter[str]:
        return self._checked + self._readers.checks + self._streams.checks

    @property
    def sometimes(self) -> Counter[str]:
        return self._counted + self._readers.sometimes + self._streams.sometimes

    # ------------------------------------------------------------ the run

    async def run(self) -> None:
        """Every operation at its moment; returns when the last one is over."""
        async with trio.open_nursery() as nursery:
            for place, op in enumerate(self._ops):
                if op.kind not in self._kinds:
                    raise SimulatorError(f"there is no operation `{op.kind}`")
                nursery.start_soon(self._one, place, op)

    async def _one(self, place: int, op: Op) -> None:
        await trio.sleep_until(op.at_s)
        with trio.move_on_after(op.vanish_s or float("inf")) as patience:
            await self._kinds[op.kind](place, op)
        if patience.cancelled_caught:
            self._counted["client_vanished"] += 1

    async def finish(self) -> None:
        """After the faults: follow each acknowledged task to its end, read it twice, and the journal once more."""
        waiting = list(reversed(self.parameters))

        async def poll() -> None:
            while waiting:
                await self._to_its_end(waiting.pop())

        async with trio.open_nursery() as nursery:
            for _ in range(POLLS_AT_ONCE):
                nursery.start_soon(poll)
        await self._readers.read_all()

    def leave_out(self, peer_id: str) -> None:
        """That host is gone for ever: nobody is asked there any more."""
        self._peers.remove(peer_id)  # the readers' list as well

    def check(self) -> None:
        """Raises InvariantViolated unless what was seen of each task is linearizable."""
        self._checked["linearizable"] += len(self.parameters)
        violation = self.history.check()
        if violation is not None:
            self._world.violated("linearizable", str(violation))

    async def _to_its_end(self, task_id: str) -> None:
        ended_at = ""  # the peer that showed it
        for _ in range(POLLS_MAX):
            peer_id = self._rng.choice([each for each in self._peers if each != ended_at] or self._peers)
            wait_s = 0.0 if ended_at else POLL_WAIT_S
            try:
                view = await self._read("end", peer_id, task_id, wait_s)
            except (BitinglipError, NoAnswer) as error:
                await self._pause(error)
                continue
            if view is None:
                return  # missing: linear says what is wrong with that
            if view.task.status not in TERMINAL:
                continue
            if ended_at:
                self._checked["read_to_its_end"] += 1
                return
            ended_at = peer_id
        self._world.violated("tasks_end", f"{task_id} has not ended after {POLLS_MAX} polls")

    # ------------------------------------------------------------ trying

    async def _try(self, op: Op, once: Callable[[str], Awaitable[Problem | None]]) -> None:
        """`once` at the peer that the operation names, then at others; None from it: it is done, or hopeless."""
        peer_id = op.peer
        for _ in range(TRIES_MAX):
            problem = await once(peer_id)
            if problem is None:
                return
            self._counted[f"{op.kind}_tried_again"] += 1
            await self._pause(problem)
            peer_id = self._rng.choice([each for each in self._peers if each != peer_id] or self._peers)
        self._counted[f"{op.kind}_given_up"] += 1

    async def _pause(self, error: Problem) -> None:
        await trio.sleep(retry_after(error, PAUSE_S_MAX) * self._rng.uniform(0.5, 1.5))

    def _stamp(self) -> float:
        return self.history.stamp(self._world.now())

    def _require_sane(self, error: Problem, what: str) -> None:
        """500 is a bug wherever it comes from; what else is refused must be no news to who asked."""
        self._checked["no_internal_error"] += 1
        if isinstance(error, BitinglipError) and error.status == 500:
            self._world.violated("no_internal_error", f"{what}: {error.code}: {error.message}")

    # ------------------------------------------------------------ tasks

    def _command(self, place: int, op: Op) -> asks.SubmitTask:
        name = op.key or f"task {place}"
        parameters = {
            "prompt": f"{name} of client {op.client}" if not op.key else name,
            "max_tokens": op.tokens,
        }
        return asks.SubmitTask(
            task_type="text_generation",
            model_name=op.model,
            parameters=parameters,
            priority=op.priority,
            timeout_s=op.timeout_s,
            owner="owner",
            key_id="key",
            request_id=f"op-{place}",
            idempotency_key=op.key,
            body_digest=name,
        )

    async def _submit(self, place: int, op: Op) -> None:
        command = self._command(place, op)
        client = f"c{op.client}"

        async def once(peer_id: str) -> Problem | None:
            began = self._stamp()
            try:
                answer: asks.Submitted = await self._door.ask(peer_id, command, PATIENCE_S)
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, "submit")
                # A peer that repeats a keyed submit by itself may be sure of its last try only.
                unknown = is_done_unknown(error) or (op.key != "" and getattr(error, "status", 0) == 503)
                if unknown:
                    self._counted["submit_unknown"] += 1
                    self.history.submit(client, op.key, began, None, None)
                elif isinstance(error, BitinglipError) and error.status != 503:
                    self._world.violated("submits_are_accepted", f"{error.code}: {error.message}")
                return None if unknown and not op.key else error
            except trio.Cancelled:
                self.history.submit(client, op.key, began, None, None)
                raise
            outcome = outcome_of(answer.view, replayed=answer.replayed)
            if answer.replayed and outcome.task_id not in self.parameters:
                # Nobody was told of the first: it may be this one's own, which its peer has sent twice.
                self.history.submit(client, op.key, began, None, None)
            self.history.submit(client, op.key, began, self._stamp(), outcome)
            self._accept(place, answer, command)
            return None

        await self._try(op, once)

    def _accept(self, place: int, answer: asks.Submitted, command: asks.SubmitTask) -> None:
        task_id = answer.view.task.task_id
        self._ids[place] = task_id
        self._counted["submit_replayed" if answer.replayed else "submit_acknowledged"] += 1
        self._acknowledged(task_id)
        if task_id not in self.parameters:
            self.parameters[task_id] = command.parameters
            self.marks.append(Mark(self._world.now(), None, CLUSTER, "task", f"queued #{place}"))
        self._check_result(answer.view)

    def _check_result(self, view: asks.TaskView) -> None:
        """The text is that of this task's prompt, whole and of one attempt."""
        parameters = self.parameters.get(view.task.task_id)
        if view.result is None or parameters is None:
            return
        self._checked["result_is_of_its_task"] += 1
        wanted = expected_text(parameters)
        if view.result.generated_text != wanted or view.result.attempt != view.task.attempt:
            text = f"{view.result.generated_text[:60]!r} instead of {wanted[:60]!r}, attempt {view.result.attempt}"
            self._world.violated("result_is_of_its_task", f"{view.task.task_id}: {text}")

    async def _get(self, place: int, op: Op) -> None:
        task_id = self._ids.get(op.task)
        if task_id is None:
            self._counted["never_acknowledged"] += 1
            return
        wait_s = op.timeout_s if op.kind == "wait" else 0.0

        async def once(peer_id: str) -> Problem | None:
            try:
                view = await self._read(f"c{op.client}", peer_id, task_id, wait_s)
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, op.kind)
                return error
            if view is not None and wait_s:
                self._counted["wait_ended" if view.task.status in TERMINAL else "wait_timed_out"] += 1
            if view is not None and view.task.status in TERMINAL:
                await self._read_again(op, task_id, peer_id)
            return None

        await self._try(op, once)

    async def _read_again(self, op: Op, task_id: str, but: str) -> None:
        """Somebody else looks, too, a little later: an end that was shown too early would be taken back by then."""
        await trio.sleep(AGAIN_S_MAX * self._rng.random() ** 2)
        peer_id = self._rng.choice([each for each in self._peers if each != but] or self._peers)
        with suppress(BitinglipError, NoAnswer):
            await self._read(f"c{op.client}", peer_id, task_id, 0.0)

    async def _read(self, client: str, peer_id: str, task_id: str, wait_s: float) -> asks.TaskView | None:
        """None: missing, and noted so."""
        began = self._stamp()
        request = asks.GetTask(task_id=task_id, wait_s=wait_s)
        try:
            view: asks.TaskView = await self._door.ask(peer_id, request, wait_s + PATIENCE_S)
        except NotFound:
            # linear knows "missing"; it is not an error to hide behind.
            self.history.missing(client, task_id, began, self._stamp())
            return None
        self.history.about(client, "get", task_id, began, self._stamp(), outcome_of(view))
        self._check_result(view)
        return view

    async def _stream(self, place: int, op: Op) -> None:
        task_id = self._ids.get(op.task)
        if task_id is None:
            self._counted["never_acknowledged"] += 1
            return
        began = self._stamp()
        view = await self._streams.read(op.peer, task_id)
        if view is not None:
            self.history.about(f"c{op.client}", "get", task_id, began, self._stamp(), outcome_of(view))
            self._check_result(view)

    async def _cancel(self, place: int, op: Op) -> None:
        task_id = self._ids.get(op.task)
        if task_id is None:
            self._counted["never_acknowledged"] += 1
            return
        client = f"c{op.client}"

        async def once(peer_id: str) -> Problem | None:
            began = self._stamp()
            try:
                view = await self._door.ask(peer_id, asks.CancelTask(task_id=task_id), PATIENCE_S)
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, "cancel")
                if is_done_unknown(error):
                    self._counted["cancel_unknown"] += 1
                    self.history.about(client, "cancel", task_id, began, None, None)
                    return error
                if isinstance(error, NoAnswer) or error.status == 503:
                    return error
                self._counted["cancel_too_late"] += 1
                self.history.refused_cancel(client, task_id, began, self._stamp(), error)
                return None
            except trio.Cancelled:
                self.history.about(client, "cancel", task_id, began, None, None)
                raise
            self._counted["cancel_done"] += 1
            self.history.about(client, "cancel", task_id, began, self._stamp(), outcome_of(view))
            return None

        await self._try(op, once)

    async def _list(self, place: int, op: Op) -> None:
        async def once(peer_id: str) -> Problem | None:
            began = self._stamp()
            try:
                page: asks.TaskPage = await self._door.ask(
                    peer_id, asks.ListTasks(limit=LIST_MAX), PATIENCE_S
                )
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, "list")
                return error
            ended = self._stamp()
            self._checked["lists_name_each_once"] += 1
            if len({task.task_id for task in page.tasks}) != len(page.tasks):
                self._world.violated("lists_name_each_once", "a list names a task twice")
            for task in page.tasks:
                self.history.listed(f"c{op.client}", task, began, ended)
            return None

        await self._try(op, once)

    # ------------------------------------------------------------ events and owners

    async def _events(self, place: int, op: Op) -> None:
        since = 0 if op.key == "all" else None
        await self._readers.follow(op.peer, since, op.timeout_s, op.tokens / 1000.0)

    async def _owner(self, place: int, op: Op) -> None:
        async def once(peer_id: str) -> Problem | None:
            try:
                await self._door.ask(peer_id, _wish(op), PATIENCE_S)
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, op.kind)
                if isinstance(error, BitinglipError) and error.status != 503:
                    self._counted[f"{op.kind}_refused"] += 1
                    return None
                return None if is_done_unknown(error) else error
            self._counted[f"{op.kind}_accepted"] += 1
            return None

        await self._try(op, once)

    async def _transfer(self, place: int, op: Op) -> None:
        """As the API does: the one that leads now is to lead no more."""

        async def once(peer_id: str) -> Problem | None:
            try:
                status: asks.ClusterStatus = await self._door.ask(peer_id, asks.GetStatus(), PATIENCE_S)
                wish = asks.TransferLeadership(epoch=status.epoch)
                led: asks.Led = await self._door.ask(peer_id, wish, PATIENCE_S)
            except (BitinglipError, NoAnswer) as error:
                self._require_sane(error, op.kind)
                if isinstance(error, BitinglipError) and error.status != 503:
                    self._counted["transfer_refused"] += 1
                    return None
                return error
            self._checked["a_transfer_ends_an_epoch"] += 1
            if led.epoch <= status.epoch:
                self._world.violated("a_transfer_ends_an_epoch", f"{led.epoch} was to follow {status.epoch}")
            self._counted["transfer_accepted"] += 1
            return None

        await self._try(op, once)


def _wish(op: Op) -> asks.Command:
    """What an owner asks for; `tokens` 1: with force."""
    workers = (op.worker,) if op.worker else ()
    match op.kind:
        case "assign":
            return asks.AssignModel(
                model_name=op.model, worker_ids=workers, preload=True, priority=op.priority
            )
        case "unload":
            return asks.UnloadModel(model_name=op.model, worker_ids=workers, force=op.tokens > 0)
        case "restart":
            return asks.RestartWorker(worker_id=op.worker)
        case "drain" | "undrain":
            return asks.DrainHost(name=op.host, undo=op.kind == "undrain", by="operator")
        case _:
            return asks.Rebalance(strategy="load_balanced", force=op.tokens > 0, dry_run=op.key == "dry")
