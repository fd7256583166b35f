"""Readers of tasks' texts notice what a stream must not do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from peer.state.command import StreamRestart, StreamToken
from tests.simulations.noticing import require_noticed
from tests.simulations.test_world_workload import Wrong, run, scenario


def test_right_streams_are_read_to_their_end() -> None:
    seen: Counter[str] = Counter()
    for seed in range(4):
        clients = run(scenario(seed))
        seen += clients.checks + clients.sometimes
    assert seen["stream_is_what_is_recorded"] > 3
    assert seen["stream_without_gap"] > 10
    assert seen["stream_restarted"]


class SkipsPiece(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [*items[:-3], *items[-2:]]


class RepeatsPiece(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [*items[:-1], *items[-2:]]


class GivesOtherText(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [
            msgspec.structs.replace(item, text=item.text.upper()) if isinstance(item, StreamToken) else item
            for item in items
        ]


class StopsShort(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [*items[:-2], items[-1]]


class HidesRestart(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [item for item in items if not isinstance(item, StreamRestart)]


class GoesOnAfterTheEnd(Wrong):
    def bend_stream(self, items: list[Any]) -> list[Any]:
        return [*items, items[-1]]


WRONG = {
    SkipsPiece: "stream_without_gap",
    RepeatsPiece: "stream_without_gap",
    GivesOtherText: "stream_is_what_is_recorded",
    StopsShort: "stream_is_what_is_recorded",
    HidesRestart: "stream_without_gap",
    GoesOnAfterTheEnd: "stream_without_gap",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_streams_are_noticed(wrong: type[Wrong]) -> None:
    require_noticed(lambda seed: run(scenario(seed), wrong), WRONG[wrong])
