"""Engines that die, hang, lie or cannot start; restarts, quarantine, stops. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio

from engine.protocol import Cancel
from peer.engines import Device
from peer.state.order import AlertRaised, AttemptFailed, AttemptStarted, EngineStarted, WorkerReported
from peer.state.worker import EngineState
from tests.executor.rig import FAKE, QUICK, STALL_S, Rig, alive, odd_engine, rig, until

pytestmark = pytest.mark.process


REPOSITORY = Path(__file__).resolve().parents[2]


def state_of(pid: int) -> str:
    """The kernel's letter, "" if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def quick(**changes: Any) -> Any:
    return msgspec.structs.replace(QUICK, **changes)


async def report_where(it: Rig, start: int = 0, **want: Any) -> Any:
    def fits(report: object) -> bool:
        return isinstance(report, WorkerReported) and all(
            getattr(report.report, name) == value for name, value in want.items()
        )

    return (await it.sink.wait(fits, start)).report


async def test_a_death_fails_its_runs_and_the_engine_comes_back() -> None:
    async with rig(fake={"tokens_per_s": 5}) as it:
        pid = it.pid()
        await it.run("t1", prompt="a b c d e f g h")
        await it.run("t2", prompt="a b c d e f g h")
        await it.sink.wait(lambda r: isinstance(r, AttemptStarted) and r.task_id == "t2")
        start = len(it.sink.seen)
        await it.run("t3", prompt="fault:die")
        for task_id in ("t1", "t2", "t3"):
            failed = await it.outcome(task_id)
            assert isinstance(failed, AttemptFailed)
            assert (failed.code, failed.retryable) == ("engine_died", True)
        down = await report_where(it, start, state=EngineState.RESTARTING)
        assert "status 70" in down.message
        back = await report_where(it, start, state=EngineState.READY)
        assert back.engine_pid != pid
        assert back.deaths == 1
        assert back.replicas == ()
        assert back.message == ""
        assert not alive(pid)
        alerts = [r for r in it.sink.seen if isinstance(r, AlertRaised)]
        assert [(a.kind, a.level, a.raised) for a in alerts] == [
            ("engine", "warning", True),
            ("engine", "warning", False),
        ]
        await it.load()
        await it.run("t4", prompt="well again")
        assert (await it.outcome("t4")).task_id == "t4"


async def test_killed_from_outside_says_by_what() -> None:
    async with rig() as it:
        start = len(it.sink.seen)
        os.kill(it.pid(), signal.SIGKILL)
        down = await report_where(it, start, state=EngineState.RESTARTING)
        assert "SIGKILL" in down.message
        await report_where(it, start, state=EngineState.READY)


async def test_three_deaths_are_a_quarantine_which_a_restart_ends() -> None:
    async with rig() as it:
        for number in range(3):
            start = len(it.sink.seen)
            await it.load()
            await it.run(f"t{number}", prompt="fault:die")
            if number < 2:
                await report_where(it, start, state=EngineState.READY, deaths=number + 1)
        held = await report_where(it, start, state=EngineState.ERROR)
        assert "quarantined" in held.message
        assert "restart" in held.message
        assert held.deaths == 3
        alert = await it.sink.wait(lambda r: isinstance(r, AlertRaised) and r.level == "critical")
        assert alert.raised
        await it.run("t9")
        refused = await it.outcome("t9")
        assert isinstance(refused, AttemptFailed)
        assert refused.code == "worker_unavailable"
        start = len(it.sink.seen)
        await it.restart()
        await report_where(it, start, state=EngineState.READY)
        cleared = await it.sink.wait(lambda r: isinstance(r, AlertRaised) and not r.raised, start)
        assert cleared.kind == "engine"


async def test_a_quarantine_ends_by_itself() -> None:
    async with rig(allowed=quick(deaths_max=1, quarantine_s=0.2)) as it:
        start = len(it.sink.seen)
        await it.run(prompt="fault:die")
        await report_where(it, start, state=EngineState.ERROR)
        await report_where(it, start, state=EngineState.READY)


