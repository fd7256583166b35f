"""API keys come and go."""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.errors import Conflict, NotFound, Overloaded
from peer.limits import KEYS_MAX
from peer.state.command import CreateKey, RevokeKey
from peer.state.key import ApiKey
from peer.state.snapshot import Save, Snapshot


def create(snapshot: Snapshot, command: CreateKey) -> Decision:
    if command.key.key_id in snapshot.keys:
        raise Conflict(f"there is a key {command.key.key_id} already", code="key_exists")
    if len(snapshot.keys) >= KEYS_MAX:
        raise Overloaded(f"there are {KEYS_MAX} keys, which is the most")
    return Decision(changes=[Save(command.key)], reply=command.key)


def revoke(snapshot: Snapshot, now: float, command: RevokeKey) -> Decision:
    """Revoke by id, or by owner where that names one key in force. Revoking twice is no error."""
    key = snapshot.keys.get(command.key_id) or _by_owner(snapshot, command.key_id)
    if key.revoked_at is not None:
        return Decision(reply=key)
    revoked = changed(key, revoked_at=now)
    return Decision(changes=[Save(revoked)], reply=revoked)


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
