"""Continuous batching: which token of which run goes into the next step, and what comes out of it.

Knows nothing of devices: a `StepModel` computes, this file decides. Every step has a row for each decoding run, and
as many for prompts as streams can bear (`pacing`); when there are no prompts, rows to spare compute guessed tokens
(`speculation`). A run leaves its slot in the step that ends it, and the next one that waits takes it or another, whose
cache has most of its prompt (`prefixes`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.batching.pacing import Bucket, StepTimes, prompt_rows, share
from engine.batching.prefixes import Slots, TokenIds
from engine.batching.sampling import Sampler, StopStrings
from engine.batching.speculation import PROPOSED_MAX, Acceptance, proposal, rows_beyond
from engine.errors import RunError
from engine.protocol import (
    Finished,
    FinishReason,
    Logprobs,
    Message,
    Run,
    RunFailed,
    Started,
    TokenLogprob,
    Tokens,
)
from engine.text.chat import prompt_tokens
from engine.text.grammar import Grammars
from engine.text.tokenizer import Detokenizer, Vocabulary

RUNS_WAITING_MAX = 1024
MAX_TOKENS_DEFAULT = 256


@dataclass(frozen=True)
class Row:
    """One token to compute: in which slot, at which position."""

    token: int
    slot: int
    position: int


class StepModel(Protocol):
    """A loaded model. Slots are independent of each other; a row sees what is cached before its own position."""

    slots: int
    context: int  # tokens of a slot

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Sizes of steps, by rising rows."""
        ...

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute and cache `rows`; the logits of rows[w] for each w of `wanted`, [len(wanted), vocabulary]."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Cache in slot `target` what slot `source` has at its first `length` positions."""
        ...


class DeviceFault(Exception):
    """The device computed something that cannot be."""


@dataclass
class _Active:
    """A run in a slot. Its tokens are prompt and text; `filled` of them are in the cache."""

    run_id: str
    slot: int
    prompt: int  # tokens of the prompt
    buffer: TokenIds  # tokens, with room for all there can be
    sampler: Sampler
    stops: StopStrings
    detokenizer: Detokenizer
    started_s: float
    filled: int
    cached: int  # of the prompt, when it began
    generated: int = 0
    first_token_s: float = 0.0
    acceptance: Acceptance = field(default_factory=Acceptance)

    @property
    def most(self) -> int:
        """Tokens that it may generate."""
        return len(self.buffer) - self.prompt

    @property
    def tokens(self) -> TokenIds:
        return self.buffer[: self.prompt + self.generated]

    @property
    def decoding(self) -> bool:
        return self.filled >= self.prompt

    def rows(self, until: int) -> list[Row]:
        """Of the positions from `filled` on."""
        return [Row(int(self.buffer[at]), self.slot, at) for at in range(self.filled, until)]


@dataclass
class _Waiting:
    run: Run
    prompt: list[int]
    sampler: Sampler


@dataclass
class _Plan:
    """A step's rows; `wanted` are those whose logits `runs` need: each one's last row, then one per guess.

    `runs` are (run, guesses, computed): the first `computed` guesses have rows.
    """

    rows: list[Row] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    runs: list[tuple[_Active, list[int], int]] = field(default_factory=list)

    def draw(self, run: _Active, guesses: list[int], computed: int) -> None:
        """Its last row has been added: have its next token drawn from that, and some guesses computed ahead."""
        last = self.rows[-1]
        self.wanted += range(len(self.rows) - 1, len(self.rows) + computed)
        self.rows += [
            Row(token, run.slot, last.position + 1 + at) for at, token in enumerate(guesses[:computed])
        ]
        self.runs.append((run, guesses, computed))


@dataclass
class _Told:
    """What a run's step gives to tell: its tokens, then what ends it, if it ends."""

    text: str = ""
    count: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    ending: list[Message] = field(default_factory=list)


