"""The measured history that the leader keeps in memory: every bucket that is kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peer.state.metric import RESOLUTIONS, Bucket


class History:
    """Buckets by resolution and start. Plain storage: `peer.decide.meter` decides what goes in and out."""

    def __init__(self) -> None:
        self._buckets: dict[str, dict[int, Bucket]] = {resolution: {} for resolution in RESOLUTIONS}

    def put(self, bucket: Bucket) -> None:
        self._buckets[bucket.resolution][bucket.start] = bucket

    def drop(self, bucket: Bucket) -> None:
        self._buckets[bucket.resolution].pop(bucket.start, None)

    def get(self, resolution: str, start: int) -> Bucket | None:
        return self._buckets[resolution].get(start)

    def starts(self, resolution: str) -> Iterable[int]:
        """In the order in which they were put; that is, by time."""
        return self._buckets[resolution].keys()

    def newest(self, resolution: str) -> Iterator[int]:
        """The same, backwards."""
        return reversed(self._buckets[resolution])

    def span(self, resolution: str, start: int, end: int) -> list[Bucket]:
        """The buckets that begin in [start, end)."""
        buckets, width = self._buckets[resolution], RESOLUTIONS[resolution]
        first = start + (-start) % width
        if (end - first) // width > len(buckets):
            return [bucket for at, bucket in buckets.items() if start <= at < end]
        return [bucket for at in range(first, end, width) if (bucket := buckets.get(at)) is not None]
