"""Continuous batching: which token of which run goes into the next step, and what comes out of it.

Knows nothing of devices: a `StepModel` computes, this file decides. Every step has a row for each decoding run, and
what is left of the row budget goes to prompts, in turns, so that a long prompt delays the others by one step at most.
A run leaves its slot in the step that ends it, and the next one that waits takes it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.chat import prompt_tokens
from engine.errors import RunError
from engine.grammar import Grammars
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
from engine.sampling import Sampler, StopStrings
from engine.tokenizer import Detokenizer, Vocabulary

RUNS_WAITING_MAX = 1024
MAX_TOKENS_DEFAULT = 256


@dataclass(frozen=True)
class Row:
    """One token to compute: in which slot, at which position."""

    token: int
    slot: int
    position: int


class StepModel(Protocol):
    """A loaded model. Slots are independent of each other."""

    slots: int
    context: int  # tokens of a slot
    rows_max: int  # of one step

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute and cache `rows`; the logits of rows[w] for each w of `wanted`, [len(wanted), vocabulary]."""
        ...


class DeviceFault(Exception):
    """The device computed something that cannot be."""


@dataclass
class _Active:
    """A run in a slot. `next_token` is what its next decoding row computes."""

    run_id: str
    slot: int
    prompt: list[int]
    sampler: Sampler
    stops: StopStrings
    detokenizer: Detokenizer
    max_tokens: int
    started_s: float
    filled: int = 0  # positions in the cache
    next_token: int = -1
    generated: int = 0
    first_token_s: float = 0.0

    @property
    def decoding(self) -> bool:
        return self.filled >= len(self.prompt)


@dataclass
class _Waiting:
    run: Run
    prompt: list[int]
    sampler: Sampler


@dataclass
class _Plan:
    """A step's rows; `wanted[i]` is the row whose logits run `runs[i]` needs."""

    rows: list[Row] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    runs: list[_Active] = field(default_factory=list)


class Batcher:
    """The runs of one model. Every method returns the messages to send, in order."""

    def __init__(self, model: StepModel, vocabulary: Vocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._grammars = Grammars(vocabulary)
        self._waiting: deque[_Waiting] = deque()
        self._active: dict[str, _Active] = {}
        self._free_slots = list(range(model.slots))
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
            return [_failed(run.run_id, error)]
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
        self._free_slots = list(range(self._model.slots))
        return [RunFailed(run_id=run_id, code=code, message=message, retryable=True) for run_id in ids]

    def step(self, room: int) -> list[Message]:
        """Start at most `room` waiting runs and compute one step. Raises DeviceFault on impossible logits."""
        messages = self._start_waiting(room)
        plan = self._plan()
        if not plan.rows:
            return messages
        logits = self._model.step(plan.rows, plan.wanted)
        for run, row in zip(plan.runs, logits, strict=False):
            messages += self._take_logits(run, row)
        return messages

    def _start_waiting(self, room: int) -> list[Message]:
        messages: list[Message] = []
        while self._waiting and self._free_slots and room > 0:
            waiting = self._waiting.popleft()
            parameters: dict[str, Any] = waiting.run.parameters
            slot = self._free_slots.pop(0)
            self._active[waiting.run.run_id] = _Active(
                run_id=waiting.run.run_id,
                slot=slot,
                prompt=waiting.prompt,
                sampler=waiting.sampler,
                stops=StopStrings(parameters.get("stop") or []),
                detokenizer=self._vocabulary.detokenizer(),
                max_tokens=int(parameters.get("max_tokens") or MAX_TOKENS_DEFAULT),
                started_s=time.monotonic(),
            )
            messages.append(Started(run_id=waiting.run.run_id, prompt_tokens=len(waiting.prompt)))
            room -= 1
        return messages

    def _plan(self) -> _Plan:
        plan = _Plan()
        for run in self._active.values():
            if run.decoding:
                plan.wanted.append(len(plan.rows))
                plan.runs.append(run)
                plan.rows.append(Row(run.next_token, run.slot, run.filled))
                run.filled += 1
        prompts = [run for run in self._active.values() if not run.decoding]
        self.prefilling = bool(prompts)
        for run in prompts:
            budget = self._model.rows_max - len(plan.rows)
            if budget <= 0:
                break
            self._add_prompt_rows(plan, run, budget)
            self._active[run.run_id] = self._active.pop(run.run_id)  # the others' turn comes first next time
        return plan

    def _add_prompt_rows(self, plan: _Plan, run: _Active, budget: int) -> None:
        end = min(run.filled + budget, len(run.prompt))
        for position in range(run.filled, end):
            plan.rows.append(Row(run.prompt[position], run.slot, position))
        run.filled = end
        if run.decoding:
            plan.wanted.append(len(plan.rows) - 1)
            plan.runs.append(run)

    def _take_logits(self, run: _Active, logits: npt.NDArray[np.float32]) -> list[Message]:
        if not np.isfinite(logits.sum()):
            raise DeviceFault(f"the logits of run {run.run_id} are not finite")
        logits = logits[: len(self._vocabulary.pieces)]  # a matrix may be padded beyond its tokens
        try:
            token = run.sampler.choose(logits)
        except RunError as error:
            self._leave(run)
            return [_failed(run.run_id, error)]
        if run.generated == 0:
            run.first_token_s = time.monotonic() - run.started_s
        if token in self._vocabulary.ends:
            return self._end(run, "stop", flush=True)
        run.generated += 1
        run.next_token = token
        text, stopped = run.stops.push(run.detokenizer.push(token))
        logprobs = self._logprobs(run, logits, token)
        messages: list[Message] = [Tokens(run_id=run.run_id, text=text, count=1, logprobs=logprobs)]
        if stopped:
            return messages + self._end(run, "stop")
        if run.sampler.complete:
            return messages + self._end(run, "stop", flush=True)
        full = len(run.prompt) + run.generated >= self._model.context
        if full or run.generated >= run.max_tokens:
            return messages + self._end(run, "length", flush=True)
        return messages

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
            prompt_tokens=len(run.prompt),
            tokens_generated=run.generated,
            processing_s=time.monotonic() - run.started_s,
            first_token_s=run.first_token_s,
        )
        return [*messages, finished]

    def _leave(self, run: _Active) -> None:
        del self._active[run.run_id]
        self._free_slots.append(run.slot)
        self._free_slots.sort()


def _failed(run_id: str, error: RunError) -> RunFailed:
    return RunFailed(run_id=run_id, code=error.code, message=str(error), retryable=error.retryable)
