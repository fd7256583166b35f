"""The leader lets hosts in: what it grants is durable before it is signed, and what its files lack costs no more."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from peer.errors import (
    Ambiguous,
    BadRequest,
    BitinglipError,
    ConfigError,
    Conflict,
    Unauthorized,
    Unavailable,
)
from peer.registrar import TIDY_S
from peer.state import enrol as records
from peer.state.enrol import (
    CERTIFICATE_S,
    TOKEN_KEPT_S,
    TOKEN_S_DEFAULT,
    CreateJoinToken,
    Enrol,
    Enrolled,
    GetAuthority,
    ListHosts,
    NewJoinToken,
    Renew,
    Revocation,
    RevokeHost,
)
from peer.state.task import Status
from tests.decide.build import replica
from tests.leader.authority import FakeAuthority
from tests.leader.memory_store import MemoryStore
from tests.leader.rig import Rig, leading

ID, SECRET, KEY = "0123456789ab", "ab" * 16, "11" * 32
TOKEN = CreateJoinToken(token_id=ID, secret_sha256=records.digest(SECRET), created_by="me")
JOIN = Enrol(token_id=ID, secret_sha256=records.digest(SECRET), peer_id="h2-abc", csr="CSR", key_sha256=KEY)
RENEW = Renew(peer_id="h2-abc", csr="CSR", key_sha256=KEY)


async def names(rig: Rig) -> dict[str, str]:
    """Status by host."""
    return {view.peer_id: view.status for view in await rig.leader.call(ListHosts())}


async def until_tidy() -> None:
    await trio.sleep(TIDY_S + 1.0)


async def test_a_host_joins_renews_and_is_listed(autojump_clock: Any) -> None:
    authority = FakeAuthority()
    async with leading(worker=False, authority=authority) as rig:
        made = await rig.leader.call(TOKEN)
        assert isinstance(made, NewJoinToken)
        assert made.token == rig.snapshot.registry.tokens[ID]
        assert (made.token.created_by, made.ca_sha256) == ("me", "ca" * 32)
        enrolled = await rig.leader.call(JOIN)
        assert isinstance(enrolled, Enrolled)
        (csr, grant), serial = authority.signed[0], rig.snapshot.registry.hosts["h2-abc"].serial
        assert (csr, grant.cluster, grant.serial) == ("CSR", "c1", serial)
        assert serial[0] != "0"  # as certificates are known by it
        assert (enrolled.certificate, enrolled.seeds) == (f"h2-abc {serial}", ("10.0.0.1:7946",))
        renewed = await rig.leader.call(RENEW)
        assert renewed.certificate != enrolled.certificate
        assert (await rig.leader.call(GetAuthority(peer_id="h2-abc"))).pem == "KEY"
        with pytest.raises(Unauthorized):
            await rig.leader.call(GetAuthority(peer_id="h9"))
        assert await names(rig) == {"h2-abc": "offline", "p1": "online"}


async def test_nothing_is_signed_before_it_is_durable(autojump_clock: Any) -> None:
    authority = FakeAuthority()
    async with leading(worker=False, authority=authority) as rig:
        await rig.leader.call(TOKEN)
        rig.store.delay_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.leader.call, JOIN)
            await trio.sleep(0.9)
            assert (JOIN.peer_id in rig.snapshot.registry.hosts, authority.signed) == (True, [])
        assert len(authority.signed) == 1


async def test_a_grant_that_is_not_known_to_be_durable_is_not_signed(autojump_clock: Any) -> None:
    authority, store = FakeAuthority(), MemoryStore()

    async def fail() -> None:
        async with leading(store, worker=False, authority=authority) as rig:
            await rig.leader.call(TOKEN)
            store.fail = Ambiguous("no answer")
            with pytest.raises(Unavailable):
                await rig.leader.call(JOIN)
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup):
        await fail()
    assert authority.signed == []
    store.fail = None
    async with leading(store, worker=False, authority=authority) as rig:
        assert (await rig.leader.call(JOIN)).peer_id == "h2-abc"


async def test_the_next_leader_knows_tokens_hosts_and_revocations(autojump_clock: Any) -> None:
    store = MemoryStore()
    async with leading(store, worker=False, authority=FakeAuthority()) as rig:
        await rig.leader.call(TOKEN)
        await rig.leader.call(JOIN)
        revoked = await rig.leader.call(RevokeHost(name="h2"))
        registry = rig.snapshot.registry
    async with leading(store, worker=False, authority=FakeAuthority()) as rig:
        assert rig.snapshot.registry == registry
        assert rig.leader.revoked() == (revoked,)
        assert await names(rig) == {"h2-abc": "revoked", "p1": "online"}
        with pytest.raises(Unauthorized) as caught:
            await rig.leader.call(RENEW)
        assert caught.value.code == "host_revoked"


@pytest.mark.parametrize("request_", [TOKEN, JOIN, RENEW, RevokeHost(name="h2"), GetAuthority(peer_id="p1")])
async def test_who_is_in_no_cluster_says_so(request_: Any, autojump_clock: Any) -> None:
    async with leading(worker=False) as rig:
        with pytest.raises(Conflict, match="in no cluster") as caught:
            await rig.leader.call(request_)
        assert caught.value.code == "no_cluster"
        assert await rig.leader.call(ListHosts()) == ()


async def test_without_the_cas_key_nothing_is_used_up(autojump_clock: Any) -> None:
    authority = FakeAuthority(has_key=False)
    async with leading(worker=False, authority=authority) as rig:
        await rig.leader.call(TOKEN)
        for request in (JOIN, RENEW, GetAuthority(peer_id="p1")):
            with pytest.raises(Unavailable, match="CA's key") as caught:
                await rig.leader.call(request)
            assert caught.value.retry_after_s
        assert rig.snapshot.registry.tokens[ID].used_at is None
        authority.has_key = True
        assert (await rig.leader.call(JOIN)).peer_id == "h2-abc"


@pytest.mark.parametrize("broken", [ConfigError("damaged"), OSError(5, "no disk")])
async def test_files_that_cannot_be_read_cost_their_requests_only(
    broken: Exception, autojump_clock: Any
) -> None:
    authority = FakeAuthority()
    authority.broken = broken
    async with leading(worker=False, authority=authority) as rig:
        for request in (TOKEN, JOIN, RENEW, GetAuthority(peer_id="p1")):
            with pytest.raises(BitinglipError) as caught:
                await rig.leader.call(request)
            assert isinstance(caught.value, Unavailable | Unauthorized)
        assert "p1" not in rig.snapshot.registry.hosts
        authority.broken = None
        await until_tidy()
        assert await names(rig) == {"p1": "online"}


@pytest.mark.parametrize(
    ("broken", "kind", "code"),
    [
        (BadRequest("another key"), BadRequest, "invalid_request"),
        (ValueError("a bug"), BitinglipError, "internal_error"),
    ],
)
async def test_a_signature_that_fails_is_answered(
    broken: Exception, kind: type[BitinglipError], code: str, autojump_clock: Any
) -> None:
    authority = FakeAuthority()
    async with leading(worker=False, authority=authority) as rig:
        rig.store.delay_s = 1.0
        await rig.leader.call(TOKEN)
        errors: list[BitinglipError] = []

        async def join() -> None:
            with pytest.raises(kind) as caught:
                await rig.leader.call(JOIN)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            await trio.sleep(0.5)
            authority.broken = broken  # after it was decided
        assert [error.code for error in errors] == [code]
        authority.broken = None
        assert (await rig.leader.call(JOIN)).peer_id == "h2-abc"  # the token is not lost by it


async def test_who_is_revoked_is_told_at_once_and_forgotten_at_the_end(autojump_clock: Any) -> None:
    async with leading(worker=False, authority=FakeAuthority()) as rig:
        told: list[tuple[Revocation, ...]] = []
        rig.leader.on_shared = lambda: told.append(rig.leader.revoked())
        await rig.leader.call(TOKEN)
        await rig.leader.call(JOIN)
        assert told == []
        revocation = await rig.leader.call(RevokeHost(name="h2-abc", revoked_by="me"))
        assert told == [(revocation,)]
        assert await rig.leader.call(RevokeHost(name="h2-abc")) == revocation
        with pytest.raises(Conflict, match="leads now"):
            await rig.leader.call(RevokeHost(name="p1"))
        assert len(told) == 1
        rig.clock._began -= TOKEN_S_DEFAULT + TOKEN_KEPT_S
        await until_tidy()
        assert rig.snapshot.registry.tokens == {}
        rig.clock._began -= CERTIFICATE_S
        await until_tidy()
        assert told == [(revocation,), ()]
        assert await names(rig) == {"p1": "online"}


async def test_the_tasks_of_a_revoked_host_are_queued_again_at_once(autojump_clock: Any) -> None:
    async with leading(authority=FakeAuthority()) as rig:
        await rig.leader.call(TOKEN)
        await rig.leader.call(JOIN)
        await rig.hear(replica("small", worker="w2"), worker="w2", peer_id="h2-abc")
        task = await rig.running(model_name="small")
        assert task.worker_id == "w2"
        assert (await names(rig))["h2-abc"] == "online"
        rig.leader.linked("h2-abc", up=False)
        await trio.sleep(0.001)
        assert (await names(rig))["h2-abc"] == "offline"
        rig.leader.linked("h2-abc", up=True)
        await rig.leader.call(RevokeHost(name="h2-abc"))
        await trio.sleep(1.0)
        queued = rig.snapshot.tasks[task.task_id]
        assert (queued.status, queued.attempt) == (Status.QUEUED, 1)
        assert "it was revoked" in queued.requeued_because
