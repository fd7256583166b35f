"""The stand-in engine: `Configure.device == "fake"`. Same process and protocol, no model, no GPU.

Every model "loads" and behaves as `echo`: it gives back the prompt's words, one token a word; of an embedding task's
texts it gives vectors that are the same for the same words, of a tensor task's arrays the arrays. It says so
(`Ready.stand_in`). It can misbehave on purpose, by a `Fault` message, by `Configure.fake["fault"]` and by a prompt that
begins with "fault:<kind>". Of the parameters of texts it knows the prompt, max_tokens and logprobs, which are 0: what
it says is certain. The faults:

    hang            no heartbeat, no step, no answer for ever; still exits at end of stream
    die             os._exit(70)
    slow            100 times slower
    wrong           a frame that is not the protocol
    out_of_memory   runs (and, set for the engine, loads) fail with that code
    hot             heartbeats say 110 degrees Celsius

One thread and one socket. Everything that one wake-up yields goes out in one send, because it also serves to
measure the control plane at thousands of runs a second. Heartbeats come once a second, busy or idle.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import msgspec

from engine.errors import RunError
from engine.fake.embedding import embed, given_back, longest
from engine.process import EXIT_FAULT, EXIT_OK, EXIT_PROTOCOL, EXIT_UNUSABLE, RECV_BYTES, exit_now, log
from engine.protocol import (
    Cancel,
    Configure,
    CountTokens,
    Fault,
    Finished,
    FinishReason,
    Frames,
    Heartbeat,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Logprobs,
    Message,
    Output,
    Phase,
    ProtocolError,
    Ready,
    Run,
    RunFailed,
    Shutdown,
    Started,
    TokenCount,
    TokenLogprob,
    Tokens,
    Unload,
    Unloaded,
    Unusable,
    encode,
)

HEARTBEAT_S = 1.0
SLOWDOWN = 100.0
FASTEST_TOKENS_PER_S = 1000.0  # what "as fast as possible" counts as when it is to be slowed down
HOT_C = 110.0
QUEUE_RUNS_MAX = 100_000
MAX_TOKENS_DEFAULT = 256
GARBAGE = b"\x00\x00\x00\x08\xc1 wrong!"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`Configure.fake`. `tokens_per_s` is of one run; 0 is as fast as possible."""

    model_memory_bytes: float = 1e9
    memory_total_bytes: float = 16e9
    load_s: float = 0.0
    tokens_per_s: float = 0.0
    temperature_c: float = 45.0
    context_max: int = 8192
    slots_fit: int = 0  # into its memory; 0: all that are asked for
    fault: str = "none"


@dataclass
class FakeRun:
    """A run in a slot. `rate` in tokens a second, 0 for at once."""

    run_id: str
    model: str
    words: list[str]
    prompt_tokens: int
    truncated: bool
    rate: float
    started_s: float
    logprobs: bool = False
    given: int = 0
    first_token_s: float = 0.0

    def due_s(self) -> float:
        """When its next token is ready."""
        return self.started_s + (self.given + 1) / self.rate if self.rate else self.started_s


@dataclass
class FakeModel:
    load: Load
    memory_bytes: int
    ready_s: float  # on the monotonic clock
    began_s: float
    loaded: bool = False
    active: dict[str, FakeRun] = field(default_factory=dict)


def prompt_text(parameters: dict[str, Any]) -> str:
    """The prompt, the contents of all messages, or the longest text that is to be embedded."""
    if "input" in parameters:
        return longest(parameters)
    prompt = parameters.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = parameters.get("messages") or []
    return " ".join(str(message.get("content", "")) for message in messages)


def _finished(
    run_id: str, reason: str, prompt_tokens: int, generated: int, took_s: float, first_s: float = 0.0
) -> Finished:
    return Finished(
        run_id=run_id,
        reason=cast(FinishReason, reason),
        prompt_tokens=prompt_tokens,
        tokens_generated=generated,
        processing_s=took_s,
        first_token_s=first_s,
    )


def _certain(word: str) -> Logprobs:
    return Logprobs(TokenLogprob(word, word.encode(), 0.0))


