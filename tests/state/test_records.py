"""Keys, units, buckets, history: what records are stored as and made of."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.state import key as keys
from peer.state.history import History
from peer.state.key import ApiKey
from peer.state.metric import Bucket, Counts, Gauge, add_gauges, merge, sample
from peer.state.model import Assignment
from peer.state.record import (
    decode,
    encode,
    ended_at,
    idempotency_key,
    index_keys,
    key_of,
    list_prefix,
    prefix_end,
    task_id,
)
from peer.state.task import Idempotency, Status, Task
from peer.state.units import memory_text

PURE = settings(derandomize=True, deadline=None, max_examples=100)
names = st.text(min_size=1, max_size=20)


def task(**fields: object) -> Task:
    return Task(
        **{
            "task_id": "task-1",
            "task_type": "x",
            "model_name": "m",
            "priority": 5,
            "timeout_s": 1.0,
            "created_at": 0.0,
            "deadline": 1.0,
            **fields,
        }  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------- API keys


def api_key(*scopes: str) -> ApiKey:
    return ApiKey(key_id="k", owner="o", scopes=scopes, secret_sha256=keys.digest("secret"), created_at=0.0)


@pytest.mark.parametrize(
    ("have", "wanted", "allowed"),
    [
        ("admin", "admin", True),
        ("admin", "read", True),
        ("operate", "operate", True),
        ("operate", "read", True),
        ("submit", "read", True),
        ("submit", "operate", False),
        ("operate", "submit", False),
        ("read", "submit", False),
        ("read", "admin", False),
    ],
)
def test_scopes(have: str, wanted: str, allowed: bool) -> None:
    assert api_key(have).allows(wanted) is allowed


def test_tokens() -> None:
    assert keys.split(keys.token("id", "a_b_c")) == ("id", "a_b_c")
    for wrong in ("", "blk", "blk_id", "blk__x", "blk_id_", "xyz_id_secret"):
        assert keys.split(wrong) is None
    assert keys.matches(api_key("read"), "secret")
    assert not keys.matches(api_key("read"), "Secret")


# ---------------------------------------------------------------- where records lie


@given(st.lists(st.floats(0, 1e10), min_size=2))
@PURE
def test_newer_tasks_come_first(times: list[float]) -> None:
    ids = [task_id(at, "00") for at in times]
    assert [ids.index(each) for each in sorted(ids)] == [
        ids.index(each) for each in sorted(ids, key=lambda i: -int(times[ids.index(i)] * 1000))
    ]


@given(names, names, names, names)
@PURE
def test_names_never_mix(worker: str, model: str, other_worker: str, other_model: str) -> None:
    def wish(w: str, m: str) -> str:
        return key_of(
            Assignment(assignment_id="a", model_name=m, worker_id=w, preload=True, priority=1, created_at=0.0)
        )

    same = (worker, model) == (other_worker, other_model)
    assert (wish(worker, model) == wish(other_worker, other_model)) is same
    assert (idempotency_key(worker, model) == idempotency_key(other_worker, other_model)) is (
        same or f"{worker}\0{model}" == f"{other_worker}\0{other_model}"
    )


@given(names, st.sampled_from(Status))
@PURE
def test_every_list_finds_its_tasks_and_no_other(worker: str, status: Status) -> None:
    made = task(worker_id=worker, status=status, completed_at=12.5)
    every = index_keys(made) | {key_of(made)}
    shown_as = "running" if status is Status.ASSIGNED else status.value
    for of_status in (None, "queued", "running", "completed", "failed", "cancelled"):
        for of_worker in (None, worker, worker + "x", "é/"):
            prefix = list_prefix(of_status, of_worker)
            hits = [k for k in every if prefix <= k < prefix_end(prefix)]
            wanted = of_status in (None, shown_as) and of_worker in (None, worker)
            assert len(hits) == wanted, (prefix, hits)
            assert all(k.rpartition("/")[2] == "task-1" for k in hits)


def test_index_of_nothing_and_of_a_task_without_worker() -> None:
    assert index_keys(None) == frozenset()
    assert index_keys(task()) == {"by/status/queued/task-1"}


def test_the_end_of_a_task_is_in_its_key() -> None:
    done = task(status=Status.FAILED, completed_at=1234.5)
    key = next(k for k in index_keys(done) if k.startswith("ended/"))
    assert ended_at(key) == (1234.5, "task-1")


def test_records_survive_the_store_and_unknown_fields() -> None:
    record = Idempotency(owner="o", key="k", task_id="t", body_digest="d")
    assert decode(Idempotency, encode(record)) == record
    assert decode(Idempotency, encode(record)[:-1] + b',"new":1}') == record
    with pytest.raises(msgspec.DecodeError):
        decode(Idempotency, b"{")


# ---------------------------------------------------------------- units, buckets


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0MB"), (312 << 20, "312MB"), (24 << 30, "24GB"), (13 << 29, "6.5GB"), (1 << 30, "1GB")],
)
def test_memory_text(size: int, text: str) -> None:
    assert memory_text(size) == text


def test_gauges() -> None:
    assert add_gauges(Gauge(), sample(3.0)) == sample(3.0) == add_gauges(sample(3.0), Gauge())
    both = add_gauges(sample(3.0), sample(5.0))
    assert both == Gauge(samples=2, sum=8.0, minimum=3.0, maximum=5.0)


def second(start: int, completed: int = 1, worker: str = "w") -> Bucket:
    counts = Counts(completed=completed)
    return Bucket(resolution="1s", start=start, total=counts, workers={worker: counts})


def test_merging_keeps_every_count_and_the_peak() -> None:
    minutes = [merge([second(0, 3), second(1, 2, "v")], "1m", 0), merge([second(60, 4)], "1m", 60)]
    assert [m.peak_ended_per_minute for m in minutes] == [5, 4]
    hour = merge(minutes, "1h", 0)
    assert hour.total.completed == 9
    assert hour.peak_ended_per_minute == 5
    assert {w: c.completed for w, c in hour.workers.items()} == {"w": 7, "v": 2}


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(0, 60))
@PURE
def test_a_span_is_what_begins_in_it(starts: set[int], start: int, end: int) -> None:
    history = History()
    for at in sorted(starts):
        history.put(Bucket(resolution="1m", start=at * 60))
    found = [b.start for b in history.span("1m", start * 60 - 1, end * 60)]
    assert found == [at * 60 for at in sorted(starts) if start <= at < end]


def test_dropping_a_bucket_that_is_not_there() -> None:
    history = History()
    history.drop(second(1))
    history.put(second(1))
    history.drop(second(1))
    assert list(history.starts("1s")) == []
