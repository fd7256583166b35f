"""`bitinglip simulate`: what it prints, writes and ends with. What it runs here is a stand-in with known outcomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from simulations import campaign, report
from simulations.campaign import Job, each_in_order
from simulations.errors import InvariantViolated, SimulatorError
from simulations.outcome import CLUSTER, Mark, Outcome
from simulations.scenario import Fault, Op, Scenario
from tests.cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
Simulated = Callable[[Job], Outcome]


def scenario(seed: int) -> Scenario:
    return Scenario(
        seed=seed,
        faults=tuple(
            Fault(at_s=float(i), kind="power_loss", targets=(f"h{i % 5 + 1}",), for_s=4.0) for i in range(20)
        ),
        ops=(
            Op(at_s=1.0, kind="submit", peer="h1", model="m0", tokens=8, key="once"),
            Op(at_s=2.0, kind="cancel", peer="h2", task=0),
        ),
    )


def stand_in(job: Job) -> Outcome:
    """Seeds that end in 7 fail while h3 loses power at 2 s; seed 99 is beyond the simulator."""
    day = job.scenario or scenario(job.seed)
    outcome = Outcome(day, virtual_s=120.0, real_s=0.5, steps=10, trace_hash=f"hash-{day.seed}-{job.bug}")
    outcome.checks = Counter({"one leader": 40})
    outcome.faults = Counter(fault.kind for fault in day.faults)
    outcome.timeline = [Mark(0.0, 120.0, "h1", "leader"), Mark(2.0, None, CLUSTER, "event", "a new leader")]
    if job.seed == 99:
        raise SimulatorError("the disk model lost its head")
    if job.seed % 10 == 7 and any(fault.at_s == 2.0 for fault in day.faults):
        outcome.failure = InvariantViolated("an acknowledged task is never lost", "task-1 is gone", 3.5)
    return outcome


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(campaign, "_run", stand_in)
    monkeypatch.setattr(report, "declared", lambda level: ["power_loss", "torn_write"])
    monkeypatch.chdir(tmp_path)


def test_a_series_that_held(run: Run) -> None:
    ran = run("simulate", "--seeds", "5", "--workers", "1")
    assert ran.code == 0
    assert ran.err == ""
    assert "seeds run           5 at the world level" in ran.out
    assert "virtual time        0.17 hours" in ran.out
    assert "faults injected     100 of 1 kinds" in ran.out
    assert "invariants checked  200 times" in ran.out
    assert "held                5 of 5" in ran.out
    assert "power_loss    100" in ran.out
    assert "sometimes, but not in these runs (1): torn_write" in ran.out


def test_a_failure_prints_its_shortest_history_and_how_to_see_it_again(run: Run, tmp_path: Path) -> None:
    ran = run("simulate", "--seeds", "5", "--first", "15", "--workers", "1")
    assert ran.code == 1
    assert "held                4 of 5" in ran.out
    tail = ran.out[ran.out.index("seed 17: ") :].splitlines()
    assert tail[0] == "seed 17: the product is at fault"
    assert tail[1] == "  an acknowledged task is never lost: task-1 is gone"
    assert tail[2].startswith("  shortest history found (")
    assert tail[2].endswith("3 hosts, 1 faults, 0 operations in 3.125 s")
    assert tail[3] == "      2.000 s  fault power_loss  h3  for 0.125 s"
    assert tail[4] == "      3.500 s  an acknowledged task is never lost: task-1 is gone"
    assert tail[6:] == [
        "  replay  bitinglip simulate --replay world-seed-17.trace.json",
        "  whole   bitinglip simulate --level world --seed 17",
    ]
    again = run("simulate", "--replay", "world-seed-17.trace.json")
    assert again.code == 1
    assert "found     an acknowledged task is never lost: task-1 is gone" in again.out
    assert "hash-17-, the same" in again.out


def test_only_some_failures_are_shrunk(run: Run, tmp_path: Path) -> None:
    ran = run("simulate", "--seeds", "50", "--workers", "1", "--report", "out")
    assert ran.code == 1
    names = sorted(path.name for path in (tmp_path / "out").glob("*.json"))
    assert names == ["world-seed-17.trace.json", "world-seed-27.trace.json", "world-seed-7.trace.json"]
    assert "seed 37 failed: [3.500 s] an acknowledged task is never lost: task-1 is gone" in ran.out
    assert "bitinglip simulate --level world --seed 37" in ran.out


def test_the_simulators_faults_are_its_own(run: Run) -> None:
    ran = run("simulate", "--seed", "99")
    assert ran.code == 3
    assert "the simulator is at fault, not the product\nthe disk model lost its head" in ran.err
    assert "the product is at fault" not in ran.out


def test_whatever_a_run_raises_is_the_simulators(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(job: Job) -> Outcome:
        return {}[job.seed]

    monkeypatch.setattr(campaign, "_run", raises)
    ran = run("simulate", "--seeds", "3", "--workers", "1")
    assert ran.code == 3
    assert "KeyError: 0" in ran.err


def test_a_violation_counts_more_than_a_broken_run(run: Run) -> None:
    assert run("simulate", "--seeds", "3", "--first", "97", "--workers", "1").code == 1


def test_one_seed_shows_its_hash(run: Run) -> None:
    assert "trace hash  hash-3-" in run("simulate", "--seed", "3").out


def test_a_scenario_from_a_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []

    def remember(job: Job) -> Outcome:
        seen.append(job)
        return stand_in(job)

    monkeypatch.setattr(campaign, "_run", remember)
    monkeypatch.setattr("simulations.scenario_file._world_kinds", lambda: {"power_loss": "peer"})
    file = tmp_path / "day.yaml"
    file.write_text("hosts: 3\nseed: 4\nduration: 30s\nfaults:\n- {at: 9s, kind: power_loss, targets: h1}\n")
    fixed = Scenario(
        seed=4, hosts=3, fault_s=30.0, faults=(Fault(at_s=9, kind="power_loss", targets=("h1",)),)
    )
    assert run("simulate", "--scenario", str(file)).code == 0
    assert run("simulate", "--scenario", str(file), "--seeds", "2", "--workers", "1").code == 0
    assert [job.scenario for job in seen] == [fixed, replace(fixed, seed=0), replace(fixed, seed=1)]
    file.write_text("hosts: 3\nduration: 30s\nfaults:\n- {at: 9s, kind: power_los}\n")
    ran = run("simulate", "--scenario", str(file))
    assert ran.code == 2
    assert f"bitinglip: {file}:4: `faults[1].kind`: there is no fault `power_los`" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", "1", "--seeds", "2"), "--seed and --seeds do not go together"),
        (("--replay", "x", "--bugs"), "--replay and --bugs do not go together"),
        (("--replay", "x", "--seed", "1"), "--seed and --replay do not go together"),
        (("--scenario", "x", "--hosts", "3"), "--hosts: --scenario says it already"),
        (("--scenario", "x", "--level", "policy"), "--scenario is for --level world"),
        (("--hosts", "201"), "--hosts: at most 200 at the world level; try --level policy"),
        (("--hours", "0"), "Invalid value for '--hours'"),
        (("--bug", "requeue_keeps_atempt"), "did you mean `requeue_keeps_attempt`?"),
        (("--replay", "none.json"), "the trace none.json cannot be read: No such file"),
        (("--scenario", "none.yaml"), "the scenario none.yaml cannot be read: No such file"),
        (("--rehearse", "none.yaml"), "the rehearsal none.yaml cannot be read: No such file"),
    ],
)
def test_wrong_usage(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(campaign, "known_bugs", lambda level: ["requeue_keeps_attempt"])
    ran = run("simulate", *arguments)
    assert ran.code == 2
    assert words in ran.err


def test_an_installation_without_the_simulator(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("simulations")]:
        monkeypatch.setitem(sys.modules, name, None)
    ran = run("simulate")
    assert ran.code == 1
    assert "this installation lacks the simulator\n  install bitinglip again" in ran.err


def test_the_bug_bank(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def bugged(job: Job) -> Outcome:
        return (
            stand_in(replace_seed(job, job.seed + 5))
            if job.bug == "found"
            else stand_in(job.__class__("world", 1))
        )

    monkeypatch.setattr(campaign, "_run", bugged)
    monkeypatch.setattr(campaign, "known_bugs", lambda level: ["found", "missed"])
    ran = run("simulate", "--bugs", "--workers", "1")
    assert ran.code == 1
    assert "| found | 3 | an acknowledged task is never lost |" in ran.out
    assert "| missed | not in 200 |  |" in ran.out
    assert "found 1 of 2, each within 200 seeds" in ran.out
    assert run("simulate", "--bugs", "--bug", "found", "--workers", "1").code == 0


def replace_seed(job: Job, seed: int) -> Job:
    return Job(job.level, seed, bug=job.bug)


def test_help_does_not_load_the_simulator() -> None:
    code = (
        "import sys; from peer.cli import main; main(['--help']); main(['simulate', '--help']);"
        "print([name for name in sys.modules if name.startswith(('simulations', 'trio', 'yaml'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------------ processes


def late(item: int) -> tuple[int, int]:
    """The first ones take longest."""
    time.sleep(max(0.0, 0.3 - item / 10))
    return item, os.getpid()


def test_outcomes_come_in_order_whatever_the_processes_do() -> None:
    found = list(each_in_order(late, range(9), 2))
    assert [item for item, _ in found] == list(range(9))
    assert len({process for _, process in found}) == 2
    assert os.getpid() not in {process for _, process in found}


def test_one_worker_is_this_process() -> None:
    assert list(each_in_order(late, range(5, 7), 1)) == [(5, os.getpid()), (6, os.getpid())]


def test_failures_cross_processes() -> None:
    (found,) = [each for each in each_in_order(failing, [1, 2], 2) if each.seed == 2]
    assert found.failure is not None
    assert (found.failure.check, found.failure.message, found.failure.at_s) == ("one leader", "two", 1.5)


def failing(seed: int) -> Outcome:
    return Outcome(Scenario(seed=seed), failure=InvariantViolated("one leader", "two", 1.5))


def test_interrupted_it_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "series.py"
    script.write_text(
        "import signal, sys, time\n"
        # Whoever starts tests in the background lets them inherit that SIGINT is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from simulations import campaign\n"
        "from tests.cli import test_simulate\n"
        "from peer.cli import main\n"
        "if __name__ == '__main__':\n"
        "    campaign.perform = test_simulate.endless\n"
        "    sys.exit(main(['simulate', '--seeds', '8', '--workers', '2']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIMULATED_PIDS": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while len(children := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted"
    assert "seeds run           0" in out
    for child in children:
        until = time.monotonic() + 10
        while alive(int(child.stem)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(int(child.stem))


def endless(job: Any) -> Outcome:
    (Path(os.environ["SIMULATED_PIDS"]) / f"{os.getpid()}.pid").touch()
    time.sleep(60)
    raise AssertionError


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
