"""The report's page: well-formed, self-contained, bounded, with a row for each peer."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from simulations import report
from simulations.campaign import Broken, Job, Shrunk
from simulations.errors import InvariantViolated
from simulations.html import PAGE_BYTES_MAX, write_report
from simulations.outcome import CLUSTER, Mark, Outcome
from simulations.picture import ROWS_MAX, task_counts
from simulations.report import Totals
from simulations.scenario import Fault, Op, Scenario

SVG = "{http://www.w3.org/1999/xhtml}"


def made_up(hosts: int = 5, seed: int = 17, marks: int = 200, failing: bool = True) -> Outcome:
    """A run with all that a timeline may have."""
    rng = random.Random(seed)
    peers = [f"h{n}" for n in range(1, hosts + 1)]
    scenario = Scenario(
        seed=seed,
        hosts=hosts,
        fault_s=90.0,
        faults=(Fault(at_s=20.0, kind="power_loss", targets=("h1",), for_s=15.0),),
        ops=(Op(at_s=19.0, kind="submit", peer="h2", model="m0", tokens=8),),
    )
    outcome = Outcome(scenario, virtual_s=140.0, real_s=1.2, steps=12_000, trace_hash="ab" * 16)
    timeline = [
        Mark(1.2, 20.0, "h1", "leader", "epoch 1"),
        Mark(20.0, 35.0, "h1", "down", "power_loss"),
        Mark(24.1, 61.0, "h2", "leader", "epoch 2"),
        Mark(50.0, 64.0, "h2", "partition", "cut from h3 & h4"),
        Mark(40.0, 47.0, "h4", "frozen", "SIGSTOP"),
        Mark(64.5, 140.0, "h3", "leader", "epoch 3"),
        Mark(24.1, None, CLUSTER, "event", "<a new leader>"),
    ]
    for _ in range(marks):
        at = rng.uniform(0, 90)
        until = at + rng.expovariate(0.5) if rng.random() < 0.5 else None
        timeline.append(
            Mark(at, until, rng.choice([*peers, CLUSTER]), "fault", rng.choice(["slow_disk", "loss"]))
        )
        outcome.faults["slow_disk"] += 1
        arrives = rng.uniform(0, 90)
        runs, ends = arrives + rng.expovariate(0.5), arrives + rng.uniform(3, 20)
        name = f"#{len(timeline)}"
        for moment, state in ((arrives, "queued"), (min(runs, ends), "running"), (ends, "completed")):
            timeline.append(Mark(moment, None, CLUSTER, "task", f"{state} {name}"))
    outcome.timeline = timeline
    outcome.checks = Counter(
        {"one committing leader per epoch": 4_000, "an acknowledged task is never lost": 31}
    )
    outcome.sometimes = Counter({"lease expired": 3})
    outcome.trace_tail = ("64.500 h3 leads", "70.100 h2 commits <again>")
    if failing:
        outcome.failure = InvariantViolated("one committing leader per epoch", "h2 & h3 in epoch 3", 70.1)
    return outcome


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "declared", lambda level: ["slow_disk", "torn_write"])


def page(
    tmp_path: Path, *outcomes: Outcome | Broken, shrunk: tuple[Shrunk, ...] = ()
) -> tuple[str, ElementTree.Element]:
    totals = Totals("world", wall_s=3.0)
    for outcome in outcomes:
        totals.add(outcome)
    path = write_report(totals, tmp_path / "out", shrunk)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["index.html"]
    text = path.read_text(encoding="utf-8")
    return text, ElementTree.fromstring(text)


def words(root: ElementTree.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def test_a_failure_is_shown_with_its_picture(tmp_path: Path) -> None:
    failed, least = made_up(), made_up(marks=0)
    text, root = page(tmp_path, made_up(seed=3, failing=False), failed, shrunk=(Shrunk(least, 40, False),))
    pictures = root.findall(f".//{SVG}svg[@class='timeline']")
    assert len(pictures) == 2  # the shortest history's, and the whole run's
    for picture in pictures:
        labels = [each.text for each in picture.iter(f"{SVG}text") if each.get("class") == "label"]
        assert labels[:6] == [CLUSTER, "h1", "h2", "h3", "h4", "h5"]
        title, description = picture.find(f"{SVG}title"), picture.find(f"{SVG}desc")
        assert title is not None
        assert description is not None
        assert picture.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert "failed at 70.100 s: one committing leader per epoch" in (description.text or "")
        kinds = {
            (each.get("class") or "").removeprefix("mark ") for each in picture.iter() if each.get("data-a")
        }
        assert {"leader", "down", "partition", "frozen", "event"} <= kinds
        assert any(
            each.get("class") == "line failure" or each.get("class") == "failure" for each in picture.iter()
        )
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    shown = words(root)
    assert "1 of 2 runs failed" in shown
    assert "h2 & h3 in epoch 3" in shown
    assert "20.000 s fault power_loss h1 for 15 s" in shown
    assert "h2 commits <again>" in shown
    assert "torn_write" in shown


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    text, root = page(tmp_path, made_up())
    assert re.findall(r"https?://[^\"\s]+", text) == ["http://www.w3.org/1999/xhtml"]
    assert not [each for each in root.iter() if each.get("src") or each.get("href")]
    assert "@import" not in text
    assert "url(" not in text.replace("url(#c", "")


def test_marks_say_what_they_are(tmp_path: Path) -> None:
    _, root = page(tmp_path, made_up())
    titles = [each.text or "" for each in root.iter(f"{SVG}title")]
    assert "h1 leads, 1.200 s to 20.000 s: epoch 1" in titles
    assert "h2 is cut off, 50.000 s to 64.000 s: cut from h3 & h4" in titles
    assert "cluster an event, 24.100 s: <a new leader>" in titles


def test_without_a_failure_the_most_eventful_run_is_shown(tmp_path: Path) -> None:
    calm = made_up(seed=1, marks=2, failing=False)
    busy = made_up(seed=2, marks=30, failing=False)
    _, root = page(tmp_path, calm, busy, calm)
    assert "all of 3 held" in words(root)
    assert "The most eventful run: seed 2" in words(root)
    assert len(root.findall(f".//{SVG}svg[@class='timeline']")) == 1


def test_a_level_without_timelines(tmp_path: Path) -> None:
    outcome = made_up(failing=False)
    outcome.timeline = []
    assert "No timeline" in words(page(tmp_path, outcome)[1])


def test_the_simulators_faults_are_told_apart(tmp_path: Path) -> None:
    shown = words(page(tmp_path, made_up(failing=False), Broken(Job("world", 9), "KeyError: <x>"))[1])
    assert "The simulator is at fault, not the product: seed 9" in shown
    assert "KeyError: <x>" in shown


def test_a_huge_run_stays_a_small_page(tmp_path: Path) -> None:
    text, root = page(tmp_path, *(made_up(hosts=200, seed=seed, marks=30_000) for seed in (1, 2, 3)))
    assert len(text.encode()) <= PAGE_BYTES_MAX
    pictures = root.findall(f".//{SVG}svg[@class='timeline']")
    assert pictures
    labels = [each for each in pictures[0].iter(f"{SVG}text") if each.get("class") == "label"]
    assert len(labels) == ROWS_MAX + 1


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    assert page(tmp_path / "a", made_up())[0] == page(tmp_path / "b", made_up())[0]


def test_tasks_are_counted_from_one_state_to_the_next() -> None:
    steps = [
        (1.0, "queued #1"), (2.0, "queued #2"), (3.0, "running #1"), (4.0, "queued #1"), (5.0, "running #2"),
        (6.0, "completed #2"), (7.0, "cancelled #1"),
    ]  # fmt: skip
    live, running = task_counts([Mark(at, None, CLUSTER, "task", text) for at, text in reversed(steps)])
    assert live == [(1.0, 1), (2.0, 2), (6.0, 1), (7.0, 0)]
    assert running == [(1.0, 0), (3.0, 1), (4.0, 0), (5.0, 1), (6.0, 0)]
    nameless = [(1.0, "queued #1"), (2.0, "queued #2"), (3.0, "completed"), (4.0, "cancelled")]
    live, running = task_counts([Mark(at, None, CLUSTER, "task", text) for at, text in nameless])
    assert live == [(1.0, 1), (2.0, 2), (3.0, 1), (4.0, 0)]
