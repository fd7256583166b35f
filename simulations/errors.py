"""What a simulation can end with, and whose fault it is.

InvariantViolated   the product decided wrongly, or a decision raised what it must not
SimulatorError      everything else that goes wrong: the simulator's own code is at fault
"""

from __future__ import annotations


class InvariantViolated(Exception):
    """`check` names the invariant, `at_s` is virtual time."""

    def __init__(self, check: str, message: str, at_s: float = 0.0) -> None:
        super().__init__(f"[{at_s:.3f} s] {check}: {message}")
        self.check = check
        self.message = message
        self.at_s = at_s

    def __reduce__(self) -> tuple[type[InvariantViolated], tuple[str, str, float]]:
        """From one process to another: an exception is remade from what made it."""
        return InvariantViolated, (self.check, self.message, self.at_s)


class SimulatorError(Exception):
    """A bug in `simulations/`, never one of the product."""
