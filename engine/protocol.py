"""What a peer and its engine process say to each other: the one file that both import.

Transport: an inherited Unix stream socket. Each frame is a 4-byte big-endian length and one msgpack map
whose `type` names the message. Both sides send `Hello` first; a side that shares no version with the other
answers `Unusable` (engine) or closes (peer). End of stream means the other side is gone: an engine then exits
at once, so that its device is free; a peer re-queues what ran on it.

Times are seconds (`_s`), sizes bytes. Nothing here is pickled; a frame over `FRAME_BYTES_MAX` is an error.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

VERSION_MIN = 1
VERSION_MAX = 1
FRAME_BYTES_MAX = 16 * 1024 * 1024
OUTPUT_BYTES_MAX = 2 * 1024 * 1024  # of one run's arrays: they go in one frame, one transaction, one answer
SOCKET_ENV = "BITINGLIP_ENGINE_FD"  # number of the inherited socket's file descriptor

Phase = Literal["start", "idle", "load", "warmup", "prefill", "decode"]
FinishReason = Literal["stop", "length", "cancelled"]


class ProtocolError(Exception):
    """The other side sent bytes that are not this protocol."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=False):
    """Base of every message. Unknown fields are ignored, so that a newer side may add some."""


class Hello(Message, frozen=True, tag="hello"):
    version_min: int = VERSION_MIN
    version_max: int = VERSION_MAX
    product: str = ""


# ---------------------------------------------------------------- peer -> engine


class Configure(Message, frozen=True, tag="configure"):
    """Second message to an engine: which device it owns. Answered by `Ready` or `Unusable`."""

    worker_id: str
    device: str  # a tinygrad device string such as "CPU:LLVM" or "KFD:0+AMD:LLVM", or "fake"
    slots_max: int = 8  # most runs at once on this device
    memory_limit_bytes: int = 0  # 0: the device's own
    cache_dir: str = ""  # private (0700) directory for compiled kernels; "" keeps none
    beam: int = 0  # candidates that a search for faster kernels goes on with; 0: no search
    fake: dict[str, Any] = {}  # only read by the stand-in engine: speed, memory, temperature, ...


class Load(Message, frozen=True, tag="load"):
    """Load a model. Answered by `LoadProgress`*, then `Loaded` (graphs captured, ready) or `LoadFailed`."""

    model: str
    path: str  # a .gguf file or a Hugging Face folder, already on this host and verified
    family: str  # whitelisted architecture, e.g. "llama"
    context: int = 2048  # tokens per slot
    slots: int = 8
    task_type: str = "text_generation"  # what its runs are of: this, "embedding" or "tensor"


class Unload(Message, frozen=True, tag="unload"):
    """Drop a model and give its memory back. Its runs end as `RunFailed` code `unloaded`."""

    model: str


class Run(Message, frozen=True, tag="run"):
    """Start one attempt of a task. Answered by `Started`, `Tokens`*, then `Finished` or `RunFailed`."""

    run_id: str  # "<task_id>/<attempt>"
    model: str
    task_type: str
    parameters: dict[str, Any]  # as validated by the API: see peer.state.task.TextGeneration and Embedding
    request_id: str = ""  # for the engine's log


class Cancel(Message, frozen=True, tag="cancel"):
    """End a run within one step. Answered by `Finished` with reason `cancelled`; unknown runs are ignored."""

    run_id: str


class CountTokens(Message, frozen=True, tag="count_tokens"):
    """How many tokens this prompt is. Answered by `TokenCount`, also while steps run."""

    request_id: str
    path: str
    family: str
    parameters: dict[str, Any]


