"""Who is calling: bearer tokens, scopes, and one-time tickets for WebSockets."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict

from peer import limits
from peer.errors import RateLimited, Unauthorized
from peer.ports import Clock, Cluster
from peer.state import key as keys
from peer.state.key import ApiKey

TOKEN_CHARS_MAX = 512
CACHED_MAX = 4_096


class Authenticator:
    """Turns what a client sends into the key as it is in force at this moment.

    The hash of a token's secret is remembered, under the token's own hash, so that a known token costs one
    SHA-256; whether its key still holds is asked of the cluster every time.
    """

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[str, str]] = OrderedDict()  # hash: (key_id, secret's hash)

    def bearer(self, header: bytes | None, scope: str) -> ApiKey:
        """The key of an Authorization header. Raises Unauthorized."""
        if header is None:
            raise Unauthorized("Send an API key: Authorization: Bearer <api_key>", code="missing_api_key")
        if header[:7].lower() != b"bearer " or len(header) > TOKEN_CHARS_MAX:
            raise Unauthorized("The Authorization header is not of the form: Bearer <api_key>")
        return self.token(header[7:].strip(), scope)

    def token(self, token: bytes, scope: str) -> ApiKey:
        """The key of a token. Raises Unauthorized."""
        key_id, digest = self._identify(token)
        key = self._cluster.key(key_id)
        if key is None or not hmac.compare_digest(digest, key.secret_sha256):
            raise Unauthorized("The API key is not valid")
        self.check(key, scope)
        return key

    def check(self, key: ApiKey, scope: str) -> None:
        """Raises Unauthorized if the key is revoked, has expired or lacks the scope."""
        if key.revoked_at is not None:
            raise Unauthorized("The API key has been revoked")
        if key.expires_at is not None and self._clock.wall() >= key.expires_at:
            raise Unauthorized("The API key has expired")
        if not key.allows(scope):
            raise Unauthorized(
                f"The API key lacks the scope {scope!r}",
                code="insufficient_scope",
                details={"required": scope, "scopes": list(key.scopes)},
            )

    def in_force(self, key_id: str, scope: str) -> bool:
        """Whether a key that was accepted before still holds."""
        key = self._cluster.key(key_id)
        if key is None:
            return False
        try:
            self.check(key, scope)
        except Unauthorized:
            return False
        return True

    def _identify(self, token: bytes) -> tuple[str, str]:
        fingerprint = hashlib.sha256(token).digest()
        found = self._known.get(fingerprint)
        if found is not None:
            return found
        try:
            parts = keys.split(token.decode("ascii"))
        except UnicodeDecodeError:
            parts = None
        if parts is None:
            raise Unauthorized("The API key is not valid")
        key_id, secret = parts
        key = self._cluster.key(key_id)
        digest = keys.digest(secret)
        if key is not None and hmac.compare_digest(digest, key.secret_sha256):
            self._known[fingerprint] = key_id, digest
            if len(self._known) > CACHED_MAX:
                self._known.popitem(last=False)
        return key_id, digest


class Tickets:
    """One-time, short-lived stand-ins for a key, for clients that cannot set headers. Kept on this peer."""

    LIFE_S = 30.0

    def __init__(self, clock: Clock, tickets_max: int = limits.KEYS_MAX) -> None:
        self._clock = clock
        self._max = tickets_max
        self._tickets: OrderedDict[str, tuple[str, float]] = OrderedDict()  # oldest first

    def issue(self, key_id: str) -> str:
        """A fresh ticket. Raises RateLimited when too many are open."""
        now = self._clock.now()
        while self._tickets and next(iter(self._tickets.values()))[1] <= now:
            self._tickets.popitem(last=False)
        if len(self._tickets) >= self._max:
            raise RateLimited("Too many unused tickets", retry_after_s=self.LIFE_S)
        ticket = secrets.token_urlsafe(24)
        self._tickets[ticket] = key_id, now + self.LIFE_S
        return ticket

    def redeem(self, ticket: str) -> str:
        """The key id that it was issued to; it is used up. Raises Unauthorized."""
        key_id, expires = self._tickets.pop(ticket, ("", 0.0))
        if not key_id or self._clock.now() >= expires:
            raise Unauthorized("The ticket is unknown, used or expired", code="invalid_ticket")
        return key_id
