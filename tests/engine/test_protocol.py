"""Framing: whatever the cuts, the same messages; whatever the bytes, messages or ProtocolError."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import (
    FRAME_BYTES_MAX,
    Cancel,
    Finished,
    Frames,
    Hello,
    Load,
    ProtocolError,
    Run,
    Tokens,
    encode,
)

texts = st.text(max_size=40)
values = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | texts | st.lists(texts, max_size=3)
to_engine = st.one_of(
    st.builds(Hello, product=texts),
    st.builds(Cancel, run_id=texts),
    st.builds(Load, model=texts, path=texts, family=texts, context=st.integers(0, 2**31)),
    st.builds(
        Run,
        run_id=texts,
        model=texts,
        task_type=texts,
        parameters=st.dictionaries(texts, values, max_size=4),
        request_id=texts,
    ),
)


@given(st.lists(to_engine, max_size=6), st.data())
def test_any_cut_gives_the_same_messages(messages: list[object], data: st.DataObject) -> None:
    stream = b"".join(encode(message) for message in messages)  # type: ignore[arg-type]
    frames, got = Frames("engine"), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        got += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert got == messages


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes) -> None:
    for side in ("engine", "peer"):
        with contextlib.suppress(ProtocolError):
            Frames(side).feed(data)  # type: ignore[arg-type]


def test_the_other_sides_messages_are_refused() -> None:
    tokens = Tokens(run_id="r", text="x", count=1)
    assert Frames("peer").feed(encode(tokens)) == [tokens]
    with pytest.raises(ProtocolError):
        Frames("engine").feed(encode(tokens))


def test_too_long_a_frame_is_refused_before_it_is_there() -> None:
    with pytest.raises(ProtocolError):
        Frames("peer").feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError):
        encode(Tokens(run_id="r", text="x" * FRAME_BYTES_MAX, count=1))


def test_fields_of_a_newer_side_are_ignored() -> None:
    import msgspec

    body = msgspec.msgpack.encode({"type": "cancel", "run_id": "r", "why": "new"})
    assert Frames("engine").feed(len(body).to_bytes(4, "big") + body) == [Cancel(run_id="r")]


def test_finished_has_its_times() -> None:
    done = Finished(run_id="r", reason="stop", prompt_tokens=1, tokens_generated=2, processing_s=0.5)
    assert Frames("peer").feed(encode(done)) == [done]
