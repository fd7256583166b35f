"""What simulations found in the product once: each scenario failed then, and holds now."""

from __future__ import annotations

from pathlib import Path

import pytest

import simulations
from simulations.scenario_file import read_scenario, read_trace
from simulations.world.run import run

FOLDER = Path(simulations.__file__).parent / "regressions"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".yaml", ".json"))


def test_there_are_some() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_holds(path: Path) -> None:
    scenario = read_scenario(path) if path.suffix == ".yaml" else read_trace(path).scenario
    outcome = run(scenario)
    assert outcome.held, f"{outcome.failure}\n{''.join(outcome.trace_tail)}"
