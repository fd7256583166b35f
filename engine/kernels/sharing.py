"""A model shared by several devices: what each holds, and how their partial results become one.

Each device has a share of the attention's heads, of the feed-forward's (or every expert's) inner width and of the
vocabulary, and the caches of its heads. What comes out of the attention's output matrix and of the feed-forward's
last one are then partial sums. Every device gets the others' and adds all of them itself, in the same order: one copy
and one addition after each, where one device that adds and gives back would take two copies, one after the other, and
for two devices saves no traffic. So every device has the same stream of activations, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import KernelInfo, UOp

from engine.errors import LoadError
from engine.kernels.recording import call, copied


@dataclass(frozen=True)
class Share:
    """What one device holds, as half-open ranges of the whole model."""

    device: str
    first: bool  # it also adds what is no product: the stream itself
    groups: tuple[int, int]  # key/value heads, with the query heads that look at them
    feed_forward: tuple[int, int]
    vocabulary: tuple[int, int]


def shares(
    devices: Sequence[str], groups: int, feed_forward: int, vocabulary: int, block: int
) -> list[Share]:
    """`block` divides `feed_forward` into what may not be cut. Raises LoadError `not_shareable`."""
    count = len(devices)
    if groups % count:
        raise LoadError(
            "not_shareable",
            f"the model's {groups} key/value heads cannot be shared by {count} devices: join as many as divide it",
        )
    if count > 1 and feed_forward // block < count:
        raise LoadError(
            "not_shareable",
            f"the model's feed-forward of {feed_forward} lies in blocks of {block}, too few for {count} devices",
        )
    if vocabulary < count:
        raise LoadError("not_shareable", f"the model's {vocabulary} tokens are too few for {count} devices")
    ranges = (_cut(groups, count), _cut(feed_forward, count, block), _cut(vocabulary, count))
    return [
        Share(device, index == 0, *parts)
        for index, (device, *parts) in enumerate(zip(devices, *ranges, strict=True))
    ]


def _cut(size: int, count: int, block: int = 1) -> list[tuple[int, int]]:
    """Into `count` ranges as equal as blocks allow."""
    at = [size // block * index // count * block for index in range(count)]
    return list(zip(at, [*at[1:], size], strict=True))


def added(partials: Sequence[Tensor]) -> list[Tensor]:
    """Partial sums [R, I], one on each device -> their sum, on each."""
    if len(partials) == 1:
        return list(partials)
    return [_sum([copied(partial, own.device) for partial in partials]) for own in partials]


def _sum(terms: Sequence[Tensor]) -> Tensor:
    rows, inputs = terms[0].shape

    def kernel(total: UOp, *terms: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
        value = terms[0][r, i]
        for term in terms[1:]:
            value = value + term[r, i]
        info = KernelInfo(name=f"sum_{rows}_{inputs}_{len(terms)}")
        return total[r, i].store(value).end(r, i).sink(arg=info)

    return call(kernel, Tensor.empty(rows, inputs, dtype=dtypes.float32, device=terms[0].device), *terms)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Columns that several devices computed, [L, O] each -> all of them, [L, sum of O], on the first's."""
    if len(parts) == 1:
        return parts[0]
    rows, device = parts[0].shape[0], parts[0].device
    whole = Tensor.empty(rows, sum(part.shape[1] for part in parts), dtype=dtypes.float32, device=device)
    left = 0
    for part in parts:
        whole = _placed(whole, copied(part, device), left)
        left += part.shape[1]
    return whole


def _placed(whole: Tensor, part: Tensor, left: int) -> Tensor:
    rows, columns = part.shape

    def kernel(whole: UOp, part: UOp) -> UOp:
        r, c = UOp.range(rows, 0), UOp.range(columns, 1)
        info = KernelInfo(name=f"placed_{rows}_{columns}")
        return whole[r, left + c].store(part[r, c]).end(r, c).sink(arg=info)

    return call(kernel, whole, part)