class FakeEngine:
    """Owns the socket. `serve` returns never: it exits the process."""

    def __init__(self, sock: socket.socket, configure: Configure, frames: Frames) -> None:
        self._sock = sock
        self._frames = frames
        self._configure = configure
        self._out = bytearray()
        self._models: dict[str, FakeModel] = {}
        self._queue: deque[Run] = deque()
        self._active_total = 0
        self._slot_freed = False
        self._fault = "none"
        self._hung = False
        self._steps = 0
        self._heartbeat_due_s = 0.0

    # ------------------------------------------------------------ the loop

    def serve(self, waiting: list[object]) -> NoReturn:
        """Answer `Ready`, then serve until `Shutdown` or end of stream."""
        self._sock.setblocking(False)
        self._get_ready()
        for message in waiting:
            self._handle(message)
        while True:
            if not self._hung:
                self._step(time.monotonic())
            self._flush()
            self._wait_and_read()

    def _get_ready(self) -> None:
        try:
            self._settings = msgspec.convert(self._configure.fake, Settings, strict=False)
        except msgspec.ValidationError as error:
            self._send(Unusable(code="bad_configuration", message=f"Configure.fake: {error}"))
            self._flush()
            exit_now(EXIT_UNUSABLE)
        self._memory_total = int(self._configure.memory_limit_bytes or self._settings.memory_total_bytes)
        self._send(
            Ready(
                device="fake",
                device_name="stand-in engine (no GPU)",
                architecture="fake",
                memory_total_bytes=self._memory_total,
                self_test_s=0.0,
                stand_in=True,
            )
        )
        self._flush()
        self._misbehave(self._settings.fault)

    def _wait_and_read(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
        poller.poll(self._timeout_ms())
        try:
            data = self._sock.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            exit_now(EXIT_OK)
        if not data:
            exit_now(EXIT_OK)
        if self._hung:
            return
        try:
            messages = self._frames.feed(data)
        except ProtocolError as error:
            log("protocol_error", error=str(error))
            exit_now(EXIT_PROTOCOL)
        for message in messages:
            self._handle(message)

    def _timeout_ms(self) -> float | None:
        if self._hung:
            return None
        due = self._heartbeat_due_s
        for model in self._models.values():
            if not model.loaded:
                due = min(due, model.ready_s)
            due = min((run.due_s() for run in model.active.values()), default=due) if model.active else due
        return max(0.0, (due - time.monotonic()) * 1000.0 + 0.5)

    def _send(self, message: Message) -> None:
        self._out += encode(message)

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            except ConnectionError:
                exit_now(EXIT_OK)
            del self._out[:sent]

    # ------------------------------------------------------------ messages

    def _handle(self, message: object) -> None:
        if self._hung:
            return
        match message:
            case Run():
                self._run(message)
            case Cancel():
                self._cancel(message.run_id)
            case CountTokens():
                tokens = len(prompt_text(message.parameters).split())
                context = self._settings.context_max
                self._send(TokenCount(request_id=message.request_id, tokens=tokens, context=context))
            case Load():
                self._load(message)
            case Unload():
                self._unload(message.model)
            case Fault():
                self._misbehave(message.kind)
            case Shutdown():
                self._flush()
                exit_now(EXIT_OK)
            case _:
                log("protocol_error", error=f"unexpected {type(message).__name__}")
                exit_now(EXIT_PROTOCOL)

    def _misbehave(self, kind: str) -> None:
        """Set the engine's fault; `hot` and `none` show in the heartbeat that follows."""
        self._fault = kind
        if kind == "die":
            self._flush()
            os._exit(EXIT_FAULT)
        elif kind == "hang":
            self._flush()
            self._hung = True
        elif kind == "wrong":
            self._out += GARBAGE
        self._heartbeat_due_s = 0.0

    def _memory_used(self) -> int:
        return sum(model.memory_bytes for model in self._models.values())

    def _load(self, load: Load) -> None:
        need, used = int(self._settings.model_memory_bytes), self._memory_used()
        if load.model in self._models:
            text = f"{load.model} is already loaded"
            self._send(LoadFailed(model=load.model, code="already_loaded", message=text))
        elif used + need > self._memory_total or self._fault == "out_of_memory":
            text = (
                f"{load.model} needs {need} bytes; {used} of the device's {self._memory_total} bytes are "
                f"taken and {self._memory_total - used} are free: unload a model or choose a smaller one"
            )
            self._send(LoadFailed(model=load.model, code="out_of_memory", message=text))
        else:
            now = time.monotonic()
            ready_s = now + self._settings.load_s * (SLOWDOWN if self._fault == "slow" else 1.0)
            self._models[load.model] = FakeModel(load, need, ready_s, now)
            self._send(LoadProgress(model=load.model, stage="read", done=0, total=need))

    def _unload(self, name: str) -> None:
        model = self._models.pop(name, None)
        if model is None:
            self._send(Unloaded(model=name, freed_bytes=0))
            return
        ended = list(model.active) + [run.run_id for run in self._queue if run.model == name]
        self._active_total -= len(model.active)
        self._slot_freed = True
        self._queue = deque(run for run in self._queue if run.model != name)
        for run_id in ended:
            self._send(
                RunFailed(run_id=run_id, code="unloaded", message=f"{name} was unloaded", retryable=True)
            )
        self._send(Unloaded(model=name, freed_bytes=model.memory_bytes))

    def _run(self, run: Run) -> None:
        model = self._models.get(run.model)
        fault = self._run_fault(run)
        if model is None:
            self._fail(
                run.run_id, "unknown_model", f"{run.model} is not loaded on this device", retryable=True
            )
        elif fault == "out_of_memory":
            self._fail(
                run.run_id,
                "out_of_memory",
                "the stand-in engine was told to be out of memory",
                retryable=True,
            )
        elif len(self._queue) >= QUEUE_RUNS_MAX:
            self._fail(run.run_id, "engine_busy", f"{QUEUE_RUNS_MAX} runs already wait", retryable=True)
        elif self._queue or not self._has_slot(model):
            self._queue.append(run)
        else:
            self._start(run, model)

    def _run_fault(self, run: Run) -> str:
        """The fault that applies to this run; engine-wide ones named by its prompt begin at once."""
        prompt = prompt_text(run.parameters)
        if not prompt.startswith("fault:"):
            return self._fault
        kind = prompt[len("fault:") :].split(maxsplit=1)[0]
        if kind in ("hang", "die", "wrong", "hot"):
            self._misbehave(kind)
        return kind

    def _fail(self, run_id: str, code: str, message: str, retryable: bool = False) -> None:
        self._send(RunFailed(run_id=run_id, code=code, message=message, retryable=retryable))

    def _cancel(self, run_id: str) -> None:
        for model in self._models.values():
            if run_id in model.active:
                self._end(model, model.active[run_id], "cancelled", time.monotonic())
                return
        for run in self._queue:
            if run.run_id == run_id:
                self._queue.remove(run)
                words = len(prompt_text(run.parameters).split())
                self._send(_finished(run_id, "cancelled", words, 0, 0.0))
                return

    # ------------------------------------------------------------ steps

    def _slots(self, load: Load) -> int:
        return min(load.slots, self._configure.slots_max, self._settings.slots_fit or load.slots)

    def _has_slot(self, model: FakeModel) -> bool:
        free = self._active_total < self._configure.slots_max and len(model.active) < self._slots(model.load)
        return model.loaded and free

    def _compute(self, run: Run, model: FakeModel) -> None:
        """All at once: there is nothing to wait for."""
        began_s = time.monotonic()
        try:
            if run.task_type == "tensor":
                tokens, arrays = 0, given_back(run.parameters)
            else:
                tokens, array = embed(run.parameters, model.load.context)
                arrays = [array]
        except RunError as error:
            self._fail(run.run_id, error.code, str(error))
            return
        self._steps += 1
        self._send(Started(run_id=run.run_id, prompt_tokens=tokens))
        self._send(Output(run_id=run.run_id, arrays=arrays))
        self._send(_finished(run.run_id, "stop", tokens, 0, time.monotonic() - began_s))

    def _start(self, run: Run, model: FakeModel) -> None:
        if run.task_type != "text_generation":
            self._compute(run, model)
            return
        words = prompt_text(run.parameters).split()
        if len(words) >= model.load.context:
            text = f"the prompt has {len(words)} tokens and the model's context here {model.load.context}"
            self._fail(run.run_id, "prompt_too_long", text)
            return
        most = int(run.parameters.get("max_tokens") or MAX_TOKENS_DEFAULT)
        rate = self._settings.tokens_per_s
        if "slow" in (self._fault, self._run_fault(run)):
            rate = (rate or FASTEST_TOKENS_PER_S) / SLOWDOWN
        now = time.monotonic()
        truncated = len(words) > most
        logprobs = bool(run.parameters.get("logprobs") or run.parameters.get("top_logprobs"))
        active = FakeRun(run.run_id, run.model, words[:most], len(words), truncated, rate, now, logprobs)
        self._send(Started(run_id=run.run_id, prompt_tokens=len(words)))
        model.active[run.run_id] = active
        self._active_total += 1
        self._advance(model, active, now)

    def _advance(self, model: FakeModel, run: FakeRun, now: float) -> None:
        """Give the tokens that are due by now."""
        total = len(run.words)
        due = total if run.rate == 0 else min(total, int((now - run.started_s) * run.rate))
        if due > run.given:
            text = " ".join(run.words[run.given : due])
            if run.given:
                text = " " + text
            else:
                run.first_token_s = now - run.started_s
            told = [_certain(word) for word in run.words[run.given : due]] if run.logprobs else []
            self._send(Tokens(run_id=run.run_id, text=text, count=due - run.given, logprobs=told))
            run.given = due
            self._steps += 1
        if run.given == total:
            self._end(model, run, "length" if run.truncated else "stop", now)

    def _end(self, model: FakeModel, run: FakeRun, reason: str, now: float) -> None:
        del model.active[run.run_id]
        self._active_total -= 1
        self._slot_freed = True
        took_s = now - run.started_s
        self._send(_finished(run.run_id, reason, run.prompt_tokens, run.given, took_s, run.first_token_s))

    def _step(self, now: float) -> None:
        for model in self._models.values():
            if not model.loaded and now >= model.ready_s:
                self._finish_load(model, now)
            for run in list(model.active.values()):
                self._advance(model, run, now)
        self._admit()
        if now >= self._heartbeat_due_s:
            self._beat(now)

    def _admit(self) -> None:
        """Start queued runs in order, passing over those whose model has no free slot."""
        if not self._queue or not self._slot_freed:
            return
        self._slot_freed = False
        waiting, self._queue = self._queue, deque()
        while waiting:
            run = waiting.popleft()
            model = self._models[run.model]
            if self._has_slot(model):
                self._start(run, model)
            else:
                self._queue.append(run)
            if self._active_total >= self._configure.slots_max:
                break
        self._queue.extend(waiting)

    def _finish_load(self, model: FakeModel, now: float) -> None:
        model.loaded = self._slot_freed = True
        load, need = model.load, model.memory_bytes
        self._send(LoadProgress(model=load.model, stage="read", done=need, total=need))
        self._send(
            Loaded(
                model=load.model,
                memory_bytes=need,
                load_s=now - model.began_s,
                context=load.context,
                slots=self._slots(load),
                slots_asked=min(load.slots, self._configure.slots_max),
            )
        )

    def _beat(self, now: float) -> None:
        phase: Phase = "idle"
        if any(not model.loaded for model in self._models.values()):
            phase = "load"
        elif self._active_total:
            phase = "decode"
        degrees = HOT_C if self._fault == "hot" else self._settings.temperature_c
        self._send(
            Heartbeat(
                phase=phase,
                step=self._steps,
                memory_used_bytes=self._memory_used(),
                temperature_c=degrees,
            )
        )
        self._heartbeat_due_s = now + HEARTBEAT_S
