"""Who may join, who is renewed, who is put out."""

from __future__ import annotations

from typing import Any

import pytest

from peer.decide import enrol, lose
from peer.decide.decision import Decision
from peer.errors import (
    BadRequest,
    BitinglipError,
    Conflict,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
)
from peer.state import enrol as records
from peer.state.enrol import (
    CreateJoinToken,
    Enrol,
    GetAuthority,
    Grant,
    Host,
    JoinToken,
    Registry,
    Renew,
    Revocation,
    RevokeHost,
)
from peer.state.snapshot import Drop, Linked, Rumoured, Save
from tests.decide.build import World, replica

T0 = 1_700_000_000.0
ID, SECRET, SERIAL = "0123456789ab", "ab" * 16, "5eed"
KEY, OTHER_KEY = "11" * 32, "22" * 32


def take(registry: Registry, decision: Decision) -> Any:
    """Carry a decision out; its reply."""
    for change in decision.changes:
        match change:
            case Save(record=JoinToken() | Host() | Revocation() as record):
                registry.save(record)
            case Drop(record=JoinToken() | Host() | Revocation() as record):
                registry.drop(record)
            case _:
                raise AssertionError(change)
    return decision.reply


def with_token(**fields: Any) -> Registry:
    registry = Registry()
    command = CreateJoinToken(**{"token_id": ID, "secret_sha256": records.digest(SECRET), **fields})
    take(registry, enrol.create_token(registry, T0, command))
    return registry


def ask(**fields: Any) -> Enrol:
    known = {
        "token_id": ID,
        "secret_sha256": records.digest(SECRET),
        "peer_id": "h2-abc",
        "csr": "PEM",
        "key_sha256": KEY,
    }
    return Enrol(**{**known, **fields})


def let_in(registry: Registry, now: float = T0 + 60, **fields: Any) -> Grant:
    grant = take(registry, enrol.enrol(registry, now, ask(**fields), cluster="c1", serial=SERIAL))
    assert isinstance(grant, Grant)
    return grant


def refused(
    kind: type[BitinglipError], code: str, registry: Registry, now: float = T0 + 60, **fields: Any
) -> str:
    with pytest.raises(kind) as caught:
        let_in(registry, now, **fields)
    assert caught.value.code == code
    return caught.value.message


# ---------------------------------------------------------------- tokens


def test_a_token_is_recorded_with_its_end() -> None:
    registry = with_token(ttl_s=120.0, voter=False, created_by="me")
    assert registry.tokens[ID] == JoinToken(
        token_id=ID,
        secret_sha256=records.digest(SECRET),
        created_at=T0,
        expires_at=T0 + 120,
        created_by="me",
        voter=False,
    )


@pytest.mark.parametrize(
    "fields",
    [{"token_id": "x"}, {"secret_sha256": "x"}, {"ttl_s": 1.0}, {"ttl_s": 1e9}, {"ttl_s": float("nan")}],
)
def test_a_token_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        with_token(**fields)


def test_a_tokens_id_is_its_own() -> None:
    registry = with_token()
    command = CreateJoinToken(token_id=ID, secret_sha256=records.digest("x"))
    with pytest.raises(Conflict):
        enrol.create_token(registry, T0, command)


def test_open_tokens_are_bounded_and_others_do_not_count() -> None:
    registry = Registry()
    for number in range(records.TOKENS_MAX):
        command = CreateJoinToken(token_id=f"{number:012x}", secret_sha256=records.digest(str(number)))
        take(registry, enrol.create_token(registry, T0, command))
    more = CreateJoinToken(token_id=ID, secret_sha256=records.digest(SECRET))
    with pytest.raises(Overloaded):
        enrol.create_token(registry, T0, more)
    let_in(registry, token_id=f"{7:012x}", secret_sha256=records.digest("7"))
    enrol.create_token(registry, T0, more)
    enrol.create_token(registry, T0 + records.TOKEN_S_DEFAULT, more)


