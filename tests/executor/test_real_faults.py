"""The real engine on the CPU device, made to compute wrongly or to fail in a thread: what its supervisor does then."""

from __future__ import annotations

import sys
from textwrap import indent

import pytest

from peer.engines import Device
from peer.state.order import WorkerReported
from peer.state.worker import EngineState
from tests.executor import rig as rigs
from tests.executor.rig import STALL_S, alive, rig
from tests.executor.test_engine_life import quick, report_where

pytestmark = pytest.mark.process
CPU = Device(label="cpu0", device="CPU:LLVM")


def spoiled(change: str) -> tuple[str, ...]:
    """The engine's command, with something changed once its device is open: not before, tinygrad is chosen by then."""
    script = (
        "import engine.self_test as opening\n"
        "really = opening.open_devices\n"
        "def spoiled(name):\n"
        "    found = really(name)\n"
        f"{indent(change, '    ')}\n"
        "    return found\n"
        "opening.open_devices = spoiled\n"
        "from engine.__main__ import main\n"
        "main()"
    )
    return (sys.executable, "-P", "-c", script)


@pytest.fixture(autouse=True)
def _on_a_busy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigs, "WAIT_S", 120.0)


SLOW_START = quick(stall_s=STALL_S | {"start": 120.0})


async def test_a_device_that_computes_wrongly_is_not_used() -> None:
    wrong = (
        "from engine import kernels\n"
        "right = kernels.gated\n"
        "kernels.gated = lambda *given, **named: right(*given, **named).contiguous() * 1.1"
    )
    async with rig(ready=False, devices=(CPU,), command=spoiled(wrong), allowed=SLOW_START) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "computes a wrong layer" in held.message
        assert "check driver and hardware" in held.message
        assert held.deaths == 0


async def test_an_engine_ends_with_any_of_its_threads() -> None:
    broken = (
        "from engine import counting\n"
        "def count(self, message): raise ZeroDivisionError('of a library')\n"
        "counting.Counter.count = count"
    )
    async with rig(ready=False, devices=(CPU,), command=spoiled(broken), allowed=SLOW_START) as it:
        await it.state(EngineState.READY)
        pid = it.pid()
        assert await it.executor.count_tokens(rigs.ECHO, {"prompt": "one"}) is None
        dead = await it.sink.wait(lambda r: isinstance(r, WorkerReported) and r.report.deaths == 1)
        assert "status 70" in dead.report.message
        assert not alive(pid)
