from __future__ import annotations

import time

import pytest
import trio

from peer.adapters.clock import SystemClock, SystemEntropy
from peer.ports import Clock, Entropy


def test_now_is_the_boot_clock() -> None:
    clock: Clock = SystemClock()
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = clock.now()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_wall_is_utc() -> None:
    assert SystemClock().wall() == pytest.approx(time.time(), abs=1.0)


def test_a_step_of_the_wall_clock_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SystemClock()
    before = clock.wall()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock.wall() >= before


def test_wall_is_carried_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SystemClock()
    distance = clock.wall() - clock.now()
    monkeypatch.setattr(clock, "now", lambda: 5_000_000.0)
    assert clock.wall() == pytest.approx(5_000_000.0 + distance, abs=1.0)


async def test_sleep_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    clock = SystemClock()
    began = trio.current_time()
    await clock.sleep(3600.0)
    assert trio.current_time() - began == pytest.approx(3600.0)
    await clock.sleep(-1.0)
    assert trio.current_time() - began == pytest.approx(3600.0)


def test_tokens_are_hexadecimal_and_differ() -> None:
    entropy: Entropy = SystemEntropy()
    tokens = {entropy.token(16) for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(bytes.fromhex(token)) == 16 for token in tokens)


def test_uniform_stays_between_its_bounds() -> None:
    entropy = SystemEntropy()
    drawn = [entropy.uniform(2.0, 3.0) for _ in range(1000)]
    assert all(2.0 <= number <= 3.0 for number in drawn)
    assert max(drawn) - min(drawn) > 0.5
