"""Runs of arrays in and arrays out: one a step, in order."""

from __future__ import annotations

import base64
import math
import time
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.batching.batcher import RUNS_WAITING_MAX, failed
from engine.errors import RunError
from engine.onnx.model import OnnxModel
from engine.protocol import Array, Finished, FinishReason, Message, Output, Run, RunFailed, Started

# kind of a type -> kinds of the values that it takes
_TAKEN = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}


class TensorBatcher:
    """The runs of one model. Every method returns the messages to send, in order."""

    prefilling = True  # what a step does, for the heartbeat
    active = 0  # between steps: a run starts and ends in one

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._waiting: deque[tuple[str, dict[str, npt.NDArray[Any]]]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def add(self, run: Run) -> list[Message]:
        """Queue a run; `RunFailed` when it cannot be served."""
        try:
            if len(self._waiting) >= RUNS_WAITING_MAX:
                raise RunError("engine_busy", f"{RUNS_WAITING_MAX} runs already wait here", retryable=True)
            self._waiting.append((run.run_id, inputs_of(run.parameters, self._model.inputs)))
        except RunError as error:
            return [failed(run.run_id, error)]
        return []

    def cancel(self, run_id: str) -> list[Message]:
        """End a run now; nothing for one that is not here."""
        for waiting in self._waiting:
            if waiting[0] == run_id:
                self._waiting.remove(waiting)
                return [_finished(run_id, "cancelled", 0.0)]
        return []

    def fail_all(self, code: str, message: str) -> list[Message]:
        """Every run ends as `RunFailed`, retryable."""
        ids = [run_id for run_id, _ in self._waiting]
        self._waiting.clear()
        return [RunFailed(run_id=run_id, code=code, message=message, retryable=True) for run_id in ids]

    def step(self, room: int) -> list[Message]:
        """Compute the run that waits longest, if there is room for one."""
        if not self._waiting or room < 1:
            return []
        run_id, inputs = self._waiting.popleft()
        began_s = time.monotonic()
        found = self._model.run(inputs)
        arrays = [
            Array(name, array.dtype.name, array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes())
            for name, array in found.items()
        ]
        return [
            Started(run_id=run_id, prompt_tokens=0),
            Output(run_id=run_id, arrays=arrays),
            _finished(run_id, "stop", time.monotonic() - began_s),
        ]


def _finished(run_id: str, reason: FinishReason, took_s: float) -> Finished:
    return Finished(run_id=run_id, reason=reason, prompt_tokens=0, tokens_generated=0, processing_s=took_s)


def inputs_of(
    parameters: dict[str, Any], wanted: dict[str, tuple[tuple[int, ...], str]]
) -> dict[str, npt.NDArray[Any]]:
    """A run's arrays, which must have these names, shapes and types. Raises RunError `bad_parameters`."""
    given = parameters.get("inputs")
    if not isinstance(given, dict) or given.keys() != wanted.keys():
        raise RunError("bad_parameters", f"the model's inputs are {', '.join(sorted(wanted))}")
    return {name: _array(name, given[name], *form) for name, form in wanted.items()}


def _array(name: str, given: Any, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    if (
        not isinstance(given, dict)
        or given.get("dtype") != dtype
        or (given.get("shape") or []) != list(shape)
    ):
        raise RunError("bad_parameters", f"input {name} must have dtype {dtype} and shape {list(shape)}")
    data, kind = given.get("data"), np.dtype(dtype).newbyteorder("<")
    try:
        if isinstance(data, str):
            found = np.frombuffer(base64.b64decode(data, validate=True), dtype=kind)
        else:
            if np.array(data or [False]).dtype.kind not in _TAKEN[kind.kind]:
                raise RunError("bad_parameters", f"input {name} has values that are no {dtype}")
            found = np.array(data, dtype=kind)
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError("bad_parameters", f"input {name}: {str(error)[:200]}") from None
    if found.shape != (math.prod(shape),):
        raise RunError(
            "bad_parameters", f"input {name} has {found.size} numbers, and its shape {math.prod(shape)}"
        )
    return found.reshape(shape).astype(dtype)
