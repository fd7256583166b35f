"""What a measure hands back, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

NOTE_CHARS = 160
REPEATS = 2
QUIET = 0.10  # share of all cores that others may take in a round that counts


class Measured(Protocol):
    """One round's figures. `foreign`: share of all cores that processes of others took meanwhile."""

    foreign: float


M = TypeVar("M", bound=Measured)


@dataclass
class Row:
    """One line of the table. `goal`: "ratio>=0.5", "ours<=80" or none. `note`: what is missing, and why."""

    name: str
    ours: float | None
    reference: float | None = None
    unit: str = ""
    beside: str = ""  # what the reference is
    goal: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.ours is None or not self.reference:
            return None
        return self.ours / self.reference

    @property
    def met(self) -> bool | None:
        """None where there is no goal, or a number is missing."""
        if not self.goal:
            return None
        what, bound = self.goal[:5], float(self.goal.split("=")[1])
        value = self.ratio if what == "ratio" else self.ours
        if value is None:
            return None
        return value >= bound if ">=" in self.goal else value <= bound


@dataclass
class Result:
    """Of one measure: rows for people, everything measured for programs."""

    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How long and how often. Windows in seconds."""

    seconds: float = 3.0
    rounds: int = 3
    quick: bool = False


def steady(outcomes: Sequence[M]) -> list[M]:
    """Those that were measured while others left the machine alone; if there are none the quietest half."""
    quiet = [outcome for outcome in outcomes if outcome.foreign <= QUIET]
    return quiet or sorted(outcomes, key=lambda one: one.foreign)[: (len(outcomes) + 1) // 2]


def enough(rounds: Mapping[str, Sequence[Measured]], done: int, options: Options) -> bool:
    """Whether to stop after `done` rounds: noisy ones are repeated, at most REPEATS times."""
    if done < options.rounds:
        return False
    if options.quick or done >= options.rounds + REPEATS:
        return True
    wanted = min(2, options.rounds)
    return all(sum(one.foreign <= QUIET for one in every) >= wanted for every in rounds.values())


def noise(*every: Sequence[Measured]) -> str:
    """Says that a figure had no quiet round, if so."""
    if any(outcomes and min(one.foreign for one in outcomes) > QUIET for outcomes in every):
        return "noisy: no round in which other processes left the cores alone"
    return ""


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def brief(note: str) -> str:
    """One line: of a traceback or a log its beginning and its last line. The JSON has all of it."""
    lines = [line.strip() for line in note.splitlines() if line.strip()]
    return " ... ".join(line[:NOTE_CHARS] for line in (lines[0], lines[-1])) if len(lines) > 1 else note


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def table(rows: Sequence[Row]) -> str:
    """Columns name, ours, reference, ratio, goal; notes below, numbered."""
    head = ("name", "unit", "ours", "reference", "beside", "ratio", "goal", "")
    cells: list[tuple[str, ...]] = [head]
    notes: list[str] = []
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        if row.goal and row.met is None:
            verdict = "not measured"
        if note := brief(row.note):
            if note not in notes:
                notes.append(note)
            verdict = f"{verdict} [{notes.index(note) + 1}]".strip()
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        goal = row.goal.replace(">=", " >= ").replace("<=", " <= ")
        cells.append(
            (row.name, row.unit, _number(row.ours), _number(row.reference), row.beside, ratio, goal, verdict)
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    right = {2, 3, 5}
    lines = [
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines + [f"[{number}] {note}" for number, note in enumerate(notes, 1)])
