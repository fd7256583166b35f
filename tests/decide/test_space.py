"""Room in the store: who is told, and what each voter does about its own member."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.decide import retain, space
from peer.decide.admit import submit
from peer.decide.space import Compact, Defragment, Disarm, HandOver, Memory, Renew, Verdict
from peer.decide.view import cluster
from peer.errors import Overloaded
from peer.state.command import SubmitTask
from peer.state.voter import Room, Space
from tests.decide.build import World

CALM = Space(
    member_id=1,
    file_bytes=300,
    used_bytes=200,
    quota_bytes=1_000,
    revision=7,
    store_leader=2,
    voters=(1, 2, 3),
)
CROWDED = replace(CALM, file_bytes=950)
FULL = replace(CALM, file_bytes=1_000, used_bytes=600, alarmed=(1,))


def look(
    found: Space, memory: Memory | None = None, *, now: float = 0.0, leads: bool = False, led: bool = True
) -> Verdict:
    return space.look(found, memory or Memory(), leads=leads, led=led, now=now)


def levels(*used: int) -> list[str]:
    memory, found = Memory(), []
    for bytes_used in used:
        verdict = look(replace(CALM, used_bytes=bytes_used), memory)
        memory = verdict.memory
        found.append(verdict.room.level)
    return found


# ------------------------------------------------------------------------------------------------ levels


def test_a_level_begins_at_its_share_and_ends_below_it() -> None:
    assert levels(699, 700, 849, 850) == ["", "warning", "warning", "critical"]
    assert levels(850, 801, 799, 651, 649) == ["critical", "critical", "warning", "warning", ""]
    assert levels(801, 699, 700) == ["warning", "warning", "warning"]


def test_a_full_store_goes_on_as_critical_or_better_once_the_alarm_is_off() -> None:
    first = look(FULL)
    assert first.room.level == "full"
    assert "takes no writes" in first.room.message
    assert look(replace(FULL, alarmed=(), used_bytes=810), first.memory).room.level == "critical"
    assert look(replace(FULL, alarmed=(), used_bytes=100), first.memory).room.level == ""


def test_where_there_is_room_nothing_is_done() -> None:
    assert look(CALM) == Verdict(Memory(), Room(used_bytes=200, file_bytes=300, quota_bytes=1_000), None, "")
    assert look(replace(CALM, file_bytes=950, used_bytes=760)).action is None  # little would come free


# ------------------------------------------------------------------------------------------------ the cure


def test_a_full_member_compacts_defragments_and_takes_its_alarm_back() -> None:
    first = look(FULL, now=10.0)
    assert isinstance(first.action, Compact)
    assert first.action.revision == 7
    second = look(FULL, first.memory, now=15.0, led=False)
    assert isinstance(second.action, Defragment)
    assert not second.action.alone  # it would wait for a turn that a full store cannot give
    third = look(replace(FULL, file_bytes=620), second.memory, now=20.0, led=False)
    assert third.action == Disarm(1, "this member has room again")


def test_a_full_store_that_stays_full_is_compacted_and_defragmented_again_and_not_all_the_time() -> None:
    first = look(FULL)
    second = look(FULL, first.memory, now=5.0)
    assert isinstance(second.action, Defragment)
    waits = look(FULL, second.memory, now=29.0)
    assert waits.action is None
    assert "raise store.quota_bytes" in waits.waits
    again = look(FULL, waits.memory, now=30.0)
    assert isinstance(again.action, Compact)
    assert look(FULL, again.memory, now=59.0).action is None
    late = Memory(compacted_at=60.0, defragmented_at=second.memory.defragmented_at)
    assert isinstance(look(FULL, late, now=65.0).action, Defragment)


def test_data_that_are_larger_than_the_quota_need_a_larger_one() -> None:
    """What seems to be in use may come free all the same: so it is tried, and seldom again."""
    grown = replace(FULL, used_bytes=995)
    tried = look(grown, Memory(compacted_at=0.0), now=5.0)
    assert isinstance(tried.action, Defragment)
    again = Memory(compacted_at=600.0, defragmented_at=5.0)
    assert look(grown, again, now=604.0).action is None
    assert isinstance(look(grown, again, now=605.0).action, Defragment)
    waits = look(grown, tried.memory, now=6.0)
    assert waits.action is None
    assert "raise store.quota_bytes" in waits.waits
    assert isinstance(look(replace(grown, quota_bytes=1_200), waits.memory, now=7.0).action, Disarm)


def test_another_members_alarm_is_its_own_matter_for_a_while() -> None:
    others = replace(CALM, alarmed=(2,))
    first = look(others, now=100.0)
    assert first.action is None
    assert "another member" in first.waits
    assert look(others, first.memory, now=129.0).action is None
    late = look(others, first.memory, now=130.0)
    assert isinstance(late.action, Disarm)
    assert late.action.member_id == 2


@pytest.mark.parametrize("whose", ["of a voter that is gone", "of a learner", "of a member that was removed"])
def test_who_ends_anothers_alarm_and_has_no_room_itself_makes_it_first(whose: str) -> None:
    """All members' files are about as large: without that, the store would stand still for ever."""
    alarmed = {"of a voter that is gone": 2}.get(whose, 9)
    found = replace(
        CALM, file_bytes=960, alarmed=(alarmed,), learners=(9,) if whose == "of a learner" else ()
    )
    memory = look(found, now=100.0).memory if alarmed == 2 else Memory()
    assert memory.compacted_at is None
    first = look(found, memory, now=130.0, led=False)
    assert isinstance(first.action, Compact)
    second = look(found, first.memory, now=135.0, led=False)
    assert isinstance(second.action, Defragment)
    assert not second.action.alone
    waits = look(found, second.memory, now=140.0, led=False)
    assert waits.action is None
    assert "raise store.quota_bytes" in waits.waits
    third = look(replace(found, file_bytes=300), second.memory, now=140.0, led=False).action
    assert isinstance(third, Renew if whose == "of a learner" else Disarm)
    assert third.member_id == alarmed


