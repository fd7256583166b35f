"""Who may be a peer of the cluster: one-time tokens for new hosts, the hosts, and those that may not come back.

Every time is in seconds since 1970 by the leader's wall clock.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final, Literal

from peer.state.base import Record

TOKEN_PREFIX: Final = "blj"
TOKEN_S_DEFAULT: Final = 30 * 60.0
TOKEN_S_MIN: Final = 60.0
TOKEN_S_MAX: Final = 7 * 86_400.0
TOKENS_MAX: Final = 1_000  # that are not used and have not expired
TOKEN_KEPT_S: Final = 86_400.0  # after its end: who tries it again is told what became of it
CERTIFICATE_S: Final = 30 * 86_400.0
RENEW_SHARE: Final = 2 / 3  # of its life: then a certificate is renewed
CLOCK_SKEW_S: Final = 300.0  # by which the clocks of two hosts may differ
CERTIFICATES_MAX: Final = 64  # of one host that have not expired: each can be revoked, so all are known
HOSTS_MAX: Final = 10_000
ADDRESSES_MAX: Final = 8  # of one host
ADDRESS_CHARS_MAX: Final = 253
CSR_CHARS_MAX: Final = 4_096

HostStatus = Literal["online", "offline", "revoked"]

_PEER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_HEX = re.compile(r"[0-9a-f]+\Z")
_TOKEN = re.compile(TOKEN_PREFIX + r"_([0-9a-f]{12})_([0-9a-f]{32})_([0-9a-f]{64})\Z")

# ---------------------------------------------------------------- records


class JoinToken(Record, frozen=True):
    """What is stored of a token. The secret is 128 random bits that live for minutes: one SHA-256 is a sound hash."""

    token_id: str
    secret_sha256: str
    created_at: float
    expires_at: float
    created_by: str
    voter: bool = True  # who joins with it may vote, lead and so hold the CA's key
    used_at: float | None = None
    used_by: str = ""  # peer_id
    used_key_sha256: str = ""  # of the public key that it was used for


class Host(Record, frozen=True):
    """A peer with its newest certificate. `serial` is hexadecimal, `key_sha256` the digest of its public key."""

    peer_id: str
    enrolled_at: float
    serial: str
    key_sha256: str
    expires_at: float
    earlier: tuple[tuple[str, float], ...] = ()  # certificates that may still hold: serial, expires_at
    voter: bool = True
    addresses: tuple[str, ...] = ()  # names and IP addresses that its certificate speaks for


class Revocation(Record, frozen=True):
    """None of this peer's certificates holds any more. Kept until they all have expired; then the name is free.

    `serials` is for programs that know certificates by them, as etcd does; peers go by the name.
    """

    peer_id: str
    serials: tuple[str, ...]
    revoked_at: float
    revoked_by: str
    until: float


# ---------------------------------------------------------------- commands and their answers


class CreateJoinToken(Record, frozen=True, tag="create_join_token"):
    """-> NewJoinToken. The caller made id and secret; only the secret's hash is here. Overloaded."""

    token_id: str
    secret_sha256: str
    ttl_s: float = TOKEN_S_DEFAULT
    voter: bool = True
    created_by: str = ""


class Enrol(Record, frozen=True, tag="enrol"):
    """-> Enrolled. Unauthorized; Conflict on a name in use; Unavailable while the leader has not got the CA's key.

    `csr` is a certificate request in PEM whose signature was verified, `key_sha256` the digest of the key in it.
    """

    token_id: str
    secret_sha256: str
    peer_id: str
    csr: str
    key_sha256: str
    addresses: tuple[str, ...] = ()


class Renew(Record, frozen=True, tag="renew"):
    """-> Enrolled, as above. `peer_id` is what the connection that it came by has proven."""

    peer_id: str
    csr: str
    key_sha256: str
    addresses: tuple[str, ...] = ()


class RevokeHost(Record, frozen=True, tag="revoke_host"):
    """-> Revocation. `name` is a peer_id, or a host's name where that is unique. NotFound; Conflict for the leader."""

    name: str
    revoked_by: str = ""


class GetAuthority(Record, frozen=True, tag="get_authority"):
    """-> AuthorityKey, for hosts that may vote. `peer_id` is what the connection has proven. Unauthorized."""

    peer_id: str


class ListHosts(Record, frozen=True, tag="list_hosts"):
    """-> tuple[HostView, ...], by name; revoked ones too."""


class NewJoinToken(Record, frozen=True):
    """`ca_sha256` is of the CA's public key: which CA the new host is to trust."""

    token: JoinToken
    ca_sha256: str


class HostView(Record, frozen=True):
    """Of a revoked host no more is known than that."""

    peer_id: str
    status: HostStatus
    host: Host | None = None
    revocation: Revocation | None = None
    draining: bool = False  # it is being emptied
    models: int = 0  # that it holds
    tasks: int = 0  # likewise


class Grant(Record, frozen=True):
    """Permission to sign one certificate, exactly so; whoever holds the CA's key makes an Enrolled of it."""

    cluster: str
    peer_id: str
    serial: str
    key_sha256: str
    not_before: float
    not_after: float
    voter: bool
    addresses: tuple[str, ...] = ()


class Enrolled(Record, frozen=True):
    """All that a new host needs. `certificate` and `ca` are PEM, `seeds` addresses of peers that were there."""

    cluster: str
    peer_id: str
    certificate: str
    ca: str
    voter: bool
    seeds: tuple[str, ...] = ()
    gossip_key: str = ""  # base64


class AuthorityKey(Record, frozen=True):
    """The CA with its private key, PEM: goes over a link to voters only, which write it down with mode 0600."""

    pem: str


# ---------------------------------------------------------------- what the leader knows


@dataclass(slots=True)
class Registry:
    """Every record of this module that the store holds, by id."""

    tokens: dict[str, JoinToken] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    revocations: dict[str, Revocation] = field(default_factory=dict)

    def save(self, record: JoinToken | Host | Revocation) -> None:
        match record:
            case JoinToken():
                self.tokens[record.token_id] = record
            case Host():
                self.hosts[record.peer_id] = record
            case Revocation():  # pragma: no branch - there is no other
                self.revocations[record.peer_id] = record

    def drop(self, record: JoinToken | Host | Revocation) -> None:
        match record:
            case JoinToken():
                self.tokens.pop(record.token_id, None)
            case Host():
                self.hosts.pop(record.peer_id, None)
            case Revocation():  # pragma: no branch - there is no other
                self.revocations.pop(record.peer_id, None)


# ---------------------------------------------------------------- texts


def token_text(token_id: str, secret: str, ca_sha256: str) -> str:
    """What the operator carries to the new host: the token's id, its secret, and which CA to trust."""
    return f"{TOKEN_PREFIX}_{token_id}_{secret}_{ca_sha256}"


def split_token(text: str) -> tuple[str, str, str] | None:
    """(token_id, secret, SHA-256 of the CA's public key) of a well-formed token, else None."""
    found = _TOKEN.match(text)
    return None if found is None else (found[1], found[2], found[3])


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def same(one: str, other: str) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


def is_peer_id(text: str) -> bool:
    """Whether it can be a peer's name: 1 to 64 letters, digits, dots, dashes and underscores."""
    return _PEER_ID.match(text) is not None


def is_address(text: str) -> bool:
    """Whether it has the form of a host's name or IP address, without a port."""
    if len(text) > ADDRESS_CHARS_MAX:
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST_NAME.match(text) is not None
    return True


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return len(text) == 64 and _HEX.match(text) is not None


def is_token_id(text: str) -> bool:
    return len(text) == 12 and _HEX.match(text) is not None