# ---------------------------------------------------------------- joining


def test_a_host_is_let_in() -> None:
    registry = with_token(voter=False)
    grant = let_in(registry, addresses=("10.0.0.2",))
    now = T0 + 60
    assert grant == Grant(
        cluster="c1",
        peer_id="h2-abc",
        serial=SERIAL,
        key_sha256=KEY,
        not_before=now - records.CLOCK_SKEW_S,
        not_after=now + records.CERTIFICATE_S,
        voter=False,
        addresses=("10.0.0.2",),
    )
    host = registry.hosts["h2-abc"]
    assert (host.enrolled_at, host.serial, host.voter, host.expires_at) == (
        now,
        SERIAL,
        False,
        grant.not_after,
    )
    token = registry.tokens[ID]
    assert (token.used_at, token.used_by, token.used_key_sha256) == (now, "h2-abc", KEY)


def test_a_token_lets_one_host_in() -> None:
    registry = with_token()
    let_in(registry)
    refused(Unauthorized, "join_token_used", registry, peer_id="h3-abc")
    refused(Unauthorized, "join_token_used", registry, key_sha256=OTHER_KEY)
    refused(Unauthorized, "join_token_used", registry, peer_id="h3-abc", key_sha256=OTHER_KEY)


def test_whose_answer_was_lost_may_ask_again() -> None:
    registry = with_token()
    let_in(registry)
    assert let_in(registry, T0 + 90).not_after == T0 + 90 + records.CERTIFICATE_S
    assert registry.hosts["h2-abc"].enrolled_at == T0 + 60
    refused(Unauthorized, "join_token_expired", registry, T0 + records.TOKEN_S_DEFAULT)


def test_but_not_after_its_key_was_renewed() -> None:
    registry = with_token()
    let_in(registry)
    renewal = Renew(peer_id="h2-abc", csr="PEM", key_sha256=OTHER_KEY)
    take(registry, enrol.renew(registry, T0 + 80, renewal, cluster="c1", serial="aa"))
    refused(Conflict, "name_in_use", registry, T0 + 90)


def test_an_unknown_token_and_a_wrong_secret_are_told_alike() -> None:
    registry = with_token()
    wrong = refused(Unauthorized, "join_token_invalid", registry, secret_sha256=records.digest("x"))
    assert refused(Unauthorized, "join_token_invalid", registry, token_id="f" * 12) == wrong
    assert refused(Unauthorized, "join_token_invalid", Registry(), secret_sha256="0" * 64) == wrong


def test_a_token_ends_when_it_says() -> None:
    registry = with_token(ttl_s=60.0)
    assert "expired 5 s ago" in refused(Unauthorized, "join_token_expired", registry, T0 + 65)
    refused(Unauthorized, "join_token_expired", registry, T0 + 60)
    let_in(registry, T0 + 59.9)


def test_a_leader_whose_clock_is_behind_takes_no_tokens() -> None:
    registry = with_token()
    assert "400 s behind" in refused(Unauthorized, "clock_skew", registry, T0 - 400)
    let_in(registry, T0 - 200)


@pytest.mark.parametrize(
    "fields",
    [
        {"peer_id": "a b"},
        {"csr": ""},
        {"csr": "x" * (records.CSR_CHARS_MAX + 1)},
        {"key_sha256": "x"},
        {"addresses": ("a",) * (records.ADDRESSES_MAX + 1)},
        {"addresses": ("1.2.3.4:80",)},
    ],
)
def test_what_cannot_be_signed_is_refused(fields: dict[str, Any]) -> None:
    refused(BadRequest, "invalid_request", with_token(), **fields)


def test_a_name_is_one_hosts() -> None:
    registry = with_token()
    take(registry, enrol.note(registry, Host(
        peer_id="h2-abc", enrolled_at=T0, serial="aa", key_sha256=OTHER_KEY, expires_at=T0 + 1
    )))  # fmt: skip
    refused(Conflict, "name_in_use", registry)
    assert registry.tokens[ID].used_at is None


