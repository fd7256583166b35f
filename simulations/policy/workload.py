"""Clients that submit, retry, cancel and read; owners that assign, unload, restart and rebalance."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peer.errors import BitinglipError, NotFound, Unavailable
from peer.state import command as asks
from peer.state.model import Model
from peer.state.plan import Plan
from peer.state.task import TERMINAL
from simulations.policy.heap import Heap
from simulations.policy.invariants import Checker
from simulations.policy.shell import SimLeader
from simulations.policy.sometimes import Sometimes

_KNOWN_MAX = 400  # of its own tasks a client remembers so many


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients want: `tasks_per_s` in all, of models by weight."""

    tasks_per_s: float
    weights: tuple[float, ...]
    run_s: float
    cancels: float
    with_key: float
    short_timeout: float


class Clients:
    def __init__(
        self,
        heap: Heap,
        leader: SimLeader,
        checker: Checker,
        sometimes: Sometimes,
        models: list[Model],
        load: Load,
    ) -> None:
        self.over = False
        self.submitted = 0
        self.unanswered = 0
        self._heap = heap
        self._leader = leader
        self._checker = checker
        self._sometimes = sometimes
        self._models = models
        self._load = load
        self._rng = heap.random("clients")
        self._known: deque[str] = deque(maxlen=_KNOWN_MAX)
        self._keyed: deque[asks.SubmitTask] = deque(maxlen=50)

    def start(self) -> None:
        self._heap.after(self._rng.expovariate(self._load.tasks_per_s), self._arrive)

    def _arrive(self) -> None:
        if self.over:
            return
        self.submit()
        self._heap.after(self._rng.expovariate(self._load.tasks_per_s), self._arrive)

    def burst(self, count: int) -> None:
        for _ in range(count):
            self.submit()

    def submit(self) -> None:
        rng = self._rng
        if self._keyed and rng.random() < 0.05:
            self._again(rng.choice(self._keyed))
            return
        self.submitted += 1
        with_key = rng.random() < self._load.with_key
        run_s = min(120.0, rng.lognormvariate(0.0, 0.8) * self._load.run_s)
        command = asks.SubmitTask(
            task_type="text_generation",
            model_name=rng.choices(self._models, self._load.weights)[0].name,
            parameters={"prompt": "p" * rng.randrange(1, 200), "run_s": run_s},
            priority=rng.choice((1, 3, 5, 5, 5, 8)),
            timeout_s=rng.uniform(2.0, 20.0) if rng.random() < self._load.short_timeout else 300.0,
            owner=f"owner-{rng.randrange(3)}",
            key_id="k",
            idempotency_key=f"key-{self.submitted}" if with_key else "",
            body_digest=f"body-{self.submitted}",
        )
        if with_key:
            self._keyed.append(command)
        self._ask(command, 0)
        if with_key and rng.random() < 0.1:
            self._ask(command, 0)  # an impatient client: twice at once

    def _again(self, command: asks.SubmitTask) -> None:
        if self._rng.random() < 0.3:
            other = asks.SubmitTask(
                task_type=command.task_type,
                model_name=command.model_name,
                parameters=command.parameters,
                priority=command.priority,
                timeout_s=command.timeout_s,
                owner=command.owner,
                key_id=command.key_id,
                idempotency_key=command.idempotency_key,
                body_digest="another body",
            )
            self._ask(other, 0)
        else:
            self._ask(command, 0)

    def _ask(self, command: asks.SubmitTask, tries: int) -> None:
        self.unanswered += 1
        self._leader.call(command, lambda answer, error: self._answered(command, tries, answer, error))

    def _answered(
        self, command: asks.SubmitTask, tries: int, answer: Any, error: BitinglipError | None
    ) -> None:
        self.unanswered -= 1
        if error is not None:
            self._checker.refused(error)
            if isinstance(error, Unavailable) and tries < 10 and not self.over:
                self._heap.after(self._rng.uniform(0.5, 2.0), self._ask, command, tries + 1)
            return
        task_id = self._checker.submitted(command, answer)
        self._known.append(task_id)
        if self._rng.random() < self._load.cancels:
            self._heap.after(self._rng.expovariate(0.3), self._cancel, task_id)
        if self._rng.random() < 0.3:
            self._heap.after(self._rng.uniform(0.1, 30.0), self._read, task_id)

    def _cancel(self, task_id: str) -> None:
        self._leader.call(asks.CancelTask(task_id=task_id), self._cancel_answered)

    def _cancel_answered(self, answer: asks.TaskView | None, error: BitinglipError | None) -> None:
        if error is not None:
            self._checker.refused(error)
        elif answer is not None:
            self._checker.cancelled(answer)

    def _read(self, task_id: str) -> None:
        try:
            view = self._leader.read(task_id)
        except NotFound:
            self._checker.never_found(task_id)
            return
        if view is not None:
            self._checker.read(view)
        if (view is None or view.task.status not in TERMINAL or self._rng.random() < 0.3) and not self.over:
            self._heap.after(self._rng.uniform(1.0, 30.0), self._read, task_id)


