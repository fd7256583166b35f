"""What goes on in one life of a simulated engine process: engine/fake, in virtual time and with a heap of moments.

Synchronous: `advance` takes what the peer sent and gives what the process sends. `due` says when to call again.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from engine.protocol import (
    Cancel,
    CountTokens,
    Finished,
    FinishReason,
    Heartbeat,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Message,
    Phase,
    Ready,
    Run,
    RunFailed,
    Shutdown,
    Started,
    TokenCount,
    Tokens,
    Unload,
    Unloaded,
    Unusable,
)
from simulations.errors import SimulatorError
from simulations.world.cards import Profile, SimCard, pieces, prompt_text, token_stem, tokens_wanted

QUEUE_RUNS_MAX: Final = 100_000
EXIT_FAULT: Final = 70

Wrong = Literal["duplicate_finished", "finished_after_cancel", "late_finished", "unknown_run"]


@dataclass
class Faults:
    """What is wrong with an engine: times on trio's clock, numbers of times yet to come."""

    hung_until: float = -1.0  # of this life only
    slow_until: float = -1.0
    slow_factor: float = 1.0
    cancels_ignored_until: float = -1.0
    loads_failing: int = 0
    loads_without_memory: int = 0
    runs_failing: int = 0
    self_tests_failing: int = 0
    late_s: float = 5.0
    wrong: dict[str, int] = field(default_factory=dict)  # Wrong, how often yet

    def slowdown(self, now: float) -> float:
        return self.slow_factor if now < self.slow_until else 1.0

    def take(self, kind: Wrong) -> bool:
        """Whether this is to go wrong now."""
        left = self.wrong.get(kind, 0)
        if left:
            self.wrong[kind] = left - 1
        return left > 0


@dataclass
class Active:
    """A run in a slot. `done` counts tokens, with fractions, up to `at`."""

    run: Run
    stem: str
    total: int
    prompt_tokens: int
    started_s: float
    at: float  # first: when its prompt is read
    done: float = 0.0
    given: int = 0
    first_token_s: float = 0.0


@dataclass
class Place:
    """A model on the device."""

    load: Load
    nbytes: int
    began_s: float
    loaded: bool = False
    leaving: bool = False
    active: dict[str, Active] = field(default_factory=dict)


