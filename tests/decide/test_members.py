"""Gossip tags: what fits, and what others make of them."""

from __future__ import annotations

import pytest

from peer.decide.members import Hint, changes, leader, tags, worth_telling
from peer.limits import TAGS_BYTES_MAX
from peer.state.member import Load, Member, load_of


def member(peer_id: str, status: str = "alive", **shown: str) -> Member:
    return Member(peer_id=peer_id, address="192.0.2.1", status=status, tags=shown)  # type: ignore[arg-type]


def some_tags(link: str = "192.0.2.1:8302", load: str = "") -> dict[str, str]:
    return tags(
        role="leader",
        epoch=12,
        api="192.0.2.1:8000",
        link=link,
        voter=True,
        wire=1,
        version="0.1.0",
        load=load,
    )


def test_tags_say_what_others_need() -> None:
    said = some_tags(load="3/16")
    assert said["role"] == "leader"
    assert (said["epoch"], said["voter"], said["load"]) == ("12", "1", "3/16")


def test_what_is_optional_goes_first_when_room_is_short() -> None:
    assert "load" not in some_tags(load="x" * TAGS_BYTES_MAX)
    assert "version" in some_tags(load="x" * TAGS_BYTES_MAX)
    without = some_tags()
    del without["version"], without["load"]
    used = sum(len(name) + len(value) + 4 for name, value in without.items())
    long_link = without["link"] + "x" * (TAGS_BYTES_MAX - used)
    assert {"load", "version"}.isdisjoint(some_tags(link=long_link, load="y"))


def test_addresses_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        some_tags(link="x" * TAGS_BYTES_MAX)


def test_the_highest_epoch_leads_and_nonsense_is_passed_over() -> None:
    known = [
        member("h1", role="leader", epoch="9"),
        member("h2", role="leader", epoch="11"),
        member("h3", status="failed", role="leader", epoch="12"),
        member("h4", role="follower", epoch="13"),
        member("h5", role="leader", epoch="many"),
        member("h6", role="leader", epoch="9" * 30),
        member("h7", role="leader", epoch="²"),
        member("h8", role="leader"),
    ]
    assert leader(known) == Hint("h2", 11)
    assert leader([]) is None


def test_changes_are_of_status_and_name_who_vanished() -> None:
    before = {each.peer_id: each for each in (member("h1"), member("h2"), member("h3"), member("h5", "left"))}
    after = {each.peer_id: each for each in (member("h1", load="9"), member("h2", "failed"), member("h4"))}
    told = changes(before, after)
    assert [(each.peer_id, each.status) for each in told] == [
        ("h2", "failed"),
        ("h3", "left"),
        ("h4", "alive"),
    ]


def load(running: int = 5, *, slots: int = 16, up: int = 2, queued: int = 0) -> Load:
    return Load(workers=2, up=up, slots=slots, running=running, queued=queued)


def test_a_load_is_read_as_it_was_written_and_nonsense_is_none() -> None:
    busy = load(7, queued=3)
    assert busy.text() == "2/2 7/16 3"
    assert load_of({"load": busy.text()}) == busy
    assert load_of(some_tags(load=busy.text())) == busy
    for nonsense in ("", "2/2", "-1/2 7/16 3", "2/2 7/16 3 4", "9999999/2 7/16 3", "\u0662/2 7/16 3"):
        assert load_of({"load": nonsense}) is None
    assert load_of({}) is None


@pytest.mark.parametrize(
    ("told", "now", "wanted"),
    [
        (None, load(), True),
        (load(5), load(5), False),
        (load(5), load(8), False),
        (load(5), load(9), True),  # a quarter of the slots
        (load(1), load(0), True),  # idle
        (load(0), load(1), True),
        (load(15), load(16), True),  # full
        (load(0, slots=0), load(0, slots=0), False),
        (load(up=2), load(up=1), True),
        (load(slots=16), load(slots=8), True),
        (load(queued=100), load(queued=120), False),
        (load(queued=100), load(queued=201), True),
        (load(queued=1), load(queued=0), True),
    ],
)
def test_a_load_is_told_again_when_it_has_changed_much(told: Load | None, now: Load, wanted: bool) -> None:
    assert worth_telling(told, now) is wanted
