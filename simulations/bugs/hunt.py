"""How many seeds each bug of the bank takes to be found."""

from __future__ import annotations

from dataclasses import dataclass

from simulations.bugs.bank import BUGS
from simulations.policy.driver import Shape, run
from simulations.policy.shell import Decisions

SEEDS_MAX = 200


@dataclass(frozen=True, slots=True)
class Found:
    """`seed` is None where no run found it; `check` is what noticed it."""

    bug: str
    seeds: int
    seed: int | None
    check: str
    message: str


def hunt(bug: str, shape: Shape, seeds_max: int = SEEDS_MAX, first: int = 0) -> Found:
    for seed in range(first, first + seeds_max):
        decisions = Decisions()
        BUGS[bug](decisions)
        outcome = run(seed, shape, decisions)
        if outcome.failure is not None:
            failure = outcome.failure
            return Found(bug, seed - first + 1, seed, failure.check, failure.message)
    return Found(bug, seeds_max, None, "", "")
