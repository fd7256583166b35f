"""Which slot a run takes, and what is reused of it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.batching.prefixes import PREFIX_MIN, Place, Slots, TokenIds, common


def ids(*parts: range | int) -> TokenIds:
    return np.array([*(n for part in parts for n in (part if isinstance(part, range) else [part]))], np.int32)


SYSTEM = range(1000, 1030)
TALK = ids(SYSTEM, range(100))
NOBODY: dict[int, TokenIds] = {}


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [(ids(), ids(1), 0), (ids(1, 2), ids(1, 2), 2), (ids(1, 2), ids(1, 2, 3), 2), (ids(1, 5), ids(1, 6), 1)],
)
def test_common(a: TokenIds, b: TokenIds, count: int) -> None:
    assert common(a, b) == common(b, a) == count


def test_a_conversation_goes_on_in_its_slot() -> None:
    slots = Slots(3)
    slots.take(TALK, NOBODY)
    slots.leave(0, TALK)
    slots.take(ids(range(50)), NOBODY)
    slots.leave(1, ids(range(50)))
    assert slots.take(ids(SYSTEM, range(100), 7, 8), NOBODY) == Place(0, len(TALK))


def test_the_last_token_is_always_computed() -> None:
    slots = Slots(1)
    slots.take(TALK, NOBODY)
    slots.leave(0, TALK)
    assert slots.take(TALK, NOBODY) == Place(0, len(TALK) - 1)


def test_others_take_the_slot_unused_for_longest() -> None:
    slots = Slots(3)
    for slot in range(3):
        assert slots.take(ids(range(slot * 10, slot * 10 + 9)), NOBODY) == Place(slot)
    for slot in (1, 2, 0):
        slots.leave(slot, ids(range(slot * 10, slot * 10 + 9)))
    assert [slots.take(ids(5, 5, 5), NOBODY).slot for _ in range(3)] == [1, 2, 0]
    assert len(slots) == 0


def test_a_shared_beginning_is_copied() -> None:
    """From a free slot, whose conversation may go on, and from a busy one."""
    slots = Slots(3)
    slots.take(TALK, NOBODY)
    slots.leave(0, TALK)
    other = ids(SYSTEM, range(500, 600))
    assert slots.take(other, NOBODY) == Place(1, len(SYSTEM), source=0)
    third = ids(SYSTEM, range(500, 550))
    assert slots.take(third, {1: other}) == Place(2, 79, source=1)
    assert slots.take(third, {1: other[:40], 2: third[:20]}) == Place(0, 40, source=1)


def test_with_no_other_slot_free_the_beginning_is_kept() -> None:
    slots = Slots(2)
    slots.take(TALK, NOBODY)
    slots.take(ids(1), NOBODY)
    slots.leave(0, TALK)
    assert slots.take(ids(SYSTEM, range(500, 600)), {1: ids(1)}) == Place(0, len(SYSTEM))


def test_a_few_tokens_are_not_worth_it() -> None:
    slots = Slots(2)
    slots.take(TALK, NOBODY)
    slots.leave(0, TALK)
    few = ids(range(1000, 1000 + PREFIX_MIN - 1), range(500, 550))
    assert slots.take(few, NOBODY) == Place(1)


def test_what_a_slot_holds_is_a_copy() -> None:
    slots, tokens = Slots(1), TALK.copy()
    slots.take(tokens, NOBODY)
    slots.leave(0, tokens)
    tokens[:] = 0
    assert slots.take(TALK, NOBODY).reused == len(TALK) - 1
