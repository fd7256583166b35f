"""What a worker keeps of a run that its engine holds: the text so far, and log probabilities if asked for."""

from __future__ import annotations

from engine import protocol
from peer import limits
from peer.state.order import RunAttempt
from peer.state.task import Array, Logprobs, TokenLogprob


class Attempt:
    """A run that the engine holds."""

    __slots__ = (
        "_logprobs_bytes",
        "arrays",
        "attempt",
        "chars",
        "logprobs",
        "model_name",
        "pieces",
        "prompt_tokens",
        "stopping",
        "task_id",
        "tokens",
    )

    def __init__(self, order: RunAttempt) -> None:
        self.task_id = order.task_id
        self.attempt = order.attempt
        self.model_name = order.model_name
        self.pieces: list[str] = []
        self.chars = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.stopping = False
        self.logprobs: list[Logprobs] = []
        self.arrays: tuple[Array, ...] = ()
        self._logprobs_bytes = 0

    def take_logprobs(self, told: list[protocol.Logprobs]) -> tuple[Logprobs, ...]:
        """Those that there is room for: of the first tokens, without gaps."""
        at = len(self.logprobs)
        for each in told:
            if at < self.tokens or self._logprobs_bytes > limits.LOGPROBS_BYTES_MAX:
                break
            kept = Logprobs(_logprob(each.token), tuple(map(_logprob, each.best)))
            self._logprobs_bytes += kept.nbytes
            self.logprobs.append(kept)
        return tuple(self.logprobs[at:])


def arrays_of(output: protocol.Output) -> tuple[Array, ...]:
    return tuple(Array(each.name, each.dtype, each.shape, each.data) for each in output.arrays)


def _logprob(told: protocol.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(told.token, told.piece, round(told.logprob, 6))
