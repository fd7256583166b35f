"""Simulated devices: what they hold, how hot they are, and which ones and which models a cluster has.

A card outlives its peer's process and its engines; its faults do too, until they are over or mended.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import trio

from peer.engines import Device
from peer.state.model import Model
from peer.state.worker import Telemetry

GIB: Final = 1 << 30
COOL_C: Final = 45.0
BUSY_C: Final = 70.0
REFUSALS_MAX: Final = 100
TOKENS_DEFAULT: Final = 256  # as peer.state.task.TextGeneration
# So that on 16 GiB the smaller ones fit together and the larger ones only alone.
MODEL_GIB: Final = (2.0, 5.0, 8.0, 3.0, 12.0, 1.0, 6.0, 14.0)

HeldState = Literal["loading", "ready", "unloading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How fast an engine is. Times in seconds, rates per second of virtual time."""

    start_s: tuple[float, float] = (0.2, 2.0)
    exit_s: tuple[float, float] = (0.02, 0.3)  # asked to, until its memory is free
    load_bytes_per_s: float = 2.0 * GIB
    unload_s: float = 0.2
    tokens_per_s: float = 40.0  # of one run
    prompt_tokens_per_s: float = 2_000.0
    batch_s: float = 0.25  # tokens come, and runs end, so often
    heartbeat_s: float = 1.0
    slots_max: int = 8
    context_max: int = 8_192
    memory_factor: float = 1.0  # what a model truly takes, of what the catalogue says
    memory_bytes: Mapping[str, int] | None = None  # by model; None or missing: `other_memory_bytes`
    other_memory_bytes: int = GIB


@dataclass(frozen=True, slots=True)
class Refusal:
    """A load that the device had no room for. Without `forced` or `foreign` the leader planned too much."""

    at_s: float
    model: str
    need_bytes: int
    held_bytes: int
    foreign_bytes: int
    forced: bool


class Holder(Protocol):
    """An engine: what it holds is gone when it is."""

    @property
    def alive(self) -> bool: ...


class SimCard:
    """One physical device of one host."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.total_bytes = device.memory_total_bytes
        self.refusals: deque[Refusal] = deque(maxlen=REFUSALS_MAX)
        self.busy = 0.0  # share of slots in use
        self.peak_bytes = 0
        self._holder: Holder | None = None
        self._held: dict[str, tuple[int, HeldState]] = {}
        self._foreign: list[tuple[float, int]] = []  # until when, bytes
        self._hot: tuple[float, float] = (-1.0, COOL_C)  # until when, degrees Celsius

    # ------------------------------------------------------------ faults

    def foreign_memory(self, nbytes: int, for_s: float) -> None:
        """Another program takes memory, as much of it as is free."""
        free = max(0, self.total_bytes - self.used_bytes())
        self._foreign.append((trio.current_time() + for_s, min(nbytes, free)))

    def overheats(self, degrees_c: float, for_s: float) -> None:
        self._hot = (trio.current_time() + for_s, degrees_c)

    def mend(self) -> None:
        """End every fault of the device."""
        self._foreign.clear()
        self._hot = (-1.0, COOL_C)

    # ------------------------------------------------------------ what it truly holds

    def held(self) -> dict[str, tuple[int, HeldState]]:
        """Bytes by model, those being loaded and unloaded too."""
        return dict(self._held) if self._holder is not None and self._holder.alive else {}

    def held_bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.held().values())

    def foreign_bytes(self) -> int:
        now = trio.current_time()
        self._foreign = [(until, nbytes) for until, nbytes in self._foreign if until > now]
        return sum(nbytes for _, nbytes in self._foreign)

    def used_bytes(self) -> int:
        return self.held_bytes() + self.foreign_bytes()

    def begin(self, holder: Holder) -> None:
        """A process of this engine starts: nothing of an earlier one is left."""
        self._holder, self._held, self.busy = holder, {}, 0.0

    def end(self, holder: Holder) -> None:
        """That process is gone."""
        if self._holder is holder:
            self._holder, self._held, self.busy = None, {}, 0.0

    def take(self, model: str, nbytes: int, *, refuse: bool = False) -> bool:
        """Room for a model that begins to load. False, and a Refusal, if there is none."""
        held, foreign = self.held_bytes(), self.foreign_bytes()
        if refuse or held + foreign + nbytes > self.total_bytes:
            now = trio.current_time()
            self.refusals.append(Refusal(now, model, nbytes, held, foreign, refuse))
            return False
        self._held[model] = (nbytes, "loading")
        self.peak_bytes = max(self.peak_bytes, held + nbytes)
        return True

    def enter(self, model: str, state: HeldState) -> None:
        self._held[model] = (self._held[model][0], state)

    def drop(self, model: str) -> int:
        return self._held.pop(model)[0]

    # ------------------------------------------------------------ measured

    def temperature_c(self) -> float:
        until, degrees = self._hot
        return degrees if until > trio.current_time() else COOL_C + (BUSY_C - COOL_C) * self.busy


class SimTelemetry:
    """peer.engines.TelemetrySource. There are no ECC counters in peer.state.worker.Telemetry to report."""

    def __init__(self, card: SimCard) -> None:
        self._card = card

    async def read(self) -> Telemetry:
        card = self._card
        return Telemetry(
            memory_total_bytes=card.total_bytes,
            memory_used_bytes=min(card.total_bytes, card.used_bytes()),
            temperature_c=card.temperature_c(),
            utilization_percent=100.0 * card.busy,
            source="simulated",
        )


# ---------------------------------------------------------------- what a cluster has


def devices(gpus: int, memory_bytes: int = 16 * GIB) -> tuple[Device, ...]:
    """A host's devices. They are no stand-ins: models are fetched for them."""
    return tuple(
        Device(
            label=f"gpu{n}",
            device=f"KFD:{n}+AMD:LLVM",
            name="Simulated Radeon",
            architecture="gfx1100",
            memory_total_bytes=memory_bytes,
        )
        for n in range(gpus)
    )


