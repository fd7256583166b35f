"""Who may join, whose certificate is renewed, and who is put out: what to write and what to sign.

Nothing is signed here: a Grant says exactly what may be, once it is durable. `serial` is fresh and unguessable,
hexadecimal, at most 16 bytes.
"""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.decide.members import named
from peer.errors import BadRequest, Conflict, Overloaded, RateLimited, Unauthorized
from peer.limits import NAME_CHARS_MAX
from peer.state import enrol as records
from peer.state.enrol import (
    CreateJoinToken,
    Enrol,
    GetAuthority,
    Grant,
    Host,
    HostView,
    JoinToken,
    Registry,
    Renew,
    Revocation,
    RevokeHost,
)
from peer.state.snapshot import Drop, Save, Snapshot

_NO_DIGEST = "0" * 64  # no secret has it: an unknown token costs the same time as a wrong secret


def create_token(registry: Registry, now: float, command: CreateJoinToken) -> Decision:
    """A token that lets one host in until it expires. Reply: JoinToken."""
    if not records.is_token_id(command.token_id) or not records.is_digest(command.secret_sha256):
        raise BadRequest("a join token needs an id of 12 hexadecimal digits and the SHA-256 of its secret")
    if not records.TOKEN_S_MIN <= command.ttl_s <= records.TOKEN_S_MAX:
        raise BadRequest(
            f"a join token lives for {records.TOKEN_S_MIN:g} to {records.TOKEN_S_MAX:g} s, not {command.ttl_s:g}",
            details={"field": "ttl_s"},
        )
    if command.token_id in registry.tokens:
        raise Conflict(f"there is a join token {command.token_id} already", code="token_exists")
    open_tokens = sum(token.used_at is None and token.expires_at > now for token in registry.tokens.values())
    if open_tokens >= records.TOKENS_MAX:
        raise Overloaded(
            f"there are {records.TOKENS_MAX} unused join tokens, which is the most; let some expire"
        )
    token = JoinToken(
        token_id=command.token_id,
        secret_sha256=command.secret_sha256,
        created_at=now,
        expires_at=now + command.ttl_s,
        created_by=command.created_by[:NAME_CHARS_MAX],
        voter=command.voter,
    )
    return Decision(changes=[Save(token)], reply=token)


def enrol(registry: Registry, now: float, command: Enrol, *, cluster: str, serial: str) -> Decision:
    """Let a host in and use its token up. Reply: Grant.

    The same host may ask again with the same key until the token expires: its answer may have been lost.
    """
    _check_names(command.peer_id, command.csr, command.key_sha256, command.addresses)
    token = _token(registry, now, command)
    if token.used_at is not None and not _by_the_same(token, command):
        raise Unauthorized(
            f"this join token was used by {token.used_by}; make another one", code="join_token_used"
        )
    _check_not_revoked(registry, command.peer_id)
    host = registry.hosts.get(command.peer_id)
    if host is not None and not (_by_the_same(token, command) and host.key_sha256 == command.key_sha256):
        raise Conflict(
            f"there is a host {command.peer_id} already; revoke it if it is gone, or join under another name",
            code="name_in_use",
            details={"peer_id": command.peer_id},
        )
    if host is None and len(registry.hosts) >= records.HOSTS_MAX:
        raise Overloaded(f"there are {records.HOSTS_MAX} hosts, which is the most")
    used = changed(token, used_at=now, used_by=command.peer_id, used_key_sha256=command.key_sha256)
    decision = _granted(now, command, cluster, serial, host, voter=token.voter)
    decision.changes.append(Save(used))
    return decision


def renew(registry: Registry, now: float, command: Renew, *, cluster: str, serial: str) -> Decision:
    """A new certificate for a peer that has shown a valid one. Reply: Grant.

    A host without a record is one that made the cluster, before there was a store to record it in.
    """
    _check_names(command.peer_id, command.csr, command.key_sha256, command.addresses)
    _check_not_revoked(registry, command.peer_id)
    host = registry.hosts.get(command.peer_id)
    voter = True if host is None else host.voter
    return _granted(now, command, cluster, serial, host, voter=voter)


def note(registry: Registry, host: Host) -> Decision:
    """Record a host that was there before it could be, as the one that made the cluster: its name is taken."""
    known = host.peer_id in registry.hosts or host.peer_id in registry.revocations
    return Decision() if known else Decision(changes=[Save(host)])


def revoke(registry: Registry, now: float, command: RevokeHost, *, leader: str) -> Decision:
    """Put a host out. Revoking twice is no error. Reply: Revocation, to be told to every peer at once."""
    before = registry.revocations.get(command.name)
    if before is not None:
        return Decision(reply=before)
    host = registry.hosts[named(registry.hosts, command.name)]
    if host.peer_id == leader:
        raise Conflict(
            f"{host.peer_id} leads now; let another peer lead before you revoke it",
            code="host_leads",
            details={"peer_id": host.peer_id},
        )
    # An earlier certificate of it expires before the newest one does, or at most a whole life from now.
    until = max(host.expires_at, now + records.CERTIFICATE_S) + records.CLOCK_SKEW_S
    revocation = Revocation(
        peer_id=host.peer_id,
        serials=tuple(serial for serial, _ in _unexpired(host, now)),
        revoked_at=now,
        revoked_by=command.revoked_by[:NAME_CHARS_MAX],
        until=until,
    )
    return Decision(changes=[Drop(host), Save(revocation)], reply=revocation)