class Owners:
    """Now and then somebody changes the placement by hand."""

    def __init__(
        self,
        heap: Heap,
        leader: SimLeader,
        checker: Checker,
        sometimes: Sometimes,
        models: list[Model],
        per_hour: float,
    ) -> None:
        self.over = False
        self._heap = heap
        self._leader = leader
        self._checker = checker
        self._sometimes = sometimes
        self._models = models
        self._per_s = per_hour / 3600
        self._rng = heap.random("owners")

    def start(self) -> None:
        self._heap.after(self._rng.expovariate(self._per_s), self._act)

    def _act(self) -> None:
        if self.over:
            return
        if self._leader.up and self._leader.snapshot.workers:
            self._leader.call(self._command(self._rng), self._answered)
        self._heap.after(self._rng.expovariate(self._per_s), self._act)

    def _command(self, rng: random.Random) -> asks.Command:
        workers = sorted(self._leader.snapshot.workers)
        model = rng.choice(self._models).name
        some = tuple(rng.sample(workers, min(len(workers), rng.randrange(0, 3))))
        kind = rng.choice(("assign", "assign", "unload", "unload", "restart", "rebalance", "rebalance"))
        if kind == "assign":
            return asks.AssignModel(
                model_name=model, worker_ids=some, preload=rng.random() < 0.7, priority=rng.randrange(1, 9)
            )
        if kind == "unload":
            return asks.UnloadModel(model_name=model, worker_ids=some, force=rng.random() < 0.4)
        if kind == "restart":
            return asks.RestartWorker(worker_id=rng.choice(workers))
        strategy = rng.choice(("memory_optimized", "load_balanced", "latency_optimized"))
        return asks.Rebalance(strategy=strategy, force=rng.random() < 0.5, dry_run=rng.random() < 0.1)

    def _answered(self, answer: Any, error: BitinglipError | None) -> None:
        if error is not None:
            self._checker.refused(error)
        elif isinstance(answer, asks.UnloadReply) and answer.requeued_tasks:
            self._sometimes.saw("forced unload")
        elif isinstance(answer, Plan) and answer.status == "initiated":
            self._sometimes.saw("rebalance began")


class Operators:
    """Some hosts are taken out of service, and given back or not."""

    def __init__(
        self, heap: Heap, leader: SimLeader, checker: Checker, peer_ids: Sequence[str], per_hour: float
    ) -> None:
        self.over = False
        self._heap = heap
        self._leader = leader
        self._checker = checker
        self._peer_ids = peer_ids
        self._per_s = per_hour / 3600
        self._rng = heap.random("operators")

    def start(self) -> None:
        if self._per_s:
            self._heap.after(self._rng.expovariate(self._per_s), self._act)

    def _act(self) -> None:
        if self.over:
            return
        if self._leader.up:
            leaving = sorted(self._leader.snapshot.leaving)
            undo = bool(leaving) and self._rng.random() < 0.5
            name = self._rng.choice(leaving if undo else self._peer_ids)
            self._leader.call(asks.DrainHost(name=name, undo=undo, by="operator"), self._answered)
        self._heap.after(self._rng.expovariate(self._per_s), self._act)

    def _answered(self, answer: Any, error: BitinglipError | None) -> None:
        if error is not None:
            self._checker.refused(error)
