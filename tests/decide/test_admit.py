"""What enters the table, and how clients take it out; API keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as changed

from peer.decide import admit, keys
from peer.decide.decision import Decision
from peer.errors import Conflict, NotFound, Overloaded
from peer.limits import KEYS_MAX
from peer.state.command import CancelTask, CreateKey, RevokeKey, SubmitTask
from peer.state.key import ApiKey
from peer.state.model import LoadProfile
from peer.state.order import StopAttempt
from peer.state.record import idempotency_key
from peer.state.snapshot import Drop, Save
from peer.state.task import Idempotency, Status
from tests.decide.build import ECHO, POLICY, T0, World, assigned, replica, snapshot


def ask(**fields: Any) -> SubmitTask:
    return SubmitTask(
        **{
            "task_type": "text_generation",
            "model_name": "echo",
            "parameters": {"prompt": "x"},
            "priority": 5,
            "timeout_s": 60.0,
            "owner": "o",
            "key_id": "k",
            **fields,
        }
    )


def test_a_new_task_is_queued_with_its_input() -> None:
    world = World()
    reply = world.take(admit.submit(world.s, T0, ask(), "t1", 10))
    task = world.s.tasks["t1"]
    assert reply.view.task == task
    assert not reply.replayed
    assert (task.status, task.attempt, task.deadline) == (Status.QUEUED, 0, T0 + 60)
    assert set(world.disk) == {"task/t1", "input/t1", "by/status/queued/t1"}
    assert world.s.inputs_bytes == 10


def test_an_unknown_model_is_refused_with_the_nearest_names() -> None:
    world = World()
    with pytest.raises(NotFound, match="did you mean echo") as caught:
        admit.submit(world.s, T0, ask(model_name="ecoh"), "t1", 10)
    assert caught.value.details == {"model_name": "ecoh", "nearest": ["echo"]}
    with pytest.raises(NotFound, match=r"in the catalogue$"):
        admit.submit(world.s, T0, ask(model_name="zzzzzz"), "t1", 10)


def test_a_model_serves_the_types_of_tasks_that_the_catalogue_says() -> None:
    world = World()
    embedder = changed(ECHO, name="embedder", task_types=("embedding",))
    world.s.catalogue = {"echo": ECHO, "embedder": embedder}
    for model_name, task_type, serves in (
        ("echo", "embedding", "text_generation"),
        ("embedder", "text_generation", "embedding"),
    ):
        with pytest.raises(Conflict, match=f"{model_name} serves {serves}, not {task_type}") as caught:
            admit.submit(world.s, T0, ask(model_name=model_name, task_type=task_type), "t1", 10)
        assert caught.value.code == "wrong_task_type"
        assert caught.value.details["field"] == "task_type"
    world.take(admit.submit(world.s, T0, ask(model_name="embedder", task_type="embedding"), "t1", 10))
    assert world.s.tasks["t1"].task_type == "embedding"


def test_a_full_queue_refuses() -> None:
    world = World(snapshot(changed_policy(queue_tasks_max=1)))
    world.submit()
    with pytest.raises(Overloaded, match="queue is full") as caught:
        admit.submit(world.s, T0, ask(), "t2", 10)
    assert caught.value.retry_after_s


def test_prompts_fill_their_bytes() -> None:
    world = World(snapshot(changed_policy(queue_bytes_max=15)))
    world.submit()
    with pytest.raises(Overloaded, match="15 bytes"):
        admit.submit(world.s, T0, ask(), "t2", 10)
    admit.submit(world.s, T0, ask(), "t2", 5)


def changed_policy(**fields: Any) -> Any:
    return replace(POLICY, **fields)


def test_idempotency_keys() -> None:
    world = World()
    repeated = ask(idempotency_key="i", body_digest="d")
    assert admit.first_of(world.s, ask(), None) is None
    assert admit.first_of(world.s, repeated, None) is None
    first = world.submit(idempotency_key="i", body_digest="d")
    assert admit.first_of(world.s, repeated, None) == first.task_id
    with pytest.raises(Conflict, match="another body") as caught:
        admit.first_of(world.s, ask(idempotency_key="i", body_digest="e"), None)
    assert caught.value.code == "idempotency_mismatch"
    assert admit.first_of(world.s, ask(idempotency_key="i", body_digest="d", owner="p"), None) is None
    # once it is finished only the store knows
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=first.task_id), None))
    assert world.s.idempotency == {}
    stored = Idempotency(owner="o", key="i", task_id=first.task_id, body_digest="d")
    assert idempotency_key("o", "i") in world.disk
    assert admit.first_of(world.s, repeated, stored) == first.task_id


def test_cancelling_a_queued_task_orders_nothing() -> None:
    world = World()
    task = world.submit()
    view = world.take(admit.cancel(world.s, T0 + 1, CancelTask(task_id=task.task_id), None))
    assert (view.task.status, view.task.completed_at) == (Status.CANCELLED, T0 + 1)
    assert world.events == ["task_cancelled"]
    assert world.orders == []
    assert world.s.tasks == {}


def test_cancelling_a_held_task_frees_its_slot() -> None:
    world = World()
    world.worker("w1", replica("echo"))
    task = world.running()
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), None))
    assert world.orders == [StopAttempt(epoch=7, worker_id="w1", task_id=task.task_id, attempt=1)]
    assert world.s.held == {"w1": {}}


def test_a_task_of_a_worker_that_nobody_knows_has_no_slot_to_free() -> None:
    world = World()
    task = world.submit()
    world.take(Decision(changes=[Save(assigned(task, "gone", T0))]))
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), None))
    assert world.orders == []


def test_cancelling_what_is_finished_or_unknown() -> None:
    world = World()
    with pytest.raises(NotFound):
        admit.cancel(world.s, T0, CancelTask(task_id="t"), None)
    task = changed(world.submit(), status=Status.COMPLETED)
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), None))
    with pytest.raises(Conflict, match="already completed"):
        admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), task)


# ---------------------------------------------------------------- API keys


def key(key_id: str, owner: str = "o") -> ApiKey:
    return ApiKey(key_id=key_id, owner=owner, scopes=("read",), secret_sha256="x", created_at=T0)


def test_keys_come_and_go() -> None:
    world = World()
    assert world.take(keys.create(world.s, CreateKey(key=key("a")))) == key("a")
    with pytest.raises(Conflict):
        keys.create(world.s, CreateKey(key=key("a")))
    revoked = world.take(keys.revoke(world.s, T0, RevokeKey(key_id="a")))
    assert revoked.revoked_at == T0
    assert keys.revoke(world.s, T0 + 9, RevokeKey(key_id="a")).changes == []
    assert keys.revoke(world.s, T0 + 9, RevokeKey(key_id="a")).reply.revoked_at == T0


def test_revoking_by_owner() -> None:
    world = World()
    for key_id, owner in (("a", "x"), ("b", "y"), ("c", "y")):
        world.take(keys.create(world.s, CreateKey(key=key(key_id, owner))))
    assert world.take(keys.revoke(world.s, T0, RevokeKey(key_id="x"))).key_id == "a"
    with pytest.raises(NotFound):
        keys.revoke(world.s, T0, RevokeKey(key_id="x"))
    with pytest.raises(Conflict) as caught:
        keys.revoke(world.s, T0, RevokeKey(key_id="y"))
    assert caught.value.details == {"key_ids": ["b", "c"]}


def test_so_many_keys_and_no_more() -> None:
    world = World()
    world.s.keys.update({str(n): key(str(n)) for n in range(KEYS_MAX)})
    with pytest.raises(Overloaded):
        keys.create(world.s, CreateKey(key=key("a")))
    world.take(keys.revoke(world.s, T0 + 1, RevokeKey(key_id="7")))
    world.take(keys.revoke(world.s, T0, RevokeKey(key_id="8")))
    world.take(keys.create(world.s, CreateKey(key=key("a"))))
    assert "a" in world.s.keys
    assert "7" in world.s.keys
    assert "8" not in world.s.keys  # the one that was revoked first has made room


def test_the_last_key_that_may_make_keys_stays() -> None:
    world = World()
    first, second = (changed(key(name), scopes=("admin",)) for name in ("a", "b"))
    world.take(keys.create(world.s, CreateKey(key=first)))
    world.take(keys.create(world.s, CreateKey(key=changed(second, key_id="c", expires_at=T0 + 60))))
    with pytest.raises(Conflict, match="last key"):
        keys.revoke(world.s, T0, RevokeKey(key_id="a"))
    world.take(keys.create(world.s, CreateKey(key=second)))
    assert world.take(keys.revoke(world.s, T0, RevokeKey(key_id="a"))).revoked_at == T0
    with pytest.raises(Conflict, match="last key"):
        keys.revoke(world.s, T0, RevokeKey(key_id="b"))


# ---------------------------------------------------------------- the snapshot's own guards


def test_a_finished_task_is_not_loaded_and_profiles_are_not_dropped() -> None:
    world = World()
    task = changed(world.submit(), status=Status.FAILED)
    with pytest.raises(TypeError, match="stay in the store"):
        world.s.load(task)
    with pytest.raises(TypeError, match="never dropped"):
        world.s.apply(Drop(LoadProfile(model_name="m", device_name="d", memory_bytes=1, load_s=1.0)))


def test_an_empty_catalogue_knows_no_near_names() -> None:
    with pytest.raises(NotFound):
        admit.submit(snapshot(catalogue={"m": ECHO}), T0, ask(), "t", 1)
