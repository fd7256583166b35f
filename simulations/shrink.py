"""The shortest scenario that still fails: parts are taken away for as long as the same check fails.

A bad day drawn from a seed has dozens of faults and hundreds of requests, most of them without any part in what went
wrong. Pure: it knows a scenario and a predicate, nothing of what runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from msgspec.structs import replace

from simulations.scenario import Fault, Op, Scenario

RUNS_MAX = 400
LIMIT_S = 300.0
FAULT_S_MIN = 0.1  # a fault of 0 s may be one for good: none is shortened to that
_TAIL_S = 1.0  # of calm after the last event, before all is mended

T = TypeVar("T")
Fails = Callable[[Scenario], bool]  # whether it fails by the same check


def shrink(
    scenario: Scenario,
    fails: Fails,
    *,
    failed_at_s: float | None = None,
    runs_max: int = RUNS_MAX,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Scenario:
    """A scenario that fails too, as short as `runs_max` runs and `limit_s` seconds find it.

    If both suffice, nothing can be taken away alone: no fault, and no operation with what refers to it. `scenario`
    is taken to fail, at `failed_at_s` if that is known; `fails` must be a function of its argument.
    """
    return Shrinker(
        scenario, fails, failed_at_s=failed_at_s, runs_max=runs_max, limit_s=limit_s, clock=clock
    ).run()


class Shrinker:
    """`runs` counts the runs made, `exhausted` says whether the bounds ended the search before it was done."""

    def __init__(
        self,
        scenario: Scenario,
        fails: Fails,
        *,
        failed_at_s: float | None = None,
        runs_max: int = RUNS_MAX,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scenario = scenario
        self.runs = 0
        self.exhausted = False
        self._fails = fails
        self._failed_at_s = failed_at_s
        self._runs_max = runs_max
        self._clock = clock
        self._until = clock() + limit_s
        self._known: dict[Scenario, bool] = {}

    def run(self) -> Scenario:
        """What takes most away comes first; all of it again until nothing more can go."""
        if self._failed_at_s is not None:
            self._cut(self._failed_at_s)
        before = None
        while before != self.scenario and not self.exhausted:
            before = self.scenario
            self._fewer_faults()
            self._fewer_ops()
            self._fewer_hosts()
            self._none_upgraded()
            self._shorter_faults()
            self._earlier_end()
        return self.scenario

    def _try(self, candidate: Scenario) -> bool:
        """Whether it fails as well, and is taken then."""
        if candidate == self.scenario:
            return False
        known = self._known.get(candidate)
        if known is None:
            if self.runs >= self._runs_max or self._clock() >= self._until:
                self.exhausted = True
                return False
            self.runs += 1
            known = self._known[candidate] = self._fails(candidate)
        if known:
            self.scenario = candidate
        return known

    def _cut(self, at_s: float) -> None:
        """What came after the failure has no part in it."""
        ops = [i for i, op in enumerate(self.scenario.ops) if op.at_s <= at_s]
        faults = tuple(fault for fault in self.scenario.faults if fault.at_s <= at_s)
        end = min(self.scenario.fault_s, at_s + _TAIL_S)
        self._try(replace(with_ops(self.scenario, ops), faults=faults, fault_s=end))

    def _fewer_faults(self) -> None:
        self._ddmin(lambda: self.scenario.faults, lambda kept: replace(self.scenario, faults=tuple(kept)))

    def _fewer_ops(self) -> None:
        self._ddmin(
            lambda: range(len(self.scenario.ops)), lambda kept: with_ops(self.scenario, frozenset(kept))
        )

    def _ddmin(self, items: Callable[[], Sequence[T]], build: Callable[[Sequence[T]], Scenario]) -> None:
        """Zeller's: halves go first, then ever smaller parts. What is taken changes `items`."""
        if not items() or self._try(build(())):
            return
        part = max(1, len(items()) // 2)
        while True:
            at, taken = 0, False
            while at < len(items()):
                now = items()
                if self._try(build([*now[:at], *now[at + part :]])):
                    taken = True  # what followed is at `at` now
                else:
                    at += part
                if self.exhausted:
                    return
            if part == 1 and not taken:
                return
            part = max(1, part // 2)

    def _fewer_hosts(self) -> None:
        for hosts in range(1, self.scenario.hosts):
            if self._try(with_hosts(self.scenario, hosts)):
                return

    def _none_upgraded(self) -> None:
        for peer in self.scenario.upgraded:
            rest = tuple(each for each in self.scenario.upgraded if each != peer)
            self._try(replace(self.scenario, upgraded=rest))

    def _shorter_faults(self) -> None:
        for i in range(len(self.scenario.faults)):
            while (fault := self.scenario.faults[i]).for_s >= 2 * FAULT_S_MIN:
                shorter = replace(fault, for_s=round(fault.for_s / 2, 3))
                faults = (*self.scenario.faults[:i], shorter, *self.scenario.faults[i + 1 :])
                if not self._try(replace(self.scenario, faults=faults)):
                    break

    def _earlier_end(self) -> None:
        ends = [fault.at_s + fault.for_s for fault in self.scenario.faults]
        ends += [op.at_s for op in self.scenario.ops]
        end = max(ends, default=0.0) + _TAIL_S
        if end < self.scenario.fault_s:
            self._try(replace(self.scenario, fault_s=end))


def with_ops(scenario: Scenario, kept: Iterable[int]) -> Scenario:
    """Only the operations at these places, without those that refer to one which goes; references are kept right."""
    ops = scenario.ops
    stay = set(kept)
    while orphans := [i for i in stay if ops[i].task >= 0 and ops[i].task not in stay]:
        stay.difference_update(orphans)
    places = {old: new for new, old in enumerate(sorted(stay))}
    return replace(
        scenario,
        ops=tuple(
            replace(ops[old], task=places[ops[old].task]) if ops[old].task >= 0 else ops[old]
            for old in places
        ),
    )


def with_hosts(scenario: Scenario, hosts: int) -> Scenario:
    """Only the first so many peers ("h1" is the first), without what names another one."""
    peers = frozenset(f"h{n}" for n in range(1, hosts + 1))
    kept = [i for i, op in enumerate(scenario.ops) if _names_only(op, peers)]
    fewer = with_ops(scenario, kept)
    return replace(
        fewer,
        hosts=hosts,
        voters=min(scenario.voters, hosts),
        faults=tuple(fault for fault in scenario.faults if _targets_only(fault, peers)),
        upgraded=tuple(peer for peer in scenario.upgraded if peer in peers),
    )


def _names_only(op: Op, peers: frozenset[str]) -> bool:
    return op.peer in peers and (not op.worker or _peer_of(op.worker) in peers)


def _targets_only(fault: Fault, peers: frozenset[str]) -> bool:
    return all(_peer_of(target) in peers for target in fault.targets)


def _peer_of(name: str) -> str:
    """Of "h1" and of its worker "h1-gpu0"."""
    return name.partition("-")[0]
