"""A whole peer over the real engine: killed, frozen and out of memory, and given files that are broken or lie.

The model is one of the tiny random ones; what counts is that the peer says what was wrong and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.engine.conftest import CACHE
from tests.engine.memory import held
from tests.process.peers import REPOSITORY, Peer, is_engine, poll, running_peers
from tests.process.test_engine import new_engine, one_engine

pytestmark = pytest.mark.process

FAMILY = REPOSITORY / "tests" / "engine" / "families" / "qwen3"
CONTEXT = 4096
LONG = 3_000  # tokens: some seconds
LOAD_S_MAX = 120.0  # with no kernel compiled yet, on a busy host
SEEN: list[dict[str, Any]] = []  # of "good" while the fixture loaded it
STALL = {"idle_s": 3, "decode_s": 3, "prefill_s": 3}  # a beat a second


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def folder(home: Path, name: str, change: Callable[[Path], None] = lambda path: None) -> dict[str, Any]:
    """A catalogue entry of a copy of the tiny model's folder. `change` breaks it before it is listed."""
    path = home / name
    path.mkdir()
    for file in (*FAMILY.glob("*.safetensors"), *FAMILY.glob("*.json")):
        if not file.name.startswith("expected"):
            shutil.copy(file, path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    change(path)
    files = {
        file.name: {"sha256": sha256(file), "size_bytes": file.stat().st_size} for file in path.iterdir()
    }
    return {"source": f"file:{path}", "family": "qwen3", "context": CONTEXT, "slots": 2, "files": files}


def gguf(home: Path, name: str, change: Callable[[bytes], bytes]) -> dict[str, Any]:
    path = home / f"{name}.gguf"
    path.write_bytes(change((FAMILY / "model.gguf").read_bytes()))
    return {"source": f"file:{path}", "family": "qwen3", "context": 128, "slots": 2, "sha256": sha256(path)}


def cut_shard(path: Path) -> None:
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def lying_header(path: Path) -> None:
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(struct.pack("<Q", 1 << 62) + shard.read_bytes()[8:])


def climbing_index(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../good/model-00002"))


BROKEN: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "cut-gguf": (lambda home: gguf(home, "cut-gguf", lambda data: data[: len(data) // 2]), "ends at byte"),
    "hostile-gguf": (
        lambda home: gguf(home, "hostile-gguf", lambda data: data[:8] + b"\xff" * 16 + data[24:]),
        "tensors",
    ),
    "no-gguf": (lambda home: gguf(home, "no-gguf", lambda data: b"\x80\x04" + bytes(5000)), "GGUF"),
    "cut-shard": (lambda home: folder(home, "cut-shard", cut_shard), "model-00002-of-00003.safetensors"),
    "lying-header": (lambda home: folder(home, "lying-header", lying_header), "announces a header"),
    "climbing-index": (lambda home: folder(home, "climbing-index", climbing_index), "it names the file"),
    "not-as-listed": (
        lambda home: folder(home, "not-as-listed") | {"files": good_files(home) | {"config.json": "0" * 64}},
        "has the sha256",
    ),
}


def good_files(home: Path) -> dict[str, Any]:
    files: dict[str, Any] = yaml.safe_load((home / "models.yaml").read_text())["models"]["good"]["files"]
    return files


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """On the CPU device, with "good" loaded and a catalogue of broken ones."""
    home = tmp_path_factory.mktemp("real")
    models = {"good": folder(home, "good")}
    (home / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    models |= {name: make(home) for name, (make, _) in BROKEN.items()}
    (home / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    with running_peers(home) as made:
        config = {"models": {"catalogue": str(home / "models.yaml")}, "engine": {"stall": STALL}}
        it = made.make(config, device="CPU")
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        (it.data / "cache").mkdir(mode=0o700, parents=True)
        it.data.chmod(0o700)
        (it.data / "cache" / "cpu0").symlink_to(CACHE)  # kernels that other tests have compiled
        it.start()
        it.await_workers(within_s=LOAD_S_MAX)
        load(it, "good", seen=SEEN)
        yield it


def state(peer: Peer, model: str) -> dict[str, Any]:
    """Of the model on the only worker; {} where it is not."""
    (worker,) = peer.get("/models/assignments")["assignments"]
    return next((found for found in worker["models"] if found["name"] == model), {})


def load(
    peer: Peer, model: str, until: str = "loaded", seen: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Its state when it is there. `seen` gets those on the way."""
    peer.post("/models/assign", {"model_name": model, "preload": True})

    def there() -> dict[str, Any]:
        found = state(peer, model)
        if seen is not None:
            seen.append(found)
        return found if found.get("status") == until else {}

    return poll(f"{model} is {until}", there, LOAD_S_MAX, 0.02)


def unload(peer: Peer, model: str) -> None:
    peer.post("/models/unload", {"model_name": model, "force": True})
    poll(f"{model} is gone", lambda: not state(peer, model), 20.0, 0.05)


def generate(peer: Peer, tokens: int = 20) -> str:
    return str(peer.submit("the moon", **task(tokens))["task_id"])


def task(tokens: int) -> dict[str, Any]:
    parameters = {"prompt": "the moon", "max_tokens": tokens, "temperature": 0.0}
    return {"model": "good", "parameters": parameters}


@pytest.fixture(scope="module")
def long_text(peer: Peer) -> str:
    """Of so many tokens that something can be done to the engine meanwhile."""
    return text_of(peer, generate(peer, LONG))[0]


def text_of(peer: Peer, task_id: str, wait_s: float = 60.0) -> tuple[str, int]:
    """What was generated, and in which attempt."""
    ended = peer.task(task_id, wait_s=wait_s)
    assert ended["status"] == "completed", ended
    return ended["result"]["generated_text"], ended["attempt"]


def test_load_progress_comes_with_its_stage(peer: Peer) -> None:
    states = [found for found in SEEN if found]
    stages = [found["stage"] for found in states if found["stage"]]
    assert stages == sorted(stages, key=["fetch", "verify", "wait", "read", "upload", "compile"].index)
    assert stages[-1] == "compile"
    assert all(found["status"] == "loading" for found in states if found["stage"] == "compile")
    assert (states[-1]["status"], states[-1]["stage"]) == ("loaded", None)
    assert state(peer, "good")["memory_usage_bytes"] > 0


@pytest.mark.parametrize("model", BROKEN)
def test_a_broken_file_is_said_and_harms_nothing(peer: Peer, model: str) -> None:
    engine = one_engine(peer)
    before = held(engine).shared
    failed = load(peer, model, "failed")
    assert BROKEN[model][1] in failed["error"]
    unload(peer, model)
    assert one_engine(peer) == engine
    poll("its memory is back", lambda: held(engine).shared <= before + 65_536, 10.0, 0.05)
    assert text_of(peer, generate(peer))[1] == 1


def test_kill_9_in_the_middle_of_a_text(peer: Peer, long_text: str) -> None:
    engine, task_id = one_engine(peer), generate(peer, LONG)
    poll("it generates", lambda: (peer.task(task_id).get("tokens_so_far") or 0) > 0, 20.0)
    os.kill(engine, signal.SIGKILL)
    new_engine(peer, engine)
    assert text_of(peer, task_id) == (long_text, 2)


def test_a_frozen_engine_is_ended_and_its_task_done_by_the_next(peer: Peer) -> None:
    right, _ = text_of(peer, generate(peer))
    engine = one_engine(peer)
    os.kill(engine, signal.SIGSTOP)
    began, task_id = time.monotonic(), generate(peer)
    poll("it is ended", lambda: not is_engine(engine), 30.0)
    assert time.monotonic() - began > STALL["decode_s"] - 1.5
    assert text_of(peer, task_id)[0] == right
    (worker,) = peer.workers()
    assert worker["status"] in ("online", "busy")
    assert any("no sign of life" in line["reason"] for line in peer.log_lines("engine_died"))


def address_space(pid: int, more: int | None) -> None:
    """Let the process have so many bytes more than it has; None: as many as it wants."""
    most = resource.RLIM_INFINITY if more is None else psutil.Process(pid).memory_info().vms + more
    resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def test_memory_that_ends_during_a_load_fails_the_load(peer: Peer) -> None:
    (worker,) = peer.workers()
    engine = one_engine(peer)
    peer.post(f"/workers/{worker['worker_id']}/restart")  # forgets the deaths above: a third is a quarantine
    new_engine(peer, engine)
    right, _ = text_of(peer, generate(peer))
    unload(peer, "good")
    engine = one_engine(peer)
    before = held(engine).shared
    address_space(engine, 200_000)
    failed = load(peer, "good", "failed")
    if is_engine(
        engine
    ):  # where memory ends is not ours to choose: a library that cannot go on ends the process
        address_space(engine, None)
        assert "memory" in failed["error"] or "did not fit" in failed["error"]
        assert held(engine).shared <= before + 65_536
    unload(peer, "good")
    load(peer, "good")
    assert text_of(peer, generate(peer))[0] == right


def test_memory_that_ends_while_tasks_run_costs_an_attempt(peer: Peer, long_text: str) -> None:
    engine, task_id = one_engine(peer), generate(peer, LONG)
    poll("it generates", lambda: (peer.task(task_id).get("tokens_so_far") or 0) > 0, 20.0)
    address_space(engine, -psutil.Process(engine).memory_info().vms)
    prompt = "the moon " * 50_000  # counting its tokens needs megabytes that are not there
    long = peer.submit("", model="good", parameters={"prompt": prompt, "max_tokens": 5})["task_id"]
    assert text_of(peer, task_id) == (long_text, 2)
    ended = peer.task(long, wait_s=60)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "prompt_too_long")
    assert not is_engine(engine)


def test_a_model_that_cannot_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    models = {"good": folder(tmp_path, "good") | {"memory_bytes": 100_000}}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    with running_peers(tmp_path) as made:
        engine = {"memory_limit_bytes": 500_000, "memory_reserve_bytes": 0}
        it = made.make(
            {"models": {"catalogue": str(tmp_path / "models.yaml")}, "engine": engine}, device="CPU"
        )
        (it.data / "cache").mkdir(mode=0o700, parents=True)
        it.data.chmod(0o700)
        (it.data / "cache" / "cpu0").symlink_to(CACHE)
        it.start()
        it.await_workers(within_s=LOAD_S_MAX)
        failed = load(it, "good", "failed")
        assert "needs" in failed["error"]
        assert "the device may use 500000" in failed["error"]