class Batcher:
    """The runs of one model. Every method returns the messages to send, in order."""

    def __init__(
        self, model: StepModel, vocabulary: Vocabulary, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._clock = clock
        self._times = StepTimes(model.buckets)
        self._vocabulary = vocabulary
        self._grammars = Grammars(vocabulary)
        self._waiting: deque[_Waiting] = deque()
        self._active: dict[str, _Active] = {}
        self._slots = Slots(model.slots)
        self._stepped_s: float | None = None  # when a step ended after which there was more to do
        self.prefilling = False  # what the last step did, for the heartbeat

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def busy(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, run: Run) -> list[Message]:
        """Queue a run; `RunFailed` when it cannot be served."""
        try:
            self._waiting.append(self._accept(run))
        except RunError as error:
            return [failed(run.run_id, error)]
        return []

    def _accept(self, run: Run) -> _Waiting:
        if len(self._waiting) >= RUNS_WAITING_MAX:
            raise RunError("engine_busy", f"{RUNS_WAITING_MAX} runs already wait here", retryable=True)
        prompt = prompt_tokens(self._vocabulary, run.parameters)
        if not prompt:
            raise RunError("bad_parameters", "the prompt is empty")
        if len(prompt) >= self._model.context:
            text = (
                f"the prompt has {len(prompt)} tokens and the model's context here is {self._model.context}"
            )
            raise RunError("prompt_too_long", text)
        grammar = self._grammars.begin(run.parameters.get("response_format"))
        sampler = Sampler(run.parameters, prompt, len(self._vocabulary.pieces), grammar)
        return _Waiting(run, prompt, sampler)

    def cancel(self, run_id: str) -> list[Message]:
        """End a run now; nothing for one that is not here."""
        if run_id in self._active:
            return self._end(self._active[run_id], "cancelled")
        for waiting in self._waiting:
            if waiting.run.run_id == run_id:
                self._waiting.remove(waiting)
                return [
                    Finished(
                        run_id=run_id,
                        reason="cancelled",
                        prompt_tokens=len(waiting.prompt),
                        tokens_generated=0,
                        processing_s=0.0,
                    )
                ]
        return []

    def fail_all(self, code: str, message: str) -> list[Message]:
        """Every run ends as `RunFailed`, retryable."""
        ids = [*self._active, *(waiting.run.run_id for waiting in self._waiting)]
        self._active.clear()
        self._waiting.clear()
        self._slots = Slots(self._model.slots)
        self._stepped_s = None
        return [RunFailed(run_id=run_id, code=code, message=message, retryable=True) for run_id in ids]

    def step(self, room: int) -> list[Message]:
        """Start at most `room` waiting runs and compute one step. Raises DeviceFault on impossible logits."""
        messages = self._start_waiting(room)
        plan = self._plan()
        if not plan.rows:
            return messages
        logits = self._timed_step(plan)
        at = 0
        for run, guesses, computed in plan.runs:
            messages += self._take_logits(run, guesses, logits[at : at + 1 + computed])
            at += 1 + computed
        return messages

    def _timed_step(self, plan: _Plan) -> npt.NDArray[np.float32]:
        began = self._clock()
        between = None if self._stepped_s is None else began - self._stepped_s
        logits = self._model.step(plan.rows, plan.wanted)
        self._stepped_s = self._clock()
        attended = sum(row.position for row in plan.rows)
        self._times.observe(len(plan.rows), attended, self._stepped_s - began, between)
        return logits

    def _start_waiting(self, room: int) -> list[Message]:
        messages: list[Message] = []
        while self._waiting and self._slots and room > 0:
            run = self._begin(self._waiting.popleft())
            self._active[run.run_id] = run
            messages.append(Started(run_id=run.run_id, prompt_tokens=run.prompt))
            room -= 1
        return messages

    def _begin(self, waiting: _Waiting) -> _Active:
        """In the slot that has most of its prompt."""
        parameters: dict[str, Any] = waiting.run.parameters
        started_s, size = self._clock(), len(waiting.prompt)
        max_tokens = int(parameters.get("max_tokens") or MAX_TOKENS_DEFAULT)
        buffer = np.zeros(min(size + max_tokens, self._model.context), dtype=np.int32)
        buffer[:size] = waiting.prompt
        busy = {run.slot: run.tokens[: run.filled] for run in self._active.values()}
        place = self._slots.take(buffer[:size], busy)
        if place.is_copy:
            self._model.copy(place.source, place.slot, place.reused)
        return _Active(
            run_id=waiting.run.run_id,
            slot=place.slot,
            prompt=size,
            buffer=buffer,
            sampler=waiting.sampler,
            stops=StopStrings(parameters.get("stop") or []),
            detokenizer=self._vocabulary.detokenizer(),
            started_s=started_s,
            filled=place.reused,
            cached=place.reused,
        )

    def _plan(self) -> _Plan:
        plan = _Plan()
        decoding = [run for run in self._active.values() if run.decoding]
        prompts = [run for run in self._active.values() if not run.decoding]
        self.prefilling = bool(prompts)
        guesses = [proposal(run.tokens, min(PROPOSED_MAX, run.most - run.generated - 1)) for run in decoding]
        ahead = [0] * len(decoding)
        if not prompts:  # which want the rows
            rates = [run.acceptance.rate for run in decoding]
            most = [(rate, len(each)) for rate, each in zip(rates, guesses, strict=True)]
            ahead = rows_beyond(self._times, most, [run.filled for run in decoding])
        for run, each, computed in zip(decoding, guesses, ahead, strict=True):
            plan.rows += run.rows(run.filled + 1)
            plan.draw(run, each, computed)
        budget = 0
        if prompts:
            furthest = max(run.filled for run in prompts)
            budget = prompt_rows(self._times, [run.filled for run in decoding], furthest)
        parts = share([run.prompt - run.filled for run in prompts], budget)
        for run, count in zip(prompts, parts, strict=True):
            plan.rows += run.rows(run.filled + count)
            run.filled += count
            if run.decoding:
                run.filled -= 1  # counted when its logits are taken, as a decoding run's row is
                plan.draw(run, [], 0)
        return plan

    def _take_logits(
        self, run: _Active, guesses: list[int], logits: npt.NDArray[np.float32]
    ) -> list[Message]:
        """Draw the next token, and another after each computed guess that is drawn. logits [1 + computed, V]."""
        told = _Told()
        for index, row in enumerate(logits):
            token = self._next_token(run, row, told)
            if token is None:
                break
            if index < len(guesses):
                run.acceptance.observe(token == guesses[index])
                if token != guesses[index]:
                    break
        if not told.count:
            return told.ending
        tokens = Tokens(run_id=run.run_id, text=told.text, count=told.count, logprobs=told.logprobs)
        return [tokens, *told.ending]

    def _next_token(self, run: _Active, logits: npt.NDArray[np.float32], told: _Told) -> int | None:
        """Draw a token; None when it ends the run."""
        if not np.isfinite(logits.sum()):
            raise DeviceFault(f"the logits of run {run.run_id} are not finite")
        logits = logits[: len(self._vocabulary.pieces)]  # a matrix may be padded beyond its tokens
        run.filled += 1
        try:
            token = run.sampler.choose(logits)
        except RunError as error:
            self._leave(run)
            told.ending = [failed(run.run_id, error)]
            return None
        if run.generated == 0:
            run.first_token_s = self._clock() - run.started_s
        if token in self._vocabulary.ends:
            told.ending = self._end(run, "stop", flush=True)
            return None
        run.buffer[run.prompt + run.generated] = token
        run.generated += 1
        text, stopped = run.stops.push(run.detokenizer.push(token))
        told.text += text
        told.count += 1
        told.logprobs += self._logprobs(run, logits, token)
        if stopped:
            told.ending = self._end(run, "stop")
        elif run.sampler.complete:
            told.ending = self._end(run, "stop", flush=True)
        elif run.generated >= run.most:
            told.ending = self._end(run, "length", flush=True)
        else:
            return token
        return None

    def _logprobs(self, run: _Active, logits: npt.NDArray[np.float32], token: int) -> list[Logprobs]:
        if run.sampler.top_logprobs is None:
            return []
        own, best = run.sampler.logprobs(logits, token)
        return [Logprobs(self._logprob(token, own), [self._logprob(*each) for each in best])]

    def _logprob(self, token: int, value: float) -> TokenLogprob:
        piece = self._vocabulary.pieces[token]
        return TokenLogprob(piece.decode("utf-8", "replace"), piece, value, token)

    def _end(self, run: _Active, reason: FinishReason, flush: bool = False) -> list[Message]:
        """Free its slot. `flush` gives the text that was held back for a stop string or an open character."""
        self._leave(run)
        messages: list[Message] = []
        if flush:
            text, stopped = run.stops.push(run.detokenizer.finish())
            text += "" if stopped else run.stops.finish()
            if text:
                messages.append(Tokens(run_id=run.run_id, text=text, count=0))
        finished = Finished(
            run_id=run.run_id,
            reason=reason,
            prompt_tokens=run.prompt,
            tokens_generated=run.generated,
            processing_s=self._clock() - run.started_s,
            first_token_s=run.first_token_s,
            cached_tokens=run.cached,
        )
        return [*messages, finished]

    def _leave(self, run: _Active) -> None:
        del self._active[run.run_id]
        if not self._active:  # what comes before the next step is no time between steps
            self._stepped_s = None
        self._slots.leave(run.slot, run.tokens[: run.filled])


def failed(run_id: str, error: RunError) -> RunFailed:
    """What is said of a run that the engine cannot serve."""
    return RunFailed(run_id=run_id, code=error.code, message=str(error), retryable=error.retryable)
