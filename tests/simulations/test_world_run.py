"""The world level as a whole: it holds, it repeats itself exactly, and it finds what is wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from simulations.bugs.world import BUGS
from simulations.errors import SimulatorError
from simulations.scenario import Fault, Scenario
from simulations.world.draw import draw
from simulations.world.faults import KINDS
from simulations.world.run import run

ROOT = Path(__file__).resolve().parents[2]
PRINT_HASHES = """
import logging
import structlog
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
from simulations.world.draw import draw
from simulations.world.run import run
for seed in (1, 2):
    outcome = run(draw(seed, hosts=3, fault_s=30.0))
    assert outcome.held, outcome.failure
    print(outcome.trace_hash, outcome.steps, sorted(outcome.sometimes.items()))
"""


def hashes(hash_seed: str, script: str = PRINT_HASHES) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whole_worlds_repeat_themselves_in_other_processes() -> None:
    first = hashes("1")
    assert first == hashes("2")
    assert first.count("\n") == 2


def test_a_peer_that_asks_the_real_clock_is_noticed() -> None:
    """The proof above is one only if it fails when a peer acts on something that the seed does not give."""
    leak = """
import os, random
from simulations.world.clocks import SimEntropy
SimEntropy.uniform = lambda self, low, high: random.SystemRandom().uniform(low, high)
"""
    assert hashes("1", leak + PRINT_HASHES) != hashes("1", leak + PRINT_HASHES)


def test_a_peer_that_acts_on_hashes_is_noticed() -> None:
    leak = """
from simulations.world.clocks import SimEntropy
SimEntropy.uniform = lambda self, low, high: low + (high - low) * (hash("jitter") % 1000) / 1000
"""
    assert len({hashes(str(seed), leak + PRINT_HASHES) for seed in range(1, 4)}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_peers_hold(seed: int) -> None:
    outcome = run(draw(seed, fault_s=45.0))
    assert outcome.held, f"{outcome.failure}\n{''.join(outcome.trace_tail)}"
    assert outcome.checks["transition_table"] > 0


def test_a_cluster_of_many_hosts_holds() -> None:
    outcome = run(draw(7, hosts=40, fault_s=20.0))
    assert outcome.held, outcome.failure


STRENGTHS = {
    "clock_drift": 0.005,
    "delay": 50.0,
    "store_slow": 50.0,
    "engine_slow": 5.0,
    "device_overheats": 110.0,
}


@cache
def hash_of(scenario: Scenario) -> str:
    return run(scenario).trace_hash


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_fault_does_something_alone(kind: str) -> None:
    targets = {"h5"} if kind == "join" else {"h1"}
    one = (
        ("h1", "h2")
        if kind in ("one_way", "link_cut", "link_flapping", "connections_reset")
        else tuple(targets)
    )
    calm = replace(draw(3, hosts=5, fault_s=25.0), faults=(), voters=3)
    with_it = replace(
        calm,
        faults=(Fault(at_s=8.0, kind=kind, targets=one, for_s=6.0, strength=STRENGTHS.get(kind, 0.5)),),
    )
    outcome = run(with_it)
    assert outcome.held, outcome.failure
    assert outcome.faults[kind] == 1
    assert outcome.trace_hash != hash_of(calm)


def test_a_fault_that_does_not_exist_is_the_simulators() -> None:
    with pytest.raises(SimulatorError, match="there is no fault"):
        run(Scenario(seed=1, hosts=3, fault_s=5.0, faults=(Fault(at_s=1.0, kind="locusts"),)))


@pytest.mark.parametrize("bug", ["no_silence_guard", "time_outs_taken_for_done", "event_number_skipped"])
def test_known_bugs_are_found(bug: str) -> None:
    for seed in range(20):
        if run(draw(seed, fault_s=60.0), bug=bug).failure is not None:
            return
    pytest.fail(f"{bug} was not found in 20 seeds")


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_known_bug_takes_what_it_stands_in_for(bug: str) -> None:
    """Else it ends the peer at its first call, and is found for a wrong reason."""
    for where, name, instead in BUGS[bug].patches:
        takes = inspect.signature(instead).parameters.values()
        if any(each.kind is each.VAR_POSITIONAL for each in takes):
            continue
        wanted = inspect.signature(vars(where)[name]).parameters
        assert len(takes) == len(wanted), f"{name}: {list(wanted)}"
