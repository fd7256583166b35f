"""Join tokens' texts and the names that hosts may have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.state import enrol
from peer.state.enrol import Host, JoinToken, Registry, Revocation
from peer.state.record import decode, encode, key_of

ID, SECRET, CA = "0123456789ab", "ab" * 16, "cd" * 32


def test_a_token_is_read_back() -> None:
    assert enrol.split_token(enrol.token_text(ID, SECRET, CA)) == (ID, SECRET, CA)


@given(st.text())
def test_nothing_else_is_a_token(text: str) -> None:
    assert enrol.split_token(text) is None


@pytest.mark.parametrize(
    "text", ["", "blj", f"blj_{ID}_{SECRET}_{CA}\n", f"blk_{ID}_{SECRET}_{CA}", "blj___"]
)
def test_what_looks_like_a_token_is_none(text: str) -> None:
    assert enrol.split_token(text) is None


def test_digests_are_compared_whole() -> None:
    assert enrol.same(enrol.digest("a"), enrol.digest("a"))
    assert not enrol.same(enrol.digest("a"), enrol.digest("b"))
    assert not enrol.same("ä", "a" * 64)


@pytest.mark.parametrize("text", ["h1-abc123", "A", "a" * 64, "h_1.x"])
def test_peers_names(text: str) -> None:
    assert enrol.is_peer_id(text)


@pytest.mark.parametrize("text", ["", "a" * 65, "-a", ".", "a b", "ä", "a\n", "a/b", "a\0"])
def test_what_is_no_peers_name(text: str) -> None:
    assert not enrol.is_peer_id(text)


@pytest.mark.parametrize("text", ["10.0.0.1", "::1", "fe80::1", "gpu-1", "gpu1.example.org", "a"])
def test_addresses(text: str) -> None:
    assert enrol.is_address(text)


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "1.2.3.4:80", "[::1]", "a:b", "*.example.org", "a b", "a\n", "a.", "x" * 254]
)
def test_what_is_no_address(text: str) -> None:
    assert not enrol.is_address(text)


def test_digests_and_ids_have_their_form() -> None:
    assert enrol.is_digest(CA)
    assert not enrol.is_digest(CA[:-1] + "G")
    assert not enrol.is_digest(CA[:-1])
    assert enrol.is_token_id(ID)
    assert not enrol.is_token_id(ID.upper())
    assert not enrol.is_token_id(ID[1:])


def test_the_registry_holds_every_record_by_its_id() -> None:
    registry = Registry()
    records: tuple[JoinToken | Host | Revocation, ...] = (
        JoinToken(token_id=ID, secret_sha256=CA, created_at=1.0, expires_at=2.0, created_by="me"),
        Host(peer_id="h1", enrolled_at=1.0, serial="ab", key_sha256=CA, expires_at=2.0),
        Revocation(peer_id="h2", serials=("ab",), revoked_at=1.0, revoked_by="me", until=2.0),
    )
    for record in records:
        assert decode(type(record), encode(record)) == record
        registry.save(record)
    assert [key_of(record) for record in records] == [f"join/{ID}", "host/h1", "revoked/h2"]
    assert (set(registry.tokens), set(registry.hosts), set(registry.revocations)) == ({ID}, {"h1"}, {"h2"})
    for record in records:
        registry.drop(record)
        registry.drop(record)
    assert registry == Registry()
