"""Who is calling: bearer tokens and scopes."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict

from peer.errors import Unauthorized
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
