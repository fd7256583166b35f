"""The linearizability checker: hand-made histories for each rule, all orders tried as an oracle, each rule removed."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations import linear
from simulations.errors import SimulatorError
from simulations.linear import Operation, Outcome, Violation, check

SOURCE = Path(linear.__file__)


def op(
    kind: Any,
    invoked: float,
    returned: float | None,
    status: str = "",
    attempt: int = 0,
    result: str | None = None,
    *,
    task: str = "t",
    argument: str = "t",
    **more: Any,
) -> Operation:
    outcome = None
    if returned is not None:
        more.setdefault("task_id", "t" if kind == "submit" else "")
        outcome = Outcome(status=status, attempt=attempt, result=result, **more)
    return Operation("c", task, kind, argument, invoked, returned, outcome)


BORN = op("submit", 0, 1, "queued")
DONE = op("get", 4, 5, "completed", 1, "r")

ACCEPTED = {
    "nothing": [],
    "a life": [BORN, op("get", 2, 3, "running", 1), DONE, op("get", 6, 7, "completed", 1, "r")],
    "repeated by the peer that was asked": [op("submit", 0, 1, "queued", replayed=True)],
    "a requeue": [
        BORN,
        op("get", 2, 3, "running", 1),
        op("get", 4, 5, "queued", 1),
        op("get", 6, 7, "running", 2),
        op("get", 8, 9, "completed", 2, "r"),
    ],
    "reads at once in any order": [BORN, op("get", 2, 9, "running", 1), op("get", 3, 8, "queued", 0)],
    "a missing task before the submit has returned": [
        op("submit", 0, 5, "queued"),
        op("get", 1, 2, "missing"),
        op("get", 3, 4, "queued"),
    ],
    "a cancel": [BORN, op("cancel", 2, 3, "cancelled"), op("get", 4, 5, "cancelled")],
    "a cancel of a running one": [
        BORN,
        op("get", 2, 3, "running", 1),
        op("cancel", 4, 5, "cancelled", 1),
        op("cancel", 6, 7, "cancelled", refused=True),
    ],
    "a cancel too late": [BORN, DONE, op("cancel", 6, 7, "completed", refused=True)],
    "a cancel that shows the end first": [BORN, op("cancel", 2, 3, "completed", refused=True), DONE],
    "a cancel that shows a failure first": [
        BORN,
        op("cancel", 2, 3, "failed", refused=True),
        op("get", 4, 5, "failed"),
    ],
    "a cancel of unknown outcome that was done late": [
        BORN,
        op("cancel", 2, None),
        op("get", 3, 4, "running", 1),
        op("get", 5, 6, "cancelled", 1),
    ],
    "a cancel of unknown outcome that was not done": [BORN, op("cancel", 2, None), DONE],
    "a submit of unknown outcome that was done": [
        op("submit", 0, None),
        op("submit", 1, 2, "running", 1, replayed=True),
        DONE,
    ],
    "a submit of unknown outcome that was not": [op("submit", 0, None), op("submit", 1, 2, "queued")],
    "a submit of unknown outcome that is late": [
        op("submit", 0, None),
        op("get", 1, 2, "missing"),
        op("get", 3, 4, "queued"),
    ],
    "the same key twice": [BORN, op("submit", 2, 3, "completed", 1, "r", replayed=True), DONE],
    "a list without results": [BORN, op("list", 2, 3, "completed", 1), DONE],
    "a list between": [BORN, op("list", 2, 3, "running", 1), DONE],
    "a failure of the queue": [BORN, op("get", 2, 3, "queued", 1), op("get", 4, 5, "failed", 1)],
    "two tasks": [BORN, op("submit", 0, 1, "queued", task="u"), DONE, op("get", 4, 5, "failed", task="u")],
    "as early as a return": [BORN, op("get", 2, 3, "running", 1), op("get", 3, 4, "queued", 0)],
}

REFUSED = {
    "never made": [op("get", 0, 1, "queued")],
    "a replay shows more than what comes after": [
        BORN,
        op("submit", 2, 3, "running", 2, replayed=True),
        op("get", 4, 5, "running", 1),
    ],
    "a finished one cancelled by a cancel of unknown outcome": [
        BORN,
        DONE,
        op("cancel", 6, None),
        op("get", 7, 8, "cancelled", 1),
    ],
    "missing after an acknowledged submit": [BORN, op("get", 2, 3, "missing")],
    "cancel of one that is there says missing": [BORN, op("cancel", 2, 3, "missing")],
    "read before it was made": [op("get", 0, 1, "queued"), op("submit", 2, 3, "queued")],
    "cancelled before it was made": [op("cancel", 0, 1, "cancelled"), op("submit", 2, 3, "queued")],
    "live after a terminal was read": [BORN, DONE, op("get", 6, 7, "running", 1)],
    "queued after a terminal was read": [BORN, DONE, op("get", 6, 7, "queued", 5)],
    "an earlier attempt": [BORN, op("get", 2, 3, "running", 2), op("get", 4, 5, "running", 1)],
    "queued again without an attempt": [BORN, op("get", 2, 3, "running", 1), op("get", 4, 5, "queued", 0)],
    "the same attempt begun twice": [BORN, op("get", 2, 3, "queued", 1), op("get", 4, 5, "running", 1)],
    "an attempt that was requeued completes": [
        BORN,
        op("get", 2, 3, "queued", 1),
        op("get", 4, 5, "completed", 1, "r"),
    ],
    "the end shows an earlier attempt": [BORN, op("get", 2, 3, "running", 2), DONE],
    "another terminal": [BORN, DONE, op("get", 6, 7, "failed", 1)],
    "another terminal after a refused cancel": [BORN, op("cancel", 2, 3, "failed", refused=True), DONE],
    "another attempt of the end": [BORN, DONE, op("get", 6, 7, "completed", 2, "r")],
    "another result": [BORN, DONE, op("get", 6, 7, "completed", 1, "s")],
    "no result": [BORN, op("get", 4, 5, "completed", 1)],
    "the result of a failed one": [BORN, op("get", 4, 5, "failed", 1, "r")],
    "cancelled by nobody": [BORN, op("get", 2, 3, "cancelled")],
    "a cancel finds it cancelled by nobody": [BORN, op("cancel", 2, 3, "cancelled", refused=True)],
    "cancelled before anybody asked": [BORN, op("get", 2, 3, "cancelled"), op("cancel", 4, None)],
    "a finished one is cancelled": [BORN, DONE, op("cancel", 6, 7, "cancelled", 1)],
    "cancelled twice": [BORN, op("cancel", 2, 3, "cancelled"), op("cancel", 4, 5, "cancelled")],
    "a cancelled one completes": [BORN, op("cancel", 2, 3, "cancelled"), DONE],
    "a cancel that leaves it running": [BORN, op("cancel", 2, 3, "running", 1)],
    "a cancel shows an earlier attempt": [
        BORN,
        op("get", 2, 3, "running", 2),
        op("cancel", 4, 5, "cancelled", 1),
    ],
    "refused though it lives": [
        BORN,
        op("cancel", 2, 3, "completed", refused=True),
        op("get", 4, 5, "queued"),
    ],
    "made twice": [BORN, op("submit", 2, 3, "queued")],
    "replayed, but never made": [op("submit", 0, 1, "queued", replayed=True, argument="")],
    "two ids of a key": [BORN, op("submit", 2, 3, "queued", replayed=True, task_id="other")],
    "two made of a key at once": [
        op("submit", 0, 3, "queued"),
        op("submit", 1, 2, "queued", task_id="other"),
    ],
    "a list goes back": [BORN, DONE, op("list", 6, 7, "running", 1)],
    "seen in the order of other clients": [
        BORN,
        op("get", 2, 6, "queued", 0),
        op("get", 3, 4, "running", 1),
        op("get", 5, 7, "queued", 0),
    ],
    "the second task": [
        BORN,
        DONE,
        op("submit", 0, 1, "queued", task="u"),
        op("get", 2, 3, "missing", task="u"),
    ],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    assert check(ACCEPTED[name]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    violation = check(REFUSED[name])
    assert isinstance(violation, Violation)
    assert str(violation).startswith(f"task {violation.task}: ")


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_the_order_in_which_it_was_written_down_does_not_matter(name: str) -> None:
    history = {**ACCEPTED, **REFUSED}[name]
    assert (check(history[::-1]) is None) == (name in ACCEPTED)


def test_a_violation_says_what_did_not_fit() -> None:
    violation = check([BORN, DONE, op("get", 6, 7, "running", 1)])
    assert violation is not None
    assert violation.placed == (BORN, DONE)
    assert violation.stuck == (op("get", 6, 7, "running", 1),)
    assert "stuck  [6.000, 7.000] c get: running, attempt 1" in str(violation)


# ---------------------------------------------------------------- its bounds


def long_history(tasks: int, each: int) -> list[Operation]:
    history = []
    for n in range(tasks):
        name = f"t{n}"
        history.append(op("submit", 0, 1, "queued", task=name))
        for k in range(each):
            status, attempt = ("queued", k // 8) if k % 8 == 0 else ("running", k // 8 + 1)
            history.append(op("get", 2 + k, 6.5 + k, status, attempt, task=name))
            if k % 9 == 0:
                history.append(op("cancel", 2 + k, None, task=name))
                history.append(op("submit", 2 + k, None, task=name))
    return history


def test_fifty_operations_take_milliseconds() -> None:
    history = long_history(20, 50)
    began = time.perf_counter()
    assert check(history) is None
    assert time.perf_counter() - began < 20 * 0.05


def test_a_refusal_is_fast_too() -> None:
    history = [*long_history(1, 50), op("get", 90, 91, "missing", task="t0")]
    began = time.perf_counter()
    assert check(history) is not None
    assert time.perf_counter() - began < 0.5


def test_too_long_is_never_a_silent_pass() -> None:
    with pytest.raises(SimulatorError, match="history too long to check"):
        check(long_history(1, 50), steps_max=20)


@pytest.mark.parametrize(
    "bad",
    [
        Operation("c", "t", "get", "t", 2, 1, Outcome("queued")),
        Operation("c", "t", "get", "t", 2, None, Outcome("queued")),
        Operation("c", "t", "get", "t", 2, 3, None),
    ],
)
def test_a_history_that_cannot_be_is_the_simulators_fault(bad: Operation) -> None:
    with pytest.raises(SimulatorError):
        check([bad])


# ---------------------------------------------------------------- an oracle: every order, every hidden move

Concrete = tuple[str, int, str]  # status, attempt, result
NONE: Concrete = ("absent", 0, "")


def moves(state: Concrete, results: list[str], attempts: int) -> list[Concrete]:
    status, attempt, _ = state
    if status == "queued":
        return [("failed", attempt, ""), *([("running", attempt + 1, "")] if attempt < attempts else [])]
    if status == "running":
        ends = [("completed", attempt, result) for result in results]
        return [("queued", attempt, ""), ("failed", attempt, ""), *ends]
    return []


def closure(states: set[Concrete], results: list[str], attempts: int) -> set[Concrete]:
    found, waiting = set(states), list(states)
    while waiting:
        for after in moves(waiting.pop(), results, attempts):
            if after not in found:
                found.add(after)
                waiting.append(after)
    return found


def shows(state: Concrete, outcome: Outcome, whole: bool) -> bool:
    status, attempt, result = state
    if (status, attempt) != (outcome.status, outcome.attempt):
        return False
    return not whole or (outcome.result or "") == result


def step(state: Concrete, operation: Operation) -> Concrete | None:
    outcome, kind, live = operation.outcome, operation.kind, state[0] in ("queued", "running")
    if outcome is None:
        if kind == "submit":
            return ("queued", 0, "") if state == NONE else state
        return ("cancelled", state[1], "") if kind == "cancel" and live else state
    if outcome.status == "missing" or state == NONE:
        return state if outcome.status == "missing" and state == NONE else None
    if kind == "cancel":
        if outcome.refused:
            return state if not live and state[0] == outcome.status else None
        after = ("cancelled", state[1], "")
        return after if live and shows(after, outcome, False) else None
    return state if shows(state, outcome, kind == "get") else None


def explained(order: tuple[Operation, ...], results: list[str], attempts: int) -> bool:
    states = {NONE}
    for operation in order:
        if operation.kind == "submit" and operation.outcome is not None:
            born = closure({("queued", 0, "")}, results, attempts) if NONE in states else set()
            there = states - {NONE} if operation.outcome.replayed else set()
            states = {state for state in born | there if shows(state, operation.outcome, True)}
        else:
            states = {after for state in states if (after := step(state, operation)) is not None}
        states = closure(states, results, attempts)
    return bool(states)


def oracle(history: list[Operation]) -> bool:
    known = [each for each in history if each.outcome is not None]
    unknown = [each for each in history if each.outcome is None]
    shown = sorted({each.outcome.result for each in known if each.outcome and each.outcome.result})
    attempts = 1 + max((each.outcome.attempt for each in known if each.outcome), default=0)
    for size in range(len(unknown) + 1):
        for some in itertools.combinations(unknown, size):
            for order in itertools.permutations([*known, *some]):
                in_time = all(
                    later.returned_at is None or later.returned_at >= earlier.invoked_at
                    for earlier, later in itertools.combinations(order, 2)
                )
                if in_time and explained(order, [*shown, "another"], attempts):
                    return True
    return False


@st.composite
def anything(draw: st.DrawFn) -> list[Operation]:
    """Mostly nonsense."""
    history = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["submit", "get", "get", "list", "cancel"]))
        invoked = draw(st.integers(0, 6))
        returned = invoked + draw(st.integers(0, 4))
        if kind in ("submit", "cancel") and draw(st.integers(0, 3)) == 0:
            history.append(op(kind, invoked, None))
            continue
        history.append(op(kind, invoked, returned, **draw(answers(kind))))
    return history


@st.composite
def answers(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    statuses = ["queued", "running", "completed", "failed", "cancelled"]
    if kind == "cancel" and draw(st.booleans()):
        return {"status": draw(st.sampled_from(statuses[2:])), "refused": True}
    if kind in ("get", "cancel") and draw(st.integers(0, 5)) == 0:
        return {"status": "missing"}
    status = "cancelled" if kind == "cancel" else draw(st.sampled_from(statuses))
    lowest = 1 if status in ("running", "completed") else 0
    result = draw(st.sampled_from(["r", "r", "s"])) if status == "completed" and kind != "list" else None
    more = {"replayed": draw(st.booleans())} if kind == "submit" else {}
    return {"status": status, "attempt": draw(st.integers(lowest, 2)), "result": result, **more}


@st.composite
def lived(draw: st.DrawFn) -> list[Operation]:
    """What a real task would show at moments within overlapping calls; at times one answer is bent."""
    state, history = NONE, []
    for moment in range(draw(st.integers(1, 6))):
        for _ in range(draw(st.integers(0, 2))):
            possible = moves(state, ["r", "s"], 2)
            state = draw(st.sampled_from(possible)) if possible else state
        kind = draw(st.sampled_from(["submit", "get", "get", "list", "cancel"]))
        began, ended = moment - draw(st.floats(0, 1.5)), moment + draw(st.floats(0, 1.5))
        unknown = kind in ("submit", "cancel") and draw(st.integers(0, 3)) == 0
        before = state
        if kind == "submit" and state == NONE and not (unknown and draw(st.booleans())):
            state = ("queued", 0, "")
        live = state[0] in ("queued", "running")
        if kind == "cancel" and live and not (unknown and draw(st.booleans())):
            state = ("cancelled", state[1], "")
        if unknown:
            history.append(op(kind, began, None))
            continue
        status, attempt, result = state
        answer: dict[str, Any] = {"status": status, "attempt": attempt, "result": result or None}
        if state == NONE:
            if kind == "list":
                continue
            answer = {"status": "missing"}
        elif kind == "submit":
            answer["replayed"] = before != NONE
        elif kind == "cancel" and not live:
            answer = {"status": status, "refused": True}
        if kind in ("list", "cancel"):
            answer.pop("result", None)
        if draw(st.integers(0, 7)) == 0:
            answer = draw(answers(kind))
        history.append(op(kind, began, ended, **answer))
    return history


@settings(max_examples=400, deadline=None)
@given(st.one_of(anything(), lived(), lived()))
def test_it_agrees_with_trying_every_order(history: list[Operation]) -> None:
    assert (check(history) is None) == oracle(history)


# ---------------------------------------------------------------- each rule removed

MUTATIONS = {
    "one id of a key": ("violation = _two_ids(task, operations) or _search(", "violation = _search("),
    "made twice": ("(state is ABSENT or not outcome.replayed)", "state is ABSENT"),
    "replayed without a key": ('(not outcome.replayed or operation.argument != "")', "True"),
    "repeated by the peer": ('(not outcome.replayed or operation.argument != "")', "not outcome.replayed"),
    "what a submit shows": ("return _see(BORN if made else state, outcome, whole=True)", "return BORN"),
    "missing only before": ("return state if state is ABSENT else None", "return state"),
    "nothing before the submit": (
        "    if state is ABSENT:\n        return None\n    if operation.kind",
        "    if state is ABSENT:\n        state = BORN\n    if operation.kind",
    ),
    "unknown submits": ('if kind == "submit" and state is ABSENT:', "if False:"),
    "unknown cancels": ('if kind == "cancel" and state.status == "live":', "if False:"),
    "unknown cancels of finished ones": ('kind == "cancel" and state.status == "live":', 'kind == "cancel":'),
    "cancelled by cancels only": (
        'return State(status, state.at) if status in ("completed", "failed") else None',
        "return State(status, state.at)",
    ),
    "terminal is final": (
        "return state if state.status == status else None",
        "return State(status, state.at)",
    ),
    "cancels of live ones": ('if state.status != "live" or outcome', "if outcome"),
    "a cancel makes it cancelled": ('or outcome.status != "cancelled":', "or False:"),
    "a cancel's attempt": (
        'return _fix(State("cancelled", state.at), outcome.attempt)',
        'return State("cancelled")',
    ),
    "a refused cancel was late": ("return _end(state, outcome.status) if", "return state if"),
    "no life after the end": ('if state.status != "live" or at < state.at:', "if at < state.at:"),
    "no earlier attempt": ('if state.status != "live" or at < state.at:', 'if state.status != "live":'),
    "each attempt begins once": ("return 2 * attempt if status in", "return 2 * attempt + 1 if status in"),
    "completed where it ran": ('("running", "completed") else', '("running",) else'),
    "completed has a result": (
        'if (outcome.result is not None) != (outcome.status == "completed"):',
        "if False:",
    ),
    "one result": ("if ended.result is not None and ended.result != outcome.result:", "if False:"),
    "the end's attempt stays": ("return ended if at == ended.at else None", "return ended"),
    "the end's attempt is not earlier": ("exact=True) if at >= ended.at else None", "exact=True)"),
    "lists show no results": ('whole=operation.kind == "get")', "whole=True)"),
    "real time": ("if operation.invoked_at > earliest:", "if False:"),
    "tasks apart": ("tasks.setdefault(operation.task, [])", 'tasks.setdefault("", [])'),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_any_one_rule_some_history_is_judged_otherwise(name: str) -> None:
    old, new = MUTATIONS[name]
    source = SOURCE.read_text()
    assert source.count(old) == 1, "the rule is written otherwise now: mend this test"
    mutant = ModuleType("mutant")
    sys.modules[mutant.__name__] = mutant
    try:
        exec(compile(source.replace(old, new), str(SOURCE), "exec"), mutant.__dict__)
        verdicts = {}
        for each, history in {**ACCEPTED, **REFUSED}.items():
            verdicts[each] = mutant.check(history) is None
    finally:
        del sys.modules[mutant.__name__]
    assert verdicts != {each: each in ACCEPTED for each in verdicts}