async def test_a_restart_on_request_measures_its_downtime() -> None:
    async with rig(fake={"tokens_per_s": 5}) as it:
        pid = it.pid()
        await it.run(prompt="a b c d e f g h")
        await it.sink.kind(AttemptStarted)
        start = len(it.sink.seen)
        began = trio.current_time()
        await it.restart()
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("engine_restarted", True)
        started = await it.sink.kind(EngineStarted, start)
        took = trio.current_time() - began
        assert 0.01 < started.downtime_s <= took + 0.05
        back = await report_where(it, start, state=EngineState.READY)
        assert back.engine_pid != pid
        assert back.deaths == 0
        assert not any(isinstance(r, AlertRaised) for r in it.sink.seen)


async def test_a_hung_engine_is_killed_and_can_be_restarted() -> None:
    """A hang in a step; the stand-in beats once a second, so the limit is just above that."""
    allowed = quick(stall_s={**STALL_S, "idle": 1.5, "prefill": 1.5, "decode": 1.5})
    async with rig(allowed=allowed, fake={"tokens_per_s": 5}) as it:
        start = len(it.sink.seen)
        began = trio.current_time()
        await it.run(prompt="fault:hang")
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert failed.code == "engine_died"
        assert "no sign of life" in failed.message
        assert trio.current_time() - began < 4
        await report_where(it, start, state=EngineState.READY)


async def test_a_restart_of_a_hung_engine_kills_it_after_its_grace() -> None:
    async with rig(allowed=quick(stop_s_max=0.2), fake={"tokens_per_s": 5}) as it:
        pid = it.pid()
        await it.run(prompt="fault:hang")
        start = len(it.sink.seen)
        await it.restart()
        back = await report_where(it, start, state=EngineState.READY)
        assert back.engine_pid != pid
        assert not alive(pid)


async def test_bytes_that_are_not_the_protocol_end_the_engine() -> None:
    async with rig() as it:
        start = len(it.sink.seen)
        await it.run(prompt="fault:wrong")
        down = await report_where(it, start, state=EngineState.RESTARTING)
        assert "not the protocol" in down.message
        await report_where(it, start, state=EngineState.READY)


async def test_an_engine_that_never_greets_is_killed() -> None:
    command = odd_engine("time.sleep(60)")
    allowed = quick(stall_s={**STALL_S, "start": 0.3}, deaths_max=1)
    async with rig(ready=False, command=command, allowed=allowed) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "phase start" in held.message


async def test_another_protocol_version_makes_the_worker_unusable() -> None:
    command = odd_engine("say(Hello(version_min=98, version_max=99));time.sleep(60)")
    async with rig(ready=False, command=command, allowed=quick(stop_s_max=0.1)) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "98 to 99" in held.message
        assert held.deaths == 0


async def test_a_device_that_calls_itself_unusable_is_not_tried_again() -> None:
    command = odd_engine(
        "say(Hello());say(Unusable(code='no_device', message='no card in the slot'));sys.exit(69)"
    )
    async with rig(ready=False, command=command) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert held.message == "no card in the slot"
        start = len(it.sink.seen)
        await it.restart()
        await report_where(it, start, state=EngineState.RESTARTING)
        await report_where(it, start, state=EngineState.ERROR)


async def test_messages_before_ready_end_the_engine() -> None:
    command = odd_engine(
        "say(Hello());say(Finished(run_id='x',reason='stop',prompt_tokens=1,tokens_generated=1,"
        "processing_s=1.0));time.sleep(60)"
    )
    async with rig(ready=False, command=command, allowed=quick(deaths_max=1)) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "before it was ready" in held.message


async def test_a_program_that_cannot_be_started_is_a_death() -> None:
    async with rig(ready=False, command=("/nonexistent/engine",), allowed=quick(deaths_max=2)) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "cannot be started" in held.message
        assert held.deaths == 2


async def test_an_unsupported_gpu_is_a_worker_in_error_without_a_process() -> None:
    gpu = Device(
        label="gpu0", device="KFD:0+AMD:LLVM", name="AMD Old", architecture="gfx1030", problem="too old"
    )
    async with rig(ready=False, devices=(gpu,)) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert (held.worker_id, held.message, held.engine_pid) == ("p1-gpu0", "too old", 0)
        assert held.device.architecture == "gfx1030"


