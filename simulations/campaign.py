"""Many runs: in several processes, their outcomes in the order of their seeds whatever the processes do.

A run ends as an Outcome (the product held, or its failure) or as Broken: the simulator's own fault.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

from msgspec.structs import replace

from simulations.errors import SimulatorError
from simulations.outcome import Outcome
from simulations.scenario import Scenario
from simulations.shrink import LIMIT_S, RUNS_MAX, Shrinker

Level = Literal["world", "policy"]
LEVELS: Final[tuple[Level, ...]] = ("world", "policy")
WORKERS_MAX: Final = 64
_AHEAD: Final = 3  # jobs given out per process before the first one's outcome is taken
_POLICY_HOSTS, _POLICY_FAULT_S = 4, 240.0
_TRACEBACK_LINES = 12


@dataclass(frozen=True, slots=True)
class Job:
    """One run. Without a scenario the seed draws one, of this many hosts and seconds of faults if they are given."""

    level: Level
    seed: int
    hosts: int | None = None
    fault_s: float | None = None
    scenario: Scenario | None = None
    bug: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """The simulator is at fault: nothing is said of the product."""

    job: Job
    text: str


@dataclass(slots=True)
class Shrunk:
    """What a failure came down to."""

    outcome: Outcome  # of the shortest history
    runs: int
    exhausted: bool  # the bounds ended the search


def perform(job: Job) -> Outcome | Broken:
    """One run, in this process."""
    try:
        return _run(job)
    except SimulatorError as error:
        return Broken(job, f"{error}{_cause(error)}")
    except (
        Exception
    ) as error:  # whatever else gets out of a run is the simulator's: the product's is in Outcome
        lines = traceback.format_exception(error)[-_TRACEBACK_LINES:]
        return Broken(job, "".join(lines).rstrip())


def perform_all(jobs: Sequence[Job], workers: int) -> Iterator[Outcome | Broken]:
    """The outcomes in the jobs' order. Closing the generator, or Ctrl-C, ends the processes."""
    workers = max(1, min(workers, len(jobs), WORKERS_MAX))
    if workers == 1:
        yield from map(perform, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _deaf)
    done = False
    try:
        yield from _in_order(pool, jobs, workers * _AHEAD)
        done = True
    finally:
        pool.shutdown(wait=done, cancel_futures=True)
        if not done:
            for process in multiprocessing.active_children():
                process.terminate()


def shrunk(failed: Outcome, level: Level, *, runs_max: int = RUNS_MAX, limit_s: float = LIMIT_S) -> Shrunk:
    """The shortest history that fails by the same check."""
    assert failed.failure is not None
    check, kept = failed.failure.check, failed

    def fails(scenario: Scenario) -> bool:
        nonlocal kept
        outcome = perform(Job(level, scenario.seed, scenario=scenario, bug=failed.bug))
        if isinstance(outcome, Broken) or outcome.failure is None or outcome.failure.check != check:
            return False
        kept = outcome
        return True

    shrinker = Shrinker(
        failed.scenario, fails, failed_at_s=failed.failure.at_s, runs_max=runs_max, limit_s=limit_s
    )
    shrinker.run()
    return Shrunk(kept, shrinker.runs, shrinker.exhausted)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------ processes


def _deaf() -> None:
    """Ctrl-C is for the parent, which ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Job], ahead: int) -> Iterator[Outcome | Broken]:
    given: deque[Future[Outcome | Broken]] = deque()
    for job in jobs:
        given.append(pool.submit(perform, job))
        if len(given) >= ahead:
            yield given.popleft().result()
    while given:
        yield given.popleft().result()


# ------------------------------------------------------------------------------------------------ the levels


def _run(job: Job) -> Outcome:
    return _world(job) if job.level == "world" else _policy(job)


def _world(job: Job) -> Outcome:
    from simulations.world.draw import draw
    from simulations.world.run import run

    scenario = job.scenario
    if scenario is None:
        scenario = draw(job.seed, hosts=job.hosts)
        if job.fault_s is not None:
            scenario = replace(scenario, fault_s=job.fault_s)
    outcome: Outcome = run(scenario, bug=job.bug)
    outcome.bug = job.bug
    return outcome


def _policy(job: Job) -> Outcome:
    from simulations.bugs.bank import BUGS
    from simulations.policy.driver import Shape, run
    from simulations.policy.shell import Decisions

    scenario = job.scenario or Scenario(
        seed=job.seed, hosts=job.hosts or _POLICY_HOSTS, fault_s=job.fault_s or _POLICY_FAULT_S
    )
    decisions = Decisions()
    if job.bug:
        BUGS[job.bug](decisions)
    ran = run(scenario.seed, Shape(hosts=scenario.hosts, fault_s=scenario.fault_s), decisions)
    outcome = Outcome(
        scenario,
        failure=ran.failure,
        virtual_s=ran.virtual_s,
        real_s=ran.real_s,
        steps=ran.events,
        trace_hash=ran.trace_hash,
        checks=ran.checks,
        bug=job.bug,
    )
    for name, count in ran.sometimes.items():
        kind = name.removeprefix("fault ")
        (outcome.faults if kind != name else outcome.sometimes)[kind] += count
    return outcome


def _cause(error: BaseException) -> str:
    if error.__cause__ is None:
        return ""
    lines = traceback.format_exception(error.__cause__)[-_TRACEBACK_LINES:]
    return "\n" + "".join(lines).rstrip()
