"""python -m simulations: run many seeds, replay one, or hunt the bug bank.

Exit codes: 0 all held, 1 the product violated an invariant, 2 wrong usage, 3 the simulator itself is at fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from simulations import report
from simulations.bugs.bank import BUGS
from simulations.bugs.hunt import SEEDS_MAX, hunt
from simulations.errors import SimulatorError
from simulations.policy.driver import Outcome, Shape, run
from simulations.policy.shell import Decisions

EXIT_VIOLATED, EXIT_SIMULATOR = 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    shape = Shape(hosts=options.hosts, fault_s=options.hours * 3600)
    try:
        if options.bugs:
            return _hunt(shape, options.bug or list(BUGS))
        if options.seed is not None:
            return _one(options.seed, shape, options.bug)
        return _many(range(options.first, options.first + options.seeds), shape)
    except SimulatorError as error:
        print(f"the simulator itself is at fault: {error}", file=sys.stderr)
        return EXIT_SIMULATOR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations", description=__doc__)
    parser.add_argument("--seeds", type=_positive(int), default=20, help="how many runs (20)")
    parser.add_argument("--first", type=int, default=0, help="the first run's seed (0)")
    parser.add_argument("--seed", type=int, help="replay this one and print its trace hash")
    parser.add_argument("--hosts", type=_positive(int), default=4, help="hosts of each run's cluster (4)")
    parser.add_argument(
        "--hours",
        type=_positive(float),
        default=240 / 3600,
        help="virtual hours of faults in each run (4 min)",
    )
    parser.add_argument("--bugs", action="store_true", help="hunt the bug bank and print its table")
    parser.add_argument("--bug", action="append", choices=sorted(BUGS), help="this bug only; with --seed: on")
    return parser


def _positive(kind: type[int] | type[float]):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise ValueError(text)
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _one(seed: int, shape: Shape, bugs: Sequence[str] | None) -> int:
    decisions = Decisions()
    for bug in bugs or ():
        BUGS[bug](decisions)
    outcome = run(seed, shape, decisions)
    print(report.summary([outcome]))
    print(f"trace             {outcome.trace_hash}")
    if outcome.failure is not None:
        print(report.failure(outcome))
        return EXIT_VIOLATED
    return 0


def _many(seeds: Sequence[int], shape: Shape) -> int:
    outcomes: list[Outcome] = []
    for done, seed in enumerate(seeds, 1):
        outcome = run(seed, shape)
        outcomes.append(outcome)
        if outcome.failure is not None:
            print(report.failure(outcome), flush=True)
        if sys.stderr.isatty():
            print(f"\r{done}/{len(seeds)} seeds", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report.summary(outcomes))
    failed = [outcome.seed for outcome in outcomes if outcome.failure is not None]
    print(f"failed            {len(failed)}" + (f": {failed}" if failed else ""))
    return EXIT_VIOLATED if failed else 0


def _hunt(shape: Shape, bugs: Sequence[str]) -> int:
    found = []
    for bug in bugs:
        found.append(hunt(bug, shape))
        if sys.stderr.isatty():
            print(f"\r{len(found)}/{len(bugs)} bugs", end="", file=sys.stderr, flush=True)
    print(report.bug_table(found))
    missed = [each.bug for each in found if each.seed is None]
    print(f"found within {SEEDS_MAX} seeds: {len(found) - len(missed)} of {len(found)}")
    return EXIT_VIOLATED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
