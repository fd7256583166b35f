"""Embedding tasks on a real stand-in engine: what comes back, and what is too much."""

from __future__ import annotations

import msgspec
import pytest

from peer.state.order import AttemptFailed, AttemptFinished, RunAttempt
from tests.executor.rig import ECHO, Rig, rig

pytestmark = pytest.mark.process

EMBEDDER = msgspec.structs.replace(ECHO, name="embedder", task_types=("embedding",))


async def embed(it: Rig, *texts: str, task_id: str = "t1") -> AttemptFinished | AttemptFailed:
    await it.executor.order(
        RunAttempt(
            epoch=1,
            worker_id=it.worker_id,
            task_id=task_id,
            attempt=1,
            model_name="embedder",
            task_type="embedding",
            parameters={"input": list(texts)},
        )
    )
    return await it.outcome(task_id)


async def test_vectors_are_the_outcome_and_no_text_is_streamed() -> None:
    async with rig(load=False) as it:
        await it.load(EMBEDDER)
        done = await embed(it, "one two", "three")
        assert isinstance(done, AttemptFinished)
        (array,) = done.arrays
        assert (array.name, array.dtype, array.shape, len(array.data)) == (
            "embeddings",
            "float32",
            (2, 8),
            64,
        )
        assert (done.generated_text, done.tokens_generated, done.prompt_tokens) == ("", 0, 3)
        assert done.nbytes == 85
        assert len(it.streams) == 0


async def test_more_numbers_than_a_leader_takes_fail_the_task_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.hosted.OUTPUT_BYTES_MAX", 40)
    async with rig(load=False) as it:
        await it.load(EMBEDDER)
        failed = await embed(it, "one two", "three")
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("result_too_large", False)
        assert isinstance(await embed(it, "one", task_id="t2"), AttemptFinished)
