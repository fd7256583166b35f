"""python -m simulations.bugs.table: hunt every bug of the policy level and write the table into docs/simulations.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from simulations.bugs.bank import BUGS
from simulations.bugs.hunt import SEEDS_MAX, Found, hunt
from simulations.policy.driver import Shape

DOCS = Path(__file__).resolve().parents[2] / "docs" / "simulations.md"
BEGIN, END = "<!-- policy-bugs -->", "<!-- /policy-bugs -->"


def find(bug: str) -> Found:
    return hunt(bug, Shape())


def table(found: Sequence[Found]) -> str:
    shape = Shape()
    lines = [
        f"Policy level, {shape.hosts} hosts, {shape.fault_s:g} s of faults, at most {SEEDS_MAX} seeds each; written by "
        "`python -m simulations.bugs.table`:",
        "",
        "| bug | seeds | found by |",
        "|---|---|---|",
    ]
    for each in found:
        seeds = str(each.seeds) if each.seed is not None else f"not in {each.seeds}"
        lines.append(f"| {each.bug} | {seeds} | {each.check} |")
    return "\n".join(lines)


def write(found: Sequence[Found], path: Path = DOCS) -> None:
    """Replace what is between the markers."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def main() -> int:
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        found = list(processes.map(find, BUGS))
    print(table(found))
    write(found)
    return int(any(each.seed is None for each in found))


if __name__ == "__main__":
    sys.exit(main())
