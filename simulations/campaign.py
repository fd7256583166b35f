"""Many runs: in several processes, their outcomes in the order of their seeds whatever the processes do.

A run ends as an Outcome (the product held, or its failure) or as Broken: the simulator's own fault.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import structlog

from simulations.errors import SimulatorError
from simulations.outcome import Outcome
from simulations.scenario import Scenario
from simulations.shrink import LIMIT_S, RUNS_MAX, Shrinker

Level = Literal["world", "policy"]
LEVELS: Final[tuple[Level, ...]] = ("world", "policy")
WORKERS_MAX: Final = 64
HUNT_SEEDS_MAX: Final = 200
_AHEAD: Final = 3  # jobs given out per process before the first one's outcome is taken
_POLICY_HOSTS, _POLICY_FAULT_S = 4, 100.0
_TRACEBACK_LINES = 12
A = TypeVar("A")
R = TypeVar("R")


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
    """One run, in this process. What the simulated peers log is not kept: a trace's tail says what happened."""
    try:
        with _logging_nothing():
            return _run(job)
    except SimulatorError as error:
        return Broken(job, f"{error}{_cause(error)}")
    except Exception as error:  # whatever else gets out is the simulator's: the product's is in Outcome
        lines = traceback.format_exception(error)[-_TRACEBACK_LINES:]
        return Broken(job, "".join(lines).rstrip())


def perform_all(jobs: Sequence[Job], workers: int) -> Iterator[Outcome | Broken]:
    """The outcomes in the jobs' order. Closing the generator, or Ctrl-C, ends the processes."""
    return each_in_order(perform, jobs, workers)


def each_in_order(call: Callable[[A], R], items: Sequence[A], workers: int) -> Iterator[R]:
    """`call` of each item, in `workers` processes; one means this process."""
    workers = max(1, min(workers, len(items), WORKERS_MAX))
    if workers == 1:
        yield from map(call, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _deaf)
    done = False
    try:
        yield from _in_order(pool, call, items, workers * _AHEAD)
        done = True
    finally:
        for process in multiprocessing.active_children() if not done else ():
            process.terminate()  # before the wait, which would be for what they do
        pool.shutdown(wait=True, cancel_futures=True)


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


@dataclass(frozen=True, slots=True)
class Hunt:
    """A known bug, looked for in seeds from 0 on."""

    level: Level
    bug: str
    hosts: int | None = None
    fault_s: float | None = None
    seeds_max: int = HUNT_SEEDS_MAX


@dataclass(frozen=True, slots=True)
class Hunted:
    """`seed` is None where no run found the bug; `check` is what noticed it."""

    bug: str
    seeds: int
    seed: int | None
    check: str


def hunt(what: Hunt) -> Hunted:
    """Raises SimulatorError."""
    for seed in range(what.seeds_max):
        outcome = perform(Job(what.level, seed, hosts=what.hosts, fault_s=what.fault_s, bug=what.bug))
        if isinstance(outcome, Broken):
            raise SimulatorError(f"seed {seed} with the bug {what.bug}: {outcome.text}")
        if outcome.failure is not None:
            return Hunted(what.bug, seed + 1, seed, outcome.failure.check)
    return Hunted(what.bug, what.seeds_max, None, "")


def known_bugs(level: Level) -> list[str]:
    """Of the bank, those that this level can switch on."""
    if level == "world":
        from simulations.bugs import world

        return sorted(world.BUGS)
    from simulations.bugs import bank

    return sorted(bank.BUGS)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _logging_nothing() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


# ------------------------------------------------------------------------------------------------ processes


def _deaf() -> None:
    """Ctrl-C is for the parent, which ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_order(
    pool: ProcessPoolExecutor, call: Callable[[A], R], items: Iterable[A], ahead: int
) -> Iterator[R]:
    given: deque[Future[R]] = deque()
    for item in items:
        given.append(pool.submit(call, item))
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

    scenario = job.scenario or draw(job.seed, hosts=job.hosts, fault_s=job.fault_s)
    return run(scenario, bug=job.bug)


def _policy(job: Job) -> Outcome:
    from simulations.policy.driver import Shape, run
    from simulations.policy.shell import Decisions

    scenario = job.scenario or Scenario(
        seed=job.seed, hosts=job.hosts or _POLICY_HOSTS, fault_s=job.fault_s or _POLICY_FAULT_S
    )
    decisions = Decisions()
    if job.bug:
        from simulations.bugs.bank import BUGS

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
