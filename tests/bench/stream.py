"""Streams of 64 tokens: what the control plane adds to the engine's own first token, and CPU per stream.

Ours: `POST /tasks`, then `GET /tasks/{id}/stream` on the same connection; the first byte counts from the POST
on. Its stand-in engine gives TOKENS_PER_S tokens a second; the engine's own time is measured on the engine
process without a peer. LiteLLM's proxy streams from a mock model of the same pace.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.protocol import Configure, Load, Loaded, Tokens
from tests.bench.environments import REFERENCES, environment, pinned
from tests.bench.load import Outcome, Spec, http_request, summary
from tests.bench.peer import Peer, peer
from tests.bench.processes import Missing, Server, cpu_s, free_port, run_load, started, temporary
from tests.bench.report import Options, Result, Row, median
from tests.engine.harness import EngineProcess

TOKENS = 64
TOKENS_PER_S = 200.0
CONCURRENT = 8
ENGINE_RUNS = 20
START_S = 60.0
STREAM_S = 2.0  # a window holds several streams
PROMPT = " ".join(f"w{number}" for number in range(TOKENS))
CONFIG = f"engine:\n  slots: {2 * CONCURRENT}\n  fake:\n    tokens_per_s: {TOKENS_PER_S}\n"


@dataclass
class Proxy:
    """A way to the tokens: the load for it, and whose CPU counts."""

    name: str
    spec: dict[str, Any]
    server: Server
    only_itself: bool  # without the children: the engine is not the control plane

    def processes(self) -> list[psutil.Process]:
        return [self.server.process] if self.only_itself else self.server.tree()


def engine_first_token_ms() -> list[float]:
    """From `Run` to the first `Tokens`, on the stand-in engine process alone."""
    fake = {"tokens_per_s": TOKENS_PER_S}
    took: list[float] = []
    with EngineProcess(Configure(worker_id="bench", device="fake", fake=fake)) as engine:
        engine.send(Load(model="m", path="", family=""))
        engine.wait_type(Loaded)
        for number in range(ENGINE_RUNS):
            start, name = len(engine.seen), f"run/{number}"
            began = time.perf_counter()
            engine.run(name, prompt=PROMPT, max_tokens=TOKENS)
            engine.wait_type(Tokens, start=start)  # runs follow each other, so it is this one's
            took.append((time.perf_counter() - began) * 1e3)
            engine.wait_end(name)
    return took


def our_spec(ours: Peer) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": TOKENS}
    task = {"task_type": "text_generation", "model_name": "echo", "parameters": body}
    post = ours.spec("/tasks", json.dumps(task).encode())
    then = http_request("GET", "/tasks/{task_id}/stream", b"", ours.headers())
    return {"port": ours.port, "request": post.request, "then": then, "marker": "event: token"}


@contextmanager
def litellm(home: Path) -> Iterator[tuple[Proxy, dict[str, Any]]]:
    """The proxy, and the load for the mock model itself. Raises Missing."""
    python = environment("litellm")
    mock_port, port = free_port(), free_port()
    key = f"sk-{secrets.token_hex(32)}"
    model = {"model": "openai/mock", "api_base": f"http://127.0.0.1:{mock_port}/v1", "api_key": "none"}
    models = [{"model_name": "mock", "litellm_params": model}]
    (home / "litellm.yaml").write_text(
        json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}})
    )
    variables = {
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "NO_PROXY": "127.0.0.1",
        "HOME": str(home),
    }
    mock = [sys.executable, str(REFERENCES / "mock_model.py"), str(mock_port), str(TOKENS), str(TOKENS_PER_S)]
    proxy = [str(python.parent / "litellm"), "--config", str(home / "litellm.yaml"), "--host", "127.0.0.1"]
    body = {"model": "mock", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    request = http_request(
        "POST", "/v1/chat/completions", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"}
    )
    with (
        started(mock, home / "mock.log") as model_server,
        started([*proxy, "--port", str(port), "--num_workers", "1"], home / "log", home, variables) as server,
    ):
        model_server.wait_port(mock_port, START_S)
        server.wait_port(port, START_S)
        spec: dict[str, Any] = {"port": port, "request": request, "marker": "w0 "}
        run_load(
            Spec(**spec, seconds=START_S, warmup_s=0.0, exchanges_max=4)
        )  # its first answers take seconds
        yield Proxy("LiteLLM", spec, server, only_itself=False), spec | {"port": mock_port}


def _load(spec: dict[str, Any], connections: int, seconds: float) -> Outcome:
    return run_load(Spec(**spec, connections=connections, seconds=max(seconds, STREAM_S), warmup_s=1.0))


class Streams:
    """First bytes and CPU of the ways to the tokens, round by round."""

    def __init__(self) -> None:
        self.first_ms: dict[str, list[float]] = {}
        self.busy_ms: dict[str, list[float]] = {}
        self.cpu_ms: dict[str, list[float]] = {}
        self.raw: dict[str, list[Any]] = {}
        self.missing: dict[str, str] = {}

    def round(self, proxy: Proxy, seconds: float) -> None:
        try:
            alone = _load(proxy.spec, 1, seconds)
            before, processes = cpu_s(proxy.processes()), proxy.processes()
            several = _load(proxy.spec, CONCURRENT, seconds)
        except Missing as error:
            self.missing[proxy.name] = str(error)
            return
        cpu_ms = (cpu_s(processes) - before) * 1e3 / max(1, several.total)
        self.first_ms.setdefault(proxy.name, []).append(alone.first_byte_ms["p50"])
        self.busy_ms.setdefault(proxy.name, []).append(several.first_byte_ms["p50"])
        self.cpu_ms.setdefault(proxy.name, []).append(cpu_ms)
        self.raw.setdefault(proxy.name, []).append([asdict(alone), asdict(several)])


def measure(options: Options) -> Result:
    streams, proxies = Streams(), []
    mock_ms: dict[int, float] = {}
    with ExitStack() as stack:
        home = stack.enter_context(temporary())
        engine_ms = engine_first_token_ms()
        try:
            ours = stack.enter_context(peer(config=CONFIG))
            ours.warm_up()
            proxies.append(Proxy("ours", our_spec(ours), ours.server, only_itself=True))
        except Missing as error:
            streams.missing["ours"] = str(error)
        try:
            proxy, mock_spec = stack.enter_context(litellm(home))
            for connections in (1, CONCURRENT):
                mock_ms[connections] = _load(mock_spec, connections, options.seconds).first_byte_ms["p50"]
            proxies.append(proxy)
        except Missing as error:
            streams.missing["LiteLLM"] = str(error)
        for _ in range(options.rounds):
            for proxy in proxies:
                if proxy.name not in streams.missing:
                    streams.round(proxy, options.seconds)
    engine = median(engine_ms) or 0.0
    raw = {
        "rounds": streams.raw,
        "engine_own_first_token_ms": summary([took / 1e3 for took in engine_ms]),
        "mock_own_first_token_ms": mock_ms,
        "missing": streams.missing,
        "versions": {"litellm": pinned("litellm", "litellm")},
    }
    return Result(_rows(streams, engine, mock_ms), raw)


def _rows(streams: Streams, engine_ms: float, mock_ms: dict[int, float]) -> list[Row]:
    note = "; ".join(f"{name} missing: {why}" for name, why in streams.missing.items())

    def added(of: dict[str, list[float]], name: str, own_ms: float) -> float | None:
        through = median(of.get(name, []))
        return None if through is None else through - own_ms

    one, several = mock_ms.get(1, 0.0), mock_ms.get(CONCURRENT, 0.0)
    return [
        Row(
            "stream, added to the first byte, 1 stream",
            added(streams.first_ms, "ours", engine_ms),
            added(streams.first_ms, "LiteLLM", one),
            "ms",
            "LiteLLM proxy",
            "",
            note or "ours includes storing the task durably and assigning it",
        ),
        Row(
            f"stream, added to the first byte, {CONCURRENT} streams",
            added(streams.busy_ms, "ours", engine_ms),
            added(streams.busy_ms, "LiteLLM", several),
            "ms",
            "LiteLLM proxy",
        ),
        Row(
            f"stream, CPU per stream of {TOKENS} tokens",
            median(streams.cpu_ms.get("ours", [])),
            median(streams.cpu_ms.get("LiteLLM", [])),
            "ms",
            "LiteLLM proxy",
            "",
            "the proxy and the peer alone: no engine, no mock model, no client",
        ),
    ]