class Fault(Message, frozen=True, tag="fault"):
    """Stand-in engine only: misbehave from now on. Real engines ignore it."""

    kind: Literal["none", "hang", "die", "slow", "wrong", "out_of_memory", "hot"]


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Exit with status 0."""


# ---------------------------------------------------------------- engine -> peer


class Ready(Message, frozen=True, tag="ready"):
    """The device works: its self-test computed what it should."""

    device: str  # as given in `Configure`
    device_name: str  # what people call it: "AMD Radeon RX 7900 XTX", or the CPU's model name
    architecture: str  # "gfx1100", "x86_64", "fake"
    memory_total_bytes: int
    self_test_s: float
    stand_in: bool = False  # True: not a real engine; shown in /workers, results and logs
    versions: dict[str, str] = {}


class Unusable(Message, frozen=True, tag="unusable"):
    """The device cannot be used. The engine exits after it; restarting helps only once something changed."""

    code: str  # "unsupported_gpu", "no_device", "self_test_failed", "protocol_version", ...
    message: str  # names the card, its architecture and what to do


class LoadProgress(Message, frozen=True, tag="load_progress"):
    model: str
    stage: Literal["read", "upload", "compile", "search"]  # search: only if `Configure.beam` asked for it
    done: int  # of total; bytes for read and upload, graphs for compile, kernels for search
    total: int  # 0: not known, for search


class Loaded(Message, frozen=True, tag="loaded"):
    model: str
    memory_bytes: int  # of the device, weights and caches, measured
    load_s: float
    context: int
    slots: int
    slots_asked: int = 0  # more than `slots`: so many did not fit into the memory. 0: not told
    kernels_compiled: int = 0  # that were not in the cache
    kernels_searched: int = 0  # of those, see `Configure.beam`


class LoadFailed(Message, frozen=True, tag="load_failed"):
    model: str
    code: str  # "out_of_memory", "bad_model_file", "unsupported_architecture", "already_loaded", ...
    message: str


class Unloaded(Message, frozen=True, tag="unloaded"):
    model: str
    freed_bytes: int


class Started(Message, frozen=True, tag="started"):
    """A slot has been taken and prefill begins."""

    run_id: str
    prompt_tokens: int


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token's natural logarithm of its probability. `piece` may be part of a character, `text` shows it."""

    text: str
    piece: bytes
    logprob: float
    token: int = -1  # its number; -1 from an engine that does not tell


class Logprobs(msgspec.Struct, frozen=True):
    """Of one generated token, by the model's own logits; `best` are the likeliest ones in its place."""

    token: TokenLogprob
    best: list[TokenLogprob] = []


class Tokens(Message, frozen=True, tag="tokens"):
    """Text generated since the last one. `text` may be empty while a character is incomplete."""

    run_id: str
    text: str
    count: int
    logprobs: list[Logprobs] = []  # one for each of `count` when the run asked for them


class Array(msgspec.Struct, frozen=True):
    """Numbers in row-major order, little endian. `dtype` is numpy's name of their type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Output(Message, frozen=True, tag="output"):
    """What a run gives that is no text, all of it, just before `Finished`. At most OUTPUT_BYTES_MAX of data."""

    run_id: str
    arrays: list[Array]


class Finished(Message, frozen=True, tag="finished"):
    run_id: str
    reason: FinishReason
    prompt_tokens: int
    tokens_generated: int
    processing_s: float  # from slot taken to last token, queueing in the engine excluded
    first_token_s: float = 0.0  # from slot taken to first token
    cached_tokens: int = 0  # of the prompt's, those that the cache had from an earlier run


class RunFailed(Message, frozen=True, tag="run_failed"):
    run_id: str
    code: str  # "prompt_too_long", "unloaded", "out_of_memory", "unknown_model", "bad_parameters", ...
    message: str
    retryable: bool = False


class TokenCount(Message, frozen=True, tag="token_count"):
    request_id: str
    tokens: int  # prompt with its chat template; -1 if it could not be told (see `error`)
    context: int  # the model's own longest context, 0 if unknown
    error: str = ""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """Sent by the thread that owns the device: after every step, and every second when idle.

    No heartbeat for a phase's stall limit means that the device hangs.
    """

    phase: Phase
    step: int
    memory_used_bytes: int = 0  # ours, on the device
    temperature_c: float | None = None  # stand-in only; real temperatures come from telemetry


ToEngine = Hello | Configure | Load | Unload | Run | Cancel | CountTokens | Fault | Shutdown
FromEngine = (
    Hello
    | Ready
    | Unusable
    | LoadProgress
    | Loaded
    | LoadFailed
    | Unloaded
    | Started
    | Tokens
    | Output
    | Finished
    | RunFailed
    | TokenCount
    | Heartbeat
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Message) -> bytes:
    """One frame: length and body."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {len(body)} bytes is over the limit of {FRAME_BYTES_MAX}")
    return len(body).to_bytes(4, "big") + body


class Frames:
    """Bytes in, messages out; does no I/O. `side` names who reads: messages *to* that side are decoded."""

    def __init__(self, side: Literal["engine", "peer"]) -> None:
        self._decode = _to_engine.decode if side == "engine" else _from_engine.decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Every message completed by `data`. Raises ProtocolError on bytes that cannot be one."""
        self._buffer += data
        messages: list[Any] = []
        start = 0
        while len(self._buffer) - start >= 4:
            size = int.from_bytes(self._buffer[start : start + 4], "big")
            if size > FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame announces {size} bytes, over the limit of {FRAME_BYTES_MAX}")
            end = start + 4 + size
            if len(self._buffer) < end:
                break
            try:
                messages.append(self._decode(bytes(self._buffer[start + 4 : end])))
            except msgspec.DecodeError as error:
                raise ProtocolError(f"not a message of this protocol: {error}") from error
            start = end
        del self._buffer[:start]
        return messages
