"""A new key for gossip: what is next, whom it must not reach, and that all can read all throughout."""

from __future__ import annotations

import random

import pytest

from peer.decide.gossip_key import KEYS_MAX, check, next_step, require_done, require_room
from peer.errors import Conflict, Unavailable
from peer.state.enrol import Host, HostView, Revocation
from peer.state.member import KeyReport, KeyStep, Member


def listed(nodes: int = 3, **keys: int) -> KeyReport:
    return KeyReport(nodes=nodes, answered=nodes, failed=0, keys=keys)


def member(name: str, status: str = "alive") -> Member:
    return Member(peer_id=name, address="192.0.2.1", status=status)  # type: ignore[arg-type]


def host(name: str) -> HostView:
    record = Host(
        peer_id=name,
        enrolled_at=0.0,
        serial="5e",
        key_sha256="0" * 64,
        expires_at=1.0,
        voter=True,
        addresses=(),
    )
    return HostView(peer_id=name, status="online", host=record)


def revoked(name: str) -> HostView:
    revocation = Revocation(peer_id=name, serials=("5e",), revoked_at=0.0, revoked_by="admin", until=1.0)
    return HostView(peer_id=name, status="revoked", revocation=revocation)


def test_install_everywhere_use_everywhere_remove_the_others() -> None:
    before = ("old", "older")
    assert next_step(listed(old=3), "new", before, used=False) == KeyStep("install", "new")
    assert next_step(listed(old=3, new=2), "new", before, used=False) == KeyStep("install", "new")
    assert next_step(listed(old=3, new=3), "new", before, used=False) == KeyStep("use", "new")
    assert next_step(listed(old=3, older=1, new=3), "new", before, used=True) == KeyStep("remove", "old")
    assert next_step(listed(older=1, new=3), "new", before, used=True) == KeyStep("remove", "older")
    assert next_step(listed(new=3), "new", before, used=True) is None


def test_a_member_that_came_meanwhile_gets_the_key_before_more_is_done() -> None:
    assert next_step(listed(4, old=4, new=3), "new", ("old",), used=True) == KeyStep("install", "new")


def test_another_rotation_is_noticed() -> None:
    with pytest.raises(Conflict, match="another rotation is under way"):
        next_step(listed(old=3, new=3, theirs=1), "new", ("old",), used=True)


class Members:
    """Keyrings, the key in use first, as Serf keeps them. A step reaches some of them, in any order."""

    def __init__(self, count: int) -> None:
        self.rings = [["k0"] for _ in range(count)]

    def report(self) -> KeyReport:
        names = {key for ring in self.rings for key in ring}
        return listed(len(self.rings), **{name: sum(name in ring for ring in self.rings) for name in names})

    def take(self, step: KeyStep, reached: list[int]) -> None:
        for number in reached:
            ring = self.rings[number]
            match step.action:
                case "install" if step.key not in ring:
                    ring.append(step.key)
                case "use":
                    ring.sort(key=lambda key: key != step.key)
                case "remove" if step.key in ring:
                    assert ring[0] != step.key, "Serf refuses that"
                    ring.remove(step.key)

    def check(self) -> None:
        for sender in self.rings:
            assert all(sender[0] in reader for reader in self.rings), self.rings


@pytest.mark.parametrize("seed", range(200))
def test_interrupted_anywhere_all_read_all_and_the_next_rotation_ends_with_one_key(seed: int) -> None:
    rng = random.Random(seed)
    members = Members(rng.randint(1, 5))
    everybody = list(range(len(members.rings)))
    for rotation in range(1, 6):
        last = rotation == 5
        new, used, before = f"k{rotation}", False, tuple(members.report().keys)
        while (step := next_step(members.report(), new, before, used=used)) is not None:
            stops = not last and rng.random() < 0.3
            members.take(step, rng.sample(everybody, rng.randint(0, len(everybody))) if stops else everybody)
            members.check()
            if stops:
                break
            used = used or step.action == "use"
    assert members.rings == [["k5"]] * len(members.rings)


def test_who_is_away_would_not_find_back() -> None:
    hosts = [host("h1"), host("h2"), host("h3"), revoked("h4")]
    everybody = [member("h1"), member("h2"), member("h3"), member("h4", "failed")]
    check(hosts, everybody, force=False)
    with pytest.raises(Conflict, match="not in gossip now: h2, h3, which") as error:
        check(hosts, [member("h1"), member("h3", "left")], force=False)
    assert error.value.details == {"away": ["h2", "h3"], "strangers": []}
    check(hosts, [member("h1")], force=True)


def test_a_stranger_in_gossip_would_hear_the_new_key() -> None:
    with pytest.raises(Conflict, match="no host of the cluster: h9") as error:
        check([host("h1")], [member("h1"), member("h9")], force=False)
    assert error.value.code == "gossip_not_whole"
    check([host("h1")], [member("h1"), member("h9")], force=True)


def test_a_revoked_host_must_be_out_of_gossip_first() -> None:
    with pytest.raises(Conflict, match=r"revoked and still in gossip.*h4") as error:
        check([host("h1"), revoked("h4")], [member("h1"), member("h4")], force=True)
    assert error.value.code == "revoked_host_in_gossip"


def test_keys_do_not_pile_up() -> None:
    require_room(listed(**{f"k{n}": 3 for n in range(KEYS_MAX - 1)}))
    with pytest.raises(Conflict, match="rotations were interrupted"):
        require_room(listed(**{f"k{n}": 3 for n in range(KEYS_MAX)}))


def test_what_failed_is_named_with_the_state_of_things() -> None:
    require_done(listed(old=3), "install", [])
    refused = KeyReport(nodes=3, answered=3, failed=1, messages={"h2": "no such key"})
    with pytest.raises(Unavailable, match=r"h2: no such key\. Every member reads both keys") as error:
        require_done(refused, "use", [member("h2"), member("h3")])
    assert error.value.details == {"step": "use", "refused": {"h2": "no such key"}, "failed": []}
    silent = KeyReport(nodes=3, answered=2, failed=0)
    with pytest.raises(
        Unavailable, match=r"2 of 3 members have answered; failed by gossip: h3\. The old key"
    ):
        require_done(silent, "install", [member("h2"), member("h3", "failed")])
    with pytest.raises(Unavailable, match=r"some error\. Every member uses the new key"):
        require_done(KeyReport(nodes=3, answered=3, failed=0, error="some error"), "remove", [])
    with pytest.raises(Unavailable, match="Nothing was changed") as error:
        require_done(KeyReport(nodes=0, answered=0, failed=0), "", [])
    assert error.value.details["step"] == "list"