def test_the_alarm_of_a_member_that_was_removed_goes_at_once() -> None:
    found = look(replace(CALM, alarmed=(9,))).action
    assert isinstance(found, Disarm)
    assert found.member_id == 9


def test_a_learner_that_is_full_learns_anew() -> None:
    found = look(replace(CALM, learners=(9,), alarmed=(9,))).action
    assert isinstance(found, Renew)
    assert found.member_id == 9


# ------------------------------------------------------------------------------------------------ before it is full


def test_the_leader_compacts_what_is_nearly_full() -> None:
    nearly = replace(CALM, file_bytes=900, used_bytes=860)
    assert look(nearly).action is None
    first = look(nearly, leads=True)
    assert isinstance(first.action, Compact)
    assert look(nearly, first.memory, leads=True, now=29.0).action is None
    assert isinstance(look(nearly, first.memory, leads=True, now=30.0).action, Compact)


def test_a_file_of_free_pages_is_defragmented_when_no_other_is() -> None:
    first = look(CROWDED)
    assert isinstance(first.action, Defragment)
    assert first.action.alone
    again = look(CROWDED, first.memory, now=59.0)
    assert again.action is None
    assert "a moment ago" in again.waits
    assert isinstance(look(CROWDED, again.memory, now=60.0).action, Defragment)


def test_nothing_is_defragmented_during_an_election() -> None:
    for verdict in (look(CROWDED, led=False), look(replace(CROWDED, store_leader=0))):
        assert verdict.action is None
        assert "once somebody leads" in verdict.waits


def test_those_that_lead_let_the_others_go_first() -> None:
    leads_store = replace(CROWDED, store_leader=1)
    first = look(leads_store)
    assert first.action is None
    assert "after the others" in first.waits
    assert isinstance(look(leads_store, first.memory, now=600.0).action, Defragment)
    first = look(CROWDED, leads=True)
    assert first.action is None
    assert isinstance(look(CROWDED, first.memory, now=600.0, leads=True).action, HandOver)


def test_a_voter_that_is_alone_waits_for_nobody() -> None:
    alone = replace(CROWDED, store_leader=1, voters=(1,), learners=(2,))
    assert isinstance(look(alone, leads=True).action, Defragment)


# ------------------------------------------------------------------------------------------------ the leader's part

ROOM = Room(level="warning", used_bytes=700, file_bytes=800, quota_bytes=1_000, message="70 % are used")


def test_a_change_of_level_is_told_once() -> None:
    world = World()
    assert space.tell_room(world.s).events == []
    world.s.room = ROOM
    world.take(space.tell_room(world.s))
    assert world.data("store_alert") == {
        "level": "warning",
        "raised": True,
        "value": 70.0,
        "threshold": 70.0,
        "unit": "%",
        "message": "70 % are used",
    }
    assert space.tell_room(world.s).events == []
    world.s.room = replace(ROOM, level="critical", used_bytes=850)
    world.take(space.tell_room(world.s))
    assert world.data("store_alert")["threshold"] == 85.0
    world.s.room = replace(ROOM, level="", used_bytes=100, message="")
    world.take(space.tell_room(world.s))
    told = world.data("store_alert")
    assert (told["level"], told["raised"], told["message"]) == ("critical", False, "the store has room again")


@pytest.mark.parametrize(
    ("level", "taken"), [("", True), ("warning", True), ("critical", False), ("full", False)]
)
def test_a_store_without_room_takes_no_new_tasks(level: str, taken: bool) -> None:
    world = World()
    world.s.room = replace(ROOM, level=level)
    name = next(iter(world.s.catalogue))
    command = SubmitTask(
        task_type="text_generation",
        model_name=name,
        parameters={},
        priority=2,
        timeout_s=60,
        owner="o",
        key_id="k",
    )
    if taken:
        assert submit(world.s, 1.0, command, "task-1", 10).changes
        return
    with pytest.raises(Overloaded, match="70 %") as refused:
        submit(world.s, 1.0, command, "task-1", 10)
    assert (refused.value.code, refused.value.status) == ("store_full", 503)


def test_status_says_that_the_store_is_short_of_room() -> None:
    world = World()
    world.s.room = ROOM
    shown = cluster(world.s, 1.0)
    assert "70 % are used" in shown.reasons
    assert shown.room == ROOM


def test_finished_tasks_take_at_most_half_of_the_quota() -> None:
    world = World()
    world.s.finished, world.s.finished_bytes = 2, 600
    oldest = [(0.5, "task-1"), (0.6, "task-2")]
    assert retain.due(world.s, 1.0, oldest, [300, 300]) == []
    world.s.room = ROOM
    assert retain.due(world.s, 1.0, oldest, [300, 300]) == ["task-1"]


def test_prompts_of_unfinished_tasks_take_at_most_a_quarter_of_the_quota() -> None:
    """A look at the store's room comes every few seconds: until then they could fill a small one, for good."""
    world = World()
    world.s.inputs_bytes = 245
    name = next(iter(world.s.catalogue))
    command = SubmitTask(
        task_type="text_generation", model_name=name, parameters={}, priority=2, timeout_s=60, owner="o", key_id="k",
    )  # fmt: skip
    assert submit(world.s, 1.0, command, "task-1", 10).changes
    world.s.room = replace(ROOM, level="", message="")
    assert submit(world.s, 1.0, command, "task-1", 5).changes
    with pytest.raises(Overloaded, match="fill their 250 bytes"):
        submit(world.s, 1.0, command, "task-1", 10)
