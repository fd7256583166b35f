"""Many faults, drawn by a seed: `python -m tests.process.cluster.chaos --faults 200`. Prints a table and the seed."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.process.cluster import scenarios
from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import unusable
from tests.process.cluster.round import Round, perform
from tests.process.cluster.scenarios import Scenario

FAULTS = 200
SIZE = 3
ENGINE_KILLS = tuple(each for each in scenarios.ALL if each.name.startswith(scenarios.KILL_ENGINE))
ENGINE_KILLS_MAX = 2
ENGINE_KILLS_WITHIN = 40  # faults: more than ten minutes
HEAD = (
    f"{'':>4} {'fault':<28} {'on':<4} {'gap':>7} {'whole after':>12} {'elections':>9} {'tasks':>6} "
    f"{'re-queued':>10}  checks"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.process.cluster.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=FAULTS)
    parser.add_argument("--seed", type=int, default=None, help="draw the same faults again")
    parser.add_argument("--peers", type=int, default=SIZE)
    options = parser.parse_args(arguments)
    reason = unusable()
    if reason:
        print(f"chaos: not here: {reason}", file=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}: {options.faults} faults on {options.peers} peers", flush=True)
    with tempfile.TemporaryDirectory(prefix="blip-") as folder, cluster(Path(folder), options.peers) as made:
        made.begin_traffic(seed)
        print(HEAD)
        rounds = _rounds(made, options.faults, random.Random(seed))
        made.end_traffic()
        made.check_all_kept()
        kept = len(made.history.acknowledged())
    _print_summary(rounds, kept)
    print(f"seed {seed}: {len(rounds)} faults, all promises kept")
    return 0


def _rounds(made: Cluster, count: int, chance: random.Random) -> list[Round]:
    done: list[Round] = []
    for number, scenario in enumerate(drawn(count, chance), 1):
        try:
            found = perform(made, scenario, chance)
        except AssertionError:
            print(f"{number:>4} {scenario.name:<28} FAILED", flush=True)
            raise
        done.append(found)
        print(
            f"{number:>4} {found.fault:<28} {found.target:<4} {found.gap_s:>5.1f} s {found.settled_s:>10.1f} s "
            f"{found.elections:>9} {found.tasks:>6} {found.requeued:>10}  ok",
            flush=True,
        )
    return done


def drawn(count: int, chance: random.Random) -> list[Scenario]:
    """An engine that dies a third time within ten minutes is kept away, as it should be: so those are spread."""
    found: list[Scenario] = []
    while len(found) < count:
        scenario = chance.choice(scenarios.ALL)
        if scenario in ENGINE_KILLS:
            lately = sum(each in ENGINE_KILLS for each in found[-ENGINE_KILLS_WITHIN:])
            if lately >= ENGINE_KILLS_MAX:
                continue
        found.append(scenario)
    return found


def _print_summary(rounds: Sequence[Round], kept: int) -> None:
    print(f"\n{'fault':<28} {'times':>6} {'median gap':>11} {'longest gap':>12}")
    for name in dict.fromkeys(scenario.name for scenario in scenarios.ALL):
        gaps = sorted(each.gap_s for each in rounds if each.fault == name)
        if gaps:
            print(f"{name:<28} {len(gaps):>6} {gaps[len(gaps) // 2]:>9.1f} s {gaps[-1]:>10.1f} s")
    print(f"\n{kept} tasks acknowledged, {sum(each.requeued for each in rounds)} attempts begun again")


if __name__ == "__main__":
    sys.exit(main())
