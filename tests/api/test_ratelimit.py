"""The limiter against an exact record of every request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from api.ratelimit import RateLimiter


def test_the_documented_limits() -> None:
    limiter = RateLimiter()
    for spent in range(100):
        verdict = limiter.check("k", 0.0, 1_000, 100)
        assert verdict is not None
        assert verdict.allowed
        assert (verdict.limit, verdict.remaining) == (100, 99 - spent)
    refused = limiter.check("k", 30.0, 1_000, 100)
    assert refused is not None
    assert not refused.allowed
    assert refused.remaining == 0
    assert 30 <= refused.retry_after_s <= 31
    again = limiter.check("k", 30.0 + refused.retry_after_s, 1_000, 100)
    assert again is not None
    assert again.allowed


def test_the_hour_is_kept_when_minutes_are() -> None:
    limiter = RateLimiter()
    allowed = 0
    for minute in range(20):
        for _ in range(100):
            verdict = limiter.check("k", minute * 62.0, 1_000, 100)
            assert verdict is not None
            allowed += verdict.allowed
    assert allowed == 1_000
    last = limiter.check("k", 20 * 62.0, 1_000, 100)
    assert last is not None
    assert last.limit == 1_000
    assert last.retry_after_s > 1_000


def test_none_is_no_limit_and_keeps_nothing() -> None:
    limiter = RateLimiter()
    assert limiter.check("k", 0.0, None, None) is None
    assert len(limiter) == 0


def test_one_of_two_limits() -> None:
    limiter = RateLimiter()
    first = limiter.check("k", 0.0, None, 1)
    second = limiter.check("k", 0.0, None, 1)
    assert first is not None
    assert first.allowed
    assert second is not None
    assert not second.allowed
    only_hour = limiter.check("other", 0.0, 5, None)
    assert only_hour is not None
    assert only_hour.remaining == 4


def test_memory_is_bounded() -> None:
    limiter = RateLimiter(keys_max=10)
    for number in range(1_000):
        limiter.check(f"k{number}", float(number), 10, 10)
    assert len(limiter) == 10


@given(
    st.lists(st.floats(min_value=0.0, max_value=30.0), min_size=1, max_size=60),
    st.integers(min_value=1, max_value=6),
)
def test_never_more_than_the_limit_in_any_minute(gaps: list[float], limit: int) -> None:
    limiter = RateLimiter()
    now = 0.0
    allowed: list[float] = []
    for gap in gaps:
        now += gap
        verdict = limiter.check("k", now, None, limit)
        assert verdict is not None
        recent = [moment for moment in allowed if moment > now - 60.0]
        if verdict.allowed:
            assert len(recent) < limit
            allowed.append(now)
        else:
            assert len([moment for moment in allowed if moment > now - 62.0]) >= limit
            after = limiter.check("k", now + verdict.retry_after_s, None, limit)
            assert after is not None
            assert after.allowed
            now += verdict.retry_after_s
            allowed.append(now)