class Work:
    def __init__(
        self, profile: Profile, card: SimCard, rng: random.Random, faults: Faults, slots_max: int, now: float
    ) -> None:
        self.exited: int | None = None  # its status
        self._profile = profile
        self._card = card
        self._faults = faults
        self._slots_max = slots_max
        self._out: list[Message] = []
        self._moments: list[tuple[float, int, Callable[[float], None]]] = []
        self._made = 0
        self._places: dict[str, Place] = {}
        self._queue: deque[Run] = deque()
        self._active = 0
        self._steps = 0
        self._loads_until = now
        self._ticking = False
        self._offset_s = rng.uniform(0.0, profile.batch_s)  # so that engines do not all speak at once
        self._self_test_s = rng.uniform(*profile.start_s)
        self._at(now + self._self_test_s, self._get_ready)

    def due(self) -> float:
        """When it next has something to do by itself."""
        soonest = self._moments[0][0] if self._moments else math.inf
        return max(soonest, self._faults.hung_until)

    def advance(self, now: float, inbox: deque[Message]) -> list[Message]:
        """Everything up to `now`. A process that hangs reads nothing and says nothing."""
        if now < self._faults.hung_until or self.exited is not None:
            return []
        self._run_moments(now)
        while inbox and self.exited is None:
            self._handle(inbox.popleft(), now)
        self._admit(now)
        self._run_moments(now)
        self._card.busy = self._active / self._slots_max
        out, self._out = self._out, []
        return out

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        self._made += 1
        heapq.heappush(self._moments, (when, self._made, act))

    def _run_moments(self, now: float) -> None:
        while self._moments and self._moments[0][0] <= now and self.exited is None:
            heapq.heappop(self._moments)[2](now)

    def _send(self, message: Message) -> None:
        self._out.append(message)

    def _get_ready(self, now: float) -> None:
        device = self._card.device
        self._send(Hello(product="simulated engine"))
        if self._faults.self_tests_failing:
            self._faults.self_tests_failing -= 1
            self._send(Unusable(code="self_test_failed", message=f"{device.device} computes wrongly"))
            self.exited = 1
            return
        self._send(
            Ready(
                device=device.device,
                device_name=device.name,
                architecture=device.architecture,
                memory_total_bytes=self._card.total_bytes,
                self_test_s=self._self_test_s,
                stand_in=device.stand_in,
            )
        )
        self._beat(now)

    def _beat(self, now: float) -> None:
        loading = [place for place in self._places.values() if not place.loaded]
        phase: Phase = "load" if loading else "decode" if self._active else "idle"
        degrees = self._card.temperature_c() if self._card.device.stand_in else None
        used = self._card.held_bytes()
        self._send(Heartbeat(phase=phase, step=self._steps, memory_used_bytes=used, temperature_c=degrees))
        self._at(now + self._profile.heartbeat_s, self._beat)

    # ------------------------------------------------------------ messages

    def _handle(self, message: object, now: float) -> None:
        match message:
            case Run():
                self._run(message, now)
            case Cancel():
                if now >= self._faults.cancels_ignored_until:
                    self._cancel(message.run_id, now)
            case CountTokens():
                tokens = len(prompt_text(message.parameters).split())
                context = self._profile.context_max
                self._send(TokenCount(request_id=message.request_id, tokens=tokens, context=context))
            case Load():
                self._load(message, now)
            case Unload():
                self._unload(message.model, now)
            case Shutdown():
                self.exited = 0
            case _:
                raise SimulatorError(f"a peer sent {type(message).__name__} to an engine")

    # ------------------------------------------------------------ models

    def _need(self, model: str) -> int:
        sizes = self._profile.memory_bytes or {}
        return int(sizes.get(model, self._profile.other_memory_bytes) * self._profile.memory_factor)

    def _load(self, load: Load, now: float) -> None:
        name, need, faults = load.model, self._need(load.model), self._faults
        if name in self._places:
            self._load_failed(name, "already_loaded", f"{name} is already loaded")
            return
        forced = faults.loads_without_memory > 0
        faults.loads_without_memory -= forced
        if not self._card.take(name, need, refuse=forced):
            free = self._card.total_bytes - self._card.used_bytes()
            text = f"{name} needs {need} bytes; {free} are free: unload a model or choose a smaller one"
            self._load_failed(name, "out_of_memory", text)
            return
        place = self._places[name] = Place(load, need, now)
        self._send(LoadProgress(model=name, stage="read", done=0, total=need))
        took_s = need / self._profile.load_bytes_per_s * faults.slowdown(now)
        if faults.loads_failing:
            faults.loads_failing -= 1
            self._at(now + took_s / 2, lambda at: self._break_load(place))
            return
        self._loads_until = max(now, self._loads_until) + took_s  # one after the other
        self._at(self._loads_until, lambda at: self._finish_load(place, at))

    def _load_failed(self, name: str, code: str, text: str) -> None:
        self._send(LoadFailed(model=name, code=code, message=text))

    def _break_load(self, place: Place) -> None:
        name = place.load.model
        if self._places.get(name) is not place or place.leaving:
            return
        del self._places[name]
        self._card.drop(name)
        self._load_failed(name, "bad_model_file", f"{name} cannot be read")
        for run in [run for run in self._queue if run.model == name]:
            self._queue.remove(run)
            self._fail(run.run_id, "unknown_model", f"{name} is not loaded on this device")

    def _finish_load(self, place: Place, now: float) -> None:
        load, need = place.load, place.nbytes
        if self._places.get(load.model) is not place or place.leaving:
            return
        place.loaded = True
        self._card.enter(load.model, "ready")
        self._send(LoadProgress(model=load.model, stage="read", done=need, total=need))
        self._send(
            Loaded(
                model=load.model,
                memory_bytes=need,
                load_s=now - place.began_s,
                context=load.context,
                slots=min(load.slots, self._slots_max),
            )
        )
        self._admit(now)

    def _unload(self, name: str, now: float) -> None:
        place = self._places.get(name)
        if place is None or place.leaving:
            self._send(Unloaded(model=name, freed_bytes=0))
            return
        place.leaving = True
        self._card.enter(name, "unloading")
        ended = [*place.active, *(run.run_id for run in self._queue if run.model == name)]
        self._active -= len(place.active)
        place.active.clear()
        self._queue = deque(run for run in self._queue if run.model != name)
        for run_id in ended:
            self._fail(run_id, "unloaded", f"{name} was unloaded")
        self._at(now + self._profile.unload_s, lambda at: self._finish_unload(name))

    def _finish_unload(self, name: str) -> None:
        del self._places[name]
        self._send(Unloaded(model=name, freed_bytes=self._card.drop(name)))

    # ------------------------------------------------------------ runs

    def _run(self, run: Run, now: float) -> None:
        place = self._places.get(run.model)
        if place is None or place.leaving:
            self._fail(run.run_id, "unknown_model", f"{run.model} is not loaded on this device")
        elif self._faults.runs_failing:
            self._faults.runs_failing -= 1
            self._fail(run.run_id, "out_of_memory", "no memory is left for this run")
        elif len(self._queue) >= QUEUE_RUNS_MAX:
            self._fail(run.run_id, "engine_busy", f"{QUEUE_RUNS_MAX} runs already wait")
        elif self._queue or not self._has_slot(place):
            self._queue.append(run)
        else:
            self._start(run, place, now)

    def _fail(self, run_id: str, code: str, text: str, retryable: bool = True) -> None:
        self._send(RunFailed(run_id=run_id, code=code, message=text, retryable=retryable))

    def _has_slot(self, place: Place) -> bool:
        return place.loaded and self._active < self._slots_max and len(place.active) < place.load.slots

    def _admit(self, now: float) -> None:
        """Start queued runs in order, passing over those whose model has no free slot."""
        if not self._queue or self._active >= self._slots_max:
            return
        waiting, self._queue = self._queue, deque()
        while waiting:
            run = waiting.popleft()
            place = self._places[run.model]
            if self._has_slot(place):
                self._start(run, place, now)
            else:
                self._queue.append(run)

    def _start(self, run: Run, place: Place, now: float) -> None:
        words = len(prompt_text(run.parameters).split())
        if words >= place.load.context:
            text = f"the prompt has {words} tokens and the model's context here {place.load.context}"
            self._fail(run.run_id, "prompt_too_long", text, retryable=False)
            return
        read_s = words / self._profile.prompt_tokens_per_s * self._faults.slowdown(now)
        total = tokens_wanted(run.parameters)
        place.active[run.run_id] = Active(run, token_stem(run.parameters), total, words, now, now + read_s)
        self._active += 1
        self._send(Started(run_id=run.run_id, prompt_tokens=words))
        if not self._ticking:
            self._ticking = True
            self._at(self._next_tick(now), self._tick)

    def _next_tick(self, now: float) -> float:
        batch_s = self._profile.batch_s
        at = self._offset_s + (math.floor((now - self._offset_s) / batch_s) + 1) * batch_s
        return at if at > now else at + batch_s

    def _tick(self, now: float) -> None:
        self._steps += 1
        rate = self._profile.tokens_per_s / self._faults.slowdown(now)
        for place in list(self._places.values()):
            for active in list(place.active.values()):
                self._progress(place, active, rate, now)
        self._ticking = self._active > 0
        if self._ticking:
            self._at(self._next_tick(now), self._tick)
        self._admit(now)

    def _progress(self, place: Place, active: Active, rate: float, now: float) -> None:
        if now <= active.at:
            return
        active.done += (now - active.at) * rate
        active.at = now
        due = min(active.total, int(active.done + 1e-6))
        if due > active.given:
            if not active.given:
                active.first_token_s = now - active.started_s
            text = pieces(active.stem, active.given, due)
            self._send(Tokens(run_id=active.run.run_id, text=text, count=due - active.given))
            active.given = due
        if active.given == active.total:
            self._end(place, active, "length", now)

    def _cancel(self, run_id: str, now: float) -> None:
        for place in self._places.values():
            active = place.active.get(run_id)
            if active is not None:
                self._end(place, active, "cancelled", now)
                return
        for run in self._queue:
            if run.run_id == run_id:
                self._queue.remove(run)
                words = len(prompt_text(run.parameters).split())
                self._send(_finished(run_id, "cancelled", words))
                return

    def _end(self, place: Place, active: Active, reason: FinishReason, now: float) -> None:
        del place.active[active.run.run_id]
        self._active -= 1
        took_s = now - active.started_s
        finished = _finished(
            active.run.run_id, reason, active.prompt_tokens, active.given, took_s, active.first_token_s
        )
        faults = self._faults
        if reason != "cancelled" and faults.take("late_finished"):
            self._at(now + faults.late_s, lambda at: self._send(finished))
            return
        self._send(finished)
        if reason == "cancelled" and faults.take("finished_after_cancel"):
            run_id, words = active.run.run_id, active.prompt_tokens
            self._send(_finished(run_id, "stop", words, active.given, took_s))
        if reason != "cancelled" and faults.take("duplicate_finished"):
            self._send(finished)
        if faults.take("unknown_run"):
            self._send(Tokens(run_id="nobody/1", text="nonsense", count=1))
            self._send(_finished("nobody/1", "stop", 1, 1))


def _finished(
    run_id: str,
    reason: FinishReason,
    prompt_tokens: int,
    tokens: int = 0,
    took_s: float = 0.0,
    first_token_s: float = 0.0,
) -> Finished:
    return Finished(
        run_id=run_id,
        reason=reason,
        prompt_tokens=prompt_tokens,
        tokens_generated=tokens,
        processing_s=took_s,
        first_token_s=first_token_s,
    )
