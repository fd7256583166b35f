"""The stream hub: late and early readers, restarts, ends, bounds. Virtual time."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engine import protocol
from peer import limits
from peer.adapters.clock import SystemClock
from peer.attempt import Attempt
from peer.errors import Unavailable
from peer.state.command import StreamRestart, StreamToken, TaskView
from peer.state.order import RunAttempt
from peer.state.task import Array, Logprobs, Status, Task, TaskResult, TokenLogprob
from peer.streams import Stream, StreamHub


class Clock(SystemClock):
    def __init__(self) -> None:
        super().__init__()
        self.time_s = 0.0

    def now(self) -> float:
        return getattr(self, "time_s", 0.0)


async def follow(hub: StreamHub, into: list[Any], task_id: str = "t") -> None:
    async with hub.subscribe(task_id) as items:
        async for item in items:
            into.append(item)


async def test_an_early_and_a_late_reader_get_the_same_text() -> None:
    hub = StreamHub(Clock())
    early: list[Any] = []
    late: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, early)
        await wait_all_tasks_blocked()
        for word in ("a", " b", " c"):
            hub.publish("t", 1, word, 1)
            await wait_all_tasks_blocked()
        nursery.start_soon(follow, hub, late)
        await wait_all_tasks_blocked()
        hub.publish("t", 1, " d", 2)
        hub.end("t")
    assert early == [
        StreamToken(attempt=1, index=index, text=text, count=count)
        for index, text, count in ((0, "a", 1), (1, " b", 1), (2, " c", 1), (3, " d", 2))
    ]
    assert late == [
        StreamToken(attempt=1, index=0, text="a b c", count=3),
        StreamToken(attempt=1, index=3, text=" d", count=2),
    ]
    after: list[Any] = []
    await follow(hub, after)
    assert after == [StreamToken(attempt=1, index=0, text="a b c d", count=5)]


async def test_what_is_ready_comes_as_one() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        for number in range(100):
            hub.publish("t", 1, str(number % 10), 1)
        await wait_all_tasks_blocked()
        hub.end("t")
    assert len(seen) == 1
    assert seen[0].count == 100


async def test_a_new_attempt_voids_the_old_one() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        hub.publish("t", 1, "lost", 1)
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        hub.restart("t", 2, "engine_died")
        await wait_all_tasks_blocked()
        assert hub.tokens_so_far("t") == 0
        hub.publish("t", 1, "of the dead", 1)
        hub.publish("t", 2, "kept", 1)
        hub.restart("t", 2, "again")
        await wait_all_tasks_blocked()
        hub.publish("t", 3, "third", 1)
        hub.end("t")
    assert seen == [
        StreamToken(attempt=1, index=0, text="lost", count=1),
        StreamRestart(attempt=2, reason="engine_died"),
        StreamToken(attempt=2, index=0, text="kept", count=1),
        StreamRestart(attempt=3, reason="the attempt before ended without a result"),
        StreamToken(attempt=3, index=0, text="third", count=1),
    ]
    assert hub.tokens_so_far("t") == 1


async def test_a_reader_that_came_first_sees_no_restart_for_a_later_first_attempt() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        hub.restart("t", 2, "x")
        await wait_all_tasks_blocked()
        hub.end("t")
    assert seen == []


async def test_nothing_is_kept_of_tasks_that_nobody_wrote_or_reads() -> None:
    hub = StreamHub(Clock())
    hub.end("never")
    hub.restart("never", 2, "x")
    with trio.move_on_after(0):
        await follow(hub, [], "t")
    assert len(hub) == 0
    assert hub.tokens_so_far("t") == 0


async def test_ended_streams_are_kept_for_a_time_and_up_to_a_number() -> None:
    clock = Clock()
    hub = StreamHub(clock, kept_s=60.0, kept_max=3)
    for number in range(10):
        hub.publish(f"t{number}", 1, "x", 1)
        hub.end(f"t{number}")
    assert len(hub) == 3
    clock.time_s = 61.0
    hub.publish("last", 1, "x", 1)
    hub.end("last")
    hub.publish("last", 1, "too late", 1)
    assert len(hub) == 1
    assert hub.tokens_so_far("last") == 1


def item(attempt: int, index: int, text: str) -> StreamToken:
    return StreamToken(attempt=attempt, index=index, text=text, count=len(text))


async def all_of(stream: Stream) -> list[Any]:
    return [each async for each in stream.items()]


async def test_one_attempt_is_read_until_it_gives_no_more() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []

    async def read(attempt: int) -> None:
        async with hub.subscribe_attempt("t", attempt) as tokens:
            seen.append([token.text async for token in tokens])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 1)
        nursery.start_soon(read, 2)
        await wait_all_tasks_blocked()
        hub.publish("t", 1, "a", 1)
        await wait_all_tasks_blocked()
        hub.publish("t", 1, "b", 1)
        hub.close("t", 1)
        await wait_all_tasks_blocked()
        assert seen == [["a", "b"]]
        hub.publish("t", 2, "c", 1)
        hub.close("t", 2)
    assert seen == [["a", "b"], ["c"]]
    await read(1)
    await read(2)
    assert seen[2:] == [[], ["c"]]


async def test_what_is_closed_is_kept_for_a_time_but_not_while_it_lives_again_or_is_waited_for() -> None:
    clock = Clock()
    hub = StreamHub(clock, kept_s=60.0, kept_max=3)
    for task_id in ("closed", "again", "awaited"):
        hub.publish(task_id, 1, "x", 1)
        hub.close(task_id, 1)
    hub.publish("again", 2, "y", 1)
    async with hub.subscribe("awaited") as items:
        assert (await anext(items)).text == "x"
        clock.time_s = 61.0
        hub.end("nothing")
        assert len(hub) == 2
        hub.publish("awaited", 2, "z", 1)
        assert [await anext(items) for _ in range(2)] == [
            StreamRestart(attempt=2, reason="the attempt before ended without a result"),
            StreamToken(attempt=2, index=0, text="z", count=1),
        ]
        hub.close("again", 2)
        hub.close("awaited", 2)
    clock.time_s = 122.0
    hub.end("nothing")
    assert len(hub) == 0


async def test_a_void_stream_whose_next_attempt_runs_elsewhere_is_forgotten() -> None:
    clock = Clock()
    hub = StreamHub(clock, kept_s=60.0)
    hub.publish("t", 1, "x", 1)
    hub.restart("t", 2, "lost")
    clock.time_s = 61.0
    hub.end("nothing")
    assert len(hub) == 0


async def test_items_of_another_stream_are_taken_once_each() -> None:
    stream = Stream()
    assert stream.take(item(1, 0, "abc"))
    assert stream.take(item(1, 3, "de"))
    assert not stream.take(item(1, 9, "z"))  # a gap
    assert not stream.take(item(1, 0, "abcd"))  # less than was there before
    assert stream.take(item(1, 0, "abcdefg"))  # anew from the beginning
    assert stream.take(item(1, 0, "abcdefg"))
    assert not stream.take(item(2, 3, "z"))
    assert stream.take(item(2, 0, "second"))
    assert stream.take(item(1, 7, "of the dead"))
    stream.end()
    assert stream.take(item(2, 6, "too late"))
    assert await all_of(stream) == [item(2, 0, "second")]


async def test_what_is_no_text_gives_no_piece_of_text() -> None:
    view = view_of("")
    assert view.result is not None
    array = Array("embeddings", "float32", (1, 1), bytes(4))
    stream = Stream()
    stream.finish(msgspec.structs.replace(view, result=msgspec.structs.replace(view.result, arrays=(array,))))
    assert await all_of(stream) == []


def view_of(text: str | None, attempt: int = 1) -> TaskView:
    status = Status.FAILED if text is None else Status.COMPLETED
    task = Task(
        task_id="t", task_type="x", model_name="m", priority=5, timeout_s=1, created_at=0, deadline=1,
        status=status, attempt=attempt, requeued_because="it was lost" if attempt > 1 else "",
    )  # fmt: skip
    if text is None:
        return TaskView(task=task)
    result = TaskResult(
        task_id="t", attempt=attempt, worker_id="w", generated_text=text, tokens_generated=len(text),
        prompt_tokens=1, finish_reason="stop", processing_s=1.0, first_token_s=0.1,
    )  # fmt: skip
    return TaskView(task=task, result=result)


@pytest.mark.parametrize(
    ("given", "view", "wanted"),
    [
        ("", view_of("abc"), [item(1, 0, "abc")]),
        ("", view_of(""), [item(1, 0, "")]),
        ("", view_of("abc", attempt=2), [item(2, 0, "abc")]),
        ("", view_of(None, attempt=2), []),
        ("ab", view_of("abc"), [item(1, 0, "ab"), item(1, 2, "c")]),
        ("abc", view_of("abc"), [item(1, 0, "abc")]),
        ("ab", view_of(None), [item(1, 0, "ab")]),
        ("ab", view_of(None, attempt=2), [item(1, 0, "ab"), StreamRestart(attempt=2, reason="it was lost")]),
        (
            "ab",
            view_of("abc", attempt=2),
            [item(1, 0, "ab"), StreamRestart(attempt=2, reason="it was lost"), item(2, 0, "abc")],
        ),
        (
            "ax",
            view_of("abc"),
            [
                item(1, 0, "ax"),
                StreamRestart(attempt=1, reason="another text was recorded than was given"),
                item(1, 0, "abc"),
            ],
        ),
    ],
)
async def test_what_was_given_becomes_what_is_recorded(given: str, view: TaskView, wanted: list[Any]) -> None:
    stream = Stream()
    seen: list[Any] = []

    async def collect() -> None:
        async for each in stream.items():
            seen.append(each)

    if given:
        stream.publish(1, given, len(given))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        await wait_all_tasks_blocked()
        stream.finish(view)
    assert seen == wanted


async def test_an_error_comes_after_the_text_there_is() -> None:
    stream = Stream()
    stream.publish(1, "ab", 2)
    stream.break_off(Unavailable("nobody leads"))
    items = stream.items()
    assert await anext(items) == item(1, 0, "ab")
    with pytest.raises(Unavailable, match="nobody leads"):
        await anext(items)


def told(*numbers: int) -> tuple[Logprobs, ...]:
    return tuple(Logprobs(TokenLogprob(number, b"x", -float(number))) for number in numbers)


async def test_logprobs_come_with_their_tokens() -> None:
    stream = Stream()
    stream.publish(1, "a", 1, told(1))
    stream.publish(1, "bc", 2, told(2, 3))
    async with aclosing(stream.items()) as items:
        assert (await anext(items)).logprobs == told(1, 2, 3)
        stream.publish(1, "d", 1, told(4))
        assert (await anext(items)).logprobs == told(4)
        stream.publish(1, "e", 1)
        assert (await anext(items)).logprobs == ()
        stream.publish(2, "f", 1, told(9))
        await anext(items)
        assert (await anext(items)).logprobs == told(9)


async def test_logprobs_of_another_peers_stream_and_of_a_result_fill_up_what_is_missing() -> None:
    stream = Stream()
    assert stream.take(msgspec.structs.replace(item(1, 0, "ab"), logprobs=told(1, 2)))
    assert stream.take(msgspec.structs.replace(item(1, 0, "abc"), logprobs=told(1, 2, 3)))
    view = view_of("abcde")
    assert view.result is not None
    result = msgspec.structs.replace(view.result, logprobs=told(1, 2, 3, 4))  # there was no room for the last
    stream.finish(msgspec.structs.replace(view, result=result))
    assert await all_of(stream) == [msgspec.structs.replace(item(1, 0, "abcde"), logprobs=told(1, 2, 3, 4))]


def test_an_attempt_keeps_logprobs_up_to_a_bound_and_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOGPROBS_BYTES_MAX", 60)
    order = RunAttempt(
        epoch=1, worker_id="w", task_id="t", attempt=1, model_name="m", task_type="x", parameters={}
    )
    one = protocol.Logprobs(protocol.TokenLogprob("x", b"x", -0.12345678, 5))
    kept = Logprobs(TokenLogprob(5, b"x", -0.123457))
    attempt = Attempt(order)
    assert attempt.take_logprobs([one, one]) == (kept, kept)
    attempt.tokens += 2
    assert attempt.take_logprobs([one, one]) == (kept,)  # over the bound by one at most
    attempt.tokens += 2
    assert attempt.take_logprobs([one]) == ()
    assert attempt.logprobs == [kept] * 3
    late = Attempt(order)
    late.tokens = 1
    assert late.take_logprobs([one]) == ()
