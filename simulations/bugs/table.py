"""python -m simulations.bugs.table LEVEL: hunt each known bug of a level, write the table into docs/simulations.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from simulations.bugs.bank import BUGS
from simulations.campaign import HUNT_SEEDS_MAX, Hunt, Hunted, Level, cores, each_in_order, hunt, known_bugs

DOCS: Final = Path(__file__).resolve().parents[2] / "docs" / "simulations.md"
# How large the runs are: hosts (None: as the seed draws) and seconds of faults.
SHAPES: Final[dict[Level, tuple[int | None, float]]] = {"policy": (4, 240.0), "world": (None, 90.0)}

# A defect that needs a rare hour: its runs are as long as the seed draws.
LONG: Final = frozenset({"beats_unfenced"})


def table(level: Level, found: Sequence[Hunted]) -> str:
    hosts, fault_s = SHAPES[level]
    size = f"{hosts} hosts" if hosts else "3 to 7 hosts"
    lines = [
        f"{level.capitalize()} level, {size}, {fault_s:g} s of faults, at most {HUNT_SEEDS_MAX} seeds each; written by "
        f"`python -m simulations.bugs.table {level}`:",
        "",
        "| bug | seeds | found by |",
        "|---|---|---|",
    ]
    for each in found:
        seeds = str(each.seeds) if each.seed is not None else f"not in {each.seeds}"
        length = ", as long as drawn" if each.bug in LONG else ""
        lines.append(f"| {each.bug} | {seeds}{length} | {each.check} |")
    return "\n".join(lines)


def write(level: Level, text: str, path: Path = DOCS) -> None:
    """Replace what is between this level's markers."""
    begin, end = f"<!-- {level}-bugs -->", f"<!-- /{level}-bugs -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in (["policy"], ["world"]):
        print(__doc__)
        return 2
    level: Level = "world" if arguments[0] == "world" else "policy"
    names = list(BUGS) if level == "policy" else known_bugs(level)
    hosts, fault_s = SHAPES[level]
    hunts = [Hunt(level, name, hosts, None if name in LONG else fault_s) for name in names]
    found = list(each_in_order(hunt, hunts, cores()))
    text = table(level, found)
    print(text)
    write(level, text)
    return int(any(each.seed is None for each in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
