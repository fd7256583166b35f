"""Known defects of whole peers, switched on one at a time: the world level must find each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from simulations.errors import SimulatorError

Patch = tuple[object, str, object]  # where, name, instead
BUGS: Mapping[str, tuple[Patch, ...]] = {}


@contextmanager
def switched_on(bug: str) -> Iterator[None]:
    """With this defect, "" for none. The product is itself again afterwards."""
    if not bug:
        yield
        return
    if bug not in BUGS:
        raise SimulatorError(f"there is no bug `{bug}`")
    before = [(where, name, getattr(where, name)) for where, name, _ in BUGS[bug]]
    for where, name, instead in BUGS[bug]:
        setattr(where, name, instead)
    try:
        yield
    finally:
        for where, name, was in before:
            setattr(where, name, was)
