"""Who is measured beside each other: the engine over its socket, llama.cpp as a worker, tinygrad's own server.

Each is a context manager that raises Missing when it cannot be had. All get two threads: the machine's cores.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from engine.protocol import (
    Configure,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Ready,
    RunFailed,
    Tokens,
    Unusable,
)
from tests.bench.engine.models import Model
from tests.bench.environments import BENCH, REFERENCES, built, environment
from tests.bench.processes import CORES, REPOSITORY, Missing, Server, free_port, started, temporary
from tests.engine.harness import EngineProcess

CACHE = BENCH / "engine-cache"  # compiled kernels, as a host keeps them between starts
CONTEXT = 2048
SLOTS = 16
THREADS = len(CORES)
START_S = 600.0  # a first start compiles every kernel
ANSWER_S = 600.0
HTTP_LINE_MAX = 65536
LLAMA_FLAGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"


@dataclass
class Stream:
    """One request's answer. Seconds since it was sent; `steps` are the times at which tokens came."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps: list[float] = field(default_factory=list)
    failure: str = ""
    began_s: float = 0.0  # on the measuring process's clock

    @property
    def first_s(self) -> float:
        return self.steps[0]

    @property
    def last_s(self) -> float:
        return self.steps[-1]

    def raw(self) -> dict[str, Any]:
        return asdict(self)


# ---------------------------------------------------------------- ours


class Engine(EngineProcess):
    """The engine with its messages' times. Greedy."""

    def __init__(self, configure: Configure, log: Path) -> None:
        self.times: list[float] = []  # of each message in `seen`
        self.spawned_s = time.perf_counter()
        self._runs = 0
        with log.open("ab") as out:
            super().__init__(configure, log=out)

    def receive(self, timeout_s: float) -> bool:
        came = super().receive(timeout_s)
        self.times += [time.perf_counter()] * (len(self.seen) - len(self.times))
        return came

    def start(self, prompt: str, tokens: int) -> tuple[str, float]:
        """Send a run; its id and when."""
        self._runs += 1
        run_id, sent_s = f"bench/{self._runs}", time.perf_counter()
        self.run(run_id, prompt=prompt, temperature=0.0, max_tokens=tokens)
        return run_id, sent_s

    def finish(self, runs: Sequence[tuple[str, float]]) -> list[Stream]:
        """Wait until all have ended, and what came of each. Raises Missing."""
        for run_id, _ in runs:
            self.wait_end(run_id, ANSWER_S)
        streams = {run_id: Stream(began_s=sent_s) for run_id, sent_s in runs}
        for message, at in zip(self.seen, self.times, strict=True):
            stream = streams.get(getattr(message, "run_id", ""))
            if stream is None:
                continue
            if isinstance(message, Tokens) and message.count:
                stream.tokens += message.count
                stream.steps.append(at - stream.began_s)
            elif isinstance(message, Finished):
                stream.prompt_tokens, stream.cached_tokens = message.prompt_tokens, message.cached_tokens
                stream.steps = stream.steps or [at - stream.began_s]  # its first token was an end token
            elif isinstance(message, RunFailed):
                raise Missing(f"{message.run_id}: {message.code} {message.message}")
        self.seen.clear()
        self.times.clear()
        return list(streams.values())

    def wait_tokens(self, run_id: str, count: int) -> None:
        """Until a run has had so many messages with tokens, or has ended. Raises TimeoutError."""
        have = 0

        def enough(message: Any) -> bool:
            nonlocal have
            if getattr(message, "run_id", "") == run_id:
                have += isinstance(message, Tokens)
                return have >= count or isinstance(message, Finished | RunFailed)
            return False

        self.wait_for(enough, ANSWER_S)


