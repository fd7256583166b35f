"""The real engine on the CPU device, made to compute wrongly, to hang or to fail in a thread: what its supervisor does
then. A hang and a shortage of memory come in a step of a tiny model, on the device's thread, once."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import trio

from peer.engines import Device
from peer.state.model import Model
from peer.state.order import AttemptFailed, AttemptFinished, WorkerReported
from peer.state.worker import EngineState
from tests.engine.conftest import CACHE
from tests.executor import rig as rigs
from tests.executor.rig import STALL_S, Rig, alive, rig
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
        "from engine.kernels import transformer\n"
        "right = transformer.gated\n"
        "transformer.gated = lambda *given, **named: right(*given, **named).contiguous() * 1.1"
    )
    async with rig(ready=False, devices=(CPU,), command=spoiled(wrong), allowed=SLOW_START) as it:
        held = await report_where(it, state=EngineState.ERROR)
        assert "computes a wrong layer" in held.message
        assert "check driver and hardware" in held.message
        assert held.deaths == 0


CANNOT_LOG = (
    "from engine import runner\n"
    "log = runner.log\n"
    "def unless_failed(event, **told):\n"
    "    if event == 'thread_failed': raise MemoryError\n"
    "    log(event, **told)\n"
    "runner.log = unless_failed\n"
)


@pytest.mark.parametrize("more", ["", CANNOT_LOG], ids=["and says so", "and cannot say so"])
async def test_an_engine_ends_with_any_of_its_threads(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.executor.COUNT_TOKENS_S_MAX", 0.5)  # nobody answers
    broken = (
        "from engine import counting\n"
        "def count(self, message): raise ZeroDivisionError('of a library')\n"
        "counting.Counter.count = count"
    )
    async with rig(ready=False, devices=(CPU,), command=spoiled(more + broken), allowed=SLOW_START) as it:
        await it.state(EngineState.READY)
        pid = it.pid()
        assert await it.executor.count_tokens(rigs.ECHO, {"prompt": "one"}) is None
        dead = await it.sink.wait(lambda r: isinstance(r, WorkerReported) and r.report.deaths == 1)
        assert "status 70" in dead.report.message
        assert not alive(pid)


# ------------------------------------------------------------ in a step

FAMILY = Path(__file__).parents[1] / "engine" / "families" / "qwen3"
TINY = Model(name="echo", source="file:/model.gguf", family="qwen3", context=128, slots=2)
STALLED_S = 2.0
UNSTALLED = STALL_S | {
    "start": 120.0,
    "load": 120.0,
    "warmup": 120.0,
    "idle": 60.0,
    "prefill": 60.0,
    "decode": 60.0,
}
PROMPT = "the moon " * 20  # more than one step computes
OTHER = "a sun " * 20  # nothing of it is cached
PREFILL, DECODE = 32, 100  # positions that a run with it comes to in these phases

# a barrier of the recorded steps' own machine code, to which nobody comes
HANG = (
    "barrier = numpy.zeros((1, 1, native._WORDS), dtype=numpy.uint64)\n"
    "barrier[0, 0, 2] = 1\n"
    "native._team(1)._enter(0, barrier, 1 << 40)"
)
NO_MORE_MEMORY = "resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))\n"
SHORTAGES = {
    "of the host": NO_MORE_MEMORY + "numpy.empty(1 << 28)",
    "of the device": NO_MORE_MEMORY + "Buffer('CPU', 1 << 28, dtypes.uint8).allocate()",
    "to say so": NO_MORE_MEMORY
    + (
        "taken = ()\n"
        "for size in (1 << 20, 1 << 14, *range(1024, 0, -16)):\n"
        "    try:\n"
        "        while True: taken = (taken, bytes(size))\n"
        "    except MemoryError: pass\n"
        "took.append(taken)\n"
        "raise MemoryError"
    ),
}


def in_a_step(fault: str, flag: Path) -> tuple[str, ...]:
    """The engine's command, with a fault in the first step from the position on that `flag` names, which is removed."""
    change = (
        "import numpy, os, resource\n"
        "from tinygrad import dtypes\n"
        "from tinygrad.device import Buffer\n"
        "from engine import graphs\n"
        "from engine.kernels import native\n"
        "took, compute = [None], graphs.GraphedModel.step\n"
        "def fail():\n"
        f"{indent(fault, '    ')}\n"
        "def step(self, rows, wanted):\n"
        f"    flag = {str(flag)!r}\n"
        "    if os.path.exists(flag) and rows[0].position >= int(open(flag).read()):\n"
        "        os.unlink(flag)\n"
        "        fail()\n"
        "    return compute(self, rows, wanted)\n"
        "graphs.GraphedModel.step = step"
    )
    return spoiled(change)


