"""Whether what clients saw of each task can be explained by one task that changed step by step: linearizability.

The search is Wing and Gong's ("Testing and Verifying Concurrent Objects", J. Parallel and Distributed Computing 17,
1993): an operation may come next if no other one that is still to be placed returned before it was invoked; place
one that the sequential model accepts, go on with the rest, step back when nothing fits. Lowe's refinement ("Testing
for linearizability", Concurrency and Computation 29(4), 2017; Porcupine does the same) remembers every pair of
placed operations and model state that led nowhere, so that none is tried twice. Linearizability is local, so each
task is checked by itself. Two more observations keep it to milliseconds:

- An operation that fits and leaves the state as it is may be placed at once, without trying any other order: if a
  later place were right, so is this one.
- An operation of unknown outcome (no answer came) may take effect at any later moment or never. Leaving it out is
  that "never", so only those that change the state are placed, and of several of one kind only the first invoked.

The model of one task hides what schedulers do: a state stands for all that may lie between two answers. A live task
is known by its position, the earliest one that it may be at. Positions are, in order, queued(0), running(1),
queued(1) by a requeue, running(2), ...: attempts only grow, and each is begun once. From any of them the task may
become completed or failed unseen; cancelled only by a cancel. What is not known yet of a terminal state (its attempt,
its result) is fixed by the first answer that shows it.

A peer may itself repeat a submit that has a key, so one that is answered with "an earlier task" may have made that
task by itself. Not modelled: tasks forgotten by retention. Pure: no trio, no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from simulations.errors import SimulatorError

STEPS_MAX: Final = 200_000  # placements tried for one task

Kind = Literal["submit", "get", "list", "cancel"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation was answered.

    `status` as clients see it, or "missing" (404, of get and cancel). `refused` is a cancel's conflict; `status` says
    what the task was already. `result` is all that there is of a result, as one text; None: none was shown.
    """

    status: str
    attempt: int = 0
    result: str | None = None
    task_id: str = ""  # of submit: the id that it answered
    replayed: bool = False  # of submit: an earlier task of this idempotency key
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. `task` is whatever is the same for all calls about one task: its idempotency key, else its id.

    `argument` is the idempotency key of a submit ("": none), else the task's id. `list` is a get without results.
    Times are in one order: two calls of which one returned before the other was invoked happened in that order.
    `returned_at` and `outcome` are None if it is not known whether it was done.
    """

    client: str
    task: str
    kind: Kind
    argument: str
    invoked_at: float
    returned_at: float | None
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Violation:
    """`placed` is the longest explanation that was found, `stuck` what could not follow it."""

    task: str
    message: str
    placed: tuple[Operation, ...] = ()
    stuck: tuple[Operation, ...] = ()

    def __str__(self) -> str:
        lines = [f"task {self.task}: {self.message}"]
        lines += [f"  placed {_text(operation)}" for operation in self.placed[-8:]]
        lines += [f"  stuck  {_text(operation)}" for operation in self.stuck]
        return "\n".join(lines)


def check(history: Sequence[Operation], steps_max: int = STEPS_MAX) -> Violation | None:
    """The first task (in order of appearance) whose operations no order explains, or None.

    Raises SimulatorError for a history that cannot be one, or that takes more than `steps_max` steps.
    """
    tasks: dict[str, list[Operation]] = {}
    for operation in history:
        _require_sound(operation)
        tasks.setdefault(operation.task, []).append(operation)
    for task, operations in tasks.items():
        violation = _two_ids(task, operations) or _search(task, operations, steps_max)
        if violation is not None:
            return violation
    return None


def _require_sound(operation: Operation) -> None:
    if (operation.returned_at is None) != (operation.outcome is None):
        raise SimulatorError(f"an outcome without a return, or the other way round: {operation}")
    if operation.returned_at is not None and operation.returned_at < operation.invoked_at:
        raise SimulatorError(f"it returned before it was invoked: {operation}")


def _two_ids(task: str, operations: Iterable[Operation]) -> Violation | None:
    """One key, one task: also where each of two ids would be fine by itself."""
    submits = [each for each in operations if each.kind == "submit" and each.outcome is not None]
    for submit in submits:
        assert submit.outcome is not None
        assert submits[0].outcome is not None
        if submit.outcome.task_id != submits[0].outcome.task_id:
            return Violation(task, "one idempotency key made two tasks", (submits[0],), (submit,))
    return None


# ---------------------------------------------------------------- the model of one task


class State(NamedTuple):
    """`at` is the position, of a terminal state the one that it ended at or (not `exact`) the earliest possible."""

    status: str = "absent"  # absent, live, completed, failed, cancelled
    at: int = 0
    exact: bool = False
    result: str | None = None


ABSENT: Final = State()
BORN: Final = State("live", 1)  # queued, attempt 0


def position(status: str, attempt: int) -> int:
    """running(k) comes before queued(k): a requeue keeps the number of the attempt that ended."""
    return 2 * attempt if status in ("running", "completed") else 2 * attempt + 1


def apply(state: State, operation: Operation) -> State | None:
    """The state after `operation` took effect with its outcome; None if it could not."""
    outcome = operation.outcome
    if outcome is None:
        return _unanswered(state, operation.kind)
    if operation.kind == "submit":
        made = state is ABSENT and (not outcome.replayed or operation.argument != "")
        if not made and (state is ABSENT or not outcome.replayed):
            return None
        return _see(BORN if made else state, outcome, whole=True)
    if outcome.status == "missing":
        return state if state is ABSENT else None
    if state is ABSENT:
        return None
    if operation.kind == "cancel":
        return _end(state, outcome.status) if outcome.refused else _cancel(state, outcome)
    return _see(state, outcome, whole=operation.kind == "get")


def _unanswered(state: State, kind: Kind) -> State | None:
    if kind == "submit" and state is ABSENT:
        return BORN
    if kind == "cancel" and state.status == "live":
        return State("cancelled", state.at)
    return None


def _end(state: State, status: str) -> State | None:
    """It is known to be finished so, and no more. From live it completed or failed by itself, never cancelled."""
    if state.status == "live":
        return State(status, state.at) if status in ("completed", "failed") else None
    return state if state.status == status else None


def _cancel(state: State, outcome: Outcome) -> State | None:
    """An acknowledged cancel was the one that made it so."""
    if state.status != "live" or outcome.status != "cancelled":
        return None
    return _fix(State("cancelled", state.at), outcome.attempt)


def _see(state: State, outcome: Outcome, *, whole: bool) -> State | None:
    """A read. `whole`: it would have shown the result."""
    if outcome.status in ("queued", "running"):
        at = position(outcome.status, outcome.attempt)
        if state.status != "live" or at < state.at:
            return None
        return state if at == state.at else State("live", at)
    ended = _end(state, outcome.status)
    if ended is None:
        return None
    ended = _fix(ended, outcome.attempt)
    if ended is None or not whole:
        return ended
    if (outcome.result is not None) != (outcome.status == "completed"):
        return None
    if ended.result is not None and ended.result != outcome.result:
        return None
    return ended if ended.result == outcome.result else ended._replace(result=outcome.result)


def _fix(ended: State, attempt: int) -> State | None:
    """The attempt that a terminal state shows: not before what was seen, and always the same."""
    at = position(ended.status, attempt)
    if ended.exact:
        return ended if at == ended.at else None
    return ended._replace(at=at, exact=True) if at >= ended.at else None


# ---------------------------------------------------------------- the search


class _Search:
    def __init__(self, operations: Sequence[Operation]) -> None:
        kept = [each for each in operations if each.outcome is not None or each.kind in ("submit", "cancel")]
        self.operations = sorted(kept, key=lambda each: each.invoked_at)
        self.known = sum(1 << n for n, each in enumerate(self.operations) if each.outcome is not None)
        self.steps = 0

    def candidates(self, placed: int) -> list[int]:
        """Those that may come next: invoked before every other one that is left has returned."""
        found = []
        earliest = float("inf")
        for n in range(_trailing_ones(placed), len(self.operations)):
            if placed >> n & 1:
                continue
            operation = self.operations[n]
            if operation.invoked_at > earliest:
                break  # and so are those that follow; what is found already was invoked before anything here returned
            found.append(n)
            if operation.returned_at is not None:
                earliest = min(earliest, operation.returned_at)
        return found

    def successors(self, placed: int, state: State) -> list[tuple[int, State]]:
        following = []
        silent: set[str] = set()  # kinds of unknown outcome that were tried already
        for n in self.candidates(placed):
            operation = self.operations[n]
            self.steps += 1
            if operation.outcome is None:
                if operation.kind in silent:
                    continue
                silent.add(operation.kind)
            after = apply(state, operation)
            if after is None:
                continue
            if after == state:
                return [(placed | 1 << n, after)]
            following.append((placed | 1 << n, after))
        return following


def _search(task: str, operations: Sequence[Operation], steps_max: int) -> Violation | None:
    search = _Search(operations)
    best, best_order = -1, 0
    waiting: list[tuple[int, State]] = [(0, ABSENT)]
    seen: set[tuple[int, State]] = set(waiting)
    while waiting:
        placed, state = waiting.pop()
        if placed & search.known == search.known:
            return None
        if placed.bit_count() > best:
            best, best_order = placed.bit_count(), placed
        if search.steps > steps_max:
            raise SimulatorError(f"history too long to check: {len(operations)} operations of task {task}")
        for following in reversed(search.successors(placed, state)):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    chosen = search.operations
    return Violation(
        task,
        f"no order of its {len(chosen)} operations explains what was answered",
        tuple(each for n, each in enumerate(chosen) if best_order >> n & 1),
        tuple(chosen[n] for n in search.candidates(best_order)),
    )


def _trailing_ones(bits: int) -> int:
    """How many of the first operations are all placed."""
    return (~bits & (bits + 1)).bit_length() - 1


def _text(operation: Operation) -> str:
    returned = "never" if operation.returned_at is None else f"{operation.returned_at:.3f}"
    answer = "unknown" if operation.outcome is None else _answer(operation.outcome)
    return f"[{operation.invoked_at:.3f}, {returned}] {operation.client} {operation.kind}: {answer}"


def _answer(outcome: Outcome) -> str:
    parts = [outcome.status, f"attempt {outcome.attempt}"]
    parts += ["refused"] if outcome.refused else []
    parts += ["replayed"] if outcome.replayed else []
    parts += [f"result {outcome.result[:40]!r}"] if outcome.result is not None else []
    return ", ".join(parts)
