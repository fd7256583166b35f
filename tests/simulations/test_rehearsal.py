"""Rehearsals: plans from YAML, engines at measured speeds, and figures that can be checked by hand."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from peer.errors import ConfigError
from peer.state.model import Model
from peer.state.order import AttemptFinished, RunAttempt
from peer.state.task import Status
from simulations.policy.heap import WALL_BASE_S, Heap
from simulations.rehearsal import command, result
from simulations.rehearsal.cluster import Rehearsed, rehearse
from simulations.rehearsal.engines import START_S, Engine
from simulations.rehearsal.plan import FAILOVER_S, PROFILE, Host, Plan, Speed, pieces, read_plan, read_profile

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = """
models:
  tiny: {source: "file:/models/tiny.gguf", family: llama, memory_bytes: 1GB, slots: 1}
"""
SPEEDS = """
devices:
  card:
    tiny: {load: 2s, tokens_per_s: {1: 10}}
"""
PLAN = """
about: two hosts
seed: 5
from: "12:00"
until: "12:20"
catalogue: models.yaml
profile: speeds.yaml
leader: h1
hosts:
  - {count: 1, device: card, memory: 4GB}
  - {count: 1, device: card, gpus: 2, memory: 2GB}
placement: {tiny: 3}
load:
  - {model: tiny, per_hour: 600, tokens: 100, timeout: 10m}
events:
  - {at: "12:10", kind: power_loss, hosts: h2, for: 5m}
