"""Which slot a run takes, and how many of its prompt's tokens that slot's cache holds already. Pure.

A slot keeps the keys and values of the run that left it. A conversation's next turn begins with the same tokens and so
computes only what is new; a prompt that shares only its beginning with others has that copied from their slot into one
that nobody has used for longest. One token at least is always computed: the next one is drawn from its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
PREFIX_MIN = 16  # fewer tokens in common are computed anew: they cost no step of their own

_NOTHING: TokenIds = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Place:
    """Where a run goes. Its first `reused` positions are cached: in `slot` itself, or to be copied from `source`."""

    slot: int
    reused: int = 0
    source: int = -1  # -1: `slot` has them

    @property
    def is_copy(self) -> bool:
        return self.source >= 0


def common(a: TokenIds, b: TokenIds) -> int:
    """How many tokens both begin with."""
    count = min(len(a), len(b))
    differ = a[:count] != b[:count]
    return int(differ.argmax()) if differ.any() else count


class Slots:
    """The free slots, longest unused first, and the tokens whose keys and values each of them holds."""

    def __init__(self, count: int) -> None:
        self._free: dict[int, TokenIds] = dict.fromkeys(range(count), _NOTHING)

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def leave(self, slot: int, tokens: TokenIds) -> None:
        """A run has left: `tokens` are those whose positions it has computed."""
        self._free[slot] = tokens.copy()

    def take(self, prompt: TokenIds, busy: Mapping[int, TokenIds]) -> Place:
        """A place for a run, one slot at least being free. `busy` are the other slots' computed tokens.

        The slot with the most tokens in common is taken itself if most of what it holds is reused. Else it, or a busy
        one, is copied from, so that another conversation's cache is not cut down to a shared system prompt.
        """
        place = self._choose(prompt[:-1], busy)
        del self._free[place.slot]
        return place

    def _choose(self, wanted: TokenIds, busy: Mapping[int, TokenIds]) -> Place:
        oldest = next(iter(self._free))
        best, reused = oldest, 0
        for slot, held in (*self._free.items(), *busy.items()):
            shared = common(wanted, held)
            if shared > reused:
                best, reused = slot, shared
        if reused < PREFIX_MIN:
            return Place(oldest)
        others = [slot for slot in self._free if slot != best]
        if best in self._free and (not others or 2 * reused >= len(self._free[best])):
            return Place(best, reused)
        return Place(others[0], reused, source=best)
