"""What many runs came to, in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from simulations.bugs.hunt import Found
from simulations.policy.driver import Outcome, Shape
from simulations.policy.sometimes import Sometimes


def replay_command(seed: int, shape: Shape) -> str:
    return f"python -m simulations --seed {seed} --hosts {shape.hosts} --hours {shape.fault_s / 3600:g}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Everything that a person wants to know of a series of runs."""
    checks: Counter[str] = Counter()
    sometimes: Counter[str] = Counter()
    for outcome in outcomes:
        checks += outcome.checks
        sometimes += outcome.sometimes
    virtual_s, real_s = sum(o.virtual_s for o in outcomes), sum(o.real_s for o in outcomes)
    faults = {name[6:]: n for name, n in sorted(sometimes.items()) if name.startswith("fault ")}
    lines = [
        f"seeds             {len(outcomes)}",
        f"virtual time      {virtual_s / 3600:.2f} h ({virtual_s / max(1e-9, real_s):.0f} times real time)",
        f"events, tasks     {sum(o.events for o in outcomes)}, {sum(o.tasks for o in outcomes)}",
        f"faults injected   {sum(faults.values())}",
        *(f"  {name:<40} {count:>10}" for name, count in faults.items()),
        f"checks made       {sum(checks.values())}",
        *(f"  {name:<56} {count:>10}" for name, count in sorted(checks.items())),
    ]
    never = list(Sometimes.never(sometimes))
    lines.append(f"never reached     {len(never)}" + (": " + "; ".join(never) if never else ""))
    return "\n".join(lines)


def failure(outcome: Outcome) -> str:
    return f"seed {outcome.seed} FAILED {outcome.failure}\n  {replay_command(outcome.seed, outcome.shape)}"


def bug_table(found: Sequence[Found]) -> str:
    lines = ["| bug | seeds | found by |", "|---|---|---|"]
    for each in found:
        seeds = str(each.seeds) if each.seed is not None else f"not in {each.seeds}"
        lines.append(f"| {each.bug} | {seeds} | {each.check} |")
    return "\n".join(lines)
