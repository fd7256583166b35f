"""What clients get of tasks that give numbers and no text."""

from __future__ import annotations

import msgspec


class _Result(msgspec.Struct, kw_only=True, tag_field="task_type"):
    """Base of results. Times are of the engine's work."""

    processing_time: str
    processing_time_seconds: float
    stand_in: bool


class EmbeddingResult(_Result, kw_only=True, tag="embedding"):
    """A vector for each text, in their order."""

    embeddings: list[list[float]]
    dimensions: int
    prompt_tokens: int


class Tensor(msgspec.Struct, kw_only=True):
    """Numbers in row-major order. null: not a number, or infinite."""

    dtype: str
    shape: tuple[int, ...]
    data: list[float | int | bool | None]


class TensorResult(_Result, kw_only=True, tag="tensor"):
    """The model's outputs by name."""

    outputs: dict[str, Tensor]