@contextmanager
def ours(
    model: Model, slots: int = SLOTS, context: int = CONTEXT, cache: Path = CACHE
) -> Iterator[tuple[Engine, Loaded]]:
    """The engine on CPU:LLVM with the model loaded. Raises Missing."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    configure = Configure(worker_id="bench", device="CPU:LLVM", slots_max=slots, cache_dir=str(cache))
    with temporary() as home, Engine(configure, home / "log") as engine:
        try:
            ready = engine.wait_type(Ready, Unusable, timeout_s=START_S)
            if not isinstance(ready, Ready):
                raise Missing(f"the engine: {ready}")
            engine.send(
                Load(model="m", path=str(model.path), family=model.family, context=context, slots=slots)
            )
            loaded = engine.wait_type(Loaded, LoadFailed, timeout_s=START_S)
            if not isinstance(loaded, Loaded):
                raise Missing(f"the engine: {loaded}")
            yield engine, loaded
        except (EOFError, TimeoutError) as error:
            raise Missing(f"the engine: {error} {(home / 'log').read_text()[-800:]}") from None


# ---------------------------------------------------------------- llama.cpp


def llama_python() -> Path:
    """Its environment, built for this processor. Raises Missing."""
    flags = {"CMAKE_ARGS": LLAMA_FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(THREADS)}
    return built("llama-cpp", "llama_cpp_python", flags)


class Llama:
    """`references/llama_cpp_worker.py`: asked by lines, answered by lines."""

    def __init__(self, server: subprocess.Popen[str], log: Path) -> None:
        self._server, self._log = server, log
        self.process = psutil.Process(server.pid)
        self._answer(START_S)  # it says when the model is there

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Raises Missing."""
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps({"do": do} | fields) + "\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            raise Missing(f"llama.cpp ended: {self._log.read_text()[-800:]}") from None
        return self._answer(ANSWER_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """One line: nothing else is ever buffered between two questions."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout_s)[0]:
            raise Missing(f"llama.cpp said nothing in {timeout_s:.0f} s")
        line = self._server.stdout.readline()
        if not line:
            raise Missing(f"llama.cpp ended: {self._log.read_text()[-800:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        return self.ask("generate", prompts=list(map(list, prompts)), tokens=tokens)


@contextmanager
def llama(model: Model, sequences: int = 1, context: int = CONTEXT) -> Iterator[Llama]:
    """llama.cpp with the model loaded. Raises Missing."""
    shape = [str(model.path), str(context), str(sequences), str(THREADS)]
    command = [str(llama_python()), str(REFERENCES / "llama_cpp_worker.py"), *shape]
    with temporary() as home, (home / "log").open("ab") as log:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True) as server:
            try:
                yield Llama(server, home / "log")
            finally:
                server.kill()


# ---------------------------------------------------------------- tinygrad's own server


class Tinygrad:
    """Chat completions over server-sent events; one request after the other, the rest wait in the socket's queue."""

    def __init__(self, server: Server, port: int, ready_s: float) -> None:
        self.server, self.ready_s, self._port = server, ready_s, port

    def generate(self, prompt: str, tokens: int) -> Stream:
        stream = Stream(began_s=time.perf_counter())
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            while line := response.readline(HTTP_LINE_MAX):
                if line.startswith(b"data: {"):
                    self._take(stream, json.loads(line[6:]))
        except (OSError, ValueError, http.client.HTTPException) as error:
            stream.failure = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        if not stream.steps:
            stream.failure = stream.failure or "no token came"
        return stream

    @staticmethod
    def _take(stream: Stream, event: Mapping[str, Any]) -> None:
        if usage := event.get("usage"):
            stream.tokens, stream.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        elif "content" in event["choices"][0]["delta"] and "role" not in event["choices"][0]["delta"]:
            stream.steps.append(time.perf_counter() - stream.began_s)

    def together(
        self, prompts: Sequence[str], tokens: Sequence[int], delays_s: Sequence[float]
    ) -> list[Stream]:
        """Each sent after its delay. Raises Missing when one failed."""
        done: list[Stream] = []

        def one(prompt: str, count: int, delay_s: float) -> None:
            time.sleep(delay_s)
            done.append(self.generate(prompt, count))

        threads = [
            threading.Thread(target=one, args=each) for each in zip(prompts, tokens, delays_s, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures := [stream.failure for stream in done if stream.failure]:
            raise Missing(f"tinygrad's server: {failures[0]} {self.server.log()}")
        return sorted(done, key=lambda stream: stream.began_s)


@contextmanager
def tinygrad(model: Model) -> Iterator[Tinygrad]:
    """tinygrad's server with the model loaded and its kernels cached. Raises Missing."""
    port = free_port()
    script = str(REFERENCES / "tinygrad_server.py")
    command = [str(environment("tinygrad")), script, str(model.path), str(port), str(CONTEXT)]
    home = BENCH / "tinygrad-cache"
    home.mkdir(exist_ok=True)
    variables = {"PYTHONPATH": str(REPOSITORY), "CACHEDB": str(home / "kernels.db"), "DEV": "CPU:LLVM"}
    with temporary() as logs, started(command, logs / "log", environment=variables) as server:
        server.wait_port(port, START_S)
        yield Tinygrad(server, port, time.perf_counter() - server.began_s)


def peak_mib(process: psutil.Process) -> float:
    """The most resident memory that a process has had."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise Missing(f"no VmHWM of process {process.pid}: {os.strerror(3)}")