"""


def written(folder: Path, plan: str = PLAN) -> Path:
    (folder / "models.yaml").write_text(CATALOGUE)
    (folder / "speeds.yaml").write_text(SPEEDS)
    path = folder / "plan.yaml"
    path.write_text(textwrap.dedent(plan))
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return read_plan(written(tmp_path))


# ------------------------------------------------------------------------------------------------ the plan


def test_a_plan_is_read(plan: Plan) -> None:
    assert plan.hosts == (Host("h1", "card", 1, 4_000_000_000), Host("h2", "card", 2, 2_000_000_000))
    assert (plan.from_s, plan.until_s, plan.failover_s) == (43_200.0, 44_400.0, FAILOVER_S)
    assert plan.speeds == {("card", "tiny"): Speed(2.0, ((1, 10.0),))}
    assert [event.hosts for event in plan.events] == [("h2",)]


def test_the_load_of_each_hour(plan: Plan) -> None:
    steps = ((36_000.0, 100.0), (43_800.0, 0.0), (44_100.0, 300.0))
    stream = replace(plan.load[0], per_hour=steps)
    assert pieces(stream, plan) == [(43_200.0, 43_800.0, 100.0), (44_100.0, 44_400.0, 300.0)]
    early = replace(plan.load[0], per_hour=((43_800.0, 60.0),))  # before it, the evening's rate counts
    assert pieces(early, plan) == [(43_200.0, 43_800.0, 60.0), (43_800.0, 44_400.0, 60.0)]


def test_the_example_and_the_measured_profile_are_right() -> None:
    example = read_plan(ROOT / "configs" / "rehearsal.yaml")
    assert len(example.hosts) == 40
    assert [event.hosts for event in example.events] == [("h7",)]
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    for speed in read_profile(PROFILE).values():
        for _, rate in speed.tokens_per_s:
            assert f" {rate:g} " in benchmarks  # nothing that nobody has measured


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ('from: "12:00"', 'from: "25:00"', ":3: `from`: `25:00` is not a time of day like 12:00"),
        ('until: "12:20"', 'until: "11:00"', ":4: `until`: must be later than `from`"),
        ("hosts: h2", "hosts: h4", ":15: `events[1].hosts[1]`: there is no host `h4`; they are h1 to h2"),
        (
            "placement: {tiny: 3}",
            "placement: {tny: 3}",
            "the catalogue has no model `tny`; did you mean `tiny`?",
        ),
        ("placement: {tiny: 3}", "placement: {tiny: 9}", ":11: `placement`: 9 of tiny, and 3 devices"),
        (
            "{model: tiny, per",
            "{model: tinny, per",
            ":12: `load`: `tinny` is not in `placement`; did you mean `tiny`?",
        ),
        ("gpus: 2", "gpu: 2", ":10: unknown key `hosts[2].gpu`; did you mean `gpus`?"),
        ("power_loss", "power_lost", "not `power_lost`; did you mean `power_loss`?"),
        ('at: "12:10"', 'at: "13:10"', ":14: `events`: every event must lie within `from` and `until`"),
        ("per_hour: 600", 'per_hour: {"8": 1}', "`8` is not a time of day like 12:00"),
        ("per_hour: 600", "per_hour: 9000000", "at most 2,000,000 are rehearsed"),
        ("leader: h1", "profile: none.yaml", "duplicate key `profile`"),
    ],
)
def test_mistakes_have_a_line(tmp_path: Path, before: str, after: str, line: str) -> None:
    assert before in PLAN
    text = PLAN.lstrip("\n").replace(before, after)
    with pytest.raises(ConfigError) as caught:
        read_plan(written(tmp_path, text))
    assert line in str(caught.value)


def test_what_nobody_has_measured_is_not_made_up(tmp_path: Path) -> None:
    path = written(tmp_path, PLAN.replace("device: card, gpus", "device: MI300X, gpus"))
    with pytest.raises(ConfigError, match="nobody has measured tiny on MI300X: the profile has tiny on card"):
        read_plan(path)


# ------------------------------------------------------------------------------------------------ the engine


def test_speeds_between_and_beyond_what_was_measured() -> None:
    speed = Speed(1.0, ((1, 20.0), (5, 60.0)))
    assert [speed.together(runs) for runs in (1, 2, 3, 5, 50)] == [20.0, 30.0, 40.0, 60.0, 60.0]


class Bench:
    """One engine, and a peer that keeps what it is told."""

    def __init__(self, speed: Speed) -> None:
        self.heap = Heap(0)
        self.told: list[tuple[float, Any]] = []
        peer: Any = SimpleNamespace(
            world=SimpleNamespace(heap=self.heap),
            peer_id="h1",
            touch=lambda worker: None,
            report=lambda report: self.told.append((self.heap.now, report)),
            wall=lambda: self.heap.now,
        )
        model = Model(name="tiny", source="builtin:echo", family="echo", memory_bytes=9, slots=8)
        self.engine = Engine(peer, "h1-gpu0", Host("h1", "card", 1, 10), {("card", "tiny"): speed})
        self.engine.start()
        self.engine.load(model)

    def run(self, name: str, tokens: int) -> None:
        self.engine.start_attempt(
            RunAttempt(
                epoch=1,
                worker_id="h1-gpu0",
                task_id=name,
                attempt=1,
                model_name="tiny",
                task_type="text_generation",
                parameters={"max_tokens": tokens},
            )
        )

    def finished(self) -> dict[str, float]:
        while self.heap.step():
            pass
        return {
            report.task_id: pytest.approx(at)
            for at, report in self.told
            if isinstance(report, AttemptFinished)
        }


def test_runs_share_a_device() -> None:
    """Alone 10 tokens/s, two together 16. A has 50 tokens left when B comes; each gets 8 then, and B 10 again."""
    bench = Bench(Speed(2.0, ((1, 10.0), (2, 16.0))))
    bench.heap.at(10.0, bench.run, "a", 100)
    bench.heap.at(15.0, bench.run, "b", 100)
    assert bench.finished() == {"a": 15 + 50 / 8, "b": 15 + 50 / 8 + 50 / 10}
    assert bench.engine.worked_s() == pytest.approx(50 / 8 + 50 / 10 + 5)


def test_a_run_that_is_stopped_gives_its_part_back() -> None:
    bench = Bench(Speed(2.0, ((1, 10.0), (2, 16.0))))
    bench.heap.at(10.0, bench.run, "a", 100)
    bench.heap.at(10.0, bench.run, "b", 100)
    bench.heap.at(15.0, bench.engine.stop_attempt, "b/1")
    assert bench.finished() == {"a": 15 + 60 / 10}


def test_nothing_runs_before_its_model_is_loaded() -> None:
    bench = Bench(Speed(2.0, ((1, 10.0),)))
    bench.heap.at(START_S + 1.9, bench.run, "early", 10)
    bench.heap.at(START_S + 2.1, bench.run, "late", 10)
    assert bench.finished() == {"late": START_S + 3.1}


def test_without_power_nothing_is_left() -> None:
    bench = Bench(Speed(2.0, ((1, 10.0),)))
    bench.heap.at(10.0, bench.run, "a", 100)
    bench.heap.at(12.0, bench.engine.vanish)
    assert bench.finished() == {}
    assert bench.engine.worked_s() == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------ the cluster


def both(plan: Plan) -> tuple[Rehearsed, Rehearsed]:
    return rehearse(plan, with_events=False), rehearse(plan, with_events=True)


def test_a_calm_day_is_what_arithmetic_says(plan: Plan) -> None:
    """Three devices, ten seconds a task, a task every six: nobody waits long, every run takes its ten seconds."""
    ran = rehearse(plan, with_events=False)
    found = result.figures(plan, ran, with_events=False)
    assert found.submitted == found.completed == len(ran.tasks)
    assert 160 < found.submitted < 240
    assert (found.failed, found.refused, found.requeued) == (0, 0, 0)
    assert found.answer_s is not None
    assert found.wait_s is not None
    assert found.answer_s[0] == pytest.approx(10.0, abs=0.1)
    for task in ran.tasks:
        assert task.completed_at is not None
        assert task.started_at is not None
        assert task.completed_at - task.started_at == pytest.approx(10.0, abs=0.05)
    assert found.utilisation == pytest.approx(found.submitted * 10 / (3 * 1200), rel=0.03)
    assert (found.noticed_s, found.running_again_s, found.gap_s) == (None, None, None)


def test_a_host_that_loses_power(plan: Plan) -> None:
    calm, bad = both(plan)
    assert [task.created_at for task in bad.tasks[:50]] == [task.created_at for task in calm.tasks[:50]]
    before = result.figures(plan, calm, with_events=False)
    after = result.figures(plan, bad, with_events=True)
    assert after.submitted == before.submitted == after.completed
    assert 1 <= after.requeued <= 2  # what its two devices ran
    assert after.noticed_s is not None
    assert after.running_again_s is not None
    assert 0.0 < after.noticed_s < 6.5
    assert after.noticed_s < after.running_again_s
    assert after.gap_s == 0.0  # h1 leads
    assert before.wait_after_s is not None
    assert after.wait_after_s is not None
    assert after.wait_after_s[2] > before.wait_after_s[2] + 10  # one device for the work of three
    assert after.utilisation != before.utilisation


def test_the_leaders_host_loses_power(plan: Plan) -> None:
    plan = replace(plan, leader="h2", failover_s=20.0)
    calm, bad = both(plan)
    found = result.figures(plan, bad, with_events=True)
    assert found.gap_s == 20.0
    assert found.submitted == found.completed == len(calm.tasks)
    event = bad.start_wall + plan.events[0].at_s - plan.from_s
    assert not [task for task in bad.tasks if event < (task.assigned_at or 0.0) < event + 20.0]
    assert [task for task in bad.tasks if event < (task.assigned_at or 0.0) < event + 40.0]


def test_a_host_that_stays_away(plan: Plan) -> None:
    plan = replace(plan, events=(replace(plan.events[0], for_s=0.0),))
    _, bad = both(plan)
    event = bad.start_wall + plan.events[0].at_s - plan.from_s
    late = [task for task in bad.tasks if (task.started_at or 0.0) > event]
    assert late
    assert {task.worker_id for task in late} == {"h1-gpu0"}


def test_the_same_plan_gives_the_same_figures(plan: Plan) -> None:
    first, second = rehearse(plan, with_events=True), rehearse(plan, with_events=True)
    assert first.tasks == second.tasks
    assert first.events == second.events


def test_what_does_not_fit_is_the_plans_mistake(plan: Plan) -> None:
    small = tuple(replace(host, memory_bytes=500_000_000) for host in plan.hosts)
    with pytest.raises(ConfigError, match=r"the placement is refused: .*tiny"):
        rehearse(replace(plan, hosts=small), with_events=False)


# ------------------------------------------------------------------------------------------------ figures


def test_percentiles_are_nearest_ranks() -> None:
    assert result.percentiles(range(1, 101)) == (50, 95, 99)
    assert result.percentiles([7.0]) == (7.0, 7.0, 7.0)
    assert result.percentiles([]) is None


def test_how_many_wait(plan: Plan) -> None:
    """Steps of five seconds: one waits from 2 s to 12 s, another from 7 s on for good."""
    ran = rehearse(replace(plan, load=()), with_events=False)
    assert ran.tasks == ()
    task = next(iter(rehearse(plan, with_events=False).tasks))
    at = WALL_BASE_S
    tasks = (
        _changed(task, created_at=at + 2, started_at=at + 12, status=Status.COMPLETED),
        _changed(task, created_at=at + 7, started_at=None, completed_at=None, status=Status.QUEUED),
    )
    curve = result.waiting(plan, replace(ran, tasks=tasks, start_wall=at))
    assert curve[:5] == [(0.0, 0.0), (5.0, 1.0), (10.0, 2.0), (15.0, 1.0), (20.0, 1.0)]
    longest = result.longest_waits(plan, replace(ran, tasks=tasks, start_wall=at))
    assert longest[:3] == [(0.0, 0.0), (5.0, 10.0), (10.0, 0.0)]


def _changed(task: Any, **fields: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(task, **fields)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_both_sides_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "each_in_order", lambda call, items, workers: [call(item) for item in items])
    assert command.main(written(tmp_path), tmp_path / "out") == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split()[-2:] for line in printed.splitlines() if "  " in line}
    assert lines["tasks submitted"] == lines["tasks completed"]
    assert lines["tasks queued again"][0] == "0"
    assert "12:10  h2: no power for 5 min" in printed
    assert "tiny on card: 10 at 1 at once (tokens/s in all), loaded in 2 s" in printed
    root = ElementTree.fromstring((tmp_path / "out" / "index.html").read_text())
    text = " ".join("".join(root.itertext()).split())
    assert "Longest queue wait, by the time of submission" in text
    assert "queue wait, p99" in text


def test_the_products_fault_is_not_the_rehearsals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.errors import InvariantViolated, SimulatorError

    path = written(tmp_path)
    for error, code in ((InvariantViolated("one result per task", "two"), 1), (SimulatorError("oh"), 3)):

        def fails(call: Any, items: Any, workers: int, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(command, "each_in_order", fails)
        assert command.main(path, None) == code
    captured = capsys.readouterr()
    assert "the product is at fault: [0.000 s] one result per task: two" in captured.out
    assert "the rehearsal itself is at fault, not the product: oh" in captured.err
