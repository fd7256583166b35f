"""Figures of alternating rounds: the middle of those that were taken while others left the cores alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.processes import Meter
from tests.bench.report import Options, enough, median, noise, steady


@dataclass
class Sample:
    """One round's figure, in whatever unit the row has."""

    value: float
    foreign: float


class Samples:
    """By name."""

    def __init__(self) -> None:
        self.of: dict[str, list[Sample]] = defaultdict(list)

    @contextmanager
    def round(self) -> Iterator[dict[str, float]]:
        """Put figures into what it gives; each notes what others took of the cores until the end."""
        figures: dict[str, float] = {}
        with Meter() as meter:
            yield figures
        for name, value in figures.items():
            self.of[name].append(Sample(value, meter.foreign))

    def middle(self, name: str) -> float | None:
        return median([sample.value for sample in steady(self.of[name])])

    def note(self, *names: str) -> str:
        return noise(*(self.of[name] for name in names))

    def enough(self, done: int, options: Options) -> bool:
        return enough(self.of, done, options)

    def raw(self) -> dict[str, Any]:
        return {name: [asdict(sample) for sample in samples] for name, samples in self.of.items()}
