"""Log probabilities of tokens as clients get them."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from api.schemas import TokenLogprob, TokenLogprobs
from peer.state import task


def shown(logprobs: tuple[task.Logprobs, ...]) -> list[TokenLogprobs] | UnsetType:
    """Left out when there are none."""
    return [_of_token(each) for each in logprobs] or UNSET


def _of_token(each: task.Logprobs) -> TokenLogprobs:
    own = _one(each.own)
    return TokenLogprobs(
        id=own.id,
        token=own.token,
        logprob=own.logprob,
        bytes=own.bytes,
        top_logprobs=[_one(best) for best in each.best],
    )


def _one(each: task.TokenLogprob) -> TokenLogprob:
    text = each.piece.decode("utf-8", "replace")
    whole = text.encode() == each.piece
    return TokenLogprob(
        id=each.token, token=text, logprob=each.logprob, bytes=UNSET if whole else list(each.piece)
    )
