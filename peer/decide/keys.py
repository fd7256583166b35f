"""API keys come and go."""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.errors import Conflict, NotFound, Overloaded
from peer.limits import KEYS_MAX
from peer.state.command import CreateKey, RevokeKey
from peer.state.key import ApiKey
from peer.state.snapshot import Drop, Save, Snapshot


def create(snapshot: Snapshot, command: CreateKey) -> Decision:
    if command.key.key_id in snapshot.keys:
        raise Conflict(f"there is a key {command.key.key_id} already", code="key_exists")
    decision = Decision(reply=command.key)
    if len(snapshot.keys) >= KEYS_MAX:
        revoked = [key for key in snapshot.keys.values() if key.revoked_at is not None]
        if not revoked:
            raise Overloaded(f"there are {KEYS_MAX} keys in force, which is the most; revoke one")
        decision.changes.append(Drop(min(revoked, key=lambda key: (key.revoked_at, key.key_id))))
    decision.changes.append(Save(command.key))
    return decision


def revoke(snapshot: Snapshot, now: float, command: RevokeKey) -> Decision:
    """Revoke by id, or by owner where that names one key in force. Revoking twice is no error."""
    key = snapshot.keys.get(command.key_id) or _by_owner(snapshot, command.key_id)
    if key.revoked_at is not None:
        return Decision(reply=key)
    if key.allows("admin") and not _another_admin(snapshot, key):
        raise Conflict(
            "this is the last key that may make keys; make another one first",
            code="last_admin_key",
            details={"key_id": key.key_id},
        )
    revoked = changed(key, revoked_at=now)
    return Decision(changes=[Save(revoked)], reply=revoked)


def host_owner(peer_id: str) -> str:
    """Whose the admin key is that a host of a cluster makes for itself."""
    return f"admin@{peer_id}"


def revoke_host(snapshot: Snapshot, now: float, peer_id: str) -> Decision:
    """The key that a host has made for itself ends with the host."""
    return Decision(
        changes=[
            Save(changed(key, revoked_at=now))
            for key in snapshot.keys.values()
            if key.owner == host_owner(peer_id) and key.revoked_at is None and _another_admin(snapshot, key)
        ]
    )


def _another_admin(snapshot: Snapshot, key: ApiKey) -> bool:
    """Whether somebody else can still make and revoke keys; one that will expire does not count."""
    return any(
        other.key_id != key.key_id
        and other.allows("admin")
        and other.revoked_at is None
        and other.expires_at is None
        for other in snapshot.keys.values()
    )


def _by_owner(snapshot: Snapshot, owner: str) -> ApiKey:
    keys = [key for key in snapshot.keys.values() if key.owner == owner and key.revoked_at is None]
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise Conflict(
            f"{owner} has {len(keys)} keys; name one by its id",
            code="ambiguous_owner",
            details={"key_ids": [key.key_id for key in keys]},
        )
    raise NotFound(f"there is no key `{owner}`", code="key_not_found", details={"key_id": owner})
