"""Who may take the leader key, and when a leader must let go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peer.decide.elect import (
    Campaign,
    Depose,
    Guard,
    Seen,
    Wait,
    candidate,
    heirs,
    holder_of,
    key_value,
    must_step_down,
    vouched,
)
from peer.limits import (
    ASIDE_S,
    BEAT_S,
    GUARD_S,
    HOLD_S_MAX,
    LEASE_SURE_S,
    LEASE_TTL_S,
    READ_FRESH_S,
    STEP_DOWN_S,
)
from peer.state.member import Member
from peer.state.voter import LinkedPeer, VoterView


def seen(epoch: int = 7, holder: str = "h2", beat: int = 40, ended: float = 100.0) -> Seen:
    return Seen(epoch=epoch, holder=holder, address="", beat_revision=beat, ended=ended)


def test_the_key_says_who_leads_and_where() -> None:
    assert holder_of(key_value("h1", "192.0.2.1:8302", "abc")) == ("h1", "192.0.2.1:8302")
    assert holder_of(b"h1") == ("h1", "")
    assert key_value("h1", "a", "1") != key_value("h1", "a", "2")


def test_the_bounds_leave_room_for_clocks_that_differ() -> None:
    assert 2 * BEAT_S <= READ_FRESH_S < GUARD_S < STEP_DOWN_S < LEASE_TTL_S
    assert STEP_DOWN_S < LEASE_SURE_S < LEASE_TTL_S


def test_a_free_key_is_campaigned_for() -> None:
    guard, action = candidate("h1", seen(epoch=0, holder=""), Guard(6, 1, 0.0), "gone", 100.0)
    assert guard is None
    assert isinstance(action, Campaign)


def test_an_earlier_life_is_deposed_at_once() -> None:
    guard, action = candidate("h2", seen(), None, "", 100.0)
    assert guard is None
    assert isinstance(action, Depose)
    assert (action.epoch, action.beat_revision) == (7, None)


def test_a_leader_that_nobody_misses_is_left_alone() -> None:
    guard, action = candidate("h1", seen(), Guard(7, 40, 0.0), "", 100.0)
    assert guard is None
    assert isinstance(action, Wait)


def test_evidence_begins_the_guard() -> None:
    guard, action = candidate("h1", seen(ended=100.0), None, "its link broke", 100.2)
    assert guard == Guard(7, 40, 100.0)
    assert isinstance(action, Wait)
    assert 0 < action.seconds < GUARD_S - 0.2
    assert "its link broke" in action.reason


def test_the_last_look_comes_as_soon_as_the_guard_is_over() -> None:
    _, action = candidate("h1", seen(ended=101.4), Guard(7, 40, 100.0), "its link broke", 101.4)
    assert isinstance(action, Wait)
    assert abs(action.seconds - (GUARD_S - 1.4)) < 1e-9


def test_a_beat_that_stood_still_is_deposed_with_itself_as_the_condition() -> None:
    guard = Guard(7, 40, 100.0)
    kept, action = candidate("h1", seen(ended=100.0 + GUARD_S), guard, "its link broke", 100.0 + GUARD_S)
    assert kept == guard
    assert isinstance(action, Depose)
    assert (action.epoch, action.beat_revision) == (7, 40)


@given(st.sampled_from([(8, 40), (7, 41)]))
def test_a_beat_that_moved_or_a_new_epoch_begins_the_guard_anew(other: tuple[int, int]) -> None:
    epoch, beat = other
    guard, action = candidate(
        "h1", seen(epoch, beat=beat, ended=109.0), Guard(7, 40, 100.0), "its link broke", 109.0
    )
    assert guard == Guard(epoch, beat, 109.0)
    assert isinstance(action, Wait)


@given(begun=st.floats(0, 1e6), took=st.floats(0, 10), guard_since=st.floats(0, 1e6))
def test_no_read_is_vouched_for_once_another_may_have_taken_the_key(
    begun: float, took: float, guard_since: float
) -> None:
    """A beat begun at `begun` stood still for whoever looked at `guard_since`, so it was there by then."""
    deposed_at = max(guard_since, begun) + GUARD_S
    assert not vouched(begun, deposed_at + took, deposed_at + took)


def test_a_lease_that_may_have_ended_vouches_for_nothing_however_fresh_the_beat() -> None:
    assert vouched(10.0, 10.0, 10.5)
    assert not vouched(10.0, 10.0 - LEASE_SURE_S, 10.0)


def test_a_leader_steps_down_before_its_lease_ends() -> None:
    assert not must_step_down(10.0, 10.0 + STEP_DOWN_S - 0.01)
    assert must_step_down(10.0, 10.0 + STEP_DOWN_S)


def test_who_has_handed_over_leaves_a_free_key_to_others_for_a_while() -> None:
    free = seen(epoch=0, holder="")
    assert isinstance(candidate("h1", free, None, "", 100.0, 100.0 + ASIDE_S)[1], Wait)
    assert isinstance(candidate("h1", free, None, "", 105.0, 105.0)[1], Campaign)
    # its own key that could not be given back is taken away all the same, and a dead leader is one
    assert isinstance(candidate("h1", seen(holder="h1"), None, "", 100.0, 105.0)[1], Depose)
    old = Guard(7, 40, 100.0 - GUARD_S)
    assert isinstance(candidate("h1", seen(), old, "gone", 100.0, 105.0)[1], Depose)


def test_standing_aside_ends_while_requests_are_held() -> None:
    assert 2 * BEAT_S < ASIDE_S < HOLD_S_MAX


def test_heirs_are_other_voters_with_a_session_whose_store_answers() -> None:
    voters = (
        VoterView(peer_id="h1", learner=False, linked=True),
        VoterView(peer_id="h2", learner=False, linked=True),
        VoterView(peer_id="h3", learner=True, linked=True),
        VoterView(peer_id="h4", learner=False, linked=False),
        VoterView(peer_id="h5", learner=False, linked=True),
    )
    linked = {name: LinkedPeer(peer_id=name) for name in ("h2", "h3", "h6")}
    linked["h5"] = LinkedPeer(peer_id="h5", problem="etcd does not answer")
    assert heirs("h1", voters, (), linked) == ("h2",)
    assert heirs("h1", voters[:1], (), linked) == ()


def test_where_others_run_the_store_gossip_says_who_votes() -> None:
    members = [
        Member(peer_id=name, address="", status="alive", tags={"voter": voter} if voter else {})
        for name, voter in (("h1", "1"), ("h2", "1"), ("h3", "0"), ("h4", ""), ("h5", "1"))
    ]
    linked = {name: LinkedPeer(peer_id=name) for name in ("h2", "h3", "h4")}
    assert heirs("h1", (), members, linked) == ("h2",)
