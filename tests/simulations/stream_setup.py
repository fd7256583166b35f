"""Texts of a stand-in cluster's tasks as streams: of what is recorded, in pieces, at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

from peer.state.command import GetTask, StreamEnd, StreamItem, StreamRestart, StreamToken
from peer.state.task import TERMINAL

PIECE_CHARS: Final = 10


@asynccontextmanager
async def stream_of(peer: Any, task_id: str) -> AsyncIterator[AsyncIterator[StreamItem]]:
    await peer.call(GetTask(task_id=task_id))
    async with aclosing(_items(peer, task_id)) as items:
        yield items


async def _items(peer: Any, task_id: str) -> AsyncGenerator[StreamItem, None]:
    view = await peer.call(GetTask(task_id=task_id))
    while view.task.status not in TERMINAL:
        view = await peer.call(GetTask(task_id=task_id, wait_s=1.0))
    items: list[StreamItem] = []
    if view.result is not None:
        attempt, text = view.result.attempt, view.result.generated_text
        if attempt > 1:
            items += [StreamToken(attempt=1, index=0, text="void", count=1)]
            items += [StreamRestart(attempt=attempt, reason="requeued")]
        for at in range(0, len(text), PIECE_CHARS):
            piece = text[at : at + PIECE_CHARS]
            items.append(StreamToken(attempt=attempt, index=at, text=piece, count=len(piece)))
    bend = getattr(peer, "bend_stream", lambda items: items)
    for item in bend([*items, StreamEnd(view=view)]):
        yield item