def catalogue(models: int) -> tuple[Model, ...]:
    """Models m0, m1, ... of different sizes; from three on, not all fit on 16 GiB together."""
    made = []
    for n in range(models):
        nbytes = int(MODEL_GIB[n % len(MODEL_GIB)] * GIB)
        made.append(
            Model(
                name=f"m{n}",
                source=f"https://models.example/m{n}.gguf",
                family="llama",
                size_bytes=nbytes * 9 // 10,
                memory_bytes=nbytes,
                context=4_096,
                slots=4,
            )
        )
    return tuple(made)


def profile(models: tuple[Model, ...], **more: Any) -> Profile:
    """A profile that knows what these models take."""
    return Profile(memory_bytes={model.name: model.memory_bytes for model in models}, **more)


# ---------------------------------------------------------------- what engines answer


def prompt_text(parameters: Mapping[str, Any]) -> str:
    """The prompt, or the contents of all messages."""
    prompt = parameters.get("prompt")
    if isinstance(prompt, str):
        return prompt
    return " ".join(str(message.get("content", "")) for message in parameters.get("messages") or ())


def token_stem(parameters: Mapping[str, Any]) -> str:
    """What each token of the answer begins with: another one for other parameters or another seed."""
    meaning = [prompt_text(parameters), parameters.get("seed"), tokens_wanted(parameters)]
    return hashlib.blake2b(json.dumps(meaning).encode(), digest_size=5).hexdigest()


def tokens_wanted(parameters: Mapping[str, Any]) -> int:
    return int(parameters.get("max_tokens") or TOKENS_DEFAULT)


def pieces(stem: str, start: int, end: int) -> str:
    """Tokens `start` to `end` of an answer, which joined give its text."""
    text = " ".join(f"{stem}.{n}" for n in range(start, end))
    return f" {text}" if start and text else text


def expected_text(parameters: Mapping[str, Any]) -> str:
    """The one right answer: a lost, doubled or foreign piece makes another text."""
    return pieces(token_stem(parameters), 0, tokens_wanted(parameters))
