"""The limiter against an exact record of every request; WebSockets and tickets of the whole cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.decide.quota import Quota, RateLimiter, Tickets
from peer.errors import RateLimited, Unauthorized
from peer.limits import TICKET_S
from peer.state.quota import Client, KeepTicket, RedeemTicket, Spend, Verdict


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


def test_a_key_keeps_its_window_while_others_come() -> None:
    limiter = RateLimiter(keys_max=2)
    limiter.check("k", 0.0, None, 1)
    limiter.check("other", 1.0, None, 1)
    limiter.check("k", 2.0, None, 1)
    limiter.check("third", 3.0, None, 1)
    again = limiter.check("k", 4.0, None, 1)
    assert again is not None
    assert not again.allowed


def test_a_limit_of_which_nothing_was_spent_resets_at_once() -> None:
    verdict = RateLimiter().check("k", 5.0, 0, None)
    assert verdict == Verdict(allowed=False, limit=0, remaining=0, reset_s=0, retry_after_s=3_600)


def test_a_limit_that_was_lowered_waits_for_all_that_is_too_much() -> None:
    limiter = RateLimiter()
    for now in (0.0, 10.0, 20.0):
        limiter.check("k", now, None, 3)
    verdict = limiter.check("k", 30.0, None, 1)
    assert verdict is not None
    assert not verdict.allowed
    assert 50 <= verdict.retry_after_s <= 51


def test_requests_of_all_peers_are_one_count() -> None:
    quota = Quota()
    ask = Spend(key_id="k", per_hour=None, per_minute=2)
    verdicts = [quota.answer(ask, now) for now in (0.0, 0.1, 0.2)]
    assert [isinstance(each, Verdict) and each.allowed for each in verdicts] == [True, True, False]
    assert quota.answer(Spend(key_id="free", per_hour=None, per_minute=None), 0.3) is None


def test_windows_are_taken_over() -> None:
    windows = RateLimiter()
    windows.check("k", 0.0, None, 1)
    verdict = Quota(windows).answer(Spend(key_id="k", per_hour=None, per_minute=1), 1.0)
    assert isinstance(verdict, Verdict)
    assert not verdict.allowed


def test_sockets_are_counted_while_they_are_open() -> None:
    quota = Quota()
    two = Client(key_id="k", sockets_max=2)
    with quota.socket(two):
        with quota.socket(two):
            with pytest.raises(RateLimited, match="2 WebSocket connections") as refused, quota.socket(two):
                pass
            assert refused.value.code == "too_many_websockets"
            with quota.socket(Client(key_id="other", sockets_max=1)), quota.socket(None):
                assert quota.sockets == {"k": 2, "other": 1}
            with quota.socket(Client(key_id="k", sockets_max=None)):  # admitted before: counted only
                assert quota.sockets == {"k": 3}
        assert quota.sockets == {"k": 1}
        with quota.socket(two):
            pass
    assert not quota.sockets


def test_a_socket_that_fails_is_counted_no_more() -> None:
    quota = Quota()
    with pytest.raises(RuntimeError), quota.socket(Client(key_id="k", sockets_max=1)):
        raise RuntimeError
    assert not quota.sockets


def test_a_ticket_is_good_once_and_not_for_long() -> None:
    quota = Quota()
    assert quota.answer(KeepTicket(ticket="t", key_id="k"), 0.0) is None
    assert quota.answer(RedeemTicket(ticket="t"), TICKET_S - 0.1) == "k"
    with pytest.raises(Unauthorized, match="unknown, used or expired"):
        quota.answer(RedeemTicket(ticket="t"), TICKET_S - 0.1)
    quota.answer(KeepTicket(ticket="late", key_id="k"), 0.0)
    with pytest.raises(Unauthorized):
        quota.answer(RedeemTicket(ticket="late"), TICKET_S)


def test_unused_tickets_are_bounded_and_go_with_time() -> None:
    tickets = Tickets(tickets_max=2)
    tickets.keep("a", "k", 0.0)
    tickets.keep("b", "k", 1.0)
    tickets.keep("b", "k", 2.0)  # said again: the same one
    with pytest.raises(RateLimited):
        tickets.keep("c", "k", 2.0)
    tickets.keep("c", "k", TICKET_S)
    assert tickets.redeem("b", TICKET_S) == "k"
    assert tickets.redeem("c", TICKET_S) == "k"
