"""The policy level of the simulations: that it holds, that it replays, that it finds, and whose fault is whose."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peer.decide.decision import Decision
from simulations.bugs.bank import BUGS
from simulations.campaign import Hunt, hunt
from simulations.errors import SimulatorError
from simulations.policy.driver import Shape, run
from simulations.policy.engines import SimWorker
from simulations.policy.shell import TICK, TICK_EACH_SECOND, Decisions

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(hosts=2, fault_s=60.0)
SEEDS = 30
# Found within a few seeds, each within a second or two.
QUICK_BUGS = (
    "requeue_keeps_attempt", "accepts_dead_results", "memory_ignores_loading", "acknowledges_before_commit",
    "forgets_finished_keys", "strikes_do_not_count", "completes_cancelled", "event_numbers_repeat",
    "forgets_running_tasks", "forgets_held_slots", "runs_on_loading_replicas",
)  # fmt: skip


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_nothing_is_violated(first: int) -> None:
    outcomes = [run(seed, SMALL) for seed in range(first, first + 10)]
    assert [(o.seed, str(o.failure)) for o in outcomes if o.failure is not None] == []
    assert sum(o.tasks for o in outcomes) > 0


def test_the_same_seed_gives_the_same_trace() -> None:
    first, again, other = run(7, SMALL), run(7, SMALL), run(8, SMALL)
    assert first.trace_hash == again.trace_hash
    assert first.trace_hash != other.trace_hash


def test_the_trace_is_the_same_in_other_processes() -> None:
    """Also where sets and dictionaries of text iterate otherwise."""
    code = (
        "from simulations.policy.driver import Shape, run\n"
        "print([run(seed, Shape(hosts=2, fault_s=60.0)).trace_hash for seed in (3, 7)])"
    )
    hashes = {str([run(seed, SMALL).trace_hash for seed in (3, 7)])}
    for hash_seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1


@pytest.mark.parametrize("bug", QUICK_BUGS)
def test_a_known_bug_is_found(bug: str) -> None:
    found = hunt(Hunt("policy", bug, SMALL.hosts, SMALL.fault_s, seeds_max=20))
    assert found.seed is not None
    assert found.seeds <= 20


def test_the_bank_leaves_the_product_as_it_was() -> None:
    for switch in BUGS.values():
        switch(Decisions())
    assert run(1, SMALL).failure is None


def test_a_raising_decision_is_the_products_fault() -> None:
    def raises(snapshot: Any, now: float) -> Decision:
        raise KeyError("a bug")

    outcome = run(1, SMALL, Decisions(lost_attempts=raises))
    assert outcome.failure is not None
    assert outcome.failure.check == "a decision never raises"


def test_a_raising_engine_is_the_simulators_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(worker: SimWorker) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(SimWorker, "measure", raises)
    with pytest.raises(SimulatorError, match="seed 1 at"):
        run(1, SMALL)


def test_the_tick_decides_in_the_leaders_order() -> None:
    """`simulations.policy.shell` repeats what `peer.deciding` does; this notices when one of them changes."""
    tree = ast.parse((ROOT / "peer" / "deciding.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    asked = [
        call.func.attr
        for call in ast.walk(functions["tick"])
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)  # a module of decisions
        and call.func.attr != "take"
    ]
    known = [*(name for name, _ in TICK), "replan", "forget_revoked", *(name for name, _ in TICK_EACH_SECOND)]
    assert sorted(asked) == sorted(known)
    lines = ast.unparse(functions["tick"])
    places = [lines.index(f".{name}(") for name in known]
    assert places == sorted(places)


# What the simulator has found in the product, each with a seed that showed it before it was mended.
FOUND = Shape(hosts=5, fault_s=180.0)


@pytest.mark.parametrize("seed", [377, 429, 2007])
def test_a_rebalance_does_not_lose_the_last_replica(seed: int) -> None:
    """Its target was evicted when it was ready (377), or while the source still drained (429), or died then (2007)."""
    assert run(seed, FOUND).failure is None


def test_a_plan_under_way_loads_nothing_on_a_host_that_is_drained_meanwhile() -> None:
    assert run(19, Shape(hosts=4, fault_s=240.0)).failure is None


def test_a_plan_does_not_try_for_ever_what_has_failed() -> None:
    assert run(21, Shape(hosts=4, fault_s=100.0)).failure is None