def test_hosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "HOSTS_MAX", 0)
    refused(Overloaded, "overloaded", with_token())


# ---------------------------------------------------------------- renewing


def test_a_certificate_is_renewed() -> None:
    registry = with_token(voter=False)
    let_in(registry)
    later = T0 + 20 * 86_400
    command = Renew(peer_id="h2-abc", csr="PEM", key_sha256=OTHER_KEY)
    grant = take(registry, enrol.renew(registry, later, command, cluster="c1", serial="aa"))
    assert (grant.serial, grant.key_sha256, grant.voter) == ("aa", OTHER_KEY, False)
    assert grant.not_after == later + records.CERTIFICATE_S
    assert registry.hosts["h2-abc"].enrolled_at == T0 + 60


def test_every_certificate_that_may_hold_is_known_and_revoked() -> None:
    registry = with_token()
    let_in(registry)
    command = Renew(peer_id="h2-abc", csr="PEM", key_sha256=OTHER_KEY)
    for day, serial in ((20, "aa"), (40, "bb"), (41, "cc")):
        now = T0 + day * 86_400
        take(registry, enrol.renew(registry, now, command, cluster="c1", serial=serial))
    assert [serial for serial, _ in registry.hosts["h2-abc"].earlier] == ["aa", "bb"]
    revocation = take(registry, enrol.revoke(registry, now, RevokeHost(name="h2"), leader=""))
    assert revocation.serials == ("aa", "bb", "cc")


def test_a_host_has_so_many_certificates_at_most() -> None:
    registry = with_token()
    let_in(registry)
    command = Renew(peer_id="h2-abc", csr="PEM", key_sha256=OTHER_KEY)
    for number in range(records.CERTIFICATES_MAX - 1):
        take(registry, enrol.renew(registry, T0 + 60, command, cluster="c1", serial=f"{number:x}"))
    with pytest.raises(RateLimited) as caught:
        enrol.renew(registry, T0 + 60, command, cluster="c1", serial="ff")
    assert caught.value.retry_after_s == records.CERTIFICATE_S


def test_the_first_host_is_renewed_though_it_has_no_record() -> None:
    registry = Registry()
    command = Renew(peer_id="h1-abc", csr="PEM", key_sha256=KEY)
    assert take(registry, enrol.renew(registry, T0, command, cluster="c1", serial="aa")).voter
    assert registry.hosts["h1-abc"].voter


def test_what_is_known_is_not_noted_again() -> None:
    registry = with_token()
    let_in(registry)
    known = registry.hosts["h2-abc"]
    stale = Host(peer_id="h2-abc", enrolled_at=T0, serial="0", key_sha256=KEY, expires_at=T0)
    assert enrol.note(registry, stale).changes == []
    take(registry, enrol.revoke(registry, T0, RevokeHost(name="h2-abc"), leader=""))
    assert enrol.note(registry, known).changes == []


# ---------------------------------------------------------------- revoking


def test_a_revoked_host_is_out() -> None:
    registry = with_token()
    let_in(registry)
    now = T0 + 86_400
    command = RevokeHost(name="h2-abc", revoked_by="me")
    revocation = take(registry, enrol.revoke(registry, now, command, leader="h1-abc"))
    until = now + records.CERTIFICATE_S + records.CLOCK_SKEW_S
    assert revocation == Revocation(
        peer_id="h2-abc", serials=(SERIAL,), revoked_at=now, revoked_by="me", until=until
    )
    assert registry.hosts == {}
    renewal = Renew(peer_id="h2-abc", csr="PEM", key_sha256=KEY)
    with pytest.raises(Unauthorized, match="revoked"):
        enrol.renew(registry, now, renewal, cluster="c1", serial="aa")
    refused(Unauthorized, "host_revoked", registry)
    again = enrol.revoke(registry, now + 5, command, leader="h1-abc")
    assert (again.reply, again.changes) == (revocation, [])


