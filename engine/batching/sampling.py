"""From logits to a token, on the host; and stop strings.

In this order: logit biases, repetition penalty (of tokens in prompt and text), frequency and presence penalties (of
tokens in the text), the grammar's mask, temperature, top-k, top-p, min-p, and one draw from the run's own generator, so
that a seed gives the same text whatever else runs beside it. At temperature 0 the best token is taken after the mask.
Log probabilities are the model's own: of the logits before all of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import RunError
from engine.text.grammar import Grammar, Tokens

Logits = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32]  # in proportion to probabilities
BIASES_MAX = 1024
TOP_LOGPROBS_MAX = 20
_GREEDY = 0.0
_BLOCK = 256


class Sampler:
    """One run's way of choosing tokens. Raises RunError `bad_parameters` on values that make no sense.

    `tokens` is the size of the vocabulary, 0 if it does not matter. With a `grammar`, `complete` tells that the text
    has come to its end.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        prompt: Iterable[int] = (),
        tokens: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        self.temperature = _number(parameters, "temperature", 0.7, 0.0, 100.0)
        self.top_p = _number(parameters, "top_p", 1.0, 0.0, 1.0)
        self.top_k = int(_number(parameters, "top_k", 0, 0, 1 << 31))
        self.min_p = _number(parameters, "min_p", 0.0, 0.0, 1.0)
        self.penalty = _number(parameters, "repetition_penalty", 1.0, 0.01, 100.0)
        self.presence = _number(parameters, "presence_penalty", 0.0, -2.0, 2.0)
        self.frequency = _number(parameters, "frequency_penalty", 0.0, -2.0, 2.0)
        self.top_logprobs = _logprobs(parameters)
        self._biases = _biases(parameters, tokens)
        self._seen = set(prompt) if self.penalty != 1.0 else set()
        self._counts: Counter[int] = Counter()
        self._random = np.random.default_rng(parameters.get("seed"))
        self._grammar = grammar
        self.complete = False

    def choose(self, logits: Logits) -> int:
        """logits [V] -> token. Raises RunError when the grammar cannot go on."""
        logits = self._changed(logits)
        allowed = self._grammar.allowed() if self._grammar is not None else None
        if self.temperature == _GREEDY:
            token = _best(logits, allowed)
        else:
            candidates, weights = self._distribution(logits, allowed)
            at = drawn(weights, self._random.random())
            token = at if candidates is None else int(candidates[at])
        if self.penalty != 1.0:
            self._seen.add(token)
        if self.presence or self.frequency:
            self._counts[token] += 1
        if self._grammar is not None:
            self.complete = self._grammar.push(token)
        return token

    def probabilities(self, logits: Logits) -> npt.NDArray[np.float64]:
        """What `choose` would draw from, [V]."""
        changed = self._changed(logits)
        allowed = self._grammar.allowed() if self._grammar is not None else None
        out = np.zeros(len(logits))
        if self.temperature == _GREEDY:
            out[_best(changed, allowed)] = 1.0
        else:
            candidates, weights = self._distribution(changed, allowed)
            out[slice(None) if candidates is None else candidates] = weights / weights.sum(dtype=np.float64)
        return out

    def _changed(self, logits: Logits) -> Logits:
        """With biases and penalties; the caller's array stays as it is."""
        if self._biases:
            logits = logits.copy()
            logits[list(self._biases)] += np.fromiter(self._biases.values(), dtype=np.float32)
        if self._seen:
            logits = logits.copy()
            seen = np.fromiter(self._seen, dtype=np.int64)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / self.penalty, values * self.penalty)
        if self._counts:
            logits = logits.copy()
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            logits[list(self._counts)] -= self.frequency * counts + self.presence
        return logits

    def _distribution(self, logits: Logits, candidates: Tokens | None) -> tuple[Tokens | None, Weights]:
        """Tokens that may be drawn, of `candidates` if there are some, and how likely they are; None for all."""
        if candidates is not None:
            logits = logits[candidates]
        if 0 < self.top_k < len(logits):
            top = np.argpartition(logits, -self.top_k)[-self.top_k :].astype(np.int64)
            logits, candidates = logits[top], top if candidates is None else candidates[top]
        weights = np.exp((logits - logits.max()) / np.float32(self.temperature))
        if self.top_p < 1.0:
            total = float(weights.sum(dtype=np.float64))
            # those below this make up less than 1 - top_p all together: none of them belongs to the likeliest
            some = np.flatnonzero(weights >= (1.0 - self.top_p) * total / len(weights))
            order = some[np.argsort(-weights[some], kind="stable")]
            kept = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), self.top_p * total)) + 1
            weights, candidates = _only(order[:kept], weights, candidates)
        if self.min_p > 0.0:
            likely = np.flatnonzero(weights >= self.min_p * weights.max())
            weights, candidates = _only(likely, weights, candidates)
        return candidates, weights

    def logprobs(self, logits: Logits, token: int) -> tuple[float, list[tuple[int, float]]]:
        """The log probability of `token`, and the `top_logprobs` best tokens with theirs, best first."""
        values = logits.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())
        count = min(self.top_logprobs or 0, len(values))
        best = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, dtype=np.int64)
        best = best[np.lexsort((best, -values[best]))]
        return float(values[token]), [(int(each), float(values[each])) for each in best]


