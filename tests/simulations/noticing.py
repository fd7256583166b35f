"""Wrong stand-ins for the product: a check must notice them."""

from __future__ import annotations

from collections.abc import Callable

from simulations.errors import InvariantViolated


def require_noticed(run: Callable[[int], object], check: str) -> None:
    """`run` takes a seed: by this check and no other, in most of a few runs."""
    found = []
    for seed in range(4):
        try:
            run(seed)
        except InvariantViolated as violated:
            found.append(violated.check)
    assert len(found) >= 2, "seldom noticed"
    assert set(found) == {check}
