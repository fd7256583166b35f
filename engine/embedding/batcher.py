"""Embeddings: whose texts go into the next step, and what vectors come out of it.

Knows nothing of devices: a `StatesModel` computes, this file decides. A step takes texts of all runs in turns, so that
a run of a thousand texts delays one of a single text by a step. A text leaves its slot when its last token is computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.batching.batcher import RUNS_WAITING_MAX, DeviceFault, failed
from engine.embedding.pooling import Pooled, Pooling
from engine.embedding.states import StateRow
from engine.embedding.text import TextEncoder
from engine.errors import RunError
from engine.protocol import (
    OUTPUT_BYTES_MAX,
    Array,
    Finished,
    FinishReason,
    Message,
    Output,
    Run,
    RunFailed,
    Started,
)


class States(Protocol):
    """A loaded model. Texts are independent of each other."""

    texts: int  # at once, each in a slot
    context: int  # tokens of the longest text
    rows_max: int  # of one step
    rows_packed: int  # of a step with several texts
    whole: bool  # a text is computed in one step
    embedding: int

    def step(self, rows: Sequence[StateRow]) -> npt.NDArray[np.float32]:
        """The last hidden states of `rows`, [len(rows), E]."""
        ...


@dataclass
class _Run:
    """A run's texts as tokens; `vectors` fills up, `next_text` is the next to take a slot."""

    run_id: str
    texts: list[list[int]]
    normalize: bool
    vectors: npt.NDArray[np.float32]
    left: int  # texts whose vector is not there yet
    next_text: int = 0
    started_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass
class _Text:
    """A text in a slot."""

    run: _Run
    index: int
    slot: int
    pooled: Pooled
    filled: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.run.texts[self.index]


@dataclass
class _Plan:
    """A step's rows, and how many of them are whose."""

    rows: list[StateRow] = field(default_factory=list)
    taken: list[tuple[_Text, int]] = field(default_factory=list)