def _best(logits: Logits, allowed: Tokens | None) -> int:
    return int(logits.argmax()) if allowed is None else int(allowed[logits[allowed].argmax()])


def _only(kept: Tokens, weights: Weights, candidates: Tokens | None) -> tuple[Weights, Tokens]:
    return weights[kept], kept if candidates is None else candidates[kept]


def drawn(weights: Weights, chance: float) -> int:
    """Which of them, each as likely as its weight, for `chance` in [0, 1): where that part of their sum is reached.

    By sums of blocks first: to add up a vocabulary number by number takes longer than a step of a small model.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    reached = min(chance * sums[-1], np.nextafter(sums[-1], 0.0))  # before the end, also by rounding
    block = int(np.searchsorted(sums, reached, side="right"))
    before = sums[block - 1] if block else 0.0
    part = weights[block * _BLOCK : (block + 1) * _BLOCK]
    at = int(np.searchsorted(np.cumsum(part, dtype=np.float64), reached - before, side="right"))
    if at == len(part):  # by rounding
        at = int(np.flatnonzero(part)[-1])
    return block * _BLOCK + at


def _logprobs(parameters: Mapping[str, Any]) -> int | None:
    """How many of the best tokens are told beside each one; None when no log probabilities are wanted.

    Who asks for `top_logprobs` wants `logprobs`.
    """
    wanted = parameters.get("logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise RunError("bad_parameters", "logprobs must be true or false")
    count = _number(parameters, "top_logprobs", 0, 0, TOP_LOGPROBS_MAX)
    if count != int(count):
        raise RunError("bad_parameters", "top_logprobs must be a whole number")
    return int(count) if wanted or count else None


def _biases(parameters: Mapping[str, Any], tokens: int) -> dict[int, float]:
    """`logit_bias`: token (a number, or its digits as JSON objects have them) -> what is added, -100 to 100."""
    given = parameters.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > BIASES_MAX:
        raise RunError("bad_parameters", f"logit_bias must be an object of at most {BIASES_MAX} tokens")
    found = {}
    for key, value in given.items():
        digits = str(key)
        if not digits.isascii() or not digits.isdigit() or len(digits) > 9:
            raise RunError("bad_parameters", f"logit_bias has {digits[:20]!r}, which is no token's number")
        if tokens and int(digits) >= tokens:
            raise RunError("bad_parameters", f"logit_bias has token {digits}, and this model has {tokens}")
        found[int(digits)] = _number({"logit_bias": value}, "logit_bias", 0.0, -100.0, 100.0)
    return found


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