async def test_what_an_engine_prints_becomes_log_lines() -> None:
    script = (
        "say(Hello());say(Ready(device='fake',device_name='x',architecture='x',memory_total_bytes=1,self_test_s=0));"
        "print('x'*100000);print('plain');sys.stderr.write('{\"event\":\"told\",\"n\":1}\\n');sys.stdout.flush();"
        "[print('flood') for _ in range(500)];s.recv(1);s.recv(100000);s.recv(1000)"
    )
    with structlog.testing.capture_logs() as lines:
        async with rig(load=False, command=odd_engine(script), allowed=quick(stop_s_max=0.1)):
            await until(lambda: any(line.get("engine_event") == "told" for line in lines))
            await until(lambda: sum(line.get("line") == "flood" for line in lines) > 50)
    texts = [line["line"] for line in lines if line["event"] == "engine_output"]
    assert "plain" in texts
    long = next(text for text in texts if text.startswith("xxx"))
    assert len(long) < 2100
    assert texts.count("flood") <= 200


async def test_grandchildren_go_with_the_engine() -> None:
    script = (
        "import subprocess;say(Hello());c=subprocess.Popen(['sleep','60']);"
        "say(Ready(device='fake',device_name=str(c.pid),architecture='x',memory_total_bytes=1,self_test_s=0));"
        "time.sleep(60)"
    )
    async with rig(load=False, command=odd_engine(script), allowed=quick(stop_s_max=0.1)) as it:
        child = int((await it.state(EngineState.READY)).device.name)
        assert alive(child)

    await until(lambda: state_of(child) in ("", "Z"))


async def test_an_engine_that_does_not_read_fills_its_outbox_and_runs_are_refused() -> None:
    script = (
        "say(Hello());say(Ready(device='fake',device_name='x',architecture='x',memory_total_bytes=1,self_test_s=0));"
        "say(Loaded(model='echo',memory_bytes=1,load_s=0,context=1,slots=1));time.sleep(60)"
    )
    allowed = quick(stop_s_max=0.1, outbox_max=8)
    async with rig(load=False, command=odd_engine(script), allowed=allowed) as it:
        handle = it.engines[0]
        await it.state(EngineState.READY)
        sent = 0
        while handle.send(Cancel(run_id="x" * 100_000)):
            sent += 1
            await trio.lowlevel.checkpoint()
            assert sent < 1000


async def test_cancelling_the_executor_leaves_no_process() -> None:
    it = Rig()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.executor.run)
        await it.state(EngineState.READY)
        pid = it.pid()
        nursery.cancel_scope.cancel()
    assert not alive(pid)


async def test_two_workers_of_one_host() -> None:
    two = (FAKE, msgspec.structs.replace(FAKE, label="fake1"))
    async with rig(devices=two) as it:
        await it.sink.wait(
            lambda r: (
                isinstance(r, WorkerReported)
                and r.report.worker_id == "p1-fake1"
                and r.report.state is EngineState.READY
            )
        )
        assert it.executor.worker_ids == ("p1-fake0", "p1-fake1")


async def test_the_engines_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITINGLIP_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    script = (
        "say(Hello());say(Ready(device='fake',device_name=','.join(os.environ),architecture='x',"
        "memory_total_bytes=1,self_test_s=0));time.sleep(60)"
    )
    async with rig(load=False, command=odd_engine(script), allowed=quick(stop_s_max=0.1)) as it:
        names = (await it.state(EngineState.READY)).device.name.split(",")
        assert "BITINGLIP_ENGINE_FD" in names
        assert not {"BITINGLIP_KEY", "HF_TOKEN"} & set(names)


PEER = """
import os, sys, trio
from peer.adapters.clock import SystemClock
from peer.adapters.devices.engine_process import EngineProcess
from peer.engines import Device

class Events:
    def messages(self, batch): pass
    def changed(self, state, message, deaths): pass
    def gone(self, code, reason): pass
    def ready(self, ready, pid, downtime_s):
        os.write(2, b"%d\\n" % pid)

device = Device(label="fake0", device="fake", stand_in=True)
trio.run(EngineProcess("w", device, SystemClock()).run, Events())
"""


def test_an_engine_goes_with_a_peer_that_is_killed() -> None:
    command = [sys.executable, "-c", PEER]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stderr is not None
        pid = int(peer.stderr.readline())
        was_alive = alive(pid)
        peer.kill()
    assert was_alive
    trio.run(until, lambda: state_of(pid) in ("", "Z"))
