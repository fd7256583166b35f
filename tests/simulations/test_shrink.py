"""The shrinker: what it leaves still fails, and nothing more can be taken away."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from simulations.scenario import Fault, Op, Scenario
from simulations.shrink import Shrinker, shrink, with_hosts, with_ops


def bad_day(faults: int = 30, ops: int = 40) -> Scenario:
    """Every fourth operation asks about the submission before it."""
    return Scenario(
        seed=1,
        hosts=7,
        fault_s=90.0,
        faults=tuple(
            Fault(at_s=float(i), kind=f"k{i % 5}", targets=(f"h{i % 7 + 1}",), for_s=8.0)
            for i in range(faults)
        ),
        ops=tuple(
            Op(at_s=float(i), kind="get" if i % 4 == 3 else "submit", peer=f"h{i % 3 + 1}")
            if i % 4 != 3
            else Op(at_s=float(i), kind="get", peer="h1", task=i - 1)
            for i in range(ops)
        ),
        upgraded=("h2", "h6"),
    )


def sound(scenario: Scenario) -> bool:
    """References lead to submissions, and only peers that exist are named."""
    peers = {f"h{n}" for n in range(1, scenario.hosts + 1)}
    return (
        all(
            op.task < 0 or (op.task < len(scenario.ops) and scenario.ops[op.task].kind == "submit")
            for op in scenario.ops
        )
        and all(set(fault.targets) <= peers for fault in scenario.faults)
        and all(op.peer in peers for op in scenario.ops)
        and set(scenario.upgraded) <= peers
        and scenario.voters <= scenario.hosts
    )


@settings(max_examples=60, deadline=None)
@given(
    culprits=st.sets(st.integers(0, 29), max_size=4),
    asks=st.sets(st.integers(0, 9), max_size=3),
    hosts=st.integers(1, 7),
)
def test_what_is_left_is_what_it_takes(culprits: set[int], asks: set[int], hosts: int) -> None:
    day = bad_day()
    guilty = {day.faults[i].at_s for i in culprits}
    needed = {day.ops[4 * i + 3].at_s for i in asks}
    hosts_min = max([hosts, 3 if needed else 1, *(i % 7 + 1 for i in culprits)])

    def fails(scenario: Scenario) -> bool:
        assert sound(scenario)
        return (
            guilty <= {fault.at_s for fault in scenario.faults}
            and needed <= {op.at_s for op in scenario.ops}
            and scenario.hosts >= hosts_min
        )

    least = shrink(day, fails, runs_max=3_000)
    assert fails(least)
    assert {fault.at_s for fault in least.faults} == guilty
    gets = [op for op in least.ops if op.kind == "get"]
    assert {op.at_s for op in gets} == needed
    assert len(least.ops) == 2 * len(gets)  # each with the submission that it asks about
    assert all(least.ops[op.task].at_s == op.at_s - 1 for op in gets)
    assert least.hosts == hosts_min
    assert least.upgraded == ()
    assert all(fault.for_s < 0.2 for fault in least.faults)
    assert least.fault_s < 41


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=12, max_size=12), share=st.floats(0.1, 1.0))
def test_no_single_fault_can_go(weights: list[int], share: float) -> None:
    """Also where several faults only together are enough, in different ways."""
    day = bad_day(faults=12, ops=0)
    enough = share * sum(weights)

    def fails(scenario: Scenario) -> bool:
        return sum(weights[int(fault.at_s)] for fault in scenario.faults) >= enough

    least = shrink(day, fails, runs_max=3_000)
    assert fails(least)
    for i in range(len(least.faults)):
        assert not fails(replace(least, faults=(*least.faults[:i], *least.faults[i + 1 :])))


@given(runs_max=st.integers(0, 60))
def test_runs_are_bounded_and_what_is_left_fails(runs_max: int) -> None:
    day = bad_day()
    runs = 0

    def fails(scenario: Scenario) -> bool:
        nonlocal runs
        runs += 1
        return {3.0, 17.0} <= {fault.at_s for fault in scenario.faults}

    shrinker = Shrinker(day, fails, runs_max=runs_max)
    least = shrinker.run()
    assert runs == shrinker.runs <= runs_max
    assert {3.0, 17.0} <= {fault.at_s for fault in least.faults}


def test_time_is_bounded() -> None:
    times = iter(range(1_000))
    shrinker = Shrinker(bad_day(), lambda _: True, limit_s=0.5, clock=lambda: float(next(times)))
    assert shrinker.run() == bad_day()
    assert shrinker.exhausted
    assert shrinker.runs == 0


def test_what_came_after_the_failure_goes_at_once() -> None:
    shrinker = Shrinker(bad_day(), lambda s: len(s.faults) >= 6, failed_at_s=5.0, runs_max=1)
    least = shrinker.run()
    assert [fault.at_s for fault in least.faults] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [op.at_s for op in least.ops] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert least.fault_s == 6.0


def test_the_same_scenario_is_not_run_twice() -> None:
    seen: list[Scenario] = []

    def fails(scenario: Scenario) -> bool:
        assert scenario not in seen
        seen.append(scenario)
        return len(scenario.faults) >= 3

    assert len(shrink(bad_day(), fails).faults) == 3


def test_an_operation_goes_with_the_submission_that_it_is_about() -> None:
    day = bad_day(faults=0, ops=8)
    assert [op.task for op in day.ops] == [-1, -1, -1, 2, -1, -1, -1, 6]
    assert [(op.at_s, op.task) for op in with_ops(day, (0, 3, 6, 7)).ops] == [(0.0, -1), (6.0, -1), (7.0, 1)]


def test_a_peer_goes_with_what_names_it() -> None:
    day = replace(
        bad_day(faults=7, ops=0),
        ops=(
            Op(at_s=1, kind="restart", peer="h1", worker="h4-gpu0"),
            Op(at_s=2, kind="submit", peer="h2"),
        ),
    )
    fewer = with_hosts(day, 2)
    assert (fewer.hosts, fewer.voters, fewer.upgraded) == (2, 2, ("h2",))
    assert [fault.targets for fault in fewer.faults] == [("h1",), ("h2",)]
    assert [op.kind for op in fewer.ops] == ["submit"]
