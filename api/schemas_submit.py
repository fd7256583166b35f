"""What clients submit: a body for each type of task, told apart by `task_type`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

from api.schemas import Body, Name, Priority
from peer import limits
from peer.state.task import Embedding, TensorInputs, TextGeneration


class _Submission(Body, tag_field="task_type", kw_only=True):
    """`priority` is a name or 1 (highest) to 10. `timeout` is in seconds from submission."""

    model_name: Name
    priority: Priority = "normal"
    timeout: Annotated[float, Meta(ge=1, le=limits.TASK_TIMEOUT_S_MAX)] = limits.TASK_TIMEOUT_S_DEFAULT


class SubmitTextGeneration(_Submission, tag="text_generation", kw_only=True):
    """A text that goes on from a prompt."""

    parameters: TextGeneration


class SubmitEmbedding(_Submission, tag="embedding", kw_only=True):
    """A vector for each text."""

    parameters: Embedding


class SubmitTensor(_Submission, tag="tensor", kw_only=True):
    """Arrays in, arrays out: what an ONNX model computes."""

    parameters: TensorInputs


SubmitTask: TypeAlias = SubmitTextGeneration | SubmitEmbedding | SubmitTensor
