"""What one run came to: the same record for whatever drew, replayed or shrank its scenario."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from simulations.errors import InvariantViolated
from simulations.scenario import Scenario

MarkKind = Literal["leader", "fault", "partition", "down", "frozen", "task", "event"]
CLUSTER = "cluster"  # the row of marks that belong to no single peer


@dataclass(frozen=True, slots=True)
class Mark:
    """Something to draw on the timeline, in virtual seconds; `until_s` is None for a moment.

    A band that never ended is given the end of the run. A mark of kind "task" is a moment at which a task changed;
    its text is the new state and the task's name: "queued #3", "running #3", and any other state for an end. They
    are counted to a curve, not drawn one by one.
    """

    at_s: float
    until_s: float | None
    row: str  # a peer, or CLUSTER
    kind: MarkKind
    text: str = ""


@dataclass(slots=True)
class Outcome:
    """`failure` is the product's fault; a fault of the simulator is raised as SimulatorError instead."""

    scenario: Scenario
    failure: InvariantViolated | None = None
    virtual_s: float = 0.0
    real_s: float = 0.0
    steps: int = 0  # of the kernel
    trace_hash: str = ""
    checks: Counter[str] = field(default_factory=Counter)  # invariant: how often it was checked
    sometimes: Counter[str] = field(default_factory=Counter)  # what was reached
    faults: Counter[str] = field(default_factory=Counter)  # kind: how many were injected
    timeline: list[Mark] = field(default_factory=list)
    trace_tail: tuple[str, ...] = ()  # the last lines of the trace, for a failure's report
    bug: str = ""  # of the bug bank, when one was switched on

    @property
    def seed(self) -> int:
        return self.scenario.seed

    @property
    def held(self) -> bool:
        return self.failure is None