class EmbeddingBatcher:
    """The runs of one model. Every method returns the messages to send, in order."""

    prefilling = True  # what a step does, for the heartbeat

    def __init__(self, model: States, encoder: TextEncoder, pooling: Pooling) -> None:
        self._model = model
        self._encoder = encoder
        self._pooling = pooling
        self._waiting: deque[_Run] = deque()
        self._active: dict[str, _Run] = {}
        self._texts: list[_Text] = []
        self._free_slots = list(range(model.texts))

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def busy(self) -> bool:
        return bool(self._active or self._waiting)

    # ------------------------------------------------------------ runs

    def add(self, run: Run) -> list[Message]:
        """Queue a run; `RunFailed` when it cannot be served."""
        try:
            self._waiting.append(self._accept(run))
        except RunError as error:
            return [failed(run.run_id, error)]
        return []

    def _accept(self, run: Run) -> _Run:
        if len(self._waiting) >= RUNS_WAITING_MAX:
            raise RunError("engine_busy", f"{RUNS_WAITING_MAX} runs already wait here", retryable=True)
        if run.task_type != "embedding":
            raise RunError("bad_parameters", f"{run.model} computes embeddings, not {run.task_type}")
        texts = texts_of(run.parameters)
        size = 4 * len(texts) * self._model.embedding
        if size > OUTPUT_BYTES_MAX:
            most = OUTPUT_BYTES_MAX // (4 * self._model.embedding)
            text = f"vectors of {self._model.embedding} numbers for {len(texts)} texts: at most {most} texts"
            raise RunError("result_too_large", text)
        most = self._model.context if run.parameters.get("truncate") else 0
        tokens = [self._encoder.encode(text, most) for text in texts]
        for index, ids in enumerate(tokens):
            if len(ids) > self._model.context:
                text = (
                    f"text {index} has {len(ids)} tokens and the model takes {self._model.context}: "
                    "shorten it, or send truncate: true"
                )
                raise RunError("prompt_too_long", text)
            if not ids:
                raise RunError("bad_parameters", f"text {index} has no tokens")
        normalize = run.parameters.get("normalize")
        return _Run(
            run_id=run.run_id,
            texts=tokens,
            normalize=self._pooling.normalize if normalize is None else bool(normalize),
            vectors=np.zeros((len(texts), self._model.embedding), dtype="<f4"),
            left=len(texts),
        )

    def cancel(self, run_id: str) -> list[Message]:
        """End a run now; nothing for one that is not here."""
        run = self._active.get(run_id) or next((r for r in self._waiting if r.run_id == run_id), None)
        if run is None:
            return []
        if run_id in self._active:
            self._leave(run)
        else:
            self._waiting.remove(run)
        return [self._finished(run, "cancelled")]

    def fail_all(self, code: str, message: str) -> list[Message]:
        """Every run ends as `RunFailed`, retryable."""
        ids = [*self._active, *(run.run_id for run in self._waiting)]
        self._active.clear()
        self._waiting.clear()
        self._texts.clear()
        self._free_slots = list(range(self._model.texts))
        return [RunFailed(run_id=run_id, code=code, message=message, retryable=True) for run_id in ids]

    # ------------------------------------------------------------ steps

    def step(self, room: int) -> list[Message]:
        """Start at most `room` waiting runs and compute one step. Raises DeviceFault on impossible states."""
        messages: list[Message] = []
        while self._waiting and room > 0:
            run = self._waiting.popleft()
            run.started_s = time.monotonic()
            self._active[run.run_id] = run
            messages.append(Started(run_id=run.run_id, prompt_tokens=run.prompt_tokens))
            room -= 1
        plan = self._plan()
        if not plan.rows:
            return messages
        states = self._model.step(plan.rows)
        if not np.isfinite(states.sum()):
            raise DeviceFault("the states of a text are not finite")
        at = 0
        for text, count in plan.taken:
            text.pooled.add(states[at : at + count])
            text.filled += count
            at += count
            if text.filled == len(text.tokens):
                messages += self._take_vector(text)
        return messages

    def _plan(self) -> _Plan:
        """Texts that are under way first, then new ones, of each run in turn."""
        plan = _Plan()
        for text in self._texts:
            self._take_rows(plan, text)
        while self._free_slots and len(plan.rows) < self._model.rows_packed:
            run = next((run for run in self._active.values() if run.next_text < len(run.texts)), None)
            if run is None:
                break
            fits = len(plan.rows) + len(run.texts[run.next_text]) <= self._model.rows_packed
            if self._model.whole and plan.rows and not fits:
                break
            pooled = Pooled(self._pooling.mode, self._model.embedding)
            text = _Text(run, run.next_text, self._free_slots.pop(0), pooled)
            run.next_text += 1
            self._active[run.run_id] = self._active.pop(run.run_id)  # the others' turn comes first next time
            self._texts.append(text)
            self._take_rows(plan, text)
        return plan

    def _take_rows(self, plan: _Plan, text: _Text) -> None:
        tokens = text.tokens
        count = min(len(tokens) - text.filled, self._model.rows_max - len(plan.rows))
        if count:
            plan.rows += [
                StateRow(tokens[at], text.slot, at, len(tokens) - 1 if self._model.whole else at)
                for at in range(text.filled, text.filled + count)
            ]
            plan.taken.append((text, count))

    def _take_vector(self, text: _Text) -> list[Message]:
        run = text.run
        run.vectors[text.index] = text.pooled.vector(run.normalize)
        run.left -= 1
        self._texts.remove(text)
        self._free(text.slot)
        if run.left:
            return []
        self._leave(run)
        array = Array("embeddings", "float32", run.vectors.shape, run.vectors.tobytes())
        return [Output(run_id=run.run_id, arrays=[array]), self._finished(run, "stop")]

    def _finished(self, run: _Run, reason: FinishReason) -> Finished:
        return Finished(
            run_id=run.run_id,
            reason=reason,
            prompt_tokens=run.prompt_tokens,
            tokens_generated=0,
            processing_s=time.monotonic() - run.started_s if run.started_s else 0.0,
        )

    def _leave(self, run: _Run) -> None:
        del self._active[run.run_id]
        for text in [text for text in self._texts if text.run is run]:
            self._texts.remove(text)
            self._free(text.slot)

    def _free(self, slot: int) -> None:
        self._free_slots.append(slot)
        self._free_slots.sort()


def texts_of(parameters: dict[str, Any]) -> list[str]:
    """A run's texts. Raises RunError `bad_parameters`."""
    given = parameters.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RunError("bad_parameters", "input must be a text or a list of texts")
    return texts