def tiny(fault: str, flag: Path, **stall_s: float) -> Any:
    """A rig whose engine has that fault, and the kernels that other tests have compiled."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    return rig(
        load=False,
        within_s=240.0,
        devices=(CPU,),
        command=in_a_step(fault, flag),
        allowed=quick(stall_s=UNSTALLED | stall_s),
        cache_dir=str(CACHE),
    )


async def load(it: Rig) -> None:
    it.files.path = it.files.fetched_to = str(FAMILY / "model.gguf")
    await it.load(TINY)


async def text_of(it: Rig, task_id: str) -> str:
    await it.run(task_id, prompt=PROMPT, max_tokens=40, temperature=0.0)
    ended = await it.outcome(task_id)
    assert isinstance(ended, AttemptFinished), ended
    return ended.generated_text


async def failing(it: Rig, flag: Path) -> AttemptFailed:
    """How an attempt ends in which the fault comes."""
    await it.run("fails", prompt=OTHER, max_tokens=40, temperature=0.0)
    failed = await it.outcome("fails")
    assert isinstance(failed, AttemptFailed), failed
    assert failed.retryable
    assert not await trio.Path(flag).exists()
    return failed


async def serves_again(it: Rig, pid: int, start: int, text: str) -> None:
    """Another engine has taken its place, which loads the model and does the task."""
    back = await report_where(it, start, state=EngineState.READY, deaths=1)
    assert back.engine_pid != pid
    assert not alive(pid)
    await load(it)
    assert await text_of(it, "again") == text


@pytest.mark.parametrize(
    ("position", "limits", "phase"),
    [
        (0, ("idle", "prefill", "decode"), ""),  # in the phase of before, which is told once a second
        (PREFILL, ("prefill",), "prefill"),
        (DECODE, ("decode",), "decode"),
    ],
    ids=["first step", "prefill", "decode"],
)
async def test_a_step_that_does_not_return_is_ended(
    tmp_path: Path, position: int, limits: tuple[str, ...], phase: str
) -> None:
    flag = tmp_path / "position"
    async with tiny(HANG, flag, **dict.fromkeys(limits, STALLED_S)) as it:
        await load(it)
        assert await it.executor.count_tokens(TINY, {"prompt": PROMPT})  # its tokenizer is read
        text, pid, start = await text_of(it, "before"), it.pid(), len(it.sink.seen)
        await trio.Path(flag).write_text(str(position))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counts_while_it_hangs, it, flag)
            failed = await failing(it, flag)
        assert failed.code == "engine_died"
        assert "no sign of life" in failed.message
        assert f"in phase {phase}" in failed.message
        await serves_again(it, pid, start, text)


async def counts_while_it_hangs(it: Rig, flag: Path) -> None:
    """Its reader and its counter live, which is no sign of life of its device."""
    await rigs.until(lambda: not flag.exists())
    counted = await it.executor.count_tokens(TINY, {"prompt": PROMPT})
    assert counted is not None
    assert counted[0] > PREFILL


@pytest.mark.parametrize("shortage", SHORTAGES)
async def test_memory_that_ends_in_a_step_ends_the_engine(tmp_path: Path, shortage: str) -> None:
    flag = tmp_path / "position"
    async with tiny(SHORTAGES[shortage], flag) as it:
        await load(it)
        text, pid, start = await text_of(it, "before"), it.pid(), len(it.sink.seen)
        await trio.Path(flag).write_text(str(DECODE))
        failed = await failing(it, flag)
        assert failed.code in ("device_failed", "engine_died")
        dead = await report_where(it, start, state=EngineState.RESTARTING)
        assert "status 70" in dead.message
        await serves_again(it, pid, start, text)
