"""From logits to a token, on the host; and stop strings.

Greedy at temperature 0. Otherwise repetition penalty, temperature, top-k, top-p in that order, then one draw from the
run's own generator, so that a seed gives the same text whatever else runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import RunError

Logits = npt.NDArray[np.float32]


class Sampler:
    """One run's way of choosing tokens. Raises RunError `bad_parameters` on values that make no sense."""

    def __init__(self, parameters: Mapping[str, Any], prompt: Iterable[int] = ()) -> None:
        self.temperature = _number(parameters, "temperature", 0.7, 0.0, 100.0)
        self.top_p = _number(parameters, "top_p", 1.0, 0.0, 1.0)
        self.top_k = int(_number(parameters, "top_k", 0, 0, 1 << 31))
        self.penalty = _number(parameters, "repetition_penalty", 1.0, 0.01, 100.0)
        self._seen = set(prompt) if self.penalty != 1.0 else set()
        self._random = np.random.default_rng(parameters.get("seed"))

    def choose(self, logits: Logits) -> int:
        """logits [V] -> token."""
        if self.penalty != 1.0:
            logits = self._penalised(logits)
        token = int(logits.argmax()) if self.temperature == 0 else self._draw(logits)
        if self.penalty != 1.0:
            self._seen.add(token)
        return token

    def _penalised(self, logits: Logits) -> Logits:
        logits = logits.copy()
        seen = np.fromiter(self._seen, dtype=np.int64)
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / self.penalty, values * self.penalty)
        return logits

    def _draw(self, logits: Logits) -> int:
        candidates: npt.NDArray[np.int64] | None = None
        if 0 < self.top_k < len(logits):
            candidates = np.argpartition(logits, -self.top_k)[-self.top_k :].astype(np.int64)
            logits = logits[candidates]
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / self.temperature)
        weights /= weights.sum()
        if self.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            kept = int(np.searchsorted(np.cumsum(weights[order]), self.top_p)) + 1
            order = order[:kept]
            weights = weights[order] / weights[order].sum()
            candidates = order.astype(np.int64) if candidates is None else candidates[order]
        drawn = min(
            int(np.searchsorted(np.cumsum(weights), self._random.random(), side="right")), len(weights) - 1
        )
        return drawn if candidates is None else int(candidates[drawn])


def _number(parameters: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = parameters.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RunError("bad_parameters", f"{name} must be a number from {least} to {most}")
    return float(value)


class StopStrings:
    """Ends a run at the first stop string, and holds back text that may be the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to come before any stop string, and whether one has been reached."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            given, self._held = self._held[: min(found)], ""
            return given, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given, False

    def finish(self) -> str:
        """What was held back."""
        given, self._held = self._held, ""
        return given


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
