"""Where each record lies in the store, and the index keys that make task lists a range read.

A task id begins with its inverted creation time, so that ascending key order is newest first in `task/` and in
every index; lists filter, count and page on keys alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from peer.state.base import Record
from peer.state.enrol import Host, JoinToken, Revocation
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.metric import Bucket
from peer.state.model import Assignment, Draining, LoadProfile
from peer.state.plan import Leaving, Plan
from peer.state.task import TERMINAL, Idempotency, Task, TaskInput, TaskResult, shown
from peer.state.worker import Worker

_ID_MS_LIMIT = 1 << 48
R = TypeVar("R", bound=Record)


def task_id(created_at: float, entropy_hex: str) -> str:
    """A new task's id; `entropy_hex` keeps ids of one millisecond apart and unguessable."""
    return f"task-{_ID_MS_LIMIT - 1 - int(created_at * 1000):012x}{entropy_hex}"


def idempotency_key(owner: str, key: str) -> str:
    """The key of an Idempotency record: owners and keys are the client's text, so a digest stands for them."""
    return "idempotency/" + hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()


def _name(text: str) -> str:
    return quote(text, safe="")


_KEYS: Mapping[type[Record], Callable[[Any], str]] = MappingProxyType(
    {
        Task: lambda r: f"task/{r.task_id}",
        TaskInput: lambda r: f"input/{r.task_id}",
        TaskResult: lambda r: f"result/{r.task_id}",
        Idempotency: lambda r: idempotency_key(r.owner, r.key),
        Worker: lambda r: f"worker/{_name(r.worker_id)}",
        Assignment: lambda r: f"assignment/{_name(r.worker_id)}/{_name(r.model_name)}",
        Draining: lambda r: f"draining/{_name(r.worker_id)}/{_name(r.model_name)}",
        LoadProfile: lambda r: f"profile/{_name(r.device_name)}/{_name(r.model_name)}",
        ApiKey: lambda r: f"key/{_name(r.key_id)}",
        Event: lambda r: f"event/{r.id:016d}",
        Bucket: lambda r: f"metric/{r.resolution}/{r.start:012d}",
        Leaving: lambda r: f"leaving/{_name(r.peer_id)}",
        Plan: lambda r: f"plan/{r.rebalance_id}",
        JoinToken: lambda r: f"join/{_name(r.token_id)}",
        Host: lambda r: f"host/{_name(r.peer_id)}",
        Revocation: lambda r: f"revoked/{_name(r.peer_id)}",
    }
)

_encode = msgspec.json.Encoder().encode
_decoders: dict[type[Record], msgspec.json.Decoder[Any]] = {}


def key_of(record: Record) -> str:
    """The store key of a durable record."""
    return _KEYS[type(record)](record)


def encode(record: Record) -> bytes:
    return _encode(record)


def decode(kind: type[R], value: bytes) -> R:
    """Raises msgspec.DecodeError on bytes that are no such record."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    result: R = decoder.decode(value)
    return result


def prefix_end(prefix: str) -> str:
    """The smallest key that is beyond every key that begins with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def list_prefix(status: str | None, worker_id: str | None) -> str:
    """The index that holds exactly the tasks of this filter; each key ends in the task id."""
    if worker_id is not None and status is not None:
        return f"by/worker-status/{_name(worker_id)}/{status}/"
    if worker_id is not None:
        return f"by/worker/{_name(worker_id)}/"
    if status is not None:
        return f"by/status/{status}/"
    return "task/"


def ended_at(key: str) -> tuple[float, str]:
    """When the task of an `ended/` key ended, and its id."""
    _, ms, ended_id = key.split("/")
    return int(ms) / 1000, ended_id


def index_value(key: str, task: Task) -> bytes:
    """What stands under one of its index keys: nothing, but in `ended/` how many bytes are kept of it."""
    return b"%d" % task.kept_bytes if key.startswith("ended/") else b""


def bytes_of(value: bytes) -> int:
    """Of an `ended/` key's value; 0 for one that an earlier version has written."""
    return int(value or 0)


def index_keys(task: Task | None) -> frozenset[str]:
    """All index keys of a task; `ended/` is in order of ending, for retention."""
    if task is None:
        return frozenset()
    status = shown(task.status)
    keys = {f"by/status/{status}/{task.task_id}"}
    if task.worker_id is not None:
        worker = _name(task.worker_id)
        keys |= {f"by/worker/{worker}/{task.task_id}", f"by/worker-status/{worker}/{status}/{task.task_id}"}
    if task.status in TERMINAL:
        keys.add(f"ended/{int((task.completed_at or 0) * 1000):015d}/{task.task_id}")
    return frozenset(keys)
