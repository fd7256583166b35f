"""`peer.ports.Store.commit` for stores over a network, made of their transactions and reads.

Every commit puts BATCH_KEY, with the value "epoch/number", in its own transaction and compares the mod-revision that
the commit before left there. So all tries of one batch compare the same revision and the first that is applied
moves it: a try that timed out and is applied late, after its retry or after later commits, writes nothing. A new
epoch needs no such care: the old one's tries fail at the leader key, whose create-revision never comes back.

A comparison that fails says that this try wrote nothing, not why. The keys then tell:

    BATCH_KEY holds this batch     an earlier try took effect: that is success, at that revision, even if another
                                   epoch leads by now
    it does not                    Fenced. Had another epoch's first commit covered our batch, nobody could tell
                                   whether it took effect, and so it stays ambiguous
    they cannot be read            Ambiguous if an earlier try may have taken effect, else Unavailable

A store that is full may say so of a transaction that it has applied all the same (etcd does, as it crosses its quota):
Ambiguous with code `store_full`. Nothing is under way then, so the keys tell that as well.

An epoch belongs to one `FencedCommits`: a process that starts anew must take a new one, since tries that the old one
sent may still be under way and would carry the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn, Protocol

from peer.errors import Ambiguous, BitinglipError, Fenced, StoreBroken, Unavailable
from peer.ports import BATCH_KEY, LEADER_KEY, Compare, KeyValue, Put, TxnResult, Write

STORE_FULL: Final = "store_full"  # code of Ambiguous and Unavailable


class Transactions(Protocol):
    """That much of `peer.ports.Store`."""

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]: ...

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult: ...


class FencedCommits:
    """One for each opened store."""

    def __init__(self, store: Transactions) -> None:
        self._store = store
        self._epoch = 0  # that the next three are about
        self._number = 0  # of the batch that comes next, or is doubtful
        self._revision = 0  # of BATCH_KEY before that batch
        self._doubtful: tuple[Write, ...] | None = None  # may have been sent, and may take effect yet
        self._busy = False

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        """See `peer.ports.Store.commit`. Nothing at all to write makes no revision, but is fenced all the same."""
        if self._busy:
            raise ValueError("one commit at a time")
        self._busy = True
        try:
            return await self._commit(epoch, tuple(writes))
        finally:
            self._busy = False

    async def _commit(self, epoch: int, writes: tuple[Write, ...]) -> int:
        if any(write.key == BATCH_KEY for write in writes):
            raise ValueError(f"`{BATCH_KEY}` is written by every commit itself")
        if epoch == self._epoch and self._doubtful not in (None, writes):
            raise ValueError("the commit before is still ambiguous")
        if epoch <= 0:
            raise _fenced(epoch)
        if not writes:
            return await self._look(epoch)
        if epoch != self._epoch:
            await self._begin(epoch)
        retried = self._doubtful is not None
        self._doubtful = writes  # first: a caller cancelled below leaves a transaction that may be under way
        revision = await self._try(writes, retried)
        self._doubtful = None
        self._number += 1
        self._revision = revision
        return revision

    async def _look(self, epoch: int) -> int:
        done = await self._store.txn([Compare(LEADER_KEY, "create_revision", epoch)], [])
        if not done.succeeded:
            raise _fenced(epoch)
        return done.revision

    async def _begin(self, epoch: int) -> None:
        """What the first commit of an epoch must find. Nothing is sent before it is known."""
        try:
            found = await self._store.get([LEADER_KEY, BATCH_KEY])
        except Ambiguous as error:  # of a read, that is no more than this
            raise Unavailable(f"the epoch could not be read: {error.message}") from error
        leader, batch = found.get(LEADER_KEY), found.get(BATCH_KEY)
        if leader is None or leader.create_revision != epoch:
            raise _fenced(epoch)
        self._epoch = epoch
        self._doubtful = None  # of an older epoch, which writes no more
        self._number = 1 + (_number(batch.value, epoch) if batch is not None else 0)
        self._revision = batch.mod_revision if batch is not None else 0

    async def _try(self, writes: tuple[Write, ...], retried: bool) -> int:
        """Returns the revision at which the batch took effect, in this try or an earlier one."""
        compare = [
            Compare(LEADER_KEY, "create_revision", self._epoch),
            Compare(BATCH_KEY, "mod_revision", self._revision),
        ]
        try:
            done = await self._store.txn(compare, [*writes, Put(BATCH_KEY, self._name)])
        except Ambiguous as error:
            if error.code != STORE_FULL:
                raise
            return await self._find_out_full(error, retried)
        except StoreBroken:
            raise
        except (BitinglipError, ValueError, TypeError) as error:  # this try is not under way
            self._not_sent(error, retried)
        return done.revision if done.succeeded else await self._find_out(retried)

    async def _find_out(self, retried: bool) -> int:
        """After a comparison that failed: did an earlier try take effect?"""
        try:
            found = await self._store.get([BATCH_KEY])
        except (Unavailable, Ambiguous) as error:
            self._not_sent(Unavailable(f"the fence could not be read: {error.message}"), retried)
        batch = found.get(BATCH_KEY)
        if retried and batch is not None and batch.value == self._name:
            return batch.mod_revision
        self._doubtful = None
        raise _fenced(self._epoch)

    async def _find_out_full(self, error: Ambiguous, retried: bool) -> int:
        """After a try that the full store has answered: did it, or an earlier one, take effect?"""
        try:
            found = await self._store.get([BATCH_KEY])
        except (Unavailable, Ambiguous):
            raise error from None
        batch = found.get(BATCH_KEY)
        if batch is not None and batch.value == self._name:
            return batch.mod_revision
        return self._not_sent(
            Unavailable(error.message, code=STORE_FULL, retry_after_s=error.retry_after_s), retried
        )

    def _not_sent(self, error: Exception, retried: bool) -> NoReturn:
        """This try writes nothing; earlier ones, if there were any, may have, or may yet."""
        if retried:
            raise Ambiguous(f"tried again in vain: {error}") from error
        self._doubtful = None
        raise error

    @property
    def _name(self) -> bytes:
        return f"{self._epoch}/{self._number}".encode()


def _fenced(epoch: int) -> Fenced:
    return Fenced(f"epoch {epoch} no longer leads")


def _number(value: bytes, epoch: int) -> int:
    """The number of the last batch of this epoch, 0 if the last was another epoch's."""
    written_by, _, number = value.decode().partition("/")
    return int(number) if written_by == str(epoch) else 0