def test_a_host_is_named_by_its_hosts_name_where_that_is_unique() -> None:
    registry = with_token()
    let_in(registry)
    grant = RevokeHost(name="h2")
    assert enrol.revoke(registry, T0, grant, leader="").reply.peer_id == "h2-abc"
    registry.save(Host(peer_id="h2-def", enrolled_at=T0, serial="0", key_sha256=KEY, expires_at=T0))
    with pytest.raises(Conflict) as caught:
        enrol.revoke(registry, T0, grant, leader="")
    assert caught.value.details == {"peer_ids": ["h2-abc", "h2-def"]}
    with pytest.raises(NotFound):
        enrol.revoke(registry, T0, RevokeHost(name="h9"), leader="")


def test_the_leader_is_not_revoked() -> None:
    registry = with_token()
    let_in(registry)
    with pytest.raises(Conflict) as caught:
        enrol.revoke(registry, T0, RevokeHost(name="h2"), leader="h2-abc")
    assert caught.value.code == "host_leads"


# ---------------------------------------------------------------- who is there


def test_hosts_are_online_by_what_is_heard_of_them() -> None:
    world = World()  # p1 leads
    world.worker("w2", replica("echo"), peer_id="p2")
    for peer_id in ("p1", "p2", "p3", "p4"):
        host = Host(peer_id=peer_id, enrolled_at=T0, serial="1", key_sha256=KEY, expires_at=T0)
        world.take(Decision(changes=[Save(host)]))
    gone = Revocation(peer_id="a9", serials=(), revoked_at=T0, revoked_by="", until=T0)
    world.take(Decision(changes=[Save(gone), Rumoured("p3", "alive", T0), Rumoured("p4", "failed", T0)]))

    def status() -> list[tuple[str, str]]:
        return [(view.peer_id, view.status) for view in enrol.hosts(world.s)]

    before = [("a9", "revoked"), ("p1", "online"), ("p2", "online"), ("p3", "online"), ("p4", "offline")]
    assert status() == before
    assert (enrol.hosts(world.s)[0].revocation, enrol.hosts(world.s)[1].revocation) == (gone, None)
    world.take(Decision(changes=[Linked("p3", False, T0)]))
    world.take(lose.revoked(world.s, T0, "p2"))
    assert status() == [*before[:2], ("p2", "offline"), ("p3", "offline"), before[4]]
    world.take(Decision(changes=[Drop(gone)]))
    assert status()[0] == before[1]


# ---------------------------------------------------------------- the CA's key, and forgetting


def test_only_voters_hold_the_cas_key() -> None:
    registry = with_token()
    let_in(registry)
    enrol.may_hold_authority(registry, GetAuthority(peer_id="h2-abc"))
    with pytest.raises(Unauthorized):
        enrol.may_hold_authority(registry, GetAuthority(peer_id="h9"))
    take(registry, enrol.revoke(registry, T0, RevokeHost(name="h2"), leader=""))
    with pytest.raises(Unauthorized):
        enrol.may_hold_authority(registry, GetAuthority(peer_id="h2-abc"))
    registry = with_token(voter=False)
    let_in(registry)
    with pytest.raises(Unauthorized):
        enrol.may_hold_authority(registry, GetAuthority(peer_id="h2-abc"))


def test_what_is_long_over_is_forgotten() -> None:
    registry = with_token()
    let_in(registry)
    revocation = take(registry, enrol.revoke(registry, T0 + 90, RevokeHost(name="h2"), leader=""))
    gone = registry.tokens[ID].expires_at + records.TOKEN_KEPT_S
    assert enrol.tidy(registry, gone - 1).changes == []
    take(registry, enrol.tidy(registry, gone))
    assert registry.tokens == {}
    assert list(registry.revocations) == ["h2-abc"]
    take(registry, enrol.tidy(registry, revocation.until))
    assert registry == Registry()
