"""What runs came to, in words: the numbers of many, the history of a failed one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from simulations.campaign import Broken, Level
from simulations.outcome import Outcome
from simulations.scenario import Fault, Op, Scenario

_HISTORY_LINES_MAX = 60


@dataclass(slots=True)
class Totals:
    """The sums of many runs. `failed` has those that the product failed; `eventful`, the one with most to see."""

    level: Level
    wall_s: float = 0.0  # of the whole series; runs may overlap
    runs: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    steps: int = 0
    checks: Counter[str] = field(default_factory=Counter)
    sometimes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    eventful: Outcome | None = None

    def add(self, outcome: Outcome | Broken) -> None:
        if isinstance(outcome, Broken):
            self.broken.append(outcome)
            return
        self.runs += 1
        self.virtual_s += outcome.virtual_s
        self.real_s += outcome.real_s
        self.steps += outcome.steps
        self.checks.update(outcome.checks)
        self.sometimes.update(outcome.sometimes)
        self.faults.update(outcome.faults)
        if outcome.failure is not None:
            self.failed.append(outcome)
        elif self.eventful is None or len(outcome.timeline) > len(self.eventful.timeline):
            self.eventful = outcome

    @property
    def speed(self) -> float:
        """Virtual seconds per second of real time, all processes together."""
        return self.virtual_s / max(1e-9, self.wall_s or self.real_s)

    def numbers(self) -> Iterator[tuple[str, str]]:
        yield "seeds run", f"{self.runs} at the {self.level} level"
        yield "virtual time", f"{self.virtual_s / 3600:.2f} hours, {self.speed:,.0f} times real time"
        yield "steps", f"{self.steps:,}"
        yield "faults injected", f"{sum(self.faults.values()):,} of {len(self.faults)} kinds"
        yield "invariants checked", f"{sum(self.checks.values()):,} times, {len(self.checks)} of them"
        yield "held", f"{self.runs - len(self.failed)} of {self.runs}"
        if self.broken:
            yield "simulator at fault", str(len(self.broken))

    def never(self) -> list[str]:
        """What should be reached sometimes and was not."""
        return [name for name in declared(self.level) if not self.sometimes[name] and not self.faults[name]]


def declared(level: Level) -> list[str]:
    """The faults and states that many runs should reach."""
    if level == "policy":
        from simulations.policy.sometimes import Sometimes

        return [name.removeprefix("fault ") for name in Sometimes.never(Counter())]
    from simulations.world.faults import KINDS
    from simulations.world.sometimes import STATES

    return [*sorted(KINDS), *STATES]


def counted(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The most frequent last, so that what is rare meets the eye."""
    for name, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        yield name, f"{count:,}"


# ------------------------------------------------------------------------------------------------ one history


def history(scenario: Scenario) -> list[str]:
    """Every fault and operation in the order of time, for people."""
    lines = [(fault.at_s, 0, _fault(fault)) for fault in scenario.faults]
    lines += [(op.at_s, 1, _op(i, op)) for i, op in enumerate(scenario.ops)]
    shown = [f"{at_s:>9.3f} s  {text}" for at_s, _, text in sorted(lines)]
    if len(shown) > _HISTORY_LINES_MAX:
        left_out = len(shown) - _HISTORY_LINES_MAX
        shown = [
            *shown[:_HISTORY_LINES_MAX],
            f"{'':>9}    ... and {left_out} more: the trace has all of them",
        ]
    return shown


def size(scenario: Scenario, level: Level) -> str:
    if level == "policy":
        return f"{scenario.hosts} hosts in {scenario.fault_s:g} s; all else its seed draws"
    upgraded = f", {len(scenario.upgraded)} upgraded" if scenario.upgraded else ""
    return (
        f"{scenario.hosts} hosts{upgraded}, {len(scenario.faults)} faults, {len(scenario.ops)} operations "
        f"in {scenario.fault_s:g} s"
    )


def _fault(fault: Fault) -> str:
    words = [
        f"fault {fault.kind}",
        " -> ".join(fault.targets) if _is_link(fault) else ", ".join(fault.targets),
    ]
    if fault.for_s:
        words.append(f"for {fault.for_s:g} s")
    if fault.strength:
        words.append(f"strength {fault.strength:g}")
    return "  ".join(word for word in words if word)


def _is_link(fault: Fault) -> bool:
    return len(fault.targets) == 2 and ("link" in fault.kind or "one_way" in fault.kind)


def _op(place: int, op: Op) -> str:
    words = [f"client {op.client} asks {op.peer}: {op.kind}"]
    if op.kind == "submit":
        words.append(f"#{place} {op.model}, {op.tokens} tokens, at most {op.timeout_s:g} s")
    elif op.task >= 0:
        words.append(f"#{op.task}")
    else:
        words += [word for word in (op.model, op.worker) if word]
    if op.key:
        words.append(f"with key {op.key}")
    if op.vanish_s:
        words.append(f"gives up after {op.vanish_s:g} s")
    return "  ".join(words)