def may_hold_authority(registry: Registry, query: GetAuthority) -> None:
    """Raises Unauthorized unless this host may vote, and so may have to sign certificates as a leader."""
    host = registry.hosts.get(query.peer_id)
    if host is None or not host.voter or query.peer_id in registry.revocations:
        raise Unauthorized(f"{query.peer_id} is no voter: it does not hold the CA's key", code="not_a_voter")


def hosts(snapshot: Snapshot) -> tuple[HostView, ...]:
    """Every host, by name, and those that are revoked."""
    registry = snapshot.registry
    found = [
        HostView(
            peer_id=host.peer_id,
            status="online" if _is_online(snapshot, host.peer_id) else "offline",
            host=host,
            draining=host.peer_id in snapshot.leaving,
            models=sum(len(snapshot.replicas.get(w, ())) for w in snapshot.peers.get(host.peer_id, ())),
            tasks=sum(len(snapshot.held.get(w, ())) for w in snapshot.peers.get(host.peer_id, ())),
        )
        for host in registry.hosts.values()
    ]
    found += [
        HostView(peer_id=revocation.peer_id, status="revoked", revocation=revocation)
        for revocation in registry.revocations.values()
    ]
    return tuple(sorted(found, key=lambda view: view.peer_id))


def _is_online(snapshot: Snapshot, peer_id: str) -> bool:
    """As far as the leader knows: it may be a few seconds behind."""
    if peer_id == snapshot.peer_id:
        return True
    if peer_id in snapshot.lost or peer_id in snapshot.unlinked:
        return False
    rumour = snapshot.rumours.get(peer_id)
    if rumour is not None and rumour.status == "alive":
        return True
    return any(worker_id in snapshot.listened for worker_id in snapshot.peers.get(peer_id, ()))


def tidy(registry: Registry, now: float) -> Decision:
    """Forget tokens long after their end, and revocations of hosts whose certificates have all expired."""
    decision = Decision()
    for token in registry.tokens.values():
        if now >= token.expires_at + records.TOKEN_KEPT_S:
            decision.changes.append(Drop(token))
    for revocation in registry.revocations.values():
        if now >= revocation.until:
            decision.changes.append(Drop(revocation))
    return decision


def _token(registry: Registry, now: float, command: Enrol) -> JoinToken:
    token = registry.tokens.get(command.token_id)
    stored = _NO_DIGEST if token is None else token.secret_sha256
    if not records.same(stored, command.secret_sha256) or token is None:
        raise Unauthorized(
            "this join token is not known here; was it copied whole, and is it of this cluster?",
            code="join_token_invalid",
        )
    if now >= token.expires_at:
        raise Unauthorized(
            f"this join token expired {now - token.expires_at:.0f} s ago; make another one",
            code="join_token_expired",
        )
    if now < token.created_at - records.CLOCK_SKEW_S:
        behind_s = token.created_at - now
        raise Unauthorized(
            f"the leader's clock is {behind_s:.0f} s behind that of the leader that made this join token: "
            "set the hosts' clocks right, or it would live too long",
            code="clock_skew",
        )
    return token


def _by_the_same(token: JoinToken, command: Enrol) -> bool:
    return (token.used_by, token.used_key_sha256) == (command.peer_id, command.key_sha256)


def _check_names(peer_id: str, csr: str, key_sha256: str, addresses: tuple[str, ...]) -> None:
    if not records.is_peer_id(peer_id):
        raise BadRequest(
            "a peer's name is 1 to 64 letters, digits, dots, dashes and underscores",
            details={"field": "peer_id"},
        )
    if not records.is_digest(key_sha256) or not 0 < len(csr) <= records.CSR_CHARS_MAX:
        raise BadRequest("the certificate request is not usable", details={"field": "csr"})
    if len(addresses) > records.ADDRESSES_MAX or not all(map(records.is_address, addresses)):
        raise BadRequest(
            f"a host has at most {records.ADDRESSES_MAX} addresses, each a name or an IP address without a port",
            details={"field": "addresses"},
        )


def _check_not_revoked(registry: Registry, peer_id: str) -> None:
    if peer_id in registry.revocations:
        raise Unauthorized(
            f"{peer_id} was revoked; a host comes back under a new name only", code="host_revoked"
        )


def _granted(
    now: float, command: Enrol | Renew, cluster: str, serial: str, host: Host | None, *, voter: bool
) -> Decision:
    earlier = () if host is None else _unexpired(host, now)
    if len(earlier) >= records.CERTIFICATES_MAX:
        raise RateLimited(
            f"{command.peer_id} has {len(earlier)} certificates that have not expired, which is the most",
            retry_after_s=min(expires_at for _, expires_at in earlier) - now,
        )
    grant = Grant(
        cluster=cluster,
        peer_id=command.peer_id,
        serial=serial,
        key_sha256=command.key_sha256,
        not_before=now - records.CLOCK_SKEW_S,
        not_after=now + records.CERTIFICATE_S,
        voter=voter,
        addresses=command.addresses,
    )
    saved = Host(
        peer_id=grant.peer_id,
        enrolled_at=now if host is None else host.enrolled_at,
        serial=serial,
        key_sha256=grant.key_sha256,
        expires_at=grant.not_after,
        earlier=earlier,
        voter=voter,
        addresses=grant.addresses,
    )
    return Decision(changes=[Save(saved)], reply=grant)


def _unexpired(host: Host, now: float) -> tuple[tuple[str, float], ...]:
    """(serial, expires_at) of its certificates that a clock somewhere may still take."""
    known = (*host.earlier, (host.serial, host.expires_at))
    return tuple(each for each in known if each[1] > now - records.CLOCK_SKEW_S)
