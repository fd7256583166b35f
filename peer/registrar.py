"""The leader's registrar: which hosts are in the cluster, and the certificates that say so.

`peer.decide.enrol` decides; a certificate is signed when it is durable that it was granted, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog

from peer.decide import enrol, keys, lose
from peer.decide.decision import Decision
from peer.errors import BitinglipError, ConfigError, Conflict, Unavailable
from peer.ports import Authority, Entropy
from peer.state.command import HostCommand
from peer.state.enrol import (
    AuthorityKey,
    CreateJoinToken,
    Enrol,
    GetAuthority,
    Grant,
    HostView,
    JoinToken,
    NewJoinToken,
    Renew,
    Revocation,
    RevokeHost,
)
from peer.state.snapshot import Snapshot

log = structlog.get_logger("peer")

TIDY_S: Final = 60.0
_SERIAL_BYTES: Final = 16


class Registrar:
    """`authority` None: this host is in no cluster, and everything but the list of hosts is refused.

    `seeds` gives addresses where a new host finds the others.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        entropy: Entropy,
        authority: Authority | None = None,
        seeds: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._snapshot = snapshot
        self._entropy = entropy
        self._authority = authority
        self._seeds = seeds
        self._tidy_at = 0.0
        self._told = tuple(snapshot.registry.revocations)

    def revoked(self) -> tuple[Revocation, ...]:
        return tuple(self._snapshot.registry.revocations.values())

    def news(self) -> bool:
        """Whether others are revoked than when this was last asked."""
        before, self._told = self._told, tuple(self._snapshot.registry.revocations)
        return before != self._told

    # ---------------------------------------------------------------- before the commit

    def decide(self, command: HostCommand, now: float) -> Decision:
        """Raises BitinglipError."""
        authority, registry = self._here(), self._snapshot.registry
        match command:
            case CreateJoinToken():
                return enrol.create_token(registry, now, command)
            case Enrol() | Renew():
                with _usable():
                    if not authority.ready():
                        raise _no_key()
                    cluster = authority.cluster()
                # As certificates are known by it everywhere: a number, without zeros in front.
                serial = self._entropy.token(_SERIAL_BYTES).lstrip("0") or "1"
                if isinstance(command, Enrol):
                    return enrol.enrol(registry, now, command, cluster=cluster, serial=serial)
                return enrol.renew(registry, now, command, cluster=cluster, serial=serial)
            case RevokeHost():
                decision = enrol.revoke(registry, now, command, leader=self._snapshot.peer_id)
                decision.add(lose.revoked(self._snapshot, now, decision.reply.peer_id))
                decision.add(keys.revoke_host(self._snapshot, now, decision.reply.peer_id))
                return decision

    def tick(self, now: float) -> Decision:
        """Forget what is over; at first, record this host, which may have made the cluster before there was a store."""
        if self._authority is None or 0.0 <= now - self._tidy_at < TIDY_S:
            return Decision()
        self._tidy_at = now
        decision = enrol.tidy(self._snapshot.registry, now)
        try:
            with _usable():
                decision.add(enrol.note(self._snapshot.registry, self._authority.host()))
        except Unavailable as error:
            log.error("this_host_not_recorded", why=error.message)
        return decision

    # ---------------------------------------------------------------- after the commit

    def answer(self, command: HostCommand, reply: Any) -> tuple[Any, BitinglipError | None]:
        """What the caller gets for what was decided, now that it is durable, or an error."""
        try:
            return self._answer(command, reply), None
        except BitinglipError as error:
            return None, error
        except Exception:
            # A signature that fails costs this caller and no more: it is not to end the leadership.
            log.exception("signing_failed", command=type(command).__name__)
            return None, BitinglipError("an internal error; it has been logged")

    def _answer(self, command: HostCommand, reply: Any) -> Any:
        authority = self._here()
        with _usable():
            if isinstance(reply, Grant) and isinstance(command, Enrol | Renew):
                return authority.issue(command.csr, reply, self._seeds())
            if isinstance(reply, JoinToken):
                return NewJoinToken(token=reply, ca_sha256=authority.ca_sha256())
        return reply

    # ---------------------------------------------------------------- queries

    def key(self, query: GetAuthority) -> AuthorityKey:
        """The CA's private key. Raises Unauthorized, Unavailable."""
        authority = self._here()
        enrol.may_hold_authority(self._snapshot.registry, query)
        with _usable():
            if not authority.ready():
                raise _no_key()
            return AuthorityKey(pem=authority.private_key())

    def hosts(self) -> tuple[HostView, ...]:
        return enrol.hosts(self._snapshot)

    def _here(self) -> Authority:
        if self._authority is None:
            raise Conflict(
                "this host is in no cluster; `bitinglip init --cluster NAME` makes one", code="no_cluster"
            )
        return self._authority


def _no_key() -> Unavailable:
    return Unavailable("the leader has not got the CA's key yet; try again", retry_after_s=2.0)


@contextmanager
def _usable() -> Iterator[None]:
    """Raises Unavailable where the leader's own files are not: that is no reason to stop leading."""
    try:
        yield
    except (ConfigError, OSError) as error:
        log.error("authority_not_usable", why=str(error))
        raise Unavailable("the leader's copy of the CA is not usable; its log says why") from error
