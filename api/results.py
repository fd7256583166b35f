"""What a finished task gave, as its type has it."""

from __future__ import annotations

import math
import struct
from typing import Any

from api import format, logprobs, schemas
from api.schemas_results import EmbeddingResult, Tensor, TensorResult
from peer.state import command
from peer.state.task import ARRAY_FORMATS, Array, TaskResult

Shown = schemas.TaskResult | EmbeddingResult | TensorResult


def shown(view: command.TaskView) -> Shown | None:
    """null while there is none."""
    result = view.result
    if result is None:
        return None
    match view.task.task_type:
        case "embedding":
            return _embeddings(result)
        case "tensor":
            return TensorResult(
                outputs={array.name: _tensor(array) for array in result.arrays}, **_of_any(result)
            )
        case _:
            return _text(result)


def _of_any(result: TaskResult) -> dict[str, Any]:
    return {
        "processing_time": format.duration(result.processing_s),
        "processing_time_seconds": round(result.processing_s, 6),
        "stand_in": result.stand_in,
    }


def _text(result: TaskResult) -> schemas.TaskResult:
    return schemas.TaskResult(
        generated_text=result.generated_text,
        tokens_generated=result.tokens_generated,
        prompt_tokens=result.prompt_tokens,
        cached_tokens=result.cached_tokens,
        finish_reason=result.finish_reason,
        first_token_seconds=round(result.first_token_s, 6),
        logprobs=logprobs.shown(result.logprobs),
        **_of_any(result),
    )


def _embeddings(result: TaskResult) -> EmbeddingResult:
    """Of float32 rows."""
    rows = [
        list(row) for array in result.arrays for row in struct.iter_unpack(f"<{array.shape[1]}f", array.data)
    ]
    return EmbeddingResult(
        embeddings=rows,
        dimensions=len(rows[0]) if rows else 0,
        prompt_tokens=result.prompt_tokens,
        **_of_any(result),
    )


def _tensor(array: Array) -> Tensor:
    count = math.prod(array.shape)
    data = struct.unpack(f"<{count}{ARRAY_FORMATS[array.dtype]}", array.data)
    return Tensor(dtype=array.dtype, shape=array.shape, data=list(data))
