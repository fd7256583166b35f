"""Who votes: every rule alone, and that from any state no step goes below a quorum and the steps come to an end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.decide import voters
from peer.decide.voters import AddLearner, Bounds, Memory, Promote, Remove, look, quorum
from peer.state.enrol import Host, Registry, Revocation
from peer.state.voter import Seat, StoreMember
from tests.decide.voter_model import BOUNDS, Model, Peer

LONG_S = 1_000.0


def model(hosts: int, members: int = 1, **options: object) -> Model:
    made = Model({f"h{number}": Peer() for number in range(1, hosts + 1)}, **options)  # type: ignore[arg-type]
    for number in range(1, members + 1):
        made.add(f"h{number}")
    return made


def views_of(made: Model) -> str:
    return voters.outlook(voters.views(made.roll()))


# ------------------------------------------------------------------------------------------------ growing


@pytest.mark.parametrize(
    ("hosts", "wanted", "voting", "learning"),
    [
        (1, 0, 1, 0),
        (2, 0, 1, 1),
        (3, 0, 3, 0),
        (4, 0, 3, 0),
        (9, 0, 3, 0),
        (4, 5, 3, 1),
        (5, 5, 5, 0),
        (3, 1, 1, 1),
    ],
)
def test_a_cluster_grows_to_what_its_hosts_allow(hosts: int, wanted: int, voting: int, learning: int) -> None:
    made = model(hosts, bounds=Bounds(wanted=wanted, pair_s=6.0, start_s=6.0, steady_s=2.0))
    made.settle()
    assert (len(made.names()), len(made.names(learner=True))) == (voting, learning)
    assert not any(isinstance(action, Remove) for action in made.done)


def test_a_newcomer_is_told_its_seat_until_it_has_started() -> None:
    made = model(2)
    made.hosts["h2"].broken = True
    while not made.done:
        made.step()
    for _ in range(3):
        verdict = look(made.roll(), made.memory, made.bounds, made.now)
        made.step()
    assert verdict.seats == {"h2": Seat(member_id=102, members={"h1": "h1:1", "h2": "h2:1"})}
    made.hosts["h2"].linked = False
    assert look(made.roll(), made.memory, made.bounds, made.now).seats == {}


def test_no_seat_while_another_member_has_no_name() -> None:
    made = model(3)
    made.add("h2", learner=True, started=False, seated=False)
    made.add("h3", started=False, seated=False)
    assert look(made.roll(), Memory(), BOUNDS, 0.0).seats == {}


def test_a_second_voter_waits_for_a_third_peer() -> None:
    made = model(2, bounds=Bounds(wanted=3, pair_s=6.0, start_s=6.0, steady_s=2.0))
    made.settle()
    assert made.names(learner=True) == ["h2"]
    assert "stays a learner" in made.reasons[0]
    made.hosts["h3"] = Peer()
    made.settle()
    assert made.names() == ["h1", "h2", "h3"]


def test_a_learner_gets_the_ca_s_key_before_its_vote() -> None:
    made = model(3)
    made.hosts["h2"].keyed = made.hosts["h3"].keyed = False
    for _ in range(int(BOUNDS.steady_s) + 3):
        made.step()
    assert (made.names(), made.names(learner=True)) == (["h1"], ["h2"])
    assert made.reasons == ("h2 stays a learner until it has got the CA's key",)
    made.hosts["h2"].keyed = True
    assert isinstance(made.step(), Promote)


def test_a_voter_without_the_ca_s_key_is_better_than_none() -> None:
    made = model(3)
    made.hosts["h2"].keyed = made.hosts["h3"].keyed = False
    made.settle()
    assert made.names() == ["h1", "h2", "h3"]


def test_a_peer_is_counted_on_when_it_has_been_there_for_a_while() -> None:
    made = model(2)
    assert made.step() is None
    assert made.step() is None
    assert isinstance(made.step(), AddLearner)


def test_nothing_is_added_while_a_voter_is_away() -> None:
    made = model(4, 3, bounds=Bounds(wanted=5, steady_s=2.0))
    made.hosts["h3"].linked = False
    made.settle(10)
    assert made.done == []
    assert made.reasons == ("a member is added when all voters are there",)


def test_a_pair_without_a_third_is_parted_and_the_other_learns_again() -> None:
    made = model(2, 2)
    made.settle()
    assert [type(action) for action in made.done] == [Remove, AddLearner]
    assert (made.names(), made.names(learner=True)) == (["h1"], ["h2"])


def test_a_pair_whose_third_is_about_to_start_stays_for_its_time() -> None:
    made = model(3, 2)
    made.hosts["h3"].broken = True
    made.settle()
    kinds = [(type(action), getattr(action, "peer_id", "")) for action in made.done]
    assert kinds == [(AddLearner, "h3"), (Remove, "h2"), (Remove, "h3"), (AddLearner, "h2")]
    assert (made.names(), made.names(learner=True)) == (["h1"], ["h2"])


def test_a_peer_that_did_not_start_is_tried_again_when_it_is_back_anew_or_after_long() -> None:
    made = model(3, 2)
    made.hosts["h3"].broken = True
    made.settle()
    before = len(made.done)
    made.hosts["h3"] = Peer(linked=False)
    made.step()
    made.hosts["h3"].linked = True
    made.settle()
    assert made.names() == ["h1", "h2", "h3"]
    assert len(made.done) > before
    again = model(3, 2)
    again.hosts["h3"].broken = True
    again.settle()
    again.hosts["h3"].broken = False
    again.now += LONG_S
    again.settle()
    assert again.names() == ["h1", "h2", "h3"]


# ------------------------------------------------------------------------------------------------ replacing


def test_a_dead_voter_is_replaced_after_its_time() -> None:
    made = model(4, 3)
    made.hosts["h3"].linked = False
    made.settle(19)
    assert made.done == []
    made.settle()
    assert made.names() == ["h1", "h2", "h4"]
    made.hosts["h3"].linked = True  # with its old data
    made.settle()
    assert made.names() == ["h1", "h2", "h4"]
    assert made.hosts["h3"].seat == 0
    assert len(made.done) == 3


def test_a_learner_that_follows_takes_a_dead_voters_place() -> None:
    made = model(4, 3)
    made.add("h4", learner=True)
    made.hosts["h3"].linked = False
    made.settle()
    assert [type(action) for action in made.done] == [Remove, Promote]
    assert made.names() == ["h1", "h2", "h4"]


def test_a_voter_whose_store_does_not_answer_is_replaced_like_a_dead_one() -> None:
    made = model(4, 3)
    made.hosts["h3"].problem = "its disk is full"
    made.settle(19)
    assert made.done == []
    assert views_of(made).startswith("2 of 3 voters are up")
    made.settle()
    assert made.names() == ["h1", "h2", "h4"]


def test_a_dead_voter_without_a_spare_stays() -> None:
    made = model(3, 3)
    made.hosts["h3"].linked = False
    made.settle()
    assert made.done == []
    assert made.reasons == ("h3 is away, and no peer is there to replace it",)


def test_without_a_quorum_nothing_is_changed() -> None:
    made = model(5, 3)
    made.hosts["h2"].linked = made.hosts["h3"].linked = False
    made.settle()
    assert made.done == []
    assert "no quorum" in made.reasons[0]


def test_a_voter_that_lost_its_disk_learns_anew() -> None:
    made = model(3, 3)
    made.hosts["h2"].seat = 0
    made.settle()
    assert [type(action) for action in made.done] == [Remove, AddLearner, Promote]
    assert made.names() == ["h1", "h2", "h3"]


def test_a_host_at_another_address_gets_another_member() -> None:
    made = model(3, 3)
    made.members[103] = StoreMember(member_id=103, address="old:1", peer_id="h3")
    made.settle()
    assert {each.address for each in made.members.values()} == {"h1:1", "h2:1", "h3:1"}


def test_two_disks_lost_of_five_are_mended_one_after_the_other() -> None:
    made = model(5, 5, bounds=Bounds(wanted=5, steady_s=2.0))
    made.hosts["h4"].seat = made.hosts["h5"].seat = 0
    made.settle()
    assert len(made.names()) == 5


def test_a_learner_that_is_away_gives_way_to_another_peer() -> None:
    made = model(2)
    made.settle(20)
    made.hosts["h2"].linked = False
    made.settle()
    assert made.names(learner=True) == ["h2"]  # nobody else is there
    made.hosts["h3"] = Peer()
    made.settle()
    assert made.names(learner=True) == ["h3"]


def test_a_learner_that_does_not_start_gives_way_and_one_of_nobody_too() -> None:
    made = model(3)
    made.hosts["h2"].broken = True
    made.settle()
    assert made.names(learner=True) == ["h3"]
    lost = model(2)
    lost.add("gone", learner=True, started=False)
    lost.settle()
    assert lost.names(learner=True) == ["h2"]


# ------------------------------------------------------------------------------------------------ reducing


def test_fewer_are_wanted() -> None:
    made = model(5, 5, bounds=Bounds(wanted=3, steady_s=2.0))
    made.hosts["h3"].linked = False
    made.settle()
    assert made.names() == ["h1", "h2", "h4"]  # the one that is away went first
    one = model(3, 3, bounds=Bounds(wanted=1, steady_s=2.0))
    one.settle()
    assert (one.names(), one.names(learner=True)) == (["h1"], ["h2"])


def test_the_revoked_go_at_once_where_quorum_stays() -> None:
    made = model(4, 3)
    made.barred = frozenset({"h2"})
    assert isinstance(made.step(), Remove)
    made.settle()
    assert made.names() == ["h1", "h3", "h4"]
    held = model(4, 3)
    held.hosts["h3"].linked = False
    held.barred = frozenset({"h2"})
    held.settle(10)
    assert held.names() == ["h1", "h2", "h3"]
    assert "h2 stays a voter" in held.reasons[0]


def test_a_revoked_peer_is_not_added_and_loses_a_learner() -> None:
    made = model(2)
    made.barred = frozenset({"h2"})
    made.settle()
    assert made.done == []
    made.add("h2", learner=True, started=False)
    made.settle()
    assert made.names(learner=True) == []


def test_what_cannot_be_removed_does_not_keep_others_from_it() -> None:
    made = model(5, 5, bounds=Bounds(wanted=5, steady_s=2.0, dead_s=20.0))
    made.hosts["h4"].linked = made.hosts["h5"].linked = False
    made.barred = frozenset({"h3", "h5"})
    assert made.step() == Remove(105, "h5", "h5 may not have a member of the store")
    made.settle(40)
    assert made.names() == ["h1", "h2", "h4"]
    astray = model(3, 3)
    astray.hosts["h3"].linked = False
    astray.hosts["h2"].seat = 7  # there is no quorum then: nothing
    astray.settle()
    assert astray.done == []
    told = model(3, 3)
    told.hosts["h3"].linked = told.hosts["h2"].eligible = False
    told.settle()
    assert told.done == []
    assert "h2 stays a voter" in told.reasons[0]
    told.hosts["h3"].linked = True
    told.settle(10)
    assert "h2" not in told.names()


def test_a_peer_that_runs_no_member_of_the_store_any_more_is_told() -> None:
    made = model(4, 3)
    made.hosts["h4"].seat = 7
    made.settle(2)
    assert made.hosts["h4"].seat == 7
    made.settle(1)
    assert made.hosts["h4"].seat == 0


def test_who_may_not_vote_is_read_from_the_hosts() -> None:
    host = Host(peer_id="a", enrolled_at=0.0, serial="1", key_sha256="", expires_at=1.0)
    gone = Revocation(peer_id="b", serials=(), revoked_at=0.0, revoked_by="", until=1.0)
    registry = Registry(
        hosts={
            "a": host,
            "c": Host(peer_id="c", enrolled_at=0.0, serial="2", key_sha256="", expires_at=1.0, voter=False),
        },
        revocations={"b": gone},
    )
    assert voters.barred(registry) == {"b", "c"}


# ------------------------------------------------------------------------------------------------ for people


def test_what_a_loss_would_mean() -> None:
    made = model(1)
    assert views_of(made) == (
        "1 voter and no copy: if h1 is lost, the cluster stops, and what it knew is lost with its disk"
    )
    made = model(2)
    made.settle()
    assert views_of(made) == (
        "1 voter: if h1 is lost, the cluster stops and needs `bitinglip takeover` on h2"
    )
    assert views_of(model(2, 2)) == "2 voters: if either is lost, the cluster stops until it is back"
    made = model(3, 3)
    assert views_of(made) == "3 voters: any one may be lost"
    made.hosts["h3"].linked = False
    assert views_of(made) == "2 of 3 voters are up: one more loss stops the cluster until one is back"
    made = model(5, 5)
    assert views_of(made) == "5 voters: any 2 may be lost"
    made.hosts["h3"].linked = False
    assert views_of(made) == "4 of 5 voters are up: any one of them may be lost"


def test_members_for_people() -> None:
    made = model(2)
    made.add("h2", learner=True, started=False, seated=False)
    assert [(each.peer_id, each.learner, each.linked) for each in voters.views(made.roll())] == [
        ("h1", False, True),
        ("h2", True, False),
    ]


# ------------------------------------------------------------------------------------------------ from any state


@st.composite
def models(draw: st.DrawFn) -> Model:
    wanted = draw(st.sampled_from([0, 1, 3, 5]))
    hosts = {f"h{number}": Peer() for number in range(1, draw(st.integers(1, 7)) + 1)}
    made = Model(hosts, bounds=Bounds(wanted=wanted, dead_s=20.0, pair_s=6.0, start_s=6.0, steady_s=2.0))
    learners = 0
    for name, host in hosts.items():
        what = "voter" if name == "h1" else draw(st.sampled_from(["none", "voter", "learner"]))
        if name != "h1":
            host.linked = draw(st.booleans())
            host.eligible = draw(st.sampled_from([True, True, True, False]))
            host.broken = draw(st.sampled_from([False, False, False, True]))
            host.problem = draw(st.sampled_from(["", "", "", "its disk is full"]))
        if what == "voter":
            made.add(name, seated=name == "h1" or draw(st.sampled_from([True, True, True, False])))
        elif what == "learner" and not learners:
            learners = made.add(name, learner=True, started=draw(st.booleans()))
    others = st.sampled_from(sorted(hosts)[1:] or ["nobody"])
    made.barred = frozenset(draw(st.lists(others, max_size=1)))
    return made


@settings(max_examples=150, deadline=None)
@given(made=models(), data=st.data())
def test_from_any_state_no_step_goes_below_a_quorum_and_they_come_to_an_end(
    made: Model, data: st.DataObject
) -> None:
    for _ in range(data.draw(st.integers(0, 12))):  # links come and go, the store refuses at times
        name = data.draw(st.sampled_from(sorted(made.hosts)))
        if name != made.leader:
            made.hosts[name].linked = not made.hosts[name].linked
        for _ in range(data.draw(st.integers(1, 9))):
            made.step(refuse=data.draw(st.booleans()), seconds=data.draw(st.sampled_from([1.0, 5.0])))
    before = len(made.done)
    made.settle(300)
    calm = len(made.done)
    made.settle(100)
    assert len(made.done) == calm
    assert calm - before <= 6 * len(made.hosts)
    if made.live() < quorum(len(made.voters())):
        return
    able = [
        name
        for name, host in made.hosts.items()
        if name == made.leader
        or (
            host.linked and host.eligible and not host.broken and not host.problem and name not in made.barred
        )
    ]
    voting = made.voters()
    assert len(voting) % 2 == 1
    assert len(voting) <= (made.bounds.wanted or voters.AUTOMATIC_MAX)
    if made.live() == len(voting) and {each.peer_id for each in voting} <= set(able):
        most = min(made.bounds.wanted or voters.AUTOMATIC_MAX, len(able))
        assert len(voting) == most - 1 + most % 2
        if len(voting) == 1 and len(able) > 1:
            assert len(made.names(learner=True)) == 1
